"Every callback keeps the house contract, as `check_estimator` does for scikit-learn's estimators"
import importlib, inspect, pickle
from copy import deepcopy
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from torch import nn

root = Path(__file__).parent.parent
mods = ['.'.join(f.relative_to(root).with_suffix('').parts) for f in sorted((root/'callbacks').rglob('[!_]*.py'))]
public = [getattr(m, o) for m in map(importlib.import_module, mods) for o in m.__all__]
cbs = [o for o in public if inspect.isclass(o) and issubclass(o, Callback)]
each = pytest.mark.parametrize('cls', cbs, ids=lambda o: o.__name__)

def learner(cb=None):
    "A tiny image classifier on random data, the same every time"
    torch.manual_seed(0)
    items = list(zip(torch.rand(24,3,8,8), torch.randint(0, 3, (24,))))
    dls = DataLoaders.from_dsets(items[:16], items[16:], bs=8, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cb)

def fit(learn, n=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, .01)
    return learn

def layout(m): return [type(o) for o in m.modules()],[o for o in vars(m) if o!='training'],list(m.state_dict())

def test_found(): assert {'Mix','EMA','Precision','Checkpoint','ProgressiveResize'} <= {o.__name__ for o in cbs}

@each
def test_defaults(cls):
    "It works with its defaults, pickles before and after a fit, and trains every group"
    learn = learner(cls())
    assert type(pickle.loads(pickle.dumps(cls()))) is cls
    before = [o.detach().clone() for o in learn.model.parameters()]
    fit(learn)
    assert learn.epoch==1 and not any(torch.equal(a, b) for a,b in zip(before[-2:], list(learn.model.parameters())[-2:]))
    assert all(o.isfinite().all() for o in learn.model.parameters())
    cb = pickle.loads(pickle.dumps(learn.cbs[-1]))
    assert isinstance(cb, Callback)

@each
def test_leaves_no_trace(cls):
    "The `Learner` is afterwards as it was: model, loss, optimizer function, callbacks"
    learn = learner(cls())
    model,loss,opt,cbs,was = learn.model,learn.loss_func,learn.opt_func,set(map(type, learn.cbs)),layout(learn.model)
    fit(learn)
    assert learn.model is model and learn.loss_func is loss and learn.opt_func is opt
    assert set(map(type, learn.cbs))==cbs and layout(model)==was and all(p.requires_grad for p in model.parameters())
    assert not any(k for m in model.modules() for k in (m._forward_hooks, m._forward_pre_hooks))

@each
def test_inference(cls):
    "After a fit it lets the `Learner` validate and predict, as the model alone would unless it says `changes_inference`"
    learn = fit(learner(cls()))
    files = {f:f.stat().st_mtime_ns for f in Path().rglob('*')}
    with learn.no_bar():
        learn.validate()
        a = learn.get_preds()[0]
    assert {f:f.stat().st_mtime_ns for f in Path().rglob('*')}==files
    learn.remove_cb(cls)
    with learn.no_bar(): b = learn.get_preds()[0]
    if getattr(cls, 'changes_inference', False): assert a.shape==b.shape and a.isfinite().all()
    else: assert torch.equal(a, b)

@each
def test_twice(cls):
    "A second fit of one `Learner` begins like the first"
    learn = fit(learner(cls()))
    fit(learn, 1)
    assert learn.n_epoch==1 and all(o.isfinite().all() for o in learn.model.parameters())

@each
def test_state(cls):
    "What it remembers is plain, and another one takes it"
    if not hasattr(cls, 'state_dict'): pytest.skip('keeps no state')
    cb = fit(learner(cls())).cbs[-1]
    cb = next(o for o in [cb, *cb.learn.cbs] if type(o) is cls)
    torch.save(cb.state_dict(), 'state')
    state = torch.load('state', weights_only=True)
    other = cls()
    learner(other)
    other.load_state_dict(deepcopy(state))
    again = other.state_dict()
    assert again.keys()==state.keys()
