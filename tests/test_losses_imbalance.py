"Losses for rare classes against torch, torchvision and slow loops, and deferred weights through a resumed fit"
import math, pickle
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch, torchvision
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from fastai.torch_core import TensorCategory, TensorImage
from torch import nn
from callbacks.checkpoint import ResumableLearner, fit_state
from callbacks.deferred import DeferWeights, defer_weights, weights_on
from callbacks.finder import lr_find
from callbacks.mix import CutMix
from callbacks.schedule import flat
from recipes.losses.core import SoftmaxLoss
from recipes.losses.imbalance import FocalSoftmaxLoss, LogitAdjustedLoss, WeightedSoftmaxLoss, class_balanced_weights

COUNTS = np.array([5000,800,60,3,0])
LOSSES = [WeightedSoftmaxLoss, FocalSoftmaxLoss, partial(FocalSoftmaxLoss, beta=.999), LogitAdjustedLoss]
each_loss = pytest.mark.parametrize('make', LOSSES)

def batch(n=32, c=5, known=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, c, generator=g)*3,torch.randint(known, (n,), generator=g)

# --- weights

def effective(n, beta):
    "Cui et al., eq. 1: each picture adds `beta` of what the one before added"
    total = 0
    for i in range(n): total += beta**i
    return total

@pytest.mark.parametrize('beta', [0, .9, .99, .999, .9999, 1])
def test_weights(beta):
    inverse = [1/effective(n, beta) if n else 0 for n in COUNTS.tolist()]
    want = np.array(inverse)/sum(inverse)*4
    np.testing.assert_allclose(class_balanced_weights(COUNTS, beta), want, rtol=1e-9)

def test_weights_of_strange_counts():
    assert class_balanced_weights([0,0,0]).tolist()==[0,0,0]
    assert class_balanced_weights([7]).tolist()==[1]
    assert class_balanced_weights([10**7,1], .999999).sum()==pytest.approx(2)

# --- against others

@pytest.mark.parametrize('beta', [.9, .999, 1])
def test_weighted_is_torchs(beta):
    raw,y = batch()
    w = torch.tensor(class_balanced_weights(COUNTS, beta)).float()
    for red in 'mean','none':
        got = WeightedSoftmaxLoss(beta, reduction=red).prepare([COUNTS])(raw, y)
        torch.testing.assert_close(got, nn.CrossEntropyLoss(w, reduction=red)(raw, y))

