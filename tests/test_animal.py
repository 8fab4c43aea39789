"Animals from their files to a submission: each recipe is what its source says, from scratch, and rare classes break nothing"
import json, shutil
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from functools import partial
from sklearn.metrics import accuracy_score
from torch import nn
from torch.nn import functional as F
from types import SimpleNamespace
from callbacks.mix import CutMix, MixUp
from callbacks.resize import hw
from recipes import animal
from recipes.cli import main
from recipes.words import named
from recipes.data.fixtures import draw_animal, sample
from recipes.data.folds import assign_folds
from recipes.data.single import deal_folds
from recipes.infer.argmax import likeliest, tune_gamma
from recipes.infer.tta import as_is, hflip
from recipes.look.plots import plot_plan
from recipes.models.backbone import resolve
from recipes.recipe.build import model_of
from recipes.recipe.core import card, from_json
from recipes.recipe.folder import Run

tiny = dict(arch='test_resnet', size=24, resize=(), epochs=1, bs=32, folds=2, lr=3e-3, precision='fp32')

def rows(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

@pytest.fixture(scope='module')
def path(): return sample('animal', 120)

@pytest.fixture(scope='module')
def oof(path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('oof'))
        return animal.cross_validate(path, **tiny|dict(folds=animal.stefano.folds))

# --- recipes as written

names = ['stefano','house']
recipes = named(animal)

def test_named(): assert [*recipes]==names

@pytest.mark.parametrize('name', names)
def test_json(name):
    recipe = recipes[name]
    back = from_json(json.dumps(json.loads(recipe.to_json())))
    assert back==recipe and hash(back)==hash(recipe) and repr(back)==repr(recipe) and back.but(bs=7)!=recipe

@pytest.mark.parametrize('name', names)
def test_card(name):
    "The fields that a person looks for, those that no source states marked"
    recipe,text = recipes[name],card(recipes[name])
    assert text.startswith(f'animal.{name}: {recipe.about}')
    lines = {o.split()[0]:o for o in text.splitlines()[1:]}
    assert {o for o in lines if o.endswith('*')}=={f'{o}*' for o in recipe.assumed if getattr(recipe, o) is not None}
    assert 'SoftmaxLoss' in lines['loss'] and lines['pretrained'].split()[1]=='False' and '0x' not in text

@pytest.mark.parametrize('name', names)
def test_built_as_written(name):
    "The real backbone and size, without memory for its weights: an output a class"
    recipe = recipes[name]
    table = SimpleNamespace(y=np.zeros(1, int), vocab=[str(o) for o in range(90)])
    with torch.device('meta'):
        model = model_of(recipe, table).eval()
        assert model(torch.empty(2, recipe.channels, *hw(recipe.size))).shape==(2,90)
    assert sum(o.numel() for o in model.parameters())>6e6

@pytest.mark.parametrize('name', names)
def test_plan(name): assert len(plot_plan(recipes[name]).lines)==1

def at(recipe, pos):
    "The rate at a share of the fit"
    o, = recipe.schedule(recipe.lr, recipe.epochs)
    return o.at(pos, recipe.lr)

def test_stefano():
    "Round 3: EfficientNet-B1 from scratch"
    r = animal.stefano
    assert resolve(r.arch)=='tf_efficientnet_b1.ns_jft_in1k' and not r.pretrained and not r.weights
    assert (r.size, r.channels, r.bs, r.epochs)==(224, 3, 64, 50)
    assert {type(o).__name__ for o in r.augment((224,224))}=={'HorizontalFlip','Rotate','CoarseDropout'}
    assert [type(o).__name__ for o in r.crop((224,224), True)]==['Squish'] and r.mix is None
    assert np.allclose([at(r, o) for o in (0,.5,1)], [1e-3,(1e-3+1e-5)/2,1e-5])
    raw,y = torch.randn(9, 5),torch.arange(9)%5
    assert torch.allclose(r.loss()(raw, y), F.cross_entropy(raw, y))
    assert r.folds.keywords==dict(n=3) and r.tta==(as_is,hflip) and r.rule is likeliest and r.tune is None

def test_decay_is_decoupled():
    "Without a gradient a weight shrinks by rate times decay"
    p = nn.Parameter(torch.full((2,2), 3.))
    opt = animal.stefano.opt([[p]], lr=.1)
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.allclose(p, torch.full((2,2), 3*(1-.1*.01)))

def test_radam():
    "Twelve steps of its optimizer are those of torch's"
    params = [nn.Parameter(torch.tensor([[1.,-2.]])) for _ in range(2)]
    other = torch.optim.RAdam([params[1]], .1, weight_decay=.01, decoupled_weight_decay=True)
    for p,opt in zip(params, (animal.stefano.opt([[params[0]]], lr=.1),other)):
        for i in range(12):
            (p**2).sum().backward()
            opt.step()
            opt.zero_grad()
    assert torch.allclose(*params, atol=1e-6) and not torch.allclose(params[0], torch.tensor([[1.,-2.]]), atol=.1)

def test_house():
    "From scratch, the whole picture, mirrored views; its numbers may change"
    r = animal.house
    assert not r.pretrained and not r.weights and (r.lr, r.resize)==('find', ())
    train,valid = ([type(o).__name__ for o in r.crop((224,224), o)] for o in (True,False))
    assert train==['Squish'] and valid==['Squish'] and r.folds.keywords==dict(n=5) and r.tta==(as_is,hflip)

# --- from files to a submission

@pytest.mark.parametrize('name', names)
def test_trained(path, name):
    "Each recipe, one epoch on the sample, to a submission that the competition would take"
    lr = dict(lr=3e-3) if name=='house' else {}
    learn = animal.train(path, recipe=recipes[name].but(arch='test_resnet', size=32, epochs=1, bs=32, **lr))
    run = learn.run
    assert run.done and len(run.history)==1 and run.history.train_loss.notna().all()
    assert 0<=run.score<=1 and run.history['top1'][0]==pytest.approx(Run(run.path).score, abs=.3)   # views are averaged in one only
    test = animal.predict(learn)
    assert test.p.shape==(30,6) and np.allclose(test.p.sum(1), 1, atol=1e-4)
    got,want = rows(test.submit('submission.csv')),rows(path/'sample_submission.csv')
    assert list(got)==['image_id','label'] and got.image_id.tolist()==want.image_id.tolist()
    assert dict(zip(got.image_id, got.label))=={i:run.table.vocab[k] for i,k in zip(test.ids, test.p.argmax(1))}
    assert np.array_equal(animal.predict(run.path).p, test.p)

def test_oof(path, oof):
    "Three folds, each class dealt out evenly; each row from the fold that did not see it, scored as scikit-learn does"
    assert len(oof.runs)==3 and np.array_equal(oof.folds, assign_folds(oof.table, animal.stefano.folds, animal.stefano.seed)[oof.rows])
    for k,run in enumerate(oof.runs): assert np.array_equal(oof.p[oof.folds==k], run.valid.p)
    each = np.stack([np.bincount(oof.table.y[oof.rows[oof.folds==k]], minlength=6) for k in range(3)])
    assert (np.ptp(each, 0)<=1).all()
    assert oof.score()==pytest.approx(accuracy_score(oof.table.y[oof.rows], oof.p.argmax(1)))

def test_views(oof):
    "Mirrored views are averaged, as the model sees them"
    run = oof.runs[0]
    learn = run.learner()
    x = learn.dls.valid.new(learn.dls.valid.dataset, shuffle=False).one_batch()[0]
    with torch.no_grad(): one,two = (learn.model.eval()(o).softmax(1) for o in (x,x.flip(-1)))
    frame = run.table.train.iloc[run.valid.rows]
    both,plain = (animal.predict(run, test=frame, tta=o).p[:len(x)] for o in (True,False))
    assert np.allclose(both, (one+two)/2, atol=1e-4) and np.allclose(plain, one, atol=1e-4) and not np.allclose(one, two, atol=1e-4)
    assert np.allclose(run.valid.p[:len(x)], both, atol=1e-4)

def test_mean_of_many(oof):
    "Unweighted, as the team averaged eleven"
    each = [animal.predict(o).p for o in oof.runs]
    assert np.allclose(animal.predict(oof.runs).p, np.mean(each, 0), atol=1e-6)

def test_gamma(path):
    "A power of the counts, found on the held-out rows, decides the test set"
    learn = animal.train(path, **tiny, tune=tune_gamma)
    run = Run(learn.run.path)
    test = animal.predict(learn)
    assert run.values==run.valid.found()==test.values and isinstance(run.values['gamma'], float)
    assert np.array_equal(test.decide(), likeliest(test.p, run.table, **run.values))

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed(path, mix):
    "The loss of a mixed batch is that of both labels"
    seen = []
    learn,cb = animal.learner(path=path, **tiny),mix(alpha=1.)
    class Spy(Callback):
        order,run_valid = cb.order+1,False
        def after_loss(self):
            a,b = (F.cross_entropy(self.pred, ys[0].long()) for ys in (self.yb, cb.yb1))
            seen.append((self.loss.item(), (cb.lam*a+(1-cb.lam)*b).item()))
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-3, cbs=[cb,Spy()])
    assert len(seen)==3 and np.allclose(*zip(*seen), rtol=1e-5)

