"Stripe and row heads, stages, coordinates: against slow loops, and with what they learn in the model"
import math
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.nn import functional as F
from callbacks.optim import adamw
from recipes.losses.core import SoftmaxLoss
from recipes.losses.features import PartsLoss, centre, ring
from recipes.models.backbone import body
from recipes.models.heads import ImageModel, body_head, linear_head
from recipes.models.margin import CosineHead, KeepMap
from recipes.models.parts import Centres, FirstHead, Ring, RowBranch, StripeHead, centres_of, stripes
from recipes.models.pooling import GeM, GlobalAvg, gem
from recipes.models.stages import CoordConv, EachPool, Stages, add_coords, coords
from recipes.whale_nets import centre_rate

def test_stripe_features_by_hand():
    "GeM 3.74, batch norm, linear, CELU, batch norm, of a quarter of the width each"
    head,x = StripeHead(6, 5, dim=7).eval(),torch.rand(3,6,4,12)
    for i in range(4):
        neck = head.necks[i]
        v = gem(x[...,3*i:3*i+3], 3.74)/math.sqrt(1+1e-5)
        v = F.celu(v@neck[3].weight.T+neck[3].bias)/math.sqrt(1+1e-5)
        torch.testing.assert_close(head.features(x)[:,i], v)
        torch.testing.assert_close(head(x)[i], v@head.outs[i][1].weight.T+head.outs[i][1].bias)
    whole = head.features(x).flatten(1)
    torch.testing.assert_close(head(x)[4], whole@head.joint[1].weight.T+head.joint[1].bias)
    torch.testing.assert_close(head.embed(x), whole/whole.norm(dim=1, keepdim=True))

def test_a_stripe_sees_its_stripe_only():
    head,x = StripeHead(6, 5, dim=7).eval(),torch.rand(2,6,4,12).requires_grad_()
    g = torch.autograd.grad(head(x)[1].sum(), x)[0].abs().sum((0,1,2))
    assert (g>0).tolist()==[3<=i<6 for i in range(12)]
    with pytest.raises(ValueError, match='a map 3 wide cannot be cut into 4 stripes'): head(torch.rand(2,6,4,3))
    assert [o.shape[-1] for o in stripes(torch.rand(1,1,1,7), 3)]==[3,2,2]

def test_joint_branch_is_detached():
    head,x = StripeHead(6, 5, dim=7, extra=Ring),torch.rand(3,6,4,12).requires_grad_()
    head(x)[4].sum().backward()
    assert x.grad is None and all(p.grad is None for p in head.necks.parameters())
    assert head.joint[1].weight.grad.abs().sum()>0
    head(x)[0].sum().backward()
    assert x.grad.abs().sum()>0

@pytest.mark.parametrize('extra,loss,weight', [(Ring,ring,.01), (Centres,centre,.5)])
def test_what_is_learned_is_in_the_model(extra, loss, weight):
    "Radii and centres are in the head's group, in the checkpoint, and get the right gradient"
    torch.manual_seed(0)
    model = ImageModel(nn.Conv2d(3, 6, 1), KeepMap(), StripeHead(6, 5, dim=7, drop=0., extra=extra)).eval()
    f,(learned,) = PartsLoss(extra=loss, weight=weight),model.head.extra.parameters()
    assert not list(f.parameters()) and any(p is learned for p in body_head(model)[1])
    x,y = torch.rand(4,3,4,8),torch.tensor([1,3,1,5])   # the last is unknown
    raw = model(x)
    f(raw, y).backward()
    v = model.head.features(model.body(x)).detach()
    if extra is Ring:
        want = -2*weight*(v[:3].norm(dim=2)-1.5).sum(0)/3
        extra_value = weight*(v[:3].norm(dim=2)-1.5).square().sum()/3
    else:
        want = torch.zeros_like(learned)
        for i,k in enumerate([1,3,1]): want[:,k] += 2*weight*(learned[:,k].detach()-v[i])/3
        extra_value = weight*sum((v[i]-learned[:,k]).square().sum() for i,k in enumerate([1,3,1]))/3
    torch.testing.assert_close(learned.grad, want, rtol=1e-3, atol=1e-4)
    ce = sum(F.cross_entropy(o[:3], y[:3]) for o in raw[:5])
    torch.testing.assert_close(f(raw, y), ce+extra_value, rtol=1e-4, atol=1e-4)
    assert PartsLoss(extra=loss, weight=weight, reduction='none')(raw, y)[3]==0

def test_radius_finds_the_mean_length():
    head,x = Ring(5, 3, 2),torch.randn(40,2,3)*2
    opt = torch.optim.SGD(head.parameters(), .2)
    for _ in range(100): opt.zero_grad(), ring(head(x), None).mean().backward(), opt.step()
    torch.testing.assert_close(head.radius.detach(), x.norm(dim=2).mean(0), rtol=1e-3, atol=1e-3)

def test_parts_loss_with_shares_and_activation():
    raw,y = (torch.randn(4,5),torch.randn(4,5),torch.rand(4,2,5)),torch.tensor([0,1,2,4])
    f,b = PartsLoss(partial(SoftmaxLoss, .1), extra=centre),y.flip(0)
    soft = .6*F.one_hot(y, 5)+.4*F.one_hot(b, 5)
    torch.testing.assert_close(f(raw, soft), .6*f(raw, y)+.4*f(raw, b))
    assert len(f.outputs(raw))==2 and len(PartsLoss().outputs(raw))==3
    torch.testing.assert_close(f.activation(raw[0].bfloat16()).sum(1), torch.ones(4))

