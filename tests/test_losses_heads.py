"The loss of several heads against torch, a slow loop and the closed form of CutMix"
import pickle, random
from functools import partial
import pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.nn import functional as F
from callbacks.mix import CutMix, MixUp
from recipes.data.targets import MultiHead
from recipes.losses.heads import MultiHeadLoss, hardest_mean
from recipes.losses.imbalance import FocalSoftmaxLoss, LogitAdjustedLoss, WeightedSoftmaxLoss

SIZES = 168,11,7

def batch(n=12, sizes=SIZES, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, sum(sizes), generator=g)*3,tuple(torch.randint(c, (n,), generator=g) for c in sizes)

def counts(sizes=SIZES): return [[7*i%50+1 for i in range(c)] for c in sizes]
def ready(**kw): return MultiHeadLoss(**kw).prepare(counts())

def by_hand(raw, y, weights, smooth):
    "Each picture's loss, one class at a time"
    res = []
    for i in range(len(raw)):
        start = total = 0
        for w,c,t in zip(weights, SIZES, y):
            z = raw[i,start:start+c].double()
            logp = z-z.logsumexp(0)
            total += w*sum(-((1-smooth)*(k==t[i])+smooth/c)*logp[k] for k in range(c))
            start += c
        res.append(total)
    return torch.stack(res).float()

@pytest.mark.parametrize('weights,smooth', [((2,1,1),0.), ((.7,.1,.2),.1)])
def test_slow_loop(weights, smooth):
    raw,y = batch(4)
    want = by_hand(raw, y, weights, smooth)
    torch.testing.assert_close(ready(weights=weights, smooth=smooth, reduction='none')(raw, *y), want)
    torch.testing.assert_close(ready(weights=weights, smooth=smooth)(raw, *y), want.mean())

def test_weights_are_not_normalised():
    raw,y = batch()
    torch.testing.assert_close(ready(weights=(4,2,2))(raw, *y), 2*ready()(raw, *y))

@pytest.mark.parametrize('n,share,kept', [(10,.8,8), (12,.8,10), (1,.8,1), (3,.01,1), (5,1.,5)])
def test_hardest(n, share, kept):
    raw,y = batch(n)
    each = ready(reduction='none')(raw, *y)
    want = sum(sorted(each.tolist(), reverse=True)[:kept])/kept
    assert ready(hardest=share)(raw, *y).item()==pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(hardest_mean(each, share), ready(hardest=share)(raw, *y))

def test_the_easy_give_no_gradient():
    raw,y = batch(10)
    raw.requires_grad_()
    loss = ready(hardest=.8)
    loss(raw, *y).backward()
    still = (raw.grad==0).all(1)
    assert still.sum()==2 and ready(reduction='none')(raw, *y)[still].max()<ready(reduction='none')(raw, *y)[~still].min()

@pytest.mark.parametrize('bad', [0, -.1, 1.1])
def test_hardest_is_a_share(bad):
    with pytest.raises(ValueError, match='share of the batch'): MultiHeadLoss(hardest=bad)

def test_activation_is_the_targets():
    raw,y = batch()
    p = ready().activation(raw.bfloat16())
    torch.testing.assert_close(p, MultiHead(tuple('abc'), SIZES).activation(raw.bfloat16().float()))
    parts = p.split(SIZES, 1)
    assert torch.equal(ready().decodes(p), torch.stack([o.max(1).indices for o in parts], 1))

def test_unknown_label_of_one_head():
    raw,y = batch(4)
    y2 = (torch.tensor([0,168,-1,3]),*y[1:])
    loss = ready(reduction='none')
    rest = ready(weights=(0,1,1), reduction='none')(raw, *y)
    torch.testing.assert_close(loss(raw, *y2)[1:3], rest[1:3])

def test_float32_under_autocast():
    raw,y = batch()
    with torch.autocast('cpu', dtype=torch.bfloat16): got = ready()(raw.bfloat16(), *y)
    assert got.dtype==torch.float32
    torch.testing.assert_close(got, ready()(raw.bfloat16().float(), *y))

@pytest.mark.parametrize('scale', [0, 100, 1e4])
def test_gradient_is_finite(scale):
    raw,y = batch()
    raw = (raw.sign()*scale).requires_grad_()
    ready(smooth=.1, hardest=.8)(raw, *y).backward()
    assert raw.grad.isfinite().all()

