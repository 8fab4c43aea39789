"Losses for many labels against golden vectors and slow loops; which rows they leave without a gradient"
import math
from functools import partial
import numpy as np, pytest, torch
from recipes.losses.missing import AsymmetricLoss, ForgivingLoss, PositiveLoss, asymmetric, forgiving, positive_weights
from recipes.losses.multilabel import BCELoss, FocalLoss, sigmoid_focal
from recipes.losses.only import OnlyGroup
from recipes.losses.f2 import BCESoftF2Loss, SoftF2Loss, dead_rows, soft_f2
from recipes.metrics import f2_rows
from torch.nn import functional as F
from types import SimpleNamespace

RAW,Y = torch.tensor([[2.,-1.,0.],[-3.,.5,-.5]]),torch.tensor([[1.,0.,1.],[0.,0.,0.]])

def batch(seed=0, n=40, c=12, share=.15):
    "Outputs, and labels that a quarter of the rows does not have"
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand((n,c), generator=g)<share).float()
    y[::4] = 0
    return 3*torch.randn((n,c), generator=g),y

def f2_slow(p, y):
    tp = sum(a*b for a,b in zip(p, y))
    return 5*tp/(4*sum(y)+sum(p))

@pytest.mark.parametrize('form', ['closed','pr'])
def test_golden(form):
    assert SoftF2Loss(form)(RAW, Y).item()==pytest.approx(.6422711, abs=2e-6)
    assert SoftF2Loss(form, reduction='none')(RAW, Y).tolist()==pytest.approx([1-.7154577,1], abs=2e-6)
    assert FocalLoss()(RAW, Y).item()==pytest.approx(.3214214, abs=1e-6)
    assert BCESoftF2Loss(form=form)(RAW, Y).item()==pytest.approx(1.3150392+.6422711, abs=2e-6)

@pytest.mark.parametrize('form', ['closed','pr'])
def test_soft_f2_slow(form):
    raw,y = batch()
    p = raw.sigmoid()
    want = [f2_slow(*o) for o in zip(p.double().tolist(), y.tolist())]
    np.testing.assert_allclose(soft_f2(p, y, form), want, atol=1e-5)
    hard = (p>.5).float()
    np.testing.assert_allclose(soft_f2(hard, y), f2_rows(y.numpy(), hard.numpy()), atol=1e-6)

@pytest.mark.parametrize('form', ['closed','pr'])
def test_dead_rows(form):
    "Exactly the rows without a label are dead in soft F2, and none with cross entropy beside it"
    raw,y = batch()
    none = y.sum(1)==0
    assert 10<=none.sum()<40
    assert torch.equal(dead_rows(SoftF2Loss(form), raw, y), none)
    assert not dead_rows(BCESoftF2Loss(form=form), raw, y).any()
    assert not dead_rows(SoftF2Loss(form, smooth=.1), raw, y).any()

def test_dead_rows_stay():
    "Training on soft F2 alone leaves the scores of a row without labels where they are; with cross entropy they fall"
    moved = {}
    for loss in SoftF2Loss(),BCESoftF2Loss():
        raw = RAW.clone().requires_grad_()
        opt = torch.optim.SGD([raw], 1.)
        for _ in range(20):
            opt.zero_grad()
            loss(raw, Y).backward()
            opt.step()
        moved[type(loss).__name__] = (raw.detach()-RAW)[1]
        assert raw[0,0]>RAW[0,0] and raw[0,2]>RAW[0,2]
    assert torch.equal(moved['SoftF2Loss'], torch.zeros(3)) and (moved['BCESoftF2Loss']<-.2).all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_soft_f2_is_fp32(dtype):
    "7,178 classes in half precision: the sums would overflow or vanish"
    raw,y = torch.full((2,7178), -12., dtype=dtype),torch.zeros(2, 7178)
    y[:,:3] = 1
    for form in 'closed','pr':
        each = SoftF2Loss(form, reduction='none')(raw, y)
        assert each.dtype==torch.float32
        np.testing.assert_allclose(each, SoftF2Loss(form, reduction='none')(raw.float(), y))

