"Losses against independent references, and under fastai"
import copy, pickle
import pytest, torch, torchvision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import TensorBase, TensorCategory, TensorImage, TensorMultiCategory
from sklearn.metrics import log_loss
from torch import nn

from recipes.losses.core import SoftmaxLoss, cross_entropy
from recipes.losses.multilabel import BCELoss, FocalLoss, sigmoid_focal, smooth_labels

LOSSES = [BCELoss, FocalLoss, SoftmaxLoss]

def batch(loss, n=8, c=5):
    g = torch.Generator().manual_seed(0)
    raw = torch.randn(n, c, generator=g)*3
    y = torch.randint(c, (n,), generator=g) if isinstance(loss, SoftmaxLoss) else (torch.rand(n, c, generator=g)<.3).float()
    return raw,y

@pytest.mark.parametrize('cls', LOSSES)
def test_contract(cls):
    loss = cls()
    raw,y = batch(loss)
    each = cls(reduction='none')(raw, y)
    assert loss.reduction=='mean' and each.shape==(8,) and torch.isclose(each.mean(), loss(raw, y))
    for i in range(8): assert torch.isclose(each[i], loss(raw[i:i+1], y[i:i+1])), 'a value depends on its neighbours'
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)): assert torch.equal(twin(raw, y), loss(raw, y))
    assert loss.activation(raw.bfloat16()).dtype==torch.float32
    assert type(loss(TensorImage(raw), TensorBase(y))) is torch.Tensor

@pytest.mark.parametrize('cls', LOSSES)
def test_float32_under_autocast(cls):
    raw,y = batch(cls(), c=2000)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = cls()(raw.bfloat16(), y)
    assert got.dtype==torch.float32
    assert torch.isclose(got, cls()(raw.bfloat16().float(), y))

@pytest.mark.parametrize('cls', LOSSES)
@pytest.mark.parametrize('scale', [0, 100, 1e4])
def test_gradient_is_finite(cls, scale):
    raw,y = batch(cls())
    raw = (raw.sign()*scale).requires_grad_()
    cls()(raw, y).backward()
    assert raw.grad.isfinite().all()

@pytest.mark.parametrize('cls', LOSSES)
def test_on_the_meta_device(cls):
    raw,y = batch(cls())
    assert cls()(raw.to('meta'), y.to('meta')).shape==()

def test_focal_gradient_with_small_gamma():
    raw = torch.tensor([[200.,-200.,0.]], requires_grad=True)
    FocalLoss(gamma=.5)(raw, torch.tensor([[1.,0.,1.]])).backward()
    assert raw.grad.isfinite().all()

def test_golden():
    raw,y = torch.tensor([[2.,-1.,0.],[-3.,.5,-.5]]),torch.tensor([[1.,0.,1.],[0.,0.,0.]])
    assert BCELoss()(raw, y).item()==pytest.approx(1.3150392, abs=1e-6)
    assert FocalLoss()(raw, y).item()==pytest.approx(.3214214, abs=1e-6)

@pytest.mark.parametrize('gamma', [0., 1., 2., 3.5])
def test_focal_is_torchvisions(gamma):
    raw,y = batch(None, n=50)
    ref = torchvision.ops.sigmoid_focal_loss(raw, y, alpha=-1, gamma=gamma, reduction='none')
    torch.testing.assert_close(sigmoid_focal(raw, y, gamma), ref)
    torch.testing.assert_close(FocalLoss(gamma)(raw, y), ref.sum(1).mean())
    torch.testing.assert_close(FocalLoss(gamma, 'mean')(raw, y), ref.mean())

def test_bce_is_torchs():
    raw,y = batch(None, n=50)
    torch.testing.assert_close(BCELoss('mean')(raw, y), nn.BCEWithLogitsLoss()(raw, y))
    torch.testing.assert_close(BCELoss('sum')(raw, y), nn.BCEWithLogitsLoss(reduction='sum')(raw, y)/50)
    assert torch.equal(BCELoss()(raw, y), BCELoss()(raw, y.bool()))

