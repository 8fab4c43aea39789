"Backbones, weights, pooling and heads: what their pages cannot show"
import numpy as np
import pytest, timm, torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.layers import AdaptiveConcatPool2d
from fastai.learner import Learner
from torch import nn

from recipes.losses.multilabel import BCELoss
from recipes.models.backbone import ALIASES, body, norm_stats, resolve, to_map
from recipes.models.heads import ImageModel, body_head, build, linear_head, prior_bias, std_head
from recipes.models.pooling import GeM, GlobalAvg, GlobalConcat, GlobalMax, gem

# --- names

def test_aliases_lead_somewhere_and_hide_no_timm_name():
    old = timm.models.get_deprecated_models()
    for k,v in ALIASES.items():
        assert timm.is_model(v) and v not in old, f'{k} -> {v}'
        assert not timm.is_model(k) or k in old, f'{k} is a name of timm'

@pytest.mark.parametrize('said,name', [('seresnext50','seresnext50_32x4d'), ('SE_ResNeXt101_32x4d','legacy_seresnext101_32x4d'),
    ('senet154','senet154'), ('pnasnet5','pnasnet5large'), ('inceptionresnetv2','inception_resnet_v2'),
    ('effnet_b0','tf_efficientnet_b0'), ('efficientnet-b3','tf_efficientnet_b3'), ('efficientnet_b3','efficientnet_b3'),
    ('resnext50','resnext50_32x4d'), ('densenet','densenet121'), ('ResNet18','resnet18'),
    ('tf_efficientnet_b1_ns','tf_efficientnet_b1.ns_jft_in1k'), ('resnet18.a1_in1k','resnet18.a1_in1k')])
def test_resolve(said, name): assert resolve(said)==name

@pytest.mark.parametrize('said,near', [('resnet81','resnet18'), ('sedensenet161','densenet161'), ('efficientnet-b9','efficientnet_b8'),
    ('resnet18.tv_in21k','resnet18.tv_in1k')])
def test_a_miss_names_the_nearest(said, near):
    with pytest.raises(ValueError, match=near): resolve(said)

def test_norm_stats():
    assert norm_stats('pnasnet5')==((.5,.5,.5),(.5,.5,.5))
    assert norm_stats('seresnext50')[0]==pytest.approx((.485,.456,.406))

# --- bodies

BIG = [('legacy_senet154',224,(2048,7,7)), ('pnasnet5large',331,(4320,11,11)), ('inception_resnet_v2',299,(1536,8,8)),
    ('swin_tiny',224,(768,7,7)), ('vit_base',224,(768,14,14)), ('vgg16_bn',384,(512,12,12)), ('densenet121',320,(1024,10,10))]

@pytest.mark.parametrize('arch,size,shape', BIG)
def test_big_ones_on_meta(arch, size, shape):
    with torch.device('meta'):
        model = build(arch, 1103, size=size)
        x = torch.empty(2,3,size,size)
        assert tuple(model.body(x).shape)==(2,*shape)
        assert model(x).shape==(2,1103) and model.body.num_features==shape[0]

FAMILIES = '''resnet18 seresnext50 legacy_seresnet18 tf_efficientnet_lite0 mobilenetv3_small_050 convnext_atto dm_nfnet_f0
    dpn68 inception_v3 swin_s3_tiny_224 swinv2_tiny_window8_256 vit_tiny vit_small_patch14_reg4_dinov2
    deit_tiny_distilled_patch16_224 xcit_nano_12_p16_224 twins_svt_small mobilevit_xs'''.split()

@pytest.mark.parametrize('arch', FAMILIES)
def test_any_size_gives_a_map(arch):
    with torch.device('meta'):
        net = body(arch).eval()
        for h,w in ((224,224),(160,256)):
            got = net(torch.empty(1,3,h,w)).shape
            assert len(got)==4 and got[1]==net.num_features
            assert abs(got[2]/got[3]-h/w)<.35, f'{arch} gives {tuple(got)} for {h} x {w}'