@pytest.mark.parametrize('gamma', [0., .5, 2., 3.5])
def test_focal_is_torchvisions_for_two_classes(gamma):
    "With two classes the softmax is a sigmoid of the difference"
    raw,y = batch(50, 2, 2)
    want = torchvision.ops.sigmoid_focal_loss(raw[:,1]-raw[:,0], y.float(), alpha=-1, gamma=gamma, reduction='none')
    torch.testing.assert_close(FocalSoftmaxLoss(gamma, reduction='none')(raw, y), want, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('smooth', [0., .1])
def test_focal_slow(smooth):
    raw,y = batch()
    p,want = raw.double().softmax(1).tolist(),[]
    for row,t in zip(p, y.tolist()):
        fl = [-(1-o)**2*math.log(o) for o in row]
        want.append(sum(((1-smooth)*(k==t)+smooth/5)*o for k,o in enumerate(fl)))
    torch.testing.assert_close(FocalSoftmaxLoss(smooth=smooth, reduction='none')(raw, y), torch.tensor(want), rtol=1e-4, atol=1e-6)
    w = torch.tensor(class_balanced_weights(COUNTS, .99)).float()[y]
    got = FocalSoftmaxLoss(2., .99, smooth).prepare([COUNTS])(raw, y)
    torch.testing.assert_close(got, (w*torch.tensor(want)).sum()/w.sum(), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('tau', [0., .5, 1., 2.])
def test_adjusted_is_the_papers(tau):
    "Menon et al., eq. 10: `log(1 + sum (pi_k/pi_y)^tau exp(f_k-f_y))`"
    raw,y = batch(c=4)
    pi = COUNTS[:4]/COUNTS.sum()
    want = [math.log(1+sum((pi[k]/pi[t])**tau*math.exp(f[k]-f[t]) for k in range(4) if k!=t))
        for f,t in zip(raw.double().tolist(), y.tolist())]
    got = LogitAdjustedLoss(tau, reduction='none').prepare([COUNTS[:4]])(raw, y)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-4, atol=1e-5)

def test_adjusted_is_fitted_to_even_classes():
    "At the optimum on skewed data the plain softmax answers for classes that are equally common"
    n = torch.tensor([900,90,10])
    bias = nn.Parameter(torch.zeros(3))
    loss,y = LogitAdjustedLoss().prepare([n.numpy()]),torch.arange(3).repeat_interleave(n)
    opt = torch.optim.LBFGS([bias], max_iter=50)
    def step():
        opt.zero_grad()
        res = loss(bias.expand(1000, 3), y)
        res.backward()
        return res
    opt.step(step)
    torch.testing.assert_close(loss.activation(bias), torch.full((3,), 1/3), rtol=0, atol=1e-3)

# --- what all of them keep

@each_loss
def test_contract(make):
    raw,y = batch()
    loss,each = make().prepare([COUNTS]),make(reduction='none').prepare([COUNTS])(raw, y)
    assert each.shape==(32,) and loss.reduction=='mean'
    for i in range(8):
        alone = make(reduction='none').prepare([COUNTS])(raw[i:i+1], y[i:i+1])
        torch.testing.assert_close(alone, each[i:i+1], rtol=1e-5, atol=1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(raw, y), loss(raw, y))
    torch.testing.assert_close(loss.activation(raw), raw.softmax(1))
    with torch.autocast('cpu', dtype=torch.bfloat16): low = loss(TensorImage(raw).bfloat16(), TensorCategory(y))
    assert type(low) is torch.Tensor and low.dtype==torch.float32
    torch.testing.assert_close(low, loss(raw.bfloat16().float(), y))
    assert loss(raw.to('meta'), y.to('meta')).shape==()

@each_loss
@pytest.mark.parametrize('strange', [5, -1, 99])
def test_unknown_class_costs_nothing(make, strange):
    raw,y = batch()
    raw.requires_grad_()
    y2 = y.clone()
    y2[[1,4]] = strange
    keep = torch.tensor([i for i in range(32) if i not in (1,4)])
    loss = make().prepare([COUNTS])
    torch.testing.assert_close(loss(raw, y2), loss(raw[keep], y[keep]))
    loss(raw, torch.full_like(y, strange)).backward()
    assert (raw.grad==0).all()

@each_loss
@pytest.mark.parametrize('scale', [0, 100, 1e4])
def test_finite(make, scale):
    "Also for the class without a training picture"
    raw,_ = batch()
    raw = (raw.sign()*scale).requires_grad_()
    for y in torch.full((32,), 4),torch.arange(32)%5:
        loss = make().prepare([COUNTS])(raw, y)
        loss.backward()
        assert loss.isfinite() and raw.grad.isfinite().all()

@pytest.mark.parametrize('gamma', [.2, .5])
def test_focal_gradient_with_small_gamma(gamma):
    raw = torch.tensor([[200.,-200.,0.],[0.,200.,0.]], requires_grad=True)
    FocalSoftmaxLoss(gamma)(raw, torch.tensor([0,0])).backward()
    assert raw.grad.isfinite().all()

@each_loss
def test_linear_in_shares(make):
    "As far as pictures are not weighted against each other"
    raw,y = batch()
    one = nn.functional.one_hot(y, 5).float()
    loss = make(reduction='none').prepare([COUNTS])
    torch.testing.assert_close(loss(raw, one), loss(raw, y))

@pytest.mark.parametrize('make', [WeightedSoftmaxLoss, partial(FocalSoftmaxLoss, beta=.9), LogitAdjustedLoss])
def test_needs_counts(make):
    with pytest.raises(ValueError, match='prepare'): make()(*batch())

# --- deferred weights

class Watch(Callback):
    "Keeps `on` of each batch and the loss"
    order = 50
    def before_fit(self): self.seen = []
    def after_loss(self):
        if self.training: self.seen.append((self.epoch, [o.clone() for o in self.yb[1:]], self.loss.item()))

def learner(cbs, loss=None, cls=Learner):
    torch.manual_seed(0)
    items = [(torch.rand(3,4,4), torch.tensor(min(i%7, 4))) for i in range(40)]
    dls = DataLoaders.from_dsets(items, items[:8], bs=8, num_workers=0, device='cpu', shuffle=False)
    loss = loss or WeightedSoftmaxLoss(.99).prepare([COUNTS])
    learn = cls(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), loss_func=loss, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    return learn

def weights(learn): return [o.detach().clone() for o in learn.model.parameters()]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b))

def test_weights_on():
    for n in range(1, 60):
        for k in range(n+1): assert [weights_on(e/n, k/n) for e in range(n)]==[float(e>=k) for e in range(n)]

