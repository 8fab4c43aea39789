"The rate that is looked for: from scratch and with weights, with Adam and with SGD, on few pictures and on many"
import numpy as np, pytest, torch
from functools import partial
from callbacks.finder import below_minimum, suggest_lr
from callbacks.optim import adamw, sgd
from recipes import animal
from recipes.recipe import fitting
from recipes.recipe import finding
from types import SimpleNamespace
from recipes.recipe.finding import found_lr, lr_range, n_tried

tiny = dict(arch='test_resnet', pretrained=False, size=24, resize=(), bs=32, folds=2, precision='fp32')

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def test_a_third_of_the_best():
    lrs = torch.logspace(-7, 1, 100)
    losses = (lrs.log10()+2)**2
    assert below_minimum(lrs, losses, 100)[0]==pytest.approx(1e-2/3, rel=.1)
    assert suggest_lr(lrs.tolist(), losses.tolist(), suggest=below_minimum)[0]==pytest.approx(1e-2/3, rel=.1)

@pytest.mark.parametrize('opt, scratch, res', [(adamw,False,(1e-5,1e-2)),(adamw,True,(1e-3,1e-2)),(sgd,False,(1e-3,1.)),(partial(sgd, mom=.9),True,(.01,1.))])
def test_range(opt, scratch, res): assert np.allclose(lr_range(opt, scratch), res)

def test_tried():
    counts = [n_tried(o) for o in range(1, 3000, 7)]
    assert min(counts)==50 and max(counts)==100 and counts==sorted(counts)

@pytest.mark.parametrize('scratch', [True,False])
def test_within(scratch):
    learn = animal.learner(**tiny)
    lr = found_lr(learn, learn.recipe, scratch)
    low,high = lr_range(learn.recipe.opt, scratch)
    assert low<=lr<=high

def test_who_is_from_scratch(monkeypatch):
    "The first stage of a network without weights, and nothing else"
    seen = []
    def find(learn, step, scratch):
        seen.append(scratch)
        return 2e-3
    monkeypatch.setattr(fitting, 'found_lr', find)
    run = animal.train(**tiny, stages=(dict(epochs=1, lr='find'),dict(epochs=1, lr='find'))).run
    assert seen==[True,False] and [o.lr for o in run.recipe.steps()]==[2e-3,2e-3]
    animal.train(**tiny, epochs=1, weights=str(run.path/'model.safetensors'))
    assert seen==[True,False,False]

@pytest.mark.parametrize('opt,ends', [(adamw,(1e-4,1.)),(sgd,(1e-3,100.))])
def test_ends_from_scratch(opt, ends, monkeypatch):
    "The few batches fall where the answer is; with weights fastai's ends stay"
    seen = []
    monkeypatch.setattr(finding, 'lr_find', lambda learn, **kw: seen.append(kw) or SimpleNamespace(lr=.01))
    learn = SimpleNamespace(dls=SimpleNamespace(train=range(10)))
    for scratch in True,False: found_lr(learn, SimpleNamespace(epochs=3, opt=opt), scratch)
    assert np.allclose((seen[0]['start_lr'],seen[0]['end_lr']), ends) and 'start_lr' not in seen[1]

@pytest.mark.parametrize('read, lr', [(5.,1e-2),(2e-3,2e-3),(1e-6,1e-3)])
def test_limits_are_no_warning(read, lr, monkeypatch, recwarn):
    "A rate outside the limits is taken back to them, and nobody is alarmed"
    monkeypatch.setattr('callbacks.finder.usable', lambda *args: (torch.logspace(-4, 0, 50),torch.linspace(2, 1, 50)))
    monkeypatch.setattr(finding, 'below_minimum', lambda *args: (read,(0,0)))
    learn = animal.learner(**tiny)
    assert found_lr(learn, learn.recipe, True)==pytest.approx(lr)
    assert not [o for o in recwarn if 'lr_find' in str(o.message)]
