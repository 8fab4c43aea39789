"Cosine heads and margin losses against golden numbers, pytorch-metric-learning, slow loops and a real fit"
import math, pickle, random
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from fastai.torch_core import TensorCategory
from pytorch_metric_learning import losses as pml
from torch import nn
from torch.nn import functional as F
from callbacks.annealing import TellStep, annealed
from callbacks.checkpoint import ResumableLearner, fit_state
from callbacks.finder import lr_find
from callbacks.freeze import freeze_to
from callbacks.mix import CutMix, MixUp
from callbacks.schedule import flat
from recipes.losses.core import SoftmaxLoss
from recipes.losses.heads import MultiHeadLoss
from recipes.losses.imbalance import WeightedSoftmaxLoss
from recipes.losses.margin import (AdaptiveMarginLoss, ArcFaceLoss, CombinedMarginLoss, CosFaceLoss,
    combined_margin, hush_twin, margins_by_count)
from recipes.losses.open import OpenLoss, open_targets, suppress, to_uniform
from recipes.losses.sphere import SphereFaceLoss, sphere_lambda, sphere_margin
from recipes.models.heads import ImageModel, body_head
from recipes.models.margin import CosineHead, EmbedHead, KeepMap, ScaledHead, cosines, grid_neck, pudae_head, unit, yu4u_head
from recipes.models.pooling import GlobalAvg

COS = torch.tensor([.9,.3,-.5,-.95])
COUNTS = np.array([70,12,3,1,0])

def batch(n=16, c=5, d=8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, d, generator=g),torch.randn(c, d, generator=g),torch.randint(c, (n,), generator=g)

# --- the formula

def target(loss, c=COS):
    "The right logit for each cosine, read from what the loss makes of it"
    return loss.s*combined_margin(c, loss.m1, loss.m2, loss.m3)

