"MixUp and CutMix: every target, any loss, interrupts, and the traps fastai's own fall into"
import pickle, random
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy
from fastai.optimizer import SGD
from fastai.torch_core import TensorCategory, TensorImage, set_seed
from callbacks.mix import CutMix, Mix, MixOrCut, MixUp, choose, cutmix, mixup, rand_box

last = torch.channels_last

class Heads(nn.Module):
    "One linear layer a head; a tuple where there are several"
    def __init__(self, *ns):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(192, n) for n in ns)
    def forward(self, x):
        res = tuple(h(x.flatten(1)) for h in self.heads)
        return res if len(res)>1 else res[0]

class Spy(Callback):
    "Keeps what each batch gave"
    order = 55
    def __init__(self): self.rows = []
    def after_batch(self):
        lam,yb1 = next(((o.lam if o.yb1 is not None else None, o.yb1) for o in self.learn.cbs if isinstance(o, Mix)), (None,None))
        self.rows.append((self.training, self.epoch, lam, self.loss.detach(), self.pred, self.yb, yb1))

class Interrupt(Callback):
    "A person presses Ctrl-C in the second batch, between the loss and the step"
    order = 9
    def after_loss(self):
        if self.training and self.iter==1: raise KeyboardInterrupt

def learner(ys, loss, *cbs, ns=(3,), bs=8, n=16):
    set_seed(0)
    items = [(torch.rand(3,8,8), *(y[i] for y in ys)) for i in range(n)]
    dls = DataLoaders.from_dsets(items, items, bs=bs, num_workers=0, device='cpu')
    dls.n_inp = 1
    learn = Learner(dls, Heads(*ns), loss_func=loss, cbs=list(cbs))
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    return learn

ids = torch.arange(16)%3
many = (torch.rand(16, 3, generator=torch.Generator().manual_seed(1))>.5).float()
def heads3(raw, *ys): return sum(w*F.cross_entropy(r, y) for w,r,y in zip((2,1,1), raw, ys))
def soft_bce(raw, y): return F.binary_cross_entropy_with_logits(raw, y.float())

targets = dict(flat=((ids,), CrossEntropyLossFlat(), (3,)), plain=((ids,), F.cross_entropy, (3,)))
targets |= dict(module=((ids,), nn.CrossEntropyLoss(), (3,)), smooth=((ids,), LabelSmoothingCrossEntropy(), (3,)))
targets |= dict(focal=((ids,), FocalLossFlat(), (3,)), heads=((ids,ids%2,ids), heads3, (3,2,3)))
targets |= dict(multi=((many,), BCEWithLogitsLossFlat(), (3,)), multi_plain=((many,), soft_bce, (3,)))
cbs = dict(mixup=MixUp, cutmix=CutMix, both=MixOrCut, base=Mix)

@pytest.mark.parametrize('cb', cbs.values(), ids=cbs)
@pytest.mark.parametrize('case', targets.values(), ids=targets)
def test_trains_on_anything(case, cb):
    ys,loss,ns = case
    spy = Spy()
    learn = learner(ys, loss, cb(), spy, ns=ns)
    learn.fit(2, 1e-2)
    mixed = [o for o in spy.rows if o[0]]
    assert len(mixed)==4 and all(o[2] is not None for o in mixed)
    for _,_,lam,got,pred,yb,yb1 in mixed:   # the definition, term by term
        torch.testing.assert_close(got, lam*loss(pred, *yb) + (1-lam)*loss(pred, *yb1))
    assert learn.loss_func is loss

def soft_heads(raw, ya, yb, lam):
    "The loss on soft labels, by hand"
    res = 0
    for w,r,a,b in zip((2,1,1), raw, ya, yb):
        y = lam*F.one_hot(a, r.shape[1]) + (1-lam)*F.one_hot(b, r.shape[1])
        res -= w*(y*r.log_softmax(1)).sum(1).mean()
    return res

def test_is_the_loss_on_soft_labels():
    for name in ('plain','multi','heads'):
        ys,loss,ns = targets[name]
        spy = Spy()
        learner(ys, loss, MixOrCut(), spy, ns=ns).fit(2)
        for _,_,lam,got,pred,ya,yb in (o for o in spy.rows if o[0]):
            if name=='multi': want = F.binary_cross_entropy_with_logits(pred, lam*ya[0] + (1-lam)*yb[0])
            else: want = soft_heads(pred, ya, yb, lam) if name=='heads' else soft_heads((pred,), ya, yb, lam)/2
            torch.testing.assert_close(got, want)

