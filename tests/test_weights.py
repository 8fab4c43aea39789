"Weights from files, the cache and the hub"
import os, pickle, socket, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
import pytest, timm, torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv

from recipes.models import hub
from recipes.models.backbone import body
from recipes.models.heads import build
from recipes.models.hub import cached, from_hub, reachable
from recipes.models.pooling import GeM
from recipes.models.weights import find_weights, read_weights

@pytest.fixture
def net():
    torch.manual_seed(1)
    return timm.create_model('test_resnet')

def same(a, b):
    a,b = a.model.state_dict() if hasattr(a, 'model') else a.state_dict(),b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a) and len(a)>20

def test_files_of_every_kind_load(net, tmp_path):
    sd = net.state_dict()
    save_file(sd, tmp_path/'a.safetensors')
    torch.save(sd, tmp_path/'b.pth')
    torch.save(dict(epoch=1, optimizer={'lr': .1}, state_dict={f'module.{k}': v for k,v in sd.items()}), tmp_path/'c.pt')
    torch.save(dict(model={k: v for k,v in sd.items() if not k.startswith('fc.')}), tmp_path/'d.bin')
    torch.save({k: v[:7] if k.startswith('fc.') else v for k,v in sd.items()}, tmp_path/'e.pth')
    torch.save({k: v for k,v in sd.items() if 'num_batches' not in k}, tmp_path/'f.pth')
    for f in sorted(tmp_path.iterdir()): assert same(body('test_resnet', weights=f), net), f.name

def test_a_finished_run_gives_its_body(tmp_path):
    model = build('test_resnet', 9, pretrained=False, pool=GeM)
    save_file(model.state_dict(), tmp_path/'model.safetensors')
    back = build('test_resnet', 4, weights=tmp_path)
    assert all(torch.equal(v, back.body.state_dict()[k]) for k,v in model.body.state_dict().items())

def test_weights_in_order_of_another_library(net, tmp_path):
    torch.save({f'layer{i}': v for i,(k,v) in enumerate(net.state_dict().items()) if 'num_batches' not in k}, tmp_path/'a.pth')
    with pytest.warns(UserWarning, match='fit in order'): assert same(body('test_resnet', weights=tmp_path), net)

def test_first_conv_of_other_channels(net, tmp_path):
    save_file(net.state_dict(), tmp_path/'test_resnet.safetensors')
    for c in (1,4):
        got = body('test_resnet', weights=tmp_path, in_chans=c)
        torch.testing.assert_close(got.model.conv1[0].weight, adapt_input_conv(c, net.conv1[0].weight))
        assert got(torch.rand(1,c,64,64)).ndim==4

def test_position_embeddings_follow_the_size(tmp_path):
    vit = timm.create_model('test_vit')
    save_file(vit.state_dict(), tmp_path/'test_vit.safetensors')
    got = body('test_vit', weights=tmp_path, size=96)
    assert got.model.pos_embed.shape!=vit.pos_embed.shape
    assert torch.equal(got.model.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    assert got(torch.rand(1,3,96,96)).shape[2:]==(6,6)

def test_loaded_body_keeps_no_second_copy(net, tmp_path):
    save_file(net.state_dict(), tmp_path/'test_resnet.safetensors')
    got = body('test_resnet', weights=tmp_path)
    assert not any(torch.is_tensor(o) or isinstance(o, dict) for o in got.pretrained_cfg.values())
    assert same(pickle.loads(pickle.dumps(got)), net)

def test_misfits_are_told_with_counts(net, tmp_path):
    sd = {k: v for k,v in net.state_dict().items() if k not in ('conv1.0.weight','bn1.weight')}
    sd |= {'extra.weight': torch.ones(1), 'bn1.bias': torch.ones(99)}
    torch.save(sd, tmp_path/'a.pth')
    with pytest.raises(ValueError) as e: body('test_resnet', weights=tmp_path)
    for o in ('a.pth','2 missing','conv1.0.weight','1 unexpected','extra.weight','1 of another shape','(99,)'): assert o in str(e.value)

class Evil:
    def __reduce__(self): return os.mkdir, (os.environ['EVIL'],)

def test_nothing_unpickles(net, tmp_path, monkeypatch):
    monkeypatch.setenv('EVIL', str(tmp_path/'ran'))
    torch.save(net.state_dict() | {'evil': Evil()}, tmp_path/'test_resnet.pth')
    with pytest.raises(ValueError, match='could run code'): body('test_resnet', weights=tmp_path)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_broken_files(net, tmp_path, name):
    f = tmp_path/name
    save_file(net.state_dict(), f) if name.endswith('s') else torch.save(net.state_dict(), f)
    f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(ValueError, match='broken'): read_weights(f)
    f.write_bytes(b'')
    with pytest.raises(ValueError, match='broken'): read_weights(f)

def test_which_file_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match='no weights'): find_weights(tmp_path, 'resnet18')
    with pytest.raises(FileNotFoundError): find_weights(tmp_path/'none', 'resnet18')
    (tmp_path/'notes.txt').touch()
    (tmp_path/'model.bin').touch()
    assert find_weights(tmp_path, 'resnet18').name=='model.bin'
    for o in ('resnet18.a1_in1k.pth','resnet18d.pth','seresnext50.safetensors','seresnext50.pth'): (tmp_path/o).touch()
    assert find_weights(tmp_path, 'resnet18').name=='resnet18.a1_in1k.pth'
    assert find_weights(tmp_path, 'seresnext50').name=='seresnext50.safetensors'
    with pytest.raises(ValueError, match='could be meant'): find_weights(tmp_path, 'vgg16')