def test_rows():
    "Mean over the width, 1 x 1 convolution, batch norm without bias, length 1"
    rows,x = RowBranch(6, 5).eval(),torch.randn(2,6,4,9)
    for i in range(4):
        v = rows.conv.weight[:,:,0]@x[1,:,i].mean(1)+rows.conv.bias
        torch.testing.assert_close(rows(x)[1,i], v/v.norm())
    assert rows.bn.bias is None
    rows.train()(x).sum().backward()

def test_first_head():
    head,x = FirstHead(6, 10, dim=5).eval(),torch.randn(3,6,8,16)
    z,e,rows = head(x)
    assert rows.shape==(3,8,5) and e.shape==(3,6) and z.shape==(3,10)
    torch.testing.assert_close(e, F.normalize(x.mean((2,3)), dim=1))
    torch.testing.assert_close(z, 16*head.whole.linear(e))
    with torch.autocast('cpu', torch.bfloat16): assert {o.dtype for o in head(x)}=={torch.float32}

# --- stages

ARCHS = ['resnet18','legacy_seresnext50_32x4d','densenet121','inception_resnet_v2','vgg16_bn','tf_efficientnet_b1',
    'dm_nfnet_f0','swin_tiny_patch4_window7_224','vit_tiny_patch16_224','convnext_tiny']

@pytest.mark.parametrize('arch', ARCHS)
def test_stages_of_any_network(arch):
    "Channels are as promised, and maps get smaller"
    with torch.device('meta'):
        b = Stages(body(arch), 3).eval()
        maps = b(torch.empty(2,3,224,224))
        assert sum(o.shape[1] for o in maps)==b.num_features and len(maps)==3 and all(o.ndim==4 for o in maps)
        assert EachPool()(maps).shape==(2,b.num_features)
    assert sorted(o.shape[-1] for o in maps)[::-1]==[o.shape[-1] for o in maps]

def test_stages_are_the_networks_own():
    b = body('resnet18', False).eval()
    x,m = torch.randn(2,3,64,96),b.model
    first = m.layer1(m.maxpool(m.act1(m.bn1(m.conv1(x)))))
    want = [first]
    for layer in m.layer2,m.layer3,m.layer4: want.append(layer(want[-1]))
    for got,o in zip(Stages(b)(x), want): torch.testing.assert_close(got, o)
    pooled = EachPool(partial(GeM, 3.))([o.abs() for o in want])
    torch.testing.assert_close(pooled, torch.cat([gem(o.abs(), 3.) for o in want], 1))

def test_fusion_trains_every_stage():
    b = Stages(body('resnet18', False))
    model = ImageModel(b, EachPool(), CosineHead(b.num_features, 3, 8))
    x = torch.randn(2,3,64,64)
    model(x).square().sum().backward()
    unused = [k for k,p in model.named_parameters() if p.grad is None]
    assert not unused, unused
    assert len(body_head(model)[1])==len(list(model.head.parameters()))

# --- places

@pytest.mark.parametrize('radius', [False, True])
def test_coord_conv_is_one_convolution(radius):
    "The sum of two convolutions is the paper's one over more channels"
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    both,x = CoordConv(conv, radius),torch.randn(2,3,7,9)
    torch.testing.assert_close(both(x), conv(x))   # at first
    nn.init.normal_(both.place.weight)
    ys,xs = [[-1+2*i/(n-1) for i in range(n)] for n in (7,9)]
    more = torch.tensor([[[a if c==0 else b if c==1 else math.hypot(a, b) for a in xs] for b in ys] for c in range(2+radius)])
    torch.testing.assert_close(coords(x, radius)[0], more)
    one = F.conv2d(torch.cat([x, more.expand(2,-1,-1,-1)], 1), torch.cat([conv.weight, both.place.weight], 1), conv.bias, 2, 1)
    torch.testing.assert_close(both(x), one, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('arch', ['resnet18','densenet121','tf_efficientnet_b0','vit_tiny_patch16_224'])
def test_add_coords(arch):
    "Nothing changes at first, the first convolution learns, and bfloat16 and one-channel places are fine"
    b = body(arch, False, size=64).eval()
    x = torch.randn(1,3,64,64)
    before = b(x)
    b = add_coords(b)
    torch.testing.assert_close(b(x), before)
    b(x).square().sum().backward()
    places = [o.place.weight for o in b.modules() if isinstance(o, CoordConv)]
    assert len(places)==1 and places[0].grad.abs().sum()>0
    with torch.autocast('cpu', torch.bfloat16): b(x)

def test_coords_and_stages_together():
    b = Stages(add_coords(body('resnet18', False)))
    out = ImageModel(b, EachPool(), linear_head(b.num_features, 4))(torch.randn(2,3,64,64))
    assert out.shape==(2,4) and any(k.endswith('place.weight') for k in b.state_dict())
    assert isinstance(EachPool().pool, GlobalAvg)

def test_centres_at_their_own_rate():
    "By the formula, untouched by Adam and by weight decay, and the rest of the model moves"
    torch.manual_seed(0)
    model = ImageModel(nn.Conv2d(3, 6, 1), KeepMap(), StripeHead(6, 5, dim=7, drop=0., extra=Centres))
    loss,x,y = PartsLoss(extra=centre, weight=.5),torch.rand(4,3,4,8),torch.tensor([1,3,1,0])
    (c,),items = centres_of(model),list(zip(x, y))
    was,other = c.detach().clone(),model.head.necks[0][3].weight.detach().clone()
    seen = []
    class Seen(Callback):
        "Keeps the gradient of the centres"
        order = 79
        def before_step(self): seen.append(c.grad.clone())
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, model, loss_func=loss, opt_func=partial(adamw, wd=.1), cbs=[Seen(),*centre_rate()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert seen[0].abs().sum()>0 and torch.allclose(c, was-.5*seen[0], atol=1e-6)
    assert not torch.equal(model.head.necks[0][3].weight, other)