def test_focal_is_not_the_loss_on_soft_labels():
    pred,a,b = torch.randn(64,3),torch.zeros(64, dtype=torch.long),torch.ones(64, dtype=torch.long)
    lp,y = pred.log_softmax(1),.5*F.one_hot(a, 3) + .5*F.one_hot(b, 3)
    pt = (y*lp.exp()).sum(1)
    soft = ((1-pt)**2*-(y*lp).sum(1)).mean()
    f = FocalLossFlat()
    assert (.5*f(pred, a) + .5*f(pred, b) - soft).abs()>1e-2

def test_pixels_are_the_share_exactly():
    for h,w in ((8,8), (5,13), (1,7), (64,48)):
        x = torch.arange(4.)[:,None,None,None].expand(4,3,h,w)
        for i in range(100):
            mixed,lam = cutmix(x, torch.tensor([1,2,3,0]), random.random())
            kept = (mixed==x).all(1).flatten(1).sum(1)
            assert (kept==round(lam*h*w)).all() and abs(lam*h*w-round(lam*h*w))<1e-9

def test_box_is_clipped_alike_on_all_sides():
    random.seed(0)
    boxes = torch.tensor([rand_box(20, 30, .75) for _ in range(4000)]).double()   # 10 by 15 where whole
    y1,y2,x1,x2 = boxes.unbind(1)
    assert ((y2-y1).max(),(x2-x1).max())==(10,15)
    assert abs((y1+y2).mean()/2-10)<.5 and abs((x1+x2).mean()/2-15)<.7
    for low,high,n in ((y1,y2,20), (x1,x2,30)):
        a,b = (low==0).double().mean(),(high==n).double().mean()
        assert .15<a<.4 and abs(a-b)<.08
        side = high-low   # what reaches over an edge is cut off, at either edge
        assert side[low==0].min()<side.max()*.7 and side[high==n].min()<side.max()*.7

def test_box_goes_from_everything_to_nothing():
    random.seed(0)
    y1,y2,x1,x2 = rand_box(9, 9, 1.)
    assert (y2-y1)*(x2-x1)==0
    assert all(0<=a<=b<=9 for _ in range(200) for a,b in zip(*[iter(rand_box(9, 9, 0.))]*2))

@pytest.mark.parametrize('f', [mixup, cutmix])
def test_batch_that_came_in_stays(f):
    x = torch.rand(4,3,8,8).contiguous(memory_format=last)
    before = x.clone()
    mixed,_ = f(x, torch.tensor([1,2,3,0]), .5)
    assert torch.equal(x, before) and not torch.equal(mixed, x)
    assert mixed.is_contiguous(memory_format=last) and mixed.dtype==x.dtype
    assert type(f(TensorImage(x), torch.tensor([1,2,3,0]), .5)[0]) is TensorImage

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_batch_of_one(cb):
    spy = Spy()
    learner((ids,), F.cross_entropy, cb(), spy, bs=1, n=4).fit(1)
    assert len([o for o in spy.rows if o[0] and o[3].isfinite()])==4

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), F.cross_entropy], ids=['flat','plain'])
def test_interrupt_leaves_nothing(loss):
    learn = learner((ids,), loss, MixOrCut())
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Interrupt())
    assert learn.loss_func is loss
    p = learn.get_preds()[0]
    if loss is not F.cross_entropy: torch.testing.assert_close(p.sum(1), torch.ones(16))
    raw = learn.model(learn.dls.valid.one_batch()[0])
    torch.testing.assert_close(p[:8], raw.softmax(1) if loss is not F.cross_entropy else raw)
    learn.fit(1)
    assert not torch.equal(learn.get_preds()[0], p)

def test_interrupt_when_given_to_fit():
    learn = learner((ids,), CrossEntropyLossFlat())
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[CutMix(), Interrupt()])
    torch.testing.assert_close(learn.get_preds()[0].sum(1), torch.ones(16))
    learn.fit(1, cbs=CutMix())
    assert not [o for o in learn.cbs if isinstance(o, Mix)]