# --- cache and hub

def test_hub_cache_needs_no_network(net, tmp_path, monkeypatch):
    cfg = timm.get_pretrained_cfg('test_resnet')
    repo = tmp_path/f'models--{cfg.hf_hub_id.replace("/", "--")}'
    (repo/'refs').mkdir(parents=True)
    (repo/'refs'/'main').write_text('abc')
    (repo/'snapshots'/'abc').mkdir(parents=True)
    save_file(net.state_dict(), repo/'snapshots'/'abc'/'model.safetensors')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(hub, 'reachable', lambda *a: pytest.fail('asked the network'))
    assert same(body('test_resnet'), net)

def test_torch_cache_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    cfg = timm.get_pretrained_cfg('legacy_seresnet18')
    assert cached(cfg) is None
    (tmp_path/'checkpoints').mkdir()
    (tmp_path/'checkpoints'/cfg.url.split('/')[-1]).touch()
    assert cached(cfg)==str(tmp_path/'checkpoints'/cfg.url.split('/')[-1])

@pytest.fixture
def silent(monkeypatch):
    "A server that takes connections and never answers"
    monkeypatch.setenv('no_proxy', '*')
    with socket.create_server(('127.0.0.1', 0)) as s: yield f'http://127.0.0.1:{s.getsockname()[1]}/x'

def test_no_network_is_one_quick_error(silent, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(hub, 'hf_hub_url', lambda *a: silent)
    t = time.time()
    with pytest.raises(ConnectionError) as e: body('seresnext50')
    assert time.time()-t<10
    for o in ('weights=','pretrained=False','seresnext50_32x4d'): assert o in str(e.value)

def test_an_error_page_is_an_answer(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    server = HTTPServer(('127.0.0.1', 0), BaseHTTPRequestHandler)   # answers 501 to everything
    threading.Thread(target=server.handle_request, daemon=True).start()
    try: assert reachable(f'http://127.0.0.1:{server.server_port}/x')
    finally: server.server_close()

def test_offline_mode_is_respected(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert not reachable('http://127.0.0.1:9/x')

def test_untrained_architecture():
    with pytest.raises(ValueError, match='pretrained=False.*tf_efficientnet_b7'): from_hub('efficientnet_b7')

@pytest.mark.parametrize('arch', ['inception_v3', 'test_vit', 'test_efficientnet'])
def test_one_tensor_less_is_refused(arch, tmp_path):
    sd = timm.create_model(arch).state_dict()
    save_file(sd, tmp_path/'whole.safetensors')
    assert same(body(arch, weights=tmp_path/'whole.safetensors'), timm.create_model(arch, checkpoint_path=tmp_path/'whole.safetensors'))
    k = [k for k in sd if k.endswith('.weight')][5]
    save_file({n: v for n,v in sd.items() if n!=k}, tmp_path/'less.safetensors')
    with pytest.raises(ValueError, match='1 missing'): body(arch, weights=tmp_path/'less.safetensors')