def test_shown(path, oof):
    "A batch shows its labels; results show truth and decision, green where they are the same"
    dls = animal.dls(path, **tiny)
    b = dls.valid.one_batch()
    fig = dls.valid.show_batch(b, max_n=4)
    assert [ax.get_title() for ax in fig.axes]==[oof.table.names[i] for i in b[1][:4]]
    run = oof.runs[0]
    fig = run.learner().show_results(max_n=6, shuffle=False)
    alone = animal.predict(run, test=run.table.train.iloc[run.valid.rows[:6]], tta=False).decide()
    want = [(f'{oof.table.names[t]}\n→ {oof.table.names[d]}', 'green' if t==d else 'firebrick') for t,d in zip(run.valid.y[:6], alone)]
    assert [(ax.get_title(), ax.title.get_color()) for ax in fig.axes]==want

# --- rare classes, other forms

def test_one_picture_of_a_class(tmp_path):
    "Five folds, a class that one row has: never held out, in each fold's training, an output of its own"
    draw_animal(tmp_path/'one', 60, n_test=4)
    df = rows(tmp_path/'one/train.csv')
    df.loc[7, 'label'] = 'yak'
    df.to_csv(tmp_path/'one/train.csv', index=False)
    done = animal.cross_validate(tmp_path/'one', recipe=animal.house.but(**tiny|dict(folds=partial(deal_folds, n=5), bs=16)))
    assert len(done.runs)==5 and 7 not in done.rows and done.p.shape[1]==7
    assert sorted(done.rows)==[i for i in range(60) if df.label.value_counts()[df.label[i]]>1] and 0<=done.score()<=1
    assert 'yak' in done.table.vocab and any('yak 1' in o for o in done.table.said)
    animal.predict(done.runs).submit('a.csv')

