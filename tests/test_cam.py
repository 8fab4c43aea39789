"Grad-CAM: against autograd by hand, on pictures whose class is in a corner, for every kind of recipe, with nothing left behind"
import cv2, matplotlib.pyplot as plt, numpy as np, pytest, sys, torch
from recipes import animal, bengali, imet, whale
from recipes.data.fixtures import sample
from recipes.look.alike import show_similarity, similarity_maps
from recipes.look.cam import class_reader, columns_for, grad_cam, show_cam
from recipes.look.tapped import maps_of, untouched
from recipes.models.heads import ImageModel, build
from recipes.models.pooling import GlobalAvg
from torch import nn
from torch.nn import functional as F
from types import SimpleNamespace

tiny = dict(arch='test_resnet', pretrained=False, resize=(), bs=8, precision='fp32')

def learner(task, recipe=None, size=64, **kw):
    return task.learner(path=sample(task.competition.name, 120), recipe=recipe or task.house, **tiny|dict(size=size)|kw)

def state(model):
    return ([o.training for o in model.modules()], [(o.requires_grad, None if o.grad is None else o.grad.clone()) for o in model.parameters()],
        [o.clone() for o in model.state_dict().values()], [len(m._forward_hooks)+len(m._backward_hooks)+len(m._forward_pre_hooks) for m in model.modules()])

def same(a, b):
    def eq(x, y): return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x is y or x==y
    return a[0]==b[0] and a[3]==b[3] and all(map(eq, a[2], b[2])) and all(p==q and eq(g, h) for (p,g),(q,h) in zip(a[1], b[1]))

def test_by_hand():
    "The formula of the paper, with plain autograd"
    torch.manual_seed(0)
    model,x = build('test_resnet', 5, pretrained=False).eval(),torch.randn(3, 3, 96, 64)
    got,out = maps_of(model, x, model.head, [lambda o: o[2]]*3)
    assert torch.allclose(out, model(x), atol=1e-5)
    for i in range(3):
        f = model.body(x[i:i+1]).detach().requires_grad_()
        grad, = torch.autograd.grad(model.head(model.pool(f))[0,2], f)
        m = (grad.mean((2,3), keepdim=True)*f).sum(1)[0].relu().detach().numpy()
        m = (m-m.min())/(1e-7+(m-m.min()).max())
        m = cv2.resize(m, (64,96))
        assert np.allclose(got[i], (m-m.min())/(1e-7+(m-m.min()).max()), atol=1e-4)

@pytest.fixture(scope='module')
def corner():
    "A small network that tells upright from lying stripes, of which a picture has some in one corner"
    torch.manual_seed(0)
    n,stripes = 192,torch.arange(16)%4<2
    x,y,at = torch.randn(n, 1, 32, 32)*.2,torch.randint(2, (n,)),torch.randint(4, (n,))
    for im,k,c in zip(x, y, at):
        r,q = c//2*16,c%2*16
        im[0,r:r+16,q:q+16] += (stripes[None] if k else stripes[:,None]).float()
    def part(a, b): return nn.Conv2d(a, b, 3, padding=1),nn.BatchNorm2d(b),nn.ReLU(),nn.MaxPool2d(2)
    model = ImageModel(nn.Sequential(*part(1, 8), *part(8, 16)), GlobalAvg(), nn.Linear(16, 2))
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model,x[:64],y[:64],at[:64]

def test_corner(corner):
    "The map of the true class lies in the corner with the stripes"
    model,x,y,at = corner
    right = model.eval()(x).argmax(1)==y
    assert right.float().mean()>.9
    maps,_ = maps_of(model, x, model.head, [lambda o,k=k: o[k] for k in y])
    sums = F.adaptive_avg_pool2d(torch.from_numpy(maps)[:,None], 2).flatten(1)
    assert (sums.argmax(1)==at)[right].float().mean()>.9
    assert (sums.gather(1, at[:,None])[:,0]/sums.sum(1))[right].mean()>.5   # a quarter of the picture has most of the map

def test_untouched(corner):
    "Modes, gradients, frozen layers, weights, statistics and hooks are as before, after an error too; inside `no_grad` and autocast it works"
    model,x,y,_ = corner
    model.train()
    model.body[1].eval()
    model.body[0].weight.requires_grad_(False)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    before = state(model)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): maps,out = maps_of(model, x[:4], model.head, [lambda o: o[1]]*4)
    assert maps.dtype==np.float32 and out.dtype==torch.float32 and same(before, state(model))
    with pytest.raises(ZeroDivisionError): maps_of(model, x[:1], model.head, [lambda o: 1/0])
    assert same(before, state(model))
    with untouched(model): assert not any(o.training for o in model.modules()) and not any(o.requires_grad for o in model.parameters())
    assert same(before, state(model))
    model.body[0].weight.requires_grad_(True)

def test_channels_last(corner):
    "How weights lie in memory makes no difference, and stays"
    model,x,y,_ = corner
    a,_ = maps_of(model, x[:4], model.head, [lambda o: o[0]]*4)
    model.to(memory_format=torch.channels_last)
    b,_ = maps_of(model, x[:4].contiguous(memory_format=torch.channels_last), model.head, [lambda o: o[0]]*4)
    assert np.allclose(a, b, atol=1e-3) and model.body[4].weight.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('task', [animal,bengali,imet,whale], ids=lambda o: o.competition.name)