def test_golden():
    torch.testing.assert_close(target(ArcFaceLoss(.5, 64)), torch.tensor([37.17424,-12.42035,-54.65510,-76.14162]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(target(CosFaceLoss(.35, 32)), torch.tensor([17.6,-1.6,-27.2,-41.6]))
    mixed = target(CombinedMarginLoss(1, .4, .15, 32))
    torch.testing.assert_close(mixed[:3], torch.tensor([16.29476,-7.84522,-30.32886]), rtol=1e-5, atol=1e-4)
    assert mixed[3]==pytest.approx(32*(-.95-.4*math.sin(.4)-.15), rel=1e-5)   # beyond pi - .4: the line
    torch.testing.assert_close(sphere_margin(COS), torch.tensor([-.2312,-2.3448,-4.5,-6.29605]), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('m', [(1,.5,0), (1,.4,.15), (1,.05,0), (1,1.2,0), (1.35,0,0), (2,.3,.1), (4,0,0)])
def test_falls_everywhere(m):
    "Also across the guard, whose line may not jump up"
    c = torch.linspace(.001, math.pi-.001, 20001).double().cos()
    assert (combined_margin(c, *m).diff()<0).all()

def test_guard_is_the_reference():
    "`where(c > cos(pi-m), phi, c - sin(pi-m)*m)`, as pudae's and earhian's code has it"
    c = torch.linspace(-1, 1, 4001).double()
    phi = c*math.cos(.5)-(1-c**2).clamp(min=0).sqrt()*math.sin(.5)
    want = torch.where(c>math.cos(math.pi-.5), phi, c-math.sin(math.pi-.5)*.5)
    torch.testing.assert_close(combined_margin(c, m2=.5)[1:-1], want[1:-1], rtol=0, atol=1e-6)

@pytest.mark.parametrize('loss', [ArcFaceLoss(), CosFaceLoss(), CombinedMarginLoss(1.2, .4, .15, 32), SphereFaceLoss(),
    ArcFaceLoss(twins='mask')])
def test_gradients_at_the_ends(loss):
    "A picture exactly at its class's vector, and one exactly opposite, under float32"
    head = CosineHead(6, 6, dim=None, length=isinstance(loss, SphereFaceLoss))
    x = torch.cat([head.weight.detach()[:2], -head.weight.detach()[:2], torch.zeros(1,6)]).requires_grad_()
    loss(head(x), torch.tensor([0,1,0,1,2])).backward()
    assert x.grad.isfinite().all() and head.weight.grad.isfinite().all() and head.weight.grad.abs().sum()>0

# --- against pytorch-metric-learning

@pytest.mark.parametrize('ours,theirs', [
    (ArcFaceLoss(.5, 64), partial(pml.ArcFaceLoss, margin=math.degrees(.5), scale=64)),
    (ArcFaceLoss(.2, 10), partial(pml.ArcFaceLoss, margin=math.degrees(.2), scale=10)),
    (CosFaceLoss(.35, 32), partial(pml.CosFaceLoss, margin=.35, scale=32))])
def test_is_pmls(ours, theirs):
    x,w,y = batch(200)
    x = x+6*w[y]*(torch.arange(200)%2)[:,None]
    theirs = theirs(num_classes=5, embedding_size=8)
    theirs.W.data = w.T.clone()
    near = (cosines(x, w).gather(1, y[:,None])[:,0].acos()+.5<math.pi) if isinstance(ours, ArcFaceLoss) else y>=0
    torch.testing.assert_close(ours(cosines(x[near], w), y[near]), theirs(x[near], y[near]), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('m', [2,4])
def test_sphereface_is_pmls(m):
    x,w,y = batch(100)
    theirs = pml.SphereFaceLoss(5, 8, margin=m, scale=1)
    theirs.W.data = w.T.clone()
    head = CosineHead(8, 5, dim=None, length=True)
    head.weight.data = w
    torch.testing.assert_close(SphereFaceLoss(m, last=0.)(head(x), y), theirs(x, y), rtol=1e-4, atol=1e-4)

def test_sub_centres_are_pmls():
    x,_,y = batch(60)
    theirs = pml.SubCenterArcFaceLoss(num_classes=5, embedding_size=8, margin=math.degrees(.3), scale=16, sub_centers=3)
    head = CosineHead(8, 5, dim=None, subs=3)
    theirs.W.data = head.weight.detach().T.clone()
    torch.testing.assert_close(ArcFaceLoss(.3, 16)(head(x), y), theirs(x, y), rtol=1e-4, atol=1e-4)

# --- the loss against a slow loop

def slow(cos, y, margin, s, twins=None):
    "One picture after the other, in Python"
    each = []
    for c,k in zip(cos.double().tolist(), y.tolist()):
        n = len(c)
        if not 0<=k<n:
            each.append(0.)
            continue
        z = [s*o for o in c]
        z[k] = s*margin(math.acos(c[k]), k)
        if twins: z[(k+n//2)%n] = 1. if twins=='constant' else -math.inf
        top = max(z)
        each.append(top+math.log(sum(math.exp(o-top) for o in z))-z[k])
    return torch.tensor(each)

@pytest.mark.parametrize('twins', [None,'constant','mask'])
def test_twins_and_unknown(twins):
    g = torch.Generator().manual_seed(0)
    cos,y = torch.rand(12, 6, generator=g)*1.6-.8,torch.tensor([0,1,2,3,4,5,6,9,-1,0,3,6])
    loss = ArcFaceLoss(.3, 20, twins=twins, reduction='none')
    want = slow(cos, y, lambda t,k: math.cos(t+.3), 20, twins)
    torch.testing.assert_close(loss(cos, y), want.float(), rtol=1e-4, atol=1e-4)
    loss.reduction = 'mean'
    assert loss(cos, y).item()==pytest.approx(want.sum().item()/8, rel=1e-4)

@pytest.mark.parametrize('how', ['constant','mask'])
def test_twin_gets_no_gradient(how):
    cos = torch.zeros(3,4).uniform_(-.5, .5).requires_grad_()
    ArcFaceLoss(twins=how)(cos, torch.tensor([0,3,4])).backward()
    assert cos.grad[0,2]==0 and cos.grad[1,1]==0 and cos.grad[0,1]!=0 and cos.grad[1,0]!=0
    assert (cos.grad[2]==0).all()   # the unknown

def test_constant_twin_is_pudaes():
    "Ours are theirs but for a shift of all logits"
    z,y = torch.randn(20,10)*9,torch.arange(20)%10
    theirs = z-1
    for i,k in enumerate(y): theirs[i,(k+5)%10] = 0.
    torch.testing.assert_close(F.cross_entropy(hush_twin(z, y), y), F.cross_entropy(theirs, y))

def test_mixed_targets():
    "Shares are what two mixed losses are; without a margin they are cross entropy's"
    x,w,y = batch()
    cos,b = cosines(x, w),y.flip(0)
    soft = .7*F.one_hot(y, 5)+.3*F.one_hot(b, 5)
    for loss in ArcFaceLoss(),CosFaceLoss(smooth=.1),AdaptiveMarginLoss().prepare([COUNTS]):
        torch.testing.assert_close(loss(cos, soft), .7*loss(cos, y)+.3*loss(cos, b), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(CombinedMarginLoss(s=9)(cos, soft), F.cross_entropy(9*cos, soft))
    sphere,raw = SphereFaceLoss(reduction='none'),(cos,torch.full((16,1), 7.))
    torch.testing.assert_close(sphere(raw, soft), .7*sphere(raw, y)+.3*sphere(raw, b))

def test_adaptive():
    m = margins_by_count(COUNTS)
    assert m[0]==pytest.approx(.05) and m[3]==m[4]==pytest.approx(.5) and (np.diff(m)>=0).all()
    assert m[1]==pytest.approx(.05+.45*(12**-.25-70**-.25)/(1-70**-.25))
    assert margins_by_count([3,3]).tolist()==[.5,.5]
    cos,y = torch.rand(20,10)-.5,torch.arange(20)%11
    loss = AdaptiveMarginLoss(s=20, twins='constant', reduction='none').prepare([COUNTS])
    want = slow(cos, y, lambda t,k: math.cos(t+m[k%5]), 20, 'constant')
    torch.testing.assert_close(loss(cos, y), want.float(), rtol=1e-4, atol=1e-4)

def test_annealing():
    cos,y,length = torch.rand(6,4)-.5,torch.tensor([0,1,2,3,4,0]),torch.full((6,1), 3.)
    lam = max(5, 1500/(1+.1*700))
    assert sphere_lambda(700).item()==pytest.approx(lam) and sphere_lambda(10**6)==5
    def psi(t, k): return (lam*math.cos(t)+sphere_margin(torch.tensor(t).cos()).item())/(1+lam)
    got = SphereFaceLoss(reduction='none')((cos,length), y, torch.full((6,), 700.))
    torch.testing.assert_close(got, slow(cos, y, psi, 3.).float(), rtol=1e-4, atol=1e-4)
    lam = 5
    torch.testing.assert_close(SphereFaceLoss(reduction='none')((cos,length), y), slow(cos, y, psi, 3.).float(), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('make', [ArcFaceLoss, CosFaceLoss, AdaptiveMarginLoss, SphereFaceLoss])
def test_as_fastai_wants_it(make):
    x,w,y = batch()
    cos = cosines(x, w)
    raw = (cos,x.norm(dim=1, keepdim=True)) if make is SphereFaceLoss else cos
    loss = pickle.loads(pickle.dumps(make(reduction='none').prepare([COUNTS])))
    each = loss(raw, TensorCategory(y))
    assert each.shape==(16,) and each.dtype==torch.float32 and type(each) is torch.Tensor
    half = tuple(o.bfloat16() for o in raw) if isinstance(raw, tuple) else raw.bfloat16()
    with torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(loss(half, y), each, rtol=.1, atol=1.)
    z = loss.outputs(raw)[0] if make is SphereFaceLoss else raw
    p = loss.activation(z)
    torch.testing.assert_close(p, loss.logits(raw).softmax(1))
    assert loss.decodes(p).tolist()==cos.argmax(1).tolist()

# --- heads

def test_fp32_under_autocast():
    "bfloat16 cosines have two digits"
    x,w,_ = batch()
    with torch.autocast('cpu', torch.bfloat16): got = cosines(x, w)
    torch.testing.assert_close(got, F.cosine_similarity(x[:,None], w[None], dim=2), rtol=1e-5, atol=1e-6)
    assert unit(torch.zeros(2,3)).tolist()==[[0.]*3]*2
    for head in CosineHead(8, 5, 4),CosineHead(8, 5, 4, subs=2),ScaledHead(8, 5),EmbedHead(8, 5):
        with torch.autocast('cpu', torch.bfloat16): assert head(x).dtype==head.embed(x).dtype==torch.float32

def test_yu4u_pools_after_the_norm():
    "4 x 4 fields of an 8 x 24 map, as his average pooling makes them"
    neck,x = grid_neck(3, 7, (2,6), .5, channels=False).eval(),torch.randn(2,3,8,24)
    torch.testing.assert_close(neck[1](neck[0](x)), F.avg_pool2d(neck[0](x), 4))
    assert neck[4].in_features==3*12 and isinstance(neck[2], nn.Dropout)
    assert isinstance(pudae_head(4, 2).neck[2], nn.Dropout2d) and pudae_head(4, 2).neck[4].in_features==400

@pytest.mark.parametrize('head', [pudae_head, yu4u_head])
@pytest.mark.parametrize('size', [(10,10),(8,24),(5,7)])
def test_grid_heads_take_any_map(head, size):
    cos = ImageModel(nn.Identity(), KeepMap(), head(4, 3))(torch.randn(3,4,*size))
    assert cos.shape==(3,3) and cos.abs().max()<=1+1e-6

def test_scaled_head():
    head = ScaledHead(8, 3).eval()
    head.linear.bias.data.uniform_()
    x = torch.randn(5,8)
    bn = x/math.sqrt(1+1e-5)
    want = 16*(bn/bn.norm(dim=1, keepdim=True)@head.linear.weight.T+head.linear.bias)
    torch.testing.assert_close(head(x), want)
    assert head.neck[1].bias is None and 'neck.1.bias' not in head.state_dict()
    head.train()(x).sum().backward()

# --- the weights live in the model

def make_dls(n=48, classes=4):
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3,8,8, generator=g)*.3+(i%classes)*.5,torch.tensor(i%(classes+1))) for i in range(n)]
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
    dls.n_inp = 1
    return dls

def make_learn(loss, cls=Learner, cbs=None, **kw):
    torch.manual_seed(0), random.seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    model = ImageModel(body, GlobalAvg(), CosineHead(6, 4, 5, **kw))
    learn = cls(make_dls(), model, loss_func=loss, splitter=body_head, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    return learn

def test_optimizer_freezing_and_lr_find_see_them():
    learn = make_learn(ArcFaceLoss(.2, 16))
    learn.create_opt()
    w = learn.model.head.weight
    assert not list(learn.loss_func.parameters())
    assert any(p is w for p in learn.opt.param_lists[1]) and not any(p is w for p in learn.opt.param_lists[0])
    before = w.detach().clone()
    lr_find(learn, 1e-4, 1., 20)
    assert torch.equal(w, before)
    conv = learn.model.body[0].weight.detach().clone()
    freeze_to(learn.opt, 1)
    with learn.no_logging(): learn.fit(1, 1e-2)
    assert not torch.equal(w, before) and torch.equal(learn.model.body[0].weight, conv)
    assert torch.equal(fit_state(learn)['model']['head.weight'], w)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('loss,kw', [(ArcFaceLoss, {}), (SphereFaceLoss, dict(length=True))])
def test_learns_with_mixing(mix, loss, kw):
    "One class of five is unknown; what is recorded is the mix of two losses"
    seen = []
    class Look(mix):
        def after_loss(self):
            super().after_loss()
            if self.training: seen.append((self.learn.loss.detach(),self.pred,self.yb,self.yb1,self.lam))
    learn = make_learn(loss(), cbs=[Look(),TellStep()], **kw)
    with learn.no_logging(): learn.fit(1, 1e-2)
    f = learn.loss_func
    for got,pred,ya,yb,lam in seen: torch.testing.assert_close(got, (lam*f(pred, *ya)+(1-lam)*f(pred, *yb)).detach())
    assert len(seen)==6 and (len(seen[-1][2])==(2 if loss is SphereFaceLoss else 1))
    if loss is SphereFaceLoss: assert [int(o[3][1][0]) for o in seen]==[0,1,2,3,4,5]

class Take(Callback):
    "Takes the state at the end of the first epoch, and stops"
    order = 95
    def after_epoch(self):
        self.state = fit_state(self.learn)
        raise KeyboardInterrupt

def test_resumed_sphereface_is_the_same():
    "The number of the batch goes on where the killed run stopped, and the class vectors come back"
    cbs = partial(annealed, 1e-2, 3, flat)
    make = partial(make_learn, SphereFaceLoss(), length=True)
    whole = make(cbs=cbs())
    with whole.no_logging(): whole.fit(3)
    take = Take()
    stopped,again = make(cbs=[*cbs(), take]),make(cls=ResumableLearner, cbs=cbs())
    with pytest.raises(KeyboardInterrupt), stopped.no_logging(): stopped.fit(3)
    again.state = take.state
    with again.no_logging(): again.fit(3)
    for a,b in zip(again.model.parameters(), whole.model.parameters()): assert torch.equal(a, b)

def test_cosine_head_learns():
    learn = make_learn(ArcFaceLoss(.2, 16))
    before = learn.validate()[0]
    with learn.no_logging(): learn.fit(6, 2e-2)
    assert learn.validate()[0]<.6*before

# --- the unknown

def test_uniform_and_suppression():
    z = torch.randn(6,9)*4
    torch.testing.assert_close(to_uniform(z), -(z.log_softmax(1)/9).sum(1))
    torch.testing.assert_close(suppress(z), z.exp().sum(1).log(), rtol=1e-4, atol=1e-4)
    kl = (torch.full((6,9), 1/9)*(math.log(1/9)-z.log_softmax(1))).sum(1)
    torch.testing.assert_close(to_uniform(z)-math.log(9), kl)   # the same but for a constant

def test_open_loss():
    x,w,_ = batch()
    cos,y = cosines(x, w),torch.arange(16)%7-1   # -1 and 5 are unknown
    ok = (y>=0) & (y<5)
    loss = OpenLoss(partial(ArcFaceLoss, s=12), weight=.3)
    want = (ArcFaceLoss(s=12)(cos, y)*ok.sum() + .3*to_uniform(12*cos[~ok]).sum())/16
    torch.testing.assert_close(loss(cos, y), want)
    teacher = (torch.randn(16,5)*2).softmax(1)
    soft = open_targets(y, 5, teacher)
    assert torch.equal(soft[ok].argmax(1), y[ok]) and torch.equal(soft[~ok], teacher[~ok])
    want = (ArcFaceLoss(s=12)(cos, y)*ok.sum() + .3*F.cross_entropy(12*cos[~ok], teacher[~ok], reduction='sum'))/16
    torch.testing.assert_close(loss(cos, soft), want)

def test_open_loss_flattens_the_unknown():
    cos = torch.zeros(1,5).uniform_(-.5, .5).requires_grad_()
    for unknown in to_uniform,suppress:
        g = torch.autograd.grad(OpenLoss(ArcFaceLoss, unknown)(cos, torch.tensor([5])), cos)[0]
        assert g[0,cos.argmax()]>0   # the step goes down
    g = torch.autograd.grad(OpenLoss(SoftmaxLoss)(cos, torch.tensor([5])), cos)[0]
    torch.testing.assert_close(g[0], cos[0].softmax(0).detach()-.2)
    sphere = OpenLoss(SphereFaceLoss)
    raw = (cos.detach(),torch.ones(1,1))
    assert sphere(raw, torch.tensor([2]), torch.tensor([9.]))==SphereFaceLoss()(raw, torch.tensor([2]), torch.tensor([9.]))
    assert torch.equal(sphere.outputs(raw)[0], SphereFaceLoss().outputs(raw)[0])

@pytest.mark.parametrize('wrap', [lambda: OpenLoss(loss=SphereFaceLoss, unknown=suppress), lambda: PartsOf(loss=SphereFaceLoss)])
def test_a_loss_inside_is_told_the_step(wrap):
    "The margin of the loss inside grows with the batches, as it does alone"
    seen = []
    class Look(Callback):
        order = 60
        def after_loss(self): seen.append((self.pred,self.yb,self.learn.loss.detach()))
    learn = make_learn(wrap(), cbs=[Look(),TellStep()], length=True)
    with learn.no_logging(): learn.fit(1, 1e-2)
    trained = [o for o in seen if len(o[1])==2]
    assert [int(o[1][1][0]) for o in trained]==list(range(len(trained))) and len(trained)==6
    pred,(y,step),loss = trained[0]
    want = wrap()(pred, y, step)
    torch.testing.assert_close(loss, want.detach())
    assert abs(float(want-wrap()(pred, y)))>.1   # as if it were long trained

class PartsOf(OpenLoss):
    "Another wrapper, as a user may write one"

def test_heads_are_told_when_weights_count():
    loss = MultiHeadLoss(weights=(1,1), loss=WeightedSoftmaxLoss).prepare([np.array([90,10]),np.array([50,5,1])])
    raw,y = torch.randn(8, 5),(torch.randint(2, (8,)),torch.randint(3, (8,)))
    assert loss.takes_on and not loss.takes_step and not MultiHeadLoss().takes_on
    off,on = (loss.per_sample(raw, *y, torch.full((8,), o)) for o in (0.,1.))
    torch.testing.assert_close(off, sum(SoftmaxLoss().per_sample(o, t) for o,t in zip(raw.split([2,3], -1), y)))
    torch.testing.assert_close(on, loss.per_sample(raw, *y))
    with pytest.raises(ValueError, match='1 targets for 2 heads'): loss.per_sample(raw, y[0])
