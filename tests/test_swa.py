"SWA against a slow loop and torch's own, and through whole runs"
import pickle, pytest, torch
from callbacks.ema import ema_weights
from callbacks.swa import SWA, fresh_stats
from functools import partial
from fastai.callback.core import Callback
from recipes import animal, whale
from recipes.data.fixtures import sample
from recipes.recipe.folder import Run
from test_ema import assert_same, learner, state
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

def fit(learn, n=4):
    with learn.no_logging(): learn.fit(n, .1)
    return learn

class Ends(Callback):
    "The raw model at each epoch's end, and the state of everything random"
    def before_fit(self): self.models,self.rngs = [],[]
    def after_train(self):
        self.models.append(state(self.learn))
        self.rngs.append(self.dls.train.rng.getstate())

@pytest.mark.parametrize('share,n', [(1.,4),(.5,2),(.6,2),(.01,1)])
def test_against_torch(share, n):
    learn = fit(learner(SWA(share), Ends()))
    ends = learn.ends.models[-n:]
    assert learn.swa.n_steps==n
    got = ema_weights(learn)
    for k,_ in learn.model.named_parameters(): torch.testing.assert_close(got[k], sum(o[k] for o in ends)/n)
    other = learner()
    own = AveragedModel(other.model)
    for o in ends:
        other.model.load_state_dict(o)
        own.update_parameters(other.model)
    learn.dls.train.rng.setstate(learn.ends.rngs[-1])
    update_bn(learn.dls.train, own)
    for k,v in own.module.state_dict().items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6)

def test_statistics_are_those_of_the_mean():
    learn = fit(learner(SWA(.5)))
    mean = ema_weights(learn)
    x = torch.stack([o[0] for o in learn.dls.train.dataset])
    with torch.no_grad(): y = x@mean['0.weight'].T+mean['0.bias']
    torch.testing.assert_close(mean['1.running_mean'], y.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(learn.model[1].running_mean, y.mean(0), atol=1e-3)   # the raw model keeps its own

def test_validates_with_the_mean():
    learn = fit(learner(SWA(.5)))
    loss = learn.recorder.values[-1][1]
    preds = learn.get_preds()[0]
    learn.swa.to_model()
    other = learner()
    other.model.load_state_dict(learn.model.state_dict())
    assert torch.equal(other.get_preds()[0], preds)
    assert other.validate()[0]==pytest.approx(loss, abs=1e-6)

def test_the_model_and_its_mode_are_untouched():
    learn = learner(SWA(.5), Ends())
    fit(learn)
    assert_same(state(learn), learn.ends.models[-1])
    assert not learn.model.training and not any(o.training for o in learn.model.modules())
    assert learn.model[1].momentum==.1

def test_a_new_fit_and_a_validation():
    learn = fit(learner(SWA(.5)))
    before = {k:v.clone() for k,v in ema_weights(learn).items()}
    learn.validate()
    learn.get_preds()
    assert_same(before, ema_weights(learn))
    fit(learn, 1)
    assert learn.swa.n_steps==1
    for k,_ in learn.model.named_parameters(): assert torch.equal(ema_weights(learn)[k], state(learn)[k])

def test_lr_find_does_not_count(tmp_path):
    learn = learner(SWA(1.), path=tmp_path)
    learn.lr_find(num_it=6, show_plot=False)
    assert learn.swa.n_steps==0 and learn.swa.avg is None

def test_two_inputs_and_no_batchnorm():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(1)
        def forward(self, a, b): return self.bn(a+b)
    m = Two().eval()
    fresh_stats(m, [(torch.ones(4, 1),torch.ones(4, 1),0)], 2)
    assert m.bn.running_mean.item()==2 and not m.training
    fresh_stats(nn.Linear(1, 1), [])   # nothing to look at

@pytest.mark.parametrize('share', [0,-.1,1.1])
def test_shares(share):
    with pytest.raises(ValueError, match='more than 0, at most 1'): SWA(share)

def test_pickles_and_its_state_is_plain(tmp_path):
    learn = fit(learner(SWA(.5)))
    torch.save(learn.swa.state_dict(), tmp_path/'x')
    other = learner(SWA(.5))
    other.swa.load_state_dict(torch.load(tmp_path/'x', weights_only=True))
    assert_same(ema_weights(other), ema_weights(learn))
    assert other.swa.avg.n_averaged==2
    assert torch.equal(pickle.loads(pickle.dumps(learn)).get_preds()[0], learn.get_preds()[0])

tiny = dict(arch='test_resnet', pretrained=False, size=32, epochs=4, bs=16, lr=1e-2, ema=partial(SWA, share=.75))

def test_a_run_saves_the_mean():
    run = animal.train(sample('animal', 60), fold='all', **tiny).run
    last = run.last()
    mean = last['cbs']['swa']
    assert mean['n_steps']==3
    assert_same(state(Run(run.path).learner()), mean['model'])
    assert not all(torch.equal(v, last['model'][k]) for k,v in mean['model'].items())

def test_stages_and_rows():
    run = animal.train(sample('animal', 60), **tiny, stages=(dict(epochs=2),dict(epochs=4))).run
    assert run.last()['cbs']['swa']['n_steps']==3
    assert whale.third.ema().share==pytest.approx(10/300) and 'ema' not in whale.third.assumed
