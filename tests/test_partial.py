"Partial convolution padding against convolutions of ones, in every kind of convolution that networks have"
import copy
import pytest, torch
from recipes.models import partial
from recipes.models.backbone import body
from recipes.models.heads import build
from recipes.models.partial import border_ratio, is_padded, pad_before, partial_padding, taps_inside
from timm.layers import Conv2dSame, ScaledStdConv2dSame, StdConv2dSame
from timm.layers.padding import pad_same
from torch import nn
from torch.nn import functional as F

def slow(conv, x):
    "What Liu et al. write, with a convolution of ones; the picture is padded by hand"
    same = isinstance(conv, Conv2dSame) or getattr(conv, 'same_pad', False)
    if same: pad = lambda o: pad_same(o, conv.kernel_size, conv.stride, conv.dilation)
    elif conv.padding=='same':
        total = [d*(k-1) for k,d in zip(conv.kernel_size, conv.dilation)]
        pad = lambda o: F.pad(o, (total[1]//2, total[1]-total[1]//2, total[0]//2, total[0]-total[0]//2))
    else:
        h,w = (0,0) if conv.padding=='valid' else conv.padding
        pad = lambda o: F.pad(o, (w,w,h,h))
    k = conv.kernel_size
    seen = F.conv2d(pad(torch.ones(1,1,*x.shape[-2:])), torch.ones(1,1,*k), None, conv.stride, 0, conv.dilation)
    y = F.conv2d(pad(x), conv.weight, None, conv.stride, 0, conv.dilation, conv.groups)
    y = y*(k[0]*k[1]/seen.clamp(min=1))
    return y if conv.bias is None else y+conv.bias[:,None,None]

CONVS = [lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: nn.Conv2d(4, 6, 7, stride=2, padding=3, bias=False),
    lambda: nn.Conv2d(4, 6, (3,5), stride=(1,2), padding=(1,2)), lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), lambda: nn.Conv2d(4, 6, 3, padding=(0,1)),
    lambda: nn.Conv2d(4, 6, 4, padding='same'), lambda: nn.Conv2d(4, 6, 2, padding='same', bias=False),
    lambda: nn.Conv2d(4, 6, 1, padding=1), lambda: Conv2dSame(4, 6, 3, stride=2), lambda: Conv2dSame(4, 6, 5, stride=3, bias=False)]

@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize('make', CONVS)
@pytest.mark.parametrize('hw', [(9,12),(12,9),(5,5),(3,4)])
def test_slow(make, hw):
    conv,x = make(),torch.randn(2,4,*hw)
    want = slow(conv, x)
    assert torch.allclose(partial_padding(conv)(x), want, atol=1e-5)

def test_golden():
    "9/4 in a corner, 9/6 on an edge, 1 inside; 49/16 in the corner of a stem"
    r = border_ratio((6,7), (6,7))[0,0]
    assert r[0,0]==r[0,-1]==r[-1,0]==r[-1,-1]==9/4 and (r[0,1:-1]==9/6).all() and (r[1:-1,-1]==9/6).all()
    assert (r[1:-1,1:-1]==1).all()
    assert border_ratio((8,8), (4,4), (7,7), (2,2), (3,3))[0,0,0,0]==49/16

def test_taps_outside():
    "A place that sees no pixel at all gives the bias, not infinity"
    assert taps_inside(3, 5, 1).tolist()==[0,1,1,1,0]
    conv = partial_padding(nn.Conv2d(1, 1, 1, padding=1))
    y = conv(torch.ones(1,1,3,3))
    assert y.isfinite().all() and y[0,0,0,0]==conv.bias

def test_inside_unchanged():
    "To the bit, with and without a bias"
    for bias in True,False:
        conv = nn.Conv2d(3, 5, 3, padding=1, bias=bias)
        x = torch.randn(2,3,10,10)
        before = conv(x)
        after = partial_padding(conv)(x)
        assert torch.equal(before[...,1:-1,1:-1], after[...,1:-1,1:-1]) and not torch.allclose(before[...,0], after[...,0])

@pytest.mark.parametrize('cls', [StdConv2dSame,ScaledStdConv2dSame])
def test_standardised(cls):
    "Convolutions that change their weights first are scaled by the same ratio"
    conv = cls(4, 6, 3, stride=2, padding='same', bias=True)
    x = torch.randn(2,4,10,10)
    before = conv(x)
    ratio = border_ratio((10,10), before.shape[-2:], (3,3), (2,2), pad_before(conv, (10,10)))
    bias = conv.bias[:,None,None]
    assert torch.allclose(partial_padding(conv)(x), (before-bias)*ratio+bias, atol=1e-5) and ratio.max()>1

@pytest.mark.parametrize('arch', ['resnet18','densenet121','seresnext50','tf_efficientnet_b0','dm_nfnet_f0','convnext_tiny'])
def test_networks(arch):
    "Every padded convolution of a network is served; names of weights stay; shapes on the meta device"
    with torch.device('meta'): b = body(arch, False)
    names = list(b.state_dict())
    n = sum(is_padded(o) for o in b.modules())
    want = b(torch.empty(2,3,64,96, device='meta')).shape
    partial_padding(b)
    assert list(b.state_dict())==names and n>0
    assert sum(len(o._forward_hooks) for o in b.modules())==n
    assert b(torch.empty(2,3,64,96, device='meta')).shape==want

def test_weights_load():
    "A state dict goes in either way, and the wrapped network differs at the border only"
    a,b = body('resnet18', False).eval(),partial_padding(body('resnet18', False)).eval()
    b.load_state_dict(a.state_dict())
    x = torch.randn(1,3,256,256)
    m,n = a.model.conv1(x),b.model.conv1(x)
    assert torch.equal(m[...,2:-2,2:-2], n[...,2:-2,2:-2]) and not torch.allclose(a(x), b(x))
    a.load_state_dict(b.state_dict())

def test_wrap():
    "As a recipe's `wrap`, and twice is once"
    m = build('resnet18', 4, pretrained=False, wrap=partial_padding).eval()
    x = torch.randn(2,3,48,48)
    once = m(x)
    partial_padding(m.body)
    assert torch.equal(m(x), once)
    assert torch.equal(copy.deepcopy(m)(x), once)

def test_other_padding():
    "What does not pad with zeros is left alone, and a network without any is refused"
    mirror = nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect')
    assert not is_padded(mirror) and not is_padded(nn.Conv2d(3, 4, 3)) and not is_padded(nn.Conv2d(3, 4, 3, padding='valid'))
    with pytest.raises(ValueError, match='no convolution of this VisionTransformer pads'): partial_padding(body('vit_tiny_patch16_224', False, size=32))

def test_low_precision():
    "Under autocast the answer keeps its type, and channels_last its order"
    conv = partial_padding(nn.Conv2d(8, 8, 3, padding=1)).to(memory_format=torch.channels_last)
    x = torch.randn(2,8,16,16).to(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16): y = conv(x)
    assert y.dtype==torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y.float(), slow(conv, x), atol=.05)

def test_gradient():
    "The gradient is that of the slow form"
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2,3,8,8, requires_grad=True)
    want = torch.autograd.grad(slow(conv, x).pow(2).sum(), [x,conv.weight,conv.bias])
    got = torch.autograd.grad(partial_padding(conv)(x).pow(2).sum(), [x,conv.weight,conv.bias])
    assert all(torch.allclose(a, b, atol=1e-3) for a,b in zip(want, got))

def test_kept():
    "A ratio is worked out once a size, and what inference made serves training"
    partial._kept.cache_clear()
    conv = partial_padding(nn.Conv2d(3, 4, 3, padding=1))
    with torch.inference_mode(): conv(torch.randn(1,3,20,24))
    for _ in range(3): conv(torch.randn(1,3,20,24)).sum().backward()
    conv(torch.randn(1,3,24,20))
    info = partial._kept.cache_info()
    assert (info.misses,info.hits)==(2,3)