def test_saturated():
    "Outputs as large as they come give finite losses and gradients"
    raw,y = torch.tensor([[200.,-200,200,-200]]),torch.tensor([[1.,1,0,0]])
    losses = [SoftF2Loss(),SoftF2Loss('pr'),BCESoftF2Loss(),AsymmetricLoss(),AsymmetricLoss(margin=0),AsymmetricLoss(neg=.5)]
    for loss in (*losses,ForgivingLoss(),PositiveLoss(21)):
        z = raw.clone().requires_grad_()
        loss(z, y).backward()
        assert z.grad.isfinite().all(), type(loss)
    assert AsymmetricLoss(margin=0, neg=0)(raw, y).item()==pytest.approx(400)

def asl_slow(z, y, pos, neg, m):
    "Ridnik et al. 2021, equations 2 to 6, one class of one picture"
    p = 1/(1+math.exp(-z))
    pm = max(p-m, 0)
    return -y*(1-p)**pos*math.log(p) - (1-y)*pm**neg*math.log(1-pm)

@pytest.mark.parametrize('pos,neg,m', [(0,4,.05),(1,4,.05),(0,0,0),(2,2,0),(0,1,.2),(.5,.5,.1)])
def test_asymmetric_slow(pos, neg, m):
    raw,y = batch(1)
    want = [[asl_slow(float(a), float(b), pos, neg, m) for a,b in zip(*o)] for o in zip(raw.double(), y)]
    np.testing.assert_allclose(asymmetric(raw, y, pos, neg, m), want, atol=2e-5)

def test_asymmetric_is_focal():
    raw,y = batch(2)
    np.testing.assert_allclose(asymmetric(raw, y, 2, 2, 0), sigmoid_focal(raw, y), atol=1e-5)

def test_asymmetric_soft_targets():
    "Linear in the target, so that mixed ones mean what they should"
    raw,y = batch(3)
    np.testing.assert_allclose(asymmetric(raw, .3*y+.35), .3*asymmetric(raw, y)
        +.35*(asymmetric(raw, 0*y+1)+asymmetric(raw, 0*y)), atol=1e-5)

def test_forgiving():
    "For hard labels, `1+w` times the gradient of labels and that of absent ones as it is"
    raw,y = batch(4)
    bce = lambda z,t: -(t*math.log(1/(1+math.exp(-z)))+(1-t)*math.log(1-1/(1+math.exp(-z))))
    want = [[bce(float(a), float(b))+.7*bce(float(a)*float(b), float(b)) for a,b in zip(*o)] for o in zip(raw.double(), y)]
    np.testing.assert_allclose(forgiving(raw, y, .7), want, atol=1e-5)
    z = raw.requires_grad_()
    one, = torch.autograd.grad(ForgivingLoss(.7)(z, y), z)
    two, = torch.autograd.grad(PositiveLoss(1.7)(z, y), z)
    np.testing.assert_allclose(one, two, atol=1e-6)

def test_positive():
    raw,y = batch(5, c=4)
    w = positive_weights([900,100,1,0])
    np.testing.assert_allclose(w, [1,3,20,1])
    loss = PositiveLoss(reduction='none').prepare([np.array([900,100,1,0])])
    want = (F.binary_cross_entropy_with_logits(raw, y, reduction='none')*(1+y*(torch.tensor(w)-1))).sum(1)
    np.testing.assert_allclose(loss(raw, y), want, rtol=1e-5)
    with pytest.raises(ValueError, match='prepare'): PositiveLoss()(raw, y)
    assert PositiveLoss(21).prepare([np.ones(4)]).weights.item()==21

def test_only_group():
    table = SimpleNamespace(groups=dict(culture=np.arange(3), tag=np.arange(3, 12)))
    raw,y = batch(6)
    loss = OnlyGroup('tag', partial(PositiveLoss, power=1)).of(table).prepare([np.arange(12, 0, -1)])
    want = PositiveLoss(power=1).prepare([np.arange(9, 0, -1)])
    np.testing.assert_allclose(loss(raw, y), want(raw[:,3:], y[:,3:]), rtol=1e-6)
    z = raw.requires_grad_()
    g, = torch.autograd.grad(loss(z, y), z)
    assert not g[:,:3].any() and (g[:,3:]!=0).all()
    assert torch.equal(loss.activation(raw), BCELoss().activation(raw))
    with pytest.raises(ValueError, match='culture, tag'): OnlyGroup('tags').of(table)
    with pytest.raises(ValueError, match='of'): OnlyGroup('tag')(raw, y)
