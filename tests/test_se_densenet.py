"SE-DenseNet-161: DenseNet's weights and answers, gates that learn, and its name wherever a network is named"
import pytest, timm, torch
from recipes.models.backbone import body, norm_stats, resolve
from recipes.models.partial import partial_padding
from recipes.models.se_densenet import SEDenseNet, checkpoint_filter_fn, open_gate, width_of
from recipes.models.stages import Stages
from timm.models.densenet import DenseNet

small = dict(growth_rate=8, block_config=(2,3,2))
gates = [f'se_{o}' for o in ('denseblock1','transition1','denseblock2','transition2','denseblock3','transition3','denseblock4')]

@pytest.fixture(scope='module')
def meta():
    with torch.device('meta'): return body('se_densenet161')

def test_shape(meta):
    "As DenseNet-161, whose parts it has, and a gate behind each block and each transition"
    with torch.device('meta'): plain = timm.create_model('densenet161')
    f = meta(torch.empty(2,3,320,320, device='meta'))
    assert f.shape==(2,2208,10,10) and meta.num_features==plain.num_features
    names = [k for k,_ in meta.model.features.named_children()]
    assert [o for o in names if o.startswith('se_')]==gates
    assert all(names[names.index(o)-1]==o[3:] for o in gates)
    assert set(dict(plain.features.named_children()))==set(names)-set(gates)

def test_widths(meta):
    sizes = {k:width_of(o) for k,o in meta.model.features.named_children() if k.startswith(('denseblock','transition'))}
    assert sizes==dict(denseblock1=384, transition1=192, denseblock2=768, transition2=384, denseblock3=2112, transition3=1056,
        denseblock4=2208)
    assert meta.model.features.se_denseblock3.fc1.out_channels==136   # 2112/16=132, in steps of 8

def test_stages(meta):
    "Maps of stages are taken behind their gates"
    s = Stages(meta)
    maps = s(torch.empty(1,3,128,128, device='meta'))
    assert [tuple(o.shape[1:]) for o in maps]==[(384,32,32),(768,16,16),(2112,8,8),(2208,4,4)]
    net = SEDenseNet(**small).eval()
    torch.nn.init.constant_(net.features.se_denseblock1.fc2.bias, -20)   # a gate that is shut
    a = net.forward_intermediates(torch.randn(1,3,64,64), intermediates_only=True)
    assert a[1].abs().max()<1e-6 and a[0].abs().max()>.1

def test_weights():
    "DenseNet's weights go in, old names of torchvision's too, and the answers are the same to the bit"
    plain,net = DenseNet(**small, num_classes=5).eval(),SEDenseNet(**small, num_classes=5).eval()
    old = {k.replace('.norm1.', '.norm.1.').replace('.conv2.', '.conv.2.') if 'denselayer' in k else k:v for k,v in plain.state_dict().items()}
    old = {k:v for k,v in old.items() if not k.endswith('num_batches_tracked')}   # they had none
    assert not set(old)&{k for k in plain.state_dict() if '.norm1.' in k}
    net.load_state_dict(checkpoint_filter_fn(old, net))
    x = torch.randn(2,3,64,64)
    assert torch.equal(net(x), plain(x))

def test_own_weights():
    "Gates that a file has are taken"
    net,other = SEDenseNet(**small),SEDenseNet(**small)
    torch.nn.init.normal_(net.features.se_transition1.fc2.weight)
    other.load_state_dict(checkpoint_filter_fn(net.state_dict(), other))
    assert torch.equal(net.features.se_transition1.fc2.weight, other.features.se_transition1.fc2.weight)

def test_local_file(tmp_path):
    "A file of DenseNet-161's weights by `weights=`; a wrong one is refused"
    plain = timm.create_model('densenet161').eval()
    torch.save(plain.state_dict(), tmp_path/'densenet161.pth')
    b = body('se_densenet161', weights=tmp_path/'densenet161.pth').eval()
    x = torch.randn(1,3,64,64)
    with torch.no_grad(): assert torch.equal(b(x), plain.forward_features(x))
    sd = plain.state_dict()
    sd.pop('features.denseblock1.denselayer1.conv1.weight')
    torch.save(sd, tmp_path/'part.pth')
    with pytest.raises(ValueError, match='does not fit se_densenet161'): body('se_densenet161', weights=tmp_path/'part.pth')

def test_gate():
    "Nothing at first, then a weight a channel; the first step reaches the last layer, the second the first one"
    gate,x = open_gate(16),torch.randn(4,16,5,5)
    assert torch.equal(gate(x), x)
    opt = torch.optim.SGD(gate.parameters(), .5)
    for i in range(2):
        opt.zero_grad()
        (gate(x)*x.sign()).sum().backward()
        assert gate.fc2.weight.grad.abs().sum()>0 and (gate.fc1.weight.grad.abs().sum()>0)==(i>0)
        opt.step()
    w = gate(x)/x
    assert torch.allclose(w, w[...,:1,:1].expand_as(w), atol=1e-4) and 0<w.min() and w.max()<2 and w.std()>0

def test_name():
    "Found like any network, with DenseNet-161's normalisation and weights"
    assert resolve('SE_DenseNet161')=='se_densenet161' and norm_stats('se_densenet161')==norm_stats('densenet161')
    assert timm.get_pretrained_cfg('se_densenet161').hf_hub_id=='timm/densenet161.tv_in1k'
    assert timm.get_pretrained_cfg('se_densenet161').has_weights

def test_second_place(meta):
    "Row I-2nd: with partial convolutions, four channels too"
    with torch.device('meta'): b = partial_padding(body('se_densenet161', in_chans=4))
    assert b(torch.empty(1,4,320,320, device='meta')).shape==(1,2208,10,10)