def test_folders_only(path, tmp_path):
    "A folder a class and no tables: the same training, a submission of its own"
    at = tmp_path/'folders'
    shutil.copytree(path/'test', at/'test')
    for id,label in rows(path/'train.csv').values:
        (at/'train'/label).mkdir(parents=True, exist_ok=True)
        shutil.copy(path/'train'/id, at/'train'/label/id)
    test = animal.predict(animal.train(at, **tiny))
    got = rows(test.submit('a.csv'))
    assert list(got)==['image_id','label'] and sorted(got.image_id)==sorted(o.name for o in (at/'test').iterdir())

# --- command line

def test_command_line(path, capsys):
    options = '--arch test_resnet --size 16 --resize () --epochs 1 --bs 32 --lr 1e-3 --folds 2'
    main(f'train animal --path {path} {options}'.split())
    run, = (o.parent for o in (path.cwd()/'runs').rglob('done.json'))
    recipe = Run(run).recipe
    assert (recipe.name, recipe.arch, recipe.pretrained, recipe.size, recipe.folds)==('house', 'test_resnet', False, 16, 2)
    main(['predict', str(run), '--out', 'out.csv'])
    assert 'out.csv written' in capsys.readouterr().out
    assert rows('out.csv').image_id.tolist()==rows(path/'sample_submission.csv').image_id.tolist()
    main(f'cross_validate animal.stefano --path {path} {options} --parallel 1'.split())
    assert 'out-of-fold: ' in capsys.readouterr().out
    runs = [str(o.parent) for o in sorted((path.cwd()/'runs').rglob('done.json')) if 'stefano' in str(o)]
    main(['predict', *runs, '--out', 'both.csv'])
    assert len(runs)==2 and len(rows('both.csv'))==30
    main(['show', 'animal.stefano'])
    assert 'tf_efficientnet_b1_ns' in capsys.readouterr().out

def test_from_scratch(path, recwarn):
    "Weights from elsewhere are told, where the rules forbid them"
    net = dict(path=path, arch='resnet18', size=48, bs=16)
    animal.learner(**net, pretrained=False)
    assert not [o for o in recwarn if 'from scratch' in str(o.message)]
    with pytest.warns(UserWarning, match='rules ask for networks trained from scratch.*weights='), pytest.raises(FileNotFoundError):
        animal.learner(**net, pretrained=False, weights='none.pth')