@pytest.mark.parametrize('at', [0., .5, .8, 1.])
def test_from_at_on(at):
    watch = Watch()
    learn = learner([DeferWeights(at), watch])
    with learn.no_logging(): learn.fit(10)
    assert len(watch.seen)==50
    for epoch,on,_ in watch.seen: assert on[0].tolist()==[float(epoch>=10*at)]*8

def test_is_the_plain_loss_and_then_the_weighted():
    "The first part is a fit with `SoftmaxLoss`, number for number, and the next batch is not"
    a,b = Watch(),Watch()
    for cbs,loss in (([DeferWeights(.5), a], None),([b], SoftmaxLoss())):
        learn = learner(cbs, loss)
        with learn.no_logging(): learn.fit(4)
    plain,deferred = ([o[-1] for o in w.seen] for w in (b, a))
    np.testing.assert_allclose(deferred[:10], plain[:10], rtol=1e-5)
    assert len(plain)==20 and abs(deferred[10]-plain[10])>.01

class Take(Callback):
    "Takes the state at the end of an epoch, or stops in the middle of the next"
    order = 90
    def __init__(self, epoch): self.at = epoch
    def after_epoch(self):
        if self.epoch==self.at: self.state = deepcopy(fit_state(self.learn))
    def after_batch(self):
        if self.training and self.epoch==self.at+1 and self.iter==2: raise KeyboardInterrupt

@pytest.mark.parametrize('epoch', [0, 2, 3])
def test_resumed_fit_is_the_same(epoch):
    "Interrupted before, at and after the switch of a fit of 5 epochs"
    cbs = partial(defer_weights, 1e-2, 5, flat, .6)
    learn = learner(cbs())
    with learn.no_logging(): learn.fit(5)
    take,watch = Take(epoch),Watch()
    stopped,again = learner([*cbs(), take]),learner([*cbs(), watch], cls=ResumableLearner)
    with pytest.raises(KeyboardInterrupt), stopped.no_logging(): stopped.fit(5)
    again.state = take.state
    with again.no_logging(): again.fit(5)
    assert len(watch.seen)==5*(4-epoch) and same(weights(again), weights(learn))

def test_nothing_stays_after_an_interrupt():
    learn = learner([DeferWeights(1.)])
    raw,y = batch()
    before = learn.loss_func(raw, y)
    with pytest.raises(KeyboardInterrupt), learn.no_logging(): learn.fit(2, cbs=Take(0))
    learn.remove_cb(DeferWeights)
    watch = Watch()
    with learn.no_logging(): learn.fit(1, cbs=watch)
    assert not any(on for _,on,_ in watch.seen) and torch.equal(learn.loss_func(raw, y), before)

def test_validation_is_weighted_all_along():
    learn = learner([DeferWeights(1.)])
    with learn.no_logging():
        learn.fit(1)
        got = learn.validate()[0]
        raw,y = learn.get_preds(act=lambda o: o)
    w = torch.tensor(class_balanced_weights(COUNTS, .99)).float()
    assert got==pytest.approx(nn.CrossEntropyLoss(w)(torch.as_tensor(raw), torch.as_tensor(y)).item(), rel=1e-5)

def test_mixed_batches():
    "Both losses of a mixed batch are told"
    told = []
    class Told(WeightedSoftmaxLoss):
        def per_sample(self, raw, y, on=1.):
            told.append(on)
            return super().per_sample(raw, y, on)
    learn = learner([CutMix(), DeferWeights(.5)], Told(.99).prepare([COUNTS]))
    with learn.no_logging(): learn.fit(2)
    told = [o.mean().item() for o in told if torch.is_tensor(o)]
    assert told==[0.]*10+[1.]*10

def test_other_losses_are_left_alone():
    for loss in SoftmaxLoss(),nn.CrossEntropyLoss(),LogitAdjustedLoss().prepare([COUNTS]):
        learn = learner([DeferWeights(0.)], loss)
        with learn.no_logging(): learn.fit(1)

def test_lr_find_sees_the_middle():
    class Told(WeightedSoftmaxLoss):
        def per_sample(self, raw, y, on=1.):
            told.append(on)
            return super().per_sample(raw, y, on)
    for at,want in (.8,0.),(.4,1.):
        told = []
        learn = learner([DeferWeights(at)], Told(.99).prepare([COUNTS]))
        with learn.no_logging(), learn.no_bar(): lr_find(learn)
        assert {o.mean().item() for o in told if torch.is_tensor(o)}=={want}

def test_rates_are_those_of_the_schedule():
    cbs = defer_weights(1e-2, 4, schedule=flat, at=.5)
    assert [type(o) for o in cbs]==[type(flat(1e-2, 4)[0]),DeferWeights] and cbs[1].at==.5