@pytest.mark.parametrize('arch', ['test_vit', 'vit_tiny_patch16_224', 'swin_s3_tiny_224'])
def test_map_is_in_reading_order(arch):
    net,x = body(arch, pretrained=False, size=(64,96)).eval(),torch.randn(1,3,64,96)
    with torch.no_grad():
        got = net(x)
        ref = net.model.forward_intermediates(x, indices=1, norm=True, output_fmt='NCHW', intermediates_only=True)[-1]
    torch.testing.assert_close(got, ref)

def test_tokens_that_make_no_map():
    with pytest.raises(ValueError, match='50 tokens'): to_map(torch.rand(1,50,8), (5,6))

def test_every_parameter_of_vgg_learns():
    with torch.device('meta'):
        net = body('vgg11_bn')
        net(torch.empty(2,3,64,64)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())

# --- pooling and heads

def test_gem_golden():
    x = torch.arange(1.,17).view(1,1,4,4)
    assert gem(x, 3).item()==pytest.approx(10.495085, rel=1e-6)
    assert GeM(3.74, learn=False)(x).item()==pytest.approx(10.966107, rel=1e-6)
    assert gem(x, 1).item()==pytest.approx(8.5)

def test_gem_is_float32_inside_and_its_power_bounded():
    x = torch.full((1,2,4,4), 60000.).half()   # its cube is beyond half precision
    assert gem(x, 3.).dtype==torch.half and gem(x, 3.).isfinite().all()
    x,pool = torch.rand(2,3,5,7),GeM()
    with torch.autocast('cpu', dtype=torch.bfloat16): torch.testing.assert_close(pool(x), gem(x, 3.))
    with torch.no_grad(): pool.p.fill_(-5)
    torch.testing.assert_close(pool(x), gem(x, .1))

def test_gem_gradient_at_zero():
    x,pool = torch.zeros(1,2,3,3, requires_grad=True),GeM()
    pool(x).sum().backward()
    assert x.grad.isfinite().all() and pool.p.grad.isfinite().all()

def test_pools():
    x = torch.randn(2,3,5,7)
    torch.testing.assert_close(GlobalConcat()(x), AdaptiveConcatPool2d()(x).flatten(1))
    for o in (GlobalAvg, GlobalMax, GlobalConcat, GeM): assert o()(x).shape==(2, 3*o.width)

@pytest.mark.parametrize('head', [linear_head, std_head])
def test_heads(head):
    m = head(16, 5)
    assert m(torch.rand(4,16)).shape==(4,5) and (m[-1].bias==0).all()
    assert m[-1].weight.std().item()==pytest.approx((2/m[-1].in_features)**.5, rel=.35)

def test_prior_bias_starts_at_the_frequencies():
    prior = np.array([.5,.2,.01,0])
    head = prior_bias(std_head(16, 4), prior).eval()
    with torch.no_grad(): head[-1].weight.zero_()
    p = head(torch.rand(3,16)).sigmoid()
    torch.testing.assert_close(p[0], torch.tensor([.5,.2,.01,1e-5]))

def test_split_covers_everything_once():
    model = build('test_resnet', 3, pretrained=False, pool=GeM, head=std_head)
    a,b = body_head(model)
    assert {id(p) for p in a}.isdisjoint(id(p) for p in b) and len(a)+len(b)==len(list(model.parameters()))
    assert any(p is model.pool.p for p in b)

def test_frozen_body_under_fastai():
    torch.manual_seed(0)
    ds = [(torch.rand(3,40,56), torch.tensor([1.,0.,i%2])) for i in range(8)]
    dls = DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0, device='cpu')
    model = build('test_resnet', 3, pretrained=False, pool=GeM, head=std_head)
    learn = Learner(dls, model, loss_func=BCELoss(), splitter=body_head)
    learn.freeze()
    first = [next(o.parameters()).clone() for o in (model.body, model.pool, model.head[2])]
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(2, 1e-2)
    moved = [not torch.equal(a, next(o.parameters())) for a,o in zip(first, (model.body, model.pool, model.head[2]))]
    assert moved==[False,True,True]

def test_two_sizes_one_model():
    model = build('test_vit', 3, pretrained=False).eval()
    for h,w in ((64,64),(96,160),(50,70)): assert model(torch.rand(1,3,h,w)).shape==(1,3)
    assert isinstance(model, ImageModel) and isinstance(model.head[1], nn.Linear)