def test_tasks(task):
    "Every target: the size of the last stage, from 0 to 1, the class that is asked for"
    learn = learner(task, size=(64,96))
    before = state(learn.model)
    maps = grad_cam(learn, [0,5,7])
    assert maps.shape==(3,64,96) and 0<=maps.min()<=maps.max()<=1 and same(before, state(learn.model))
    assert np.allclose(grad_cam(learn, learn.table.train.id.iloc[[5]].tolist()), maps[[1]], atol=1e-3)
    assert grad_cam(learn, learn.table.test.id.iloc[0]).shape==(1,64,96)
    a,b = grad_cam(learn, [0,0], target=[0,1])
    assert not np.allclose(a, b)
    fig = show_cam(learn, [0,1])
    assert '→ ' in fig.axes[0].get_title()
    plt.close('all')

def test_outputs():
    "What is explained is what is predicted, before the activation"
    learn = learner(animal)
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad():
        learn.model.eval()
        out = class_reader(learn)(learn.model.pool(learn.model.body(x)))
        assert torch.allclose(learn.loss_func.activation(out), learn.read_out(learn.model(x)), atol=1e-6)

def test_targets():
    "By number, label, name, head or group; mistakes are said"
    heads = SimpleNamespace(table=bengali.table(sample('bengali', 120)), competition=bengali.competition)
    sizes = [len(o) for o in heads.table.vocab]
    assert columns_for(heads).tolist()==list(range(sizes[0]))
    assert columns_for(heads, 'vowel_diacritic').tolist()==list(range(sizes[0], sizes[0]+sizes[1]))
    assert columns_for(heads, ('vowel_diacritic',heads.table.vocab[1][2])).tolist()==[sizes[0]+2]
    many = SimpleNamespace(table=imet.table(sample('imet', 120)), competition=imet.competition)
    assert columns_for(many, 'tag::3').tolist()==[many.table.names.index('tag::3')] and len(columns_for(many, 'culture'))==10
    ids = SimpleNamespace(table=whale.table(sample('whale', 120)), competition=whale.competition)
    assert len(columns_for(ids))==len(ids.table.vocab)
    with pytest.raises(ValueError, match='no class is meant by 10000'): columns_for(ids, 10000)
    with pytest.raises(ValueError, match='2 targets for 3 pictures'): grad_cam(learner(animal), [0,1,2], target=[0,1])

def test_stages():
    "The size is that of the last stage"
    recipe = animal.house.but(stages=(dict(size=32, epochs=1),dict(size=96)))
    assert grad_cam(animal.learner(path=sample('animal', 120), recipe=recipe, **tiny|dict(epochs=2)), [0]).shape==(1,96,96)

@pytest.mark.parametrize('arch', ['test_vit','test_convnext','test_efficientnet'])
def test_backbones(arch):
    "Transformers too: their tokens are a map"
    maps = grad_cam(learner(animal, arch=arch, size=96), [0,1])
    assert maps.shape==(2,96,96) and maps.max()>.9

@pytest.mark.parametrize('name', ['first','third','seventh','ninth','fifteenth','yu4u'])
def test_heads(name):
    "Heads of several outputs, heads that get the map, bodies of several maps, four channels, twins"
    recipe = getattr(whale, name)
    if recipe.parts: recipe = recipe.parts[0]
    learn = whale.learner(path=sample('whale', 120), recipe=recipe.but(stages=(), rounds=(), data=None), **tiny|dict(size=(64,128)))
    assert grad_cam(learn, [0,1]).shape==(2,64,128)
    one,two,s = similarity_maps(learn, [0], [1])
    assert one.shape==two.shape==(1,64,128) and -1.001<=s[0]<=1.001

def test_pairs():
    "A pair head has no classes, which is said; its maps are of the logit, alike in both orders"
    learn = whale.learner(path=sample('whale', 120), recipe=whale.fifth.but(stages=(), rounds=(), data=None), **tiny|dict(size=(64,128)))
    with pytest.raises(ValueError, match='see `show_similarity`'): grad_cam(learn, [0])
    before = state(learn.model)
    a,b,s = similarity_maps(learn, [0,3], [1,4])
    c,d,t = similarity_maps(learn, [1,4], [0,3])
    assert np.allclose(a, d, atol=1e-4) and np.allclose(b, c, atol=1e-4) and np.allclose(s, t, atol=1e-4) and same(before, state(learn.model))
    assert len(show_similarity(learn, [0], [1]).axes)==2
    plt.close('all')

def test_errors(monkeypatch):
    "Too small, unknown pictures, no library: said in words"
    with pytest.raises(ValueError, match='too small to say where'): grad_cam(learner(animal, size=32), [0])
    with pytest.raises(ValueError, match="1 of 2 pictures are not in the table, such as 'nobody'"): grad_cam(learner(animal), ['nobody',animal.table(sample('animal', 120)).train.id[0]])
    with pytest.raises(ValueError, match='rows up to 119'): grad_cam(learner(animal), [120])
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    with pytest.raises(ImportError, match=r"pip install 'fastai-recipes\[explain\]'"): grad_cam(learner(animal), [0])
