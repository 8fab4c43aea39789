"Hard pictures come again, with a loader that trains and after a kill; rare rows come as often as their factor says"
from functools import partial
from random import Random
import fastai.callback.progress   # gives learners `no_bar`  # chkstyle: ignore
import numpy as np, pandas as pd, pytest, torch
from callbacks.checkpoint import ResumableLearner, fit_state
from callbacks.mix import MixUp
from callbacks.replay import Replay, each_loss, replays, worst
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from recipes.data.augment import none, squish
from recipes.data.loaders import Items, make_dls
from recipes.data.repeats import Repeats, repeat_factor, repeat_weight
from recipes.data.samplers import Draw, log_weight, rank_weight, weighted
from recipes.data.table import Table
from recipes.data.targets import MultiLabel
from recipes.losses.multilabel import BCELoss
from scipy import sparse
from torch import nn

N,C = 50,3
PICS = np.random.default_rng(0).integers(0, 255, (N,4,4,3), dtype=np.uint8)
Y = sparse.csr_matrix((np.random.default_rng(1).random((N,C))<.4).astype(np.float32))

def loaders(order=None, workers=0, rows=N):
    it = Items(list(PICS), range(N), list(range(rows)), (squish,none), (4,4), train=True)
    return make_dls((it,it), 8, (Y,Y), workers=workers, device='cpu', order=order, target=MultiLabel(), stats=((.5,)*3,(.25,)*3))

def learner(cbs=(), seed=0, **kw):
    torch.manual_seed(seed)
    dls = loaders(**kw)
    dls.train.rng = Random(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, C))
    return ResumableLearner(dls, model, loss_func=BCELoss(), lr=.01, cbs=list(cbs))

def fit(learn, n, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kw)

class Spy(Callback):
    "Which pictures each epoch saw, and their losses, by what is in the batch"
    run_valid = False
    def before_fit(self): self.epochs = []
    def before_train(self): self.epochs.append([])
    def after_loss(self):
        x = (self.x*.25+.5).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        rows = [int(np.flatnonzero((PICS==o).all((1,2,3)))[0]) for o in x]
        each = nn.functional.binary_cross_entropy_with_logits(self.pred, self.y, reduction='none').sum(1)
        self.epochs[-1] += list(zip(rows, each.tolist()))

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('order', [None, Draw(np.arange(1, N+1))])
def test_replays_the_worst(order, workers):
    "Every epoch has the worst of the one before once more, by losses that a slow loop notes"
    spy,cb = Spy(),Replay(.1)
    learn = learner([cb,spy], order=order, workers=workers)
    known = {}
    class Look(Callback):
        run_valid = False
        def before_train(self):
            want = sorted(known, key=lambda o: -known[o])[:5]
            if self.epoch: assert sorted(self.dls.train.shuffle_fn.more)==sorted(want)
        def after_train(self):
            known.update(spy.epochs[-1])
            counts.append((self.n_iter, len(spy.epochs[-1]), round(float(self.pct_train)*4, 5)))
    counts = []
    learn.add_cb(Look())
    fit(learn, 4)
    assert counts==[(6,48,1.)]+[(6,48,float(o)) for o in (2,3,4)]   # 55 rows make 6 whole batches of 8, too
    assert learn.dls.train.order is order and len(learn.dls.train)==6 and learn.dls.train.n==N

def test_longer_epochs():
    spy = Spy()
    fit(learner([Replay(.2),spy]), 3)
    assert [len(o) for o in spy.epochs]==[48,56,56]
    rows = [o for o,_ in spy.epochs[1]]
    assert len(set(rows))<len(rows)   # some come twice

def test_same_without():
    "With a share of nothing, training is as if the callback were not there"
    one,two = learner(),learner([Replay(0.)])
    for o in one,two: fit(o, 2)
    for a,b in zip(one.model.parameters(), two.model.parameters()): assert torch.equal(a, b)

def test_resume():
    "Stopped after two epochs and gone on with in another learner: the same weights as in one go"
    whole = learner([Replay(.2)])
    fit(whole, 4)
    kept = {}
    class Stop(Callback):
        order = 90
        def after_epoch(self):
            if self.epoch==1:
                kept.update(fit_state(self.learn))
                raise CancelFitException
    first = learner([Replay(.2),Stop()])
    fit(first, 4)
    torch.save(kept, 'state.pt')
    then = learner([Replay(.2)], seed=7)
    then.state = torch.load('state.pt', weights_only=True)
    fit(then, 4)
    for a,b in zip(whole.model.parameters(), then.model.parameters()): assert torch.equal(a, b)