def test_says_what_is_wrong():
    raw,y = batch()
    with pytest.raises(ValueError, match='prepare'): MultiHeadLoss()(raw, *y)
    with pytest.raises(ValueError, match='3 weights .* but 2 heads'): MultiHeadLoss().prepare(counts()[:2])
    with pytest.raises(ValueError, match='2 targets for 3 heads'): ready()(raw, *y[:2])
    with pytest.raises(ValueError, match='185 outputs'): ready()(raw[:,1:], *y)

@pytest.mark.parametrize('kind', [partial(WeightedSoftmaxLoss, beta=.99), partial(FocalSoftmaxLoss, gamma=1.), LogitAdjustedLoss])
def test_another_loss_a_head(kind):
    "Each head's loss has its head's counts"
    raw,y = batch()
    want = sum(w*kind(smooth=.1, reduction='none').prepare([n])(o, t)
        for w,n,o,t in zip((2,1,1), counts(), raw.split(SIZES, 1), y))
    torch.testing.assert_close(ready(loss=kind, smooth=.1, reduction='none')(raw, *y), want)

# --- under fastai, with mixed batches

def learner(cb=None, loss=None, sizes=(5,3,2)):
    torch.manual_seed(0)
    items = [(torch.rand(1,6,8), *(torch.tensor(i%c) for c in sizes)) for i in range(24)]
    dls = DataLoaders.from_dsets(items[:16], items[16:], bs=8, num_workers=0, device='cpu')
    dls.n_inp = 1
    for dl in dls.loaders: dl._n_inp = 1
    loss = loss or MultiHeadLoss().prepare(counts(sizes))
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, sum(sizes))), loss_func=loss, cbs=cb)
    learn.remove_cb(ProgressCallback)
    return learn

class See(CutMix):
    "Keeps what a batch was made of, and the loss it had"
    def before_batch(self):
        x,y = self.x.clone(),self.yb
        super().before_batch()
        self.kept = x,y,self.xb[0].clone()
    def after_loss(self):
        super().after_loss()
        x,y,mixed = self.kept
        self.said = getattr(self, 'said', [])+[(x, y, mixed, self.yb1, self.pred.detach().clone(), self.loss.item())]

def test_cutmix_closed_form():
    "The loss of a mixed batch is `lam*L(a)+(1-lam)*L(b)` with `lam` the share of pixels that are a's own"
    random.seed(1)
    cb = See()
    learn = learner(cb)
    with learn.no_logging(): learn.fit(3)
    assert len(cb.said)==6
    lams = []
    for x,y,mixed,y1,pred,got in cb.said:
        lam = (mixed==x)[:,0].float().flatten(1).mean(1).min().item()   # a picture mixed with itself is all its own
        want = 0
        for w,z,a,b in zip((2,1,1), pred.split((5,3,2), 1), y, y1):
            c = z.shape[1]
            want += w*F.cross_entropy(z, lam*F.one_hot(a, c)+(1-lam)*F.one_hot(b, c))
        assert got==pytest.approx(want.item(), rel=1e-5)
        lams.append(lam)
    assert min(lams)<.9 and len(set(lams))>2
    assert all(len(o[3])==3 for o in cb.said)

def test_mixed_soft_targets_are_mixed_losses():
    raw,y = batch()
    lam,other = .3,tuple(o.roll(1) for o in y)
    soft = [lam*F.one_hot(a, c)+(1-lam)*F.one_hot(b, c) for a,b,c in zip(y, other, SIZES)]
    for loss in ready(),ready(smooth=.1),ready(loss=FocalSoftmaxLoss):
        torch.testing.assert_close(loss(raw, *soft), lam*loss(raw, *y)+(1-lam)*loss(raw, *other))

def test_get_preds():
    learn = learner(MixUp())
    with learn.no_logging():
        learn.fit(1)
        p,t,dec,each = learn.get_preds(with_loss=True, with_decoded=True)
        total = learn.validate()[0]
    assert each.shape==(8,) and dec.shape==(8,3) and len(t)==3
    assert torch.as_tensor(each).mean().item()==pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(torch.as_tensor(p).sum(1), torch.full((8,), 3.))

def test_learns():
    "Three heads at once, by memory"
    learn = learner(loss=MultiHeadLoss(hardest=.8, smooth=.05).prepare(counts((5,3,2))))
    with learn.no_logging():
        learn.fit(60, lr=.05)
        _,t,dec = learn.get_preds(0, with_decoded=True)
    assert (torch.as_tensor(dec)==torch.stack(t, 1)).float().mean()>.95

def test_pickles():
    raw,y = batch()
    assert torch.equal(pickle.loads(pickle.dumps(ready(smooth=.1)))(raw, *y), ready(smooth=.1)(raw, *y))
