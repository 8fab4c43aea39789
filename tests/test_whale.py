"The whale task: its recipes as written, their numbers, and a short fit to a submission"
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from callbacks.resize import hw
from recipes import from_json, whale
from recipes.cli import main
from recipes.words import named
from recipes.data.augment import none
from recipes.data.fixtures import sample
from recipes.models.margin import CosineHead
from recipes.ranking import map5
from recipes.recipe.build import dls_of, model_of, target_of

recipes = {k:v for k,v in named(whale).items() if not v.parts}
recipes |= dict(tenth_pair=whale.tenth.parts[0], tenth_metric=whale.tenth.parts[-1])

@pytest.fixture(scope='module')
def path(): return sample('whale', 148)

def small(recipe, size=(64,128), **kw):
    "The recipe with a tiny network on small pictures, an epoch a stage"
    stages = tuple(o|dict(epochs=1)|(dict(size=size) if 'size' in o else {}) for o in recipe.stages)
    bs = 24 if recipe.name=='first' else 16
    return recipe.but(arch='test_resnet', pretrained=False, size=size, epochs=max(1, len(stages)), stages=stages, bs=bs, **kw)

@pytest.mark.parametrize('name', recipes)
def test_built_as_written(name):
    "The real backbone, size and head, without memory for its weights"
    recipe,n = recipes[name],5004
    table = SimpleNamespace(y=np.arange(n), vocab=[f'w_{i}' for i in range(n)], groups={})
    with torch.device('meta'):
        model = model_of(recipe, table).eval()
        out = model(torch.empty(2, recipe.channels, *hw(recipe.size)))
    first = out[0] if isinstance(out, tuple) else out
    assert first.shape==(2,n*(1+recipe.twins)) and sum(o.numel() for o in model.parameters())>(5e5 if recipe.arch=='kernel2' else 5e6)

@pytest.mark.parametrize('name', recipes)
def test_json(name): assert from_json(recipes[name].to_json())==recipes[name]

def test_numbers():
    "Methods §8.2 and §9"
    third,first,seventh,ninth = (recipes[o] for o in ('third','first','seventh','ninth'))
    assert (third.arch, third.size, third.loss.keywords, third.opt.keywords, third.lr, third.bs)==\
        ('densenet121', 320, dict(m=.5, s=65., twins='constant'), dict(wd=5e-4), 2.5e-4, 32)
    assert third.twins and third.rule.keywords['share']==.276 and third.scorer.keywords==dict(score='centre')
    assert (first.arch, first.channels, first.size, first.clip, first.bs, first.opt.keywords)==\
        ('legacy_senet154', 4, (256,512), 5., 48, dict(betas=(.9,.99), wd=2e-4))
    assert [o.lr for o in first.steps()]==[3e-4,3e-4,3e-5]
    assert (seventh.size, seventh.bs, seventh.clip, [o.epochs for o in seventh.steps()])==(384, 20, .1, [100,100])
    assert [(o.size, o.epochs) for o in ninth.steps()]==[(256,64),(1024,64)]
    assert recipes['yu4u'].size==(256,768) and recipes['fifteenth'].sampler.keywords['sampler'].keywords==dict(k=20)

@pytest.mark.parametrize('name', recipes)
def test_fit(path, name, tmp_path):
    "An epoch, predictions, five different labels a picture"
    learn = whale.train(path, recipe=small(recipes[name], lr=1e-3 if recipes[name].lr=='find' else recipes[name].lr))
    run = learn.run
    assert run.done and 0<=run.score<=1 and run.valid.p.shape[1]==len(run.table.vocab)
    df = pd.read_csv(whale.predict(learn).submit(tmp_path/'sub.csv'), dtype=str)
    assert df.Image.tolist()==pd.read_csv(path/'sample_submission.csv', dtype=str).Image.tolist()
    labels = df.Id.str.split()
    assert labels.map(lambda o: len(o)==len(set(o))==5 and set(o)<={*run.table.vocab,'new_whale'}).all()

def test_twins(path):
    "Mirrored rows are other classes; the unknown stays unknown; held-out rows are as photographed"
    table = whale.table(path)
    n,recipe = len(table.vocab),small(whale.house)
    dls = dls_of(recipe, table)
    y = np.asarray(dls.train.y)
    assert len(y)==2*len(table) and set(y[len(table):][table.y<n])<=set(range(n, 2*n)) and (y[len(table):][table.y>=n]==2*n).all()
    assert max(dls.valid.dataset.rows)<len(table) and target_of(recipe, table).n_out(table)==2*n
    rows = dls.train.dataset.rows
    seen = [dls.train.dataset.pictures[i] for i in (rows[0],rows[0]+len(table))]
    np.testing.assert_array_equal(seen[0], seen[1][:,::-1])

def test_embedding_learns(path):
    "Nearest pictures find the whale far more often than always answering `new_whale`"
    learn = whale.train(path, recipe=small(whale.house, (32,64), lr=4e-3, resize=(), augment=none).but(epochs=12, precision='fp32'))
    valid = learn.run.valid
    always = np.full((len(valid),5), len(valid.table.vocab))
    assert isinstance(learn.model.head, CosineHead) and learn.run.score>map5(valid.y, always)+.1

def test_command_line(path, capsys):
    main(f'train whale --path {path} --arch test_resnet --pretrained false --size 48,96 --resize () --epochs 1 --lr 1e-3'.split())
    assert 'whale.house fold 0' in capsys.readouterr().out