def test_loader_is_given_back():
    "After an interrupt, a replay that came with the fit leaves nothing behind"
    class Interrupt(Callback):
        def after_loss(self):
            if self.training and self.epoch==2: raise KeyboardInterrupt
    learn = learner()
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, cbs=[Replay(.2),Interrupt()])
    assert learn.dls.train.order is None and learn.dls.train.n==N

def test_with_mixup():
    learn = learner([MixUp()])
    fit(learn, 2, cbs=replays())
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_any_loader():
    "fastai's own loader, too; one that does not shuffle is refused"
    items = [(torch.rand(3,4,4), torch.zeros(3))]*16
    def made(dl): return Learner(DataLoaders(dl, dl), nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), loss_func=BCELoss(), cbs=Replay(.5))
    dl = DataLoader(items, bs=8, shuffle=True)
    fit(made(dl), 2)
    assert dl.n==16 and 'shuffle_fn' not in vars(dl)
    with pytest.raises(ValueError, match='shuffles'): fit(made(DataLoader(items, bs=8)), 1)

def test_each_loss():
    raw,y = torch.randn(6, 3),torch.rand(6, 3)
    want = nn.functional.binary_cross_entropy_with_logits(raw, y, reduction='none')
    assert torch.allclose(each_loss(BCELoss(), raw, (y,)), want.sum(1))
    flat = BCEWithLogitsLossFlat()
    assert torch.allclose(each_loss(flat, raw, (y,)), want.mean(1)) and flat.reduction=='mean'
    class Bad(BCELoss):
        def per_sample(self, raw, y): raise RuntimeError
    bad = Bad()
    with pytest.raises(RuntimeError): each_loss(bad, raw, (y,))
    assert bad.reduction=='mean'

def test_worst():
    l = np.array([np.nan,2,1,2,np.nan,0])
    assert worst(l, .5)==[1,3,2] and worst(l, 1)==[1,3,2,5] and worst(l, 0)==[]

# --- repeat factors

def lvis(y, t):
    "Gupta et al. 2019, appendix: one loop over classes, one over rows"
    n,f = len(y),y.mean(0)
    r = [max(1, (t/o)**.5) if o else 1 for o in f]
    return [max([r[c] for c in range(y.shape[1]) if y[i,c]], default=min(r)) for i in range(n)]

def table_of(y):
    df = pd.DataFrame(dict(id=range(len(y))))
    return Table(df, df[:0], sparse.csr_matrix(y.astype(np.float32)), [str(o) for o in range(y.shape[1])])

def test_repeat_factor():
    "Every row once at least; on average as often as its factor, in epochs of one length"
    rng = np.random.default_rng(0)
    y = rng.random((300,12))<.5/np.arange(1, 13)**2
    rows = np.arange(0, 300, 2)
    order,want = repeat_factor(table_of(y), rows, t=.1),np.array(lvis(y[rows], .1))
    drawn = np.array([np.bincount(order(Random(s)), minlength=150) for s in range(400)])
    assert (drawn.sum(1)==len(order)).all() and len(order)==int(np.ceil(want.sum()-1e-6)) and (drawn>=1).all()
    assert want.max()>2 and abs(drawn.mean(0)-want).max()<.12
    assert (drawn.max(0)-drawn.min(0)<=2).all()
    assert order(Random(3))==order(Random(3))!=order(Random(4))

def test_repeat_weight():
    np.testing.assert_allclose(repeat_weight(np.array([.5,1e-3,1e-5])), [1,1,10])
    assert len(Repeats(np.ones(7)))==7 and sorted(Repeats(np.ones(7))(Random(0)))==list(range(7))

@pytest.mark.parametrize('weight_of,least,most', [(log_weight,None,None), (partial(rank_weight, common=30, rare=4000),30,4000)])
def test_weighted_for_labels(weight_of, least, most):
    "iMet's first place and Inclusive's ldong87: the weight of a row is that of its rarest label"
    y = np.random.default_rng(2).random((200,6))<np.array([.6,.3,.15,.08,.04,.02])
    share,order = y.mean(0),weighted(table_of(y), np.arange(200), weight_of)
    w = np.diff([0,*order.sums])
    each = -np.log(share) if least is None else least+(most-least)*np.argsort(np.argsort(-share))/5
    want = [max([each[c] for c in range(6) if o[c]], default=each.min()) for o in y]
    np.testing.assert_allclose(w, want, rtol=1e-6)