def test_only_training_is_mixed():
    spy = Spy()
    learn = learner((ids,), F.cross_entropy, MixUp(), spy)
    learn.fit(1)
    plain = [torch.isclose(got, F.cross_entropy(pred, *yb)).item() for _,_,_,got,pred,yb,_ in spy.rows]
    assert plain==[not o[0] for o in spy.rows] and len(set(plain))==2
    torch.testing.assert_close(learn.validate()[0], F.cross_entropy(learn.get_preds(act=lambda o: o)[0], ids).item())

def test_p_is_the_share_of_batches():
    random.seed(0)
    for cb,want in ((MixUp(p=.3), .3), (MixOrCut(.4, .4), .8), (CutMix(p=0), 0), (MixUp(), 1)):
        n = sum(choose(cb.ways) is not None for _ in range(4000))/4000
        assert n==want if want in (0,1) else abs(n-want)<.03
    way = [choose(MixOrCut(.2, .6).ways) for _ in range(4000)]
    n = {f: sum(o is not None and o[0] is f for o in way)/4000 for f in (mixup,cutmix)}
    assert abs(n[mixup]-.2)<.03 and abs(n[cutmix]-.6)<.03

@pytest.mark.parametrize('kw', [dict(p=1.2), dict(p=-.1)])
def test_wrong_share_is_refused(kw):
    with pytest.raises(ValueError, match='sum to 1'): MixUp(**kw)

def test_cooldown():
    spy = Spy()
    learn = learner((ids,), F.cross_entropy, MixUp(cooldown=2), spy)
    learn.fit(5)
    assert {o[1] for o in spy.rows if o[0] and o[2] is not None}=={0,1,2}
    assert {o[1] for o in spy.rows if o[0] and o[2] is None}=={3,4}

def test_lambda_follows_beta():
    random.seed(0)
    spy = Spy()
    learner((ids,), F.cross_entropy, MixUp(.2), spy, bs=1).fit(40, 0.)
    lams = torch.tensor([o[2] for o in spy.rows if o[0]])
    q = torch.distributions.Beta(.2, .2).sample((20000,))
    assert abs(lams.mean()-.5)<.06 and abs(lams.std()-q.std())<.04

class Grab(Callback):
    "Keeps the mixed batches as the model gets them"
    order,run_valid = 8,False
    def __init__(self): self.rows = []
    def after_pred(self): self.rows.append((self.x, self.y, self.mix_up.yb1[0], self.mix_up.lam))

def test_accumulation_gives_the_gradient_of_the_whole():
    "Four mixed batches of 4 accumulated to 16 move the weights as the mean of their gradients does"
    grab = Grab()
    learn = learner((ids,), F.cross_entropy, MixUp(), GradientAccumulation(16), grab, bs=4)
    learn.opt_func = partial(SGD, mom=0., wd=0.)
    ref = learner((ids,), F.cross_entropy, bs=4).model   # the same start
    learn.fit(1, 1., wd=0.)
    loss = sum((lam*F.cross_entropy(ref(x), a) + (1-lam)*F.cross_entropy(ref(x), b))/4 for x,a,b,lam in grab.rows)
    loss.backward()
    for new,old in zip(learn.model.parameters(), ref.parameters()): torch.testing.assert_close(new, old-old.grad)

def test_fastai_tensor_types():
    spy = Spy()
    learn = learner((ids,), CrossEntropyLossFlat(), MixOrCut(), spy)
    learn.dls.train.after_batch = lambda b: (TensorImage(b[0]), TensorCategory(b[1]))
    learn.fit(1)
    assert {type(o) for row in spy.rows for o in row[6] or ()}=={torch.Tensor}

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_under_autocast(cb):
    class Auto(Callback):
        "bf16 on the CPU, entered and left as fastai's `MixedPrecision` does"
        order = MixedPrecision.order
        def before_batch(self):
            self.cast = torch.autocast('cpu', torch.bfloat16)
            self.cast.__enter__()
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.cast.__exit__(None, None, None)
    spy = Spy()
    learner((ids,), CrossEntropyLossFlat(), cb(), Auto(), spy).fit(1)
    assert all(o[3].dtype==torch.float32 and o[3].isfinite() for o in spy.rows) and not torch.is_autocast_enabled('cpu')

def test_seeds_repeat_and_the_callback_pickles():
    def weights():
        learn = learner((ids,), F.cross_entropy, pickle.loads(pickle.dumps(MixOrCut(.4, .4))))
        learn.fit(2)
        return learn.model.heads[0].weight
    assert torch.equal(weights(), weights())