@pytest.mark.parametrize('loss', [BCELoss(), FocalLoss(), BCELoss(smooth=.1)])
def test_linear_in_the_target(loss):
    raw,y = batch(loss)
    mixed = loss(raw, .7*y + .3*y.flip(0))
    torch.testing.assert_close(mixed, .7*loss(raw, y) + .3*loss(raw, y.flip(0)))

def test_smoothing_spreads_eps_in_all():
    y = torch.zeros(2, 1103)
    y[0,3] = 1
    got = smooth_labels(y, .1)
    torch.testing.assert_close(got.sum(1), torch.tensor([1., .1]))
    assert got[0,3]==pytest.approx(.9+.1/1103) and got[0,0]==pytest.approx(.1/1103)
    raw = torch.randn(2, 1103)
    torch.testing.assert_close(BCELoss(smooth=.1)(raw, y), BCELoss()(raw, got))

def test_wrong_class_reduction():
    with pytest.raises(ValueError, match='median'): BCELoss('median')

@pytest.mark.parametrize('smooth', [0., .1])
def test_softmax_is_torchs(smooth):
    raw,y = batch(SoftmaxLoss())
    ref = nn.CrossEntropyLoss(label_smoothing=smooth)
    torch.testing.assert_close(SoftmaxLoss(smooth)(raw, y), ref(raw, y))
    soft = torch.rand(8,5).softmax(1)
    torch.testing.assert_close(SoftmaxLoss(smooth)(raw, soft), ref(raw, soft))
    if not smooth: assert SoftmaxLoss()(raw, y).item()==pytest.approx(log_loss(y, raw.softmax(1), labels=range(5)), rel=1e-5)

@pytest.mark.parametrize('strange', [5, -1, 99])
def test_unknown_class_costs_nothing(strange):
    raw,y = batch(SoftmaxLoss())
    raw.requires_grad_()
    y2 = y.clone()
    y2[[1,4]] = strange
    keep = torch.tensor([0,2,3,5,6,7])
    torch.testing.assert_close(SoftmaxLoss()(raw, y2), SoftmaxLoss()(raw[keep], y[keep]))
    assert (cross_entropy(raw, y2)==0).nonzero().flatten().tolist()==[1,4]
    SoftmaxLoss()(raw, torch.full_like(y, strange)).backward()
    assert (raw.grad==0).all()

def learner(loss, y):
    ds = [(TensorImage(torch.rand(3,4,4)), o) for o in y]
    dls = DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0, device='cpu')
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), loss_func=loss)

@pytest.mark.parametrize('cls', LOSSES)
def test_under_fastai(cls):
    _,y = batch(cls(), n=10)
    loss = cls()
    wrap = TensorCategory if cls is SoftmaxLoss else TensorMultiCategory
    learn = learner(loss, [wrap(o) for o in y])
    learn.remove_cb(ProgressCallback)
    with learn.no_logging():
        learn.fit(1)
        p,t,dec,each = learn.get_preds(with_loss=True, with_decoded=True)
        raw,_ = learn.get_preds(act=lambda o: o)
        total = learn.validate()[0]
    assert loss.reduction=='mean' and each.shape==(10,)
    assert torch.Tensor(each).mean().item()==pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(torch.Tensor(each), cls(reduction='none')(raw, t))
    ref = raw.softmax(1) if cls is SoftmaxLoss else raw.sigmoid()
    torch.testing.assert_close(torch.Tensor(p), torch.Tensor(ref))
    assert torch.equal(torch.Tensor(dec), torch.Tensor(ref.argmax(1) if cls is SoftmaxLoss else raw>0))

def test_loss_not_reduced_is_put_back():
    learn = learner(BCELoss(), torch.zeros(4,5))
    with learn.loss_not_reduced(): assert learn.loss_func(torch.zeros(4,5), torch.zeros(4,5)).shape==(4,)
    assert learn.loss_func.reduction=='mean'
