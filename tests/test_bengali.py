"Bengali from its files to a submission: each recipe is the network and the numbers that its source names, and does what it says"
import json
import cv2, numpy as np, pandas as pd, pytest, torch
from functools import partial
from fastai.callback.core import Callback
from pathlib import Path
from sklearn.metrics import recall_score
from torch import nn
from torch.nn import functional as F
from types import SimpleNamespace
from callbacks.mix import CutMix, MixUp
from callbacks.resize import hw
from recipes import bengali
from recipes.cli import main
from recipes.words import named
from recipes.data.fixtures import draw_bengali, sample
from recipes.data.folds import assign_folds, fold_rows, stratify
from recipes.data.graphemes import HEADS
from recipes.data.unseen import is_unseen, unseen_graphemes
from recipes.infer.argmax import tune_gamma
from recipes.infer.tta import as_is, hflip
from recipes.look.plots import plot_plan
from recipes.models.backbone import resolve
from recipes.recipe.build import model_of
from recipes.recipe.core import card, from_json
from recipes.recipe.folder import Run
from test_resume import check_same, interrupt, plant

SIZES = 168,11,7
tiny = dict(arch='test_resnet', pretrained=False, size=(24,40), resize=(), epochs=1, bs=32, folds=2, lr=3e-3, precision='fp32')

def rows(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

def short(recipe, **fields):
    "The recipe as written, but for its network, its sizes and how long it takes"
    stages = [o|dict(epochs=1, bs=32, **(dict(size=32) if 'size' in o else {})) for o in recipe.stages]
    kw = dict(arch='test_resnet', pretrained=False, size=(24,40), resize=(), bs=32, epochs=max(1, len(stages)), stages=tuple(stages))
    if recipe.name=='argus': kw['folds'] = partial(unseen_graphemes, n=5, held=20)   # of the 80 that the sample draws from
    return recipe.but(**kw|fields)

@pytest.fixture(scope='module')
def path(): return sample('bengali', 120)

@pytest.fixture(scope='module')
def oof(path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('oof'))
        return bengali.cross_validate(path, **tiny)

# --- recipes as written

names = ['yk','starter','argus','house']
recipes = named(bengali)

def test_named(): assert [*recipes]==names

@pytest.mark.parametrize('name', names)
def test_json(name):
    recipe = recipes[name]
    back = from_json(json.dumps(json.loads(recipe.to_json())))
    assert back==recipe and hash(back)==hash(recipe) and repr(back)==repr(recipe)
    assert back.but(bs=7)!=recipe and [o.lr for o in back.steps()]==[o.lr for o in recipe.steps()]

@pytest.mark.parametrize('name', names)
def test_card(name):
    "The fields that a person looks for, those that no source states marked"
    recipe,text = recipes[name],card(recipes[name])
    assert text.startswith(f'bengali.{name}: {recipe.about}')
    lines = {o.split()[0]:o for o in text.splitlines()[1:]}
    assert {o for o in lines if o.endswith('*')}=={f'{o}*' for o in recipe.assumed if getattr(recipe, o) is not None}
    assert 'MultiHeadLoss' in lines['loss'] and recipe.arch in text and '0x' not in text

@pytest.mark.parametrize('name,i', [(k,i) for k,v in recipes.items() for i in range(len(v.steps()))])
def test_built_as_written(name, i):
    "The real backbone, channels and size of each stage, without memory for its weights: the outputs of all heads side by side"
    recipe = recipes[name].steps()[i]
    table = SimpleNamespace(y=np.zeros((1,3), int), vocab=[[str(o) for o in range(n)] for n in SIZES])
    with torch.device('meta'):
        model = model_of(recipe, table).eval()
        assert model(torch.empty(2, recipe.channels, *hw(recipe.size))).shape==(2,sum(SIZES))
    assert sum(o.numel() for o in model.parameters())>6e6

@pytest.mark.parametrize('name', names)
def test_plan(name):
    "As many lines as stages"
    assert len(plot_plan(recipes[name]).lines)>=len(recipes[name].steps())

def at(recipe, pos):
    "The rate at a share of the fit"
    o, = recipe.schedule(recipe.lr, recipe.epochs)
    return o.at(pos, np.array(recipe.lr))

def hypers(recipe):
    "What the optimizer of a body and a head begins with"
    return recipe.opt([[nn.Parameter(torch.ones(1))] for _ in range(2)], lr=recipe.lr if isinstance(recipe.lr, float) else .1).hypers

def by_hand(raw, ys, weights=(2,1,1), smooth=0.):
    "A loss a picture, from the definition"
    parts = raw.split(SIZES, 1)
    return sum(w*F.cross_entropy(o, y, label_smoothing=smooth, reduction='none') for w,o,y in zip(weights, parts, ys))

def batch(n=10, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 186, generator=rng), [torch.randint(o, (n,), generator=rng) for o in SIZES]

def loss_like(recipe): return recipe.loss().prepare([np.ones(o, int) for o in SIZES])

def test_yk():
    "81st place"
    r = bengali.yk
    assert resolve(r.arch)=='seresnext50_32x4d' and (r.size, r.channels, r.bs, r.epochs)==(224, 3, 128, 50)
    assert r.stats==((.5,.5,.5),(.5,.5,.5))
    squish,cut = r.crop((224,224), True)
    assert (squish.height, squish.width, squish.interpolation)==(256, 256, cv2.INTER_NEAREST)
    assert (type(cut).__name__, cut.height, cut.width)==('RandomCrop', 224, 224)
    assert type(r.crop((224,224), False)[1]).__name__=='CenterCrop'
    turn, = r.augment((224,224))
    assert type(turn).__name__=='Rotate' and turn.limit==(-10,10) and turn.p==.5
    assert [(a,p) for _,a,p in r.mix().ways]==[(1.,1.)] and r.mix is CutMix
    raw,ys = batch()
    assert torch.allclose(loss_like(r)(raw, *ys), by_hand(raw, ys).mean())
    assert [(o['mom'],o['wd']) for o in hypers(r)]==[(.9,1e-4)]*2
    assert np.allclose([at(r, o) for o in (0,.5,1)], [.01,.005,0])
    assert r.folds==5 and r.tta==(as_is,) and r.tune is None and not (r.stages or r.rounds or r.parts or r.data or r.ema)

def test_yk_nesterov():
    "Three steps of its optimizer are those of torch's SGD"
    params = [nn.Parameter(torch.tensor([[1.,-2.]])) for _ in range(2)]   # what has one dimension does not decay
    opts = bengali.yk.opt([[params[0]]], lr=.1),torch.optim.SGD([params[1]], .1, momentum=.9, weight_decay=1e-4, nesterov=True)
    for p,opt in zip(params, opts):
        for i in range(3):
            (p**2).sum().backward()
            opt.step()
            opt.zero_grad()
    assert torch.allclose(*params, atol=1e-6)

def test_yk_folds(path):
    "Stratified over the 186 columns of all heads, the roots not as numbers"
    table = bengali.table(path)
    want = stratify(np.hstack([np.eye(n, dtype=int)[o] for n,o in zip(SIZES, table.y.T)]), 5, bengali.yk.seed)
    assert np.array_equal(assign_folds(table, bengali.yk.folds, bengali.yk.seed), want)

def test_starter():
    "The kernel of iafoss"
    r = bengali.starter
    assert (r.arch, r.size, r.channels, r.bs, r.epochs)==('densenet121', 128, 1, 128, 32) and r.stats==((.0692,),(.2051,))
    raw,ys = batch()
    assert torch.allclose(loss_like(r)(raw, *ys), by_hand(raw, ys, (.7,.1,.2)).mean())
    assert [(a,p) for _,a,p in r.mix().ways]==[(.4,1.)] and type(r.mix()) is MixUp
    assert [o['wd'] for o in hypers(r)]==[1e-3,1e-2]
    rates = np.stack([at(r, o) for o in np.linspace(0, 1, 9)])
    assert np.allclose(rates[0], [2e-3,1e-2]) and (np.diff(rates, axis=0)<0).all() and rates[-1].max()<1e-6
    assert r.folds(range(10)).tolist()==[0,0,0,1,1,2,2,2,3,3] and r.tta==(as_is,)
    assert not any('Flip' in type(o).__name__ for o in r.augment((128,128)))

def test_starter_head():
    "Concat pooling, and for each part Mish, batch norm, dropout, 512 units, and again"
    table = SimpleNamespace(y=np.zeros((1,3), int), vocab=[[str(o) for o in range(n)] for n in SIZES])
    with torch.device('meta'): model = model_of(bengali.starter, table)
    kinds = ['Mish','BatchNorm1d','Dropout','Linear']*2
    assert [[type(m).__name__ for m in o] for o in model.head.heads]==[kinds]*3
    lin = [[(m.in_features,m.out_features) for m in o if isinstance(m, nn.Linear)] for o in model.head.heads]
    assert lin==[[(2048,512),(512,n)] for n in SIZES]
    assert next(m for m in model.body.modules() if isinstance(m, nn.Conv2d)).in_channels==1

def test_argus():
    "lRomul's three stages"
    r = bengali.argus
    a,b,c = r.steps()
    assert resolve(r.arch).startswith('tf_efficientnet_b3.ns') and r.channels==3
    assert [(hw(o.size), o.bs, o.epochs) for o in (a,b,c)]==[((128,128),313,30),((137,236),156,100),((137,236),156,10)]
    assert np.allclose([o.lr for o in (a,b,c)][:2], [1e-3*313/128,1e-3*156/128]) and r.epochs==140
    assert [o.mix and [p for *_,p in o.mix().ways] for o in (a,b,c)]==[[1.],[1.],None] and a.mix().ways[0][1]==1
    assert np.allclose([at(b, o) for o in (0,1)], [1e-3*156/128,1e-5]) and a.ema().decay==.9999
    raw,ys = batch()
    want = by_hand(raw, ys, smooth=.1).sort(descending=True).values[:8].mean()
    assert torch.allclose(loss_like(r)(raw, *ys), want)
    grid, = r.augment((137,236))
    assert (grid.n, grid.p)==((3,7), .5)
    assert r.folds.func is unseen_graphemes and r.folds.keywords==dict(n=5, held=200)

def test_argus_cells():
    "GridMask draws 3 to 7 cells, both ends included"
    grid, = bengali.argus.augment((137,236))
    grid.set_random_seed(0)
    def cells():
        hole = ~grid.get_params_dependent_on_data(dict(shape=(140,210,3)), {})['kept'].all(0)
        return (np.count_nonzero(np.diff(hole.astype(int)))+1)//2   # an edge may be that of the picture
    assert {cells() for _ in range(100)}=={3,4,5,6,7}

def test_house():
    "The picture's own shape in the end, never mirrored; its numbers may change"
    r = bengali.house
    assert (r.size, r.lr, r.resize[0][0], r.resize[-1][1])==((137,236), 'find', 0, 1) and 0<r.mix().ways[0][2]<1
    assert r.tta==(as_is,) and not any('Flip' in type(o).__name__ for o in r.augment((137,236)))
    raw,ys = batch()
    assert torch.allclose(loss_like(r)(raw, *ys), by_hand(raw, ys).mean())

# --- from files to a submission

@pytest.mark.parametrize('name', names)
def test_trained(path, name):
    "Each recipe, one epoch a stage on the sample, to a submission that the competition would take"
    recipe = short(recipes[name], **(dict(lr=3e-3) if name=='house' else {}))
    learn = bengali.train(path, recipe=recipe)
    run = learn.run
    assert run.done and len(run.history)==len(recipe.steps()) and run.history.train_loss.notna().all()
    assert 0<run.score<1 and run.score==Run(run.path).score
    test = bengali.predict(learn)
    assert test.p.shape==(30,186) and all(np.allclose(o.sum(1), 1, atol=1e-4) for o in np.split(test.p, np.cumsum(SIZES)[:-1], 1))
    got,want = rows(test.submit('submission.csv')),rows(path/'sample_submission.csv')
    assert list(got)==['row_id','target'] and got.row_id.tolist()==want.row_id.tolist()
    best = np.stack([o.argmax(1) for o in np.split(test.p, np.cumsum(SIZES)[:-1], 1)], 1)
    said = dict(zip(got.row_id, got.target.astype(int)))
    assert [[said[f'{i}_{h}'] for h in HEADS] for i in test.ids]==best.tolist()
    assert np.array_equal(bengali.predict(run.path).p, test.p)

def test_rates_reach_the_groups(path):
    "starter's head learns five times as fast as its body, with ten times its decay"
    learn = bengali.train(path, recipe=short(bengali.starter))
    a,b = learn.opt.hypers
    assert b['lr']==pytest.approx(5*a['lr'], rel=1e-3) and (a['wd'],b['wd'])==(1e-3,1e-2)

def test_held_out(path):
    "argus: the held-out rows have graphemes that training does not, and every class is in training"
    recipe = short(bengali.argus)
    table = bengali.table(path)
    folds = assign_folds(table, recipe.folds, recipe.seed)
    assert table.train.grapheme[is_unseen(table, folds)].nunique()>=20
    for k in range(5):
        train,held = fold_rows(folds, k)
        gone = set(table.train.grapheme[held])-set(table.train.grapheme[train])
        assert len(gone)>=4 and all(set(table.y[held,j])<=set(table.y[train,j]) for j in range(3))

def test_oof(path, oof):
    "Each row from the fold that did not see it, scored as scikit-learn does, the root twice"
    assert oof.rows.tolist()==list(range(120)) and oof.p.shape==(120,186)
    for k,run in enumerate(oof.runs): assert np.array_equal(oof.p[oof.folds==k], run.valid.p)
    best = np.stack([o.argmax(1) for o in np.split(oof.p, np.cumsum(SIZES)[:-1], 1)], 1)
    each = [recall_score(*o, average='macro', zero_division=0) for o in zip(oof.table.y.T, best.T)]
    assert oof.score()==pytest.approx(np.average(each, weights=(2,1,1)), abs=1e-9)

def test_watched(oof):
    "The column after each epoch is the score of the best weights"
    run = oof.runs[0]
    assert run.history.hmar.max()==pytest.approx(run.score, abs=1e-6)

def test_list_is_averaged(oof):
    each = [bengali.predict(o).p for o in oof.runs]
    assert np.allclose(bengali.predict(oof.runs).p, np.mean(each, 0), atol=1e-6) and not np.allclose(*each, atol=1e-5)

def test_views(oof):
    "Views are averaged head by head, as the model sees them"
    run = oof.runs[0]
    both,plain = (bengali.predict(run, tta=o).p for o in ((as_is,hflip), False))
    learn = run.learner()
    items = learn.dls.valid.dataset.but(rows=range(4))
    x = learn.dls.valid.new(items, shuffle=False).one_batch()[0]
    want = [torch.cat([o.softmax(1) for o in learn.model.eval()(v).split(SIZES, 1)], 1) for v in (x, x.flip(-1))]
    test = bengali.predict(run, test=run.table.train.iloc[:4], tta=(as_is,hflip)).p
    assert np.allclose(test, torch.stack(want).mean(0).detach(), atol=1e-4) and not np.allclose(both, plain, atol=1e-4)

def test_gamma(path):
    "A tuned power of the counts: found on the held-out rows, in the run's values, used for the test set"
    learn = bengali.train(path, recipe=bengali.house.but(**tiny, tune=tune_gamma))
    run = Run(learn.run.path)
    assert len(run.values['gamma'])==3 and run.values==run.valid.found()
    test = bengali.predict(learn)
    assert test.values==run.values and np.array_equal(test.decide(), run.recipe.rule(test.p, run.table, **run.values))
    test.submit('a.csv')

# --- several heads in a Learner

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed(path, mix):
    "The loss of a mixed batch is that of the mixed targets, in every head"
    seen = []
    learn,cb = bengali.learner(path=path, **tiny),mix(alpha=1.)
    class Spy(Callback):
        order,run_valid = cb.order+1,False
        def after_loss(self):
            a,b = (by_hand(self.pred, ys).mean() for ys in (self.yb, cb.yb1))
            seen.append((self.loss.item(), (cb.lam*a+(1-cb.lam)*b).item()))
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-3, cbs=[cb,Spy()])
    assert len(seen)==3 and np.allclose(*zip(*seen), rtol=1e-5)

def test_captions(path):
    "A batch shows what was written; the three parts under each other"
    dls = bengali.dls(path, **tiny)
    b = dls.valid.one_batch()
    fig = dls.valid.show_batch(b, max_n=4)
    table = bengali.table(path)
    want = ['\n'.join(table.names[j][int(y[i])] for j,y in enumerate(b[1:])) for i in range(4)]
    assert [ax.get_title() for ax in fig.axes if ax.get_title()]==want

def test_results(path, oof):
    "Truth above what was decided, green where all three are right"
    learn = oof.runs[0].learner()
    fig = learn.show_results(max_n=6, shuffle=False)
    held = oof.runs[0].valid
    show = lambda y: '\n'.join(n[i] for n,i in zip(oof.table.names, y))
    want = [(f'{show(t)}\n→ {show(d)}', 'green' if (t==d).all() else 'firebrick') for t,d in zip(held.y[:6], held.decide()[:6])]
    assert [(ax.get_title(), ax.title.get_color()) for ax in fig.axes if ax.get_title()]==want

# --- nothing is lost

@pytest.mark.parametrize('event,epoch,it', [('before_step',0,1), ('before_step',2,1)])
def test_starter_resumed(path, monkeypatch, event, epoch, it):
    "RAdam with lookahead, two groups, MixUp, one channel: interrupted and gone on with, the same to the last bit"
    recipe = short(bengali.starter, epochs=3, bs=16, precision='fp32')   # 15 steps: the slow weights move at the 6th and 12th
    want = bengali.train(path, recipe=recipe).run.path
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        plant(m, interrupt, event=event, epoch=epoch, it=it)
        bengali.train(path, recipe=recipe)
    run, = (o.parent for o in Path('runs/bengali').resolve().glob('*/fold0/env.json') if not (o.parent/'done.json').exists())
    bengali.train(resume=run)
    check_same(run, want)

def test_one_picture_of_a_class(path, tmp_path):
    "Five folds, a root that one row has: trained, scored, and the row is held out once at most"
    at = tmp_path/'one'
    draw_bengali(at, 60, n_test=4)
    df = rows(at/'train.csv')
    df.loc[df.grapheme_root=='7', 'grapheme_root'] = '6'
    df.loc[3, 'grapheme_root'] = '7'
    df.to_csv(at/'train.csv', index=False)
    done = bengali.cross_validate(at, **tiny|dict(folds=5, size=(16,24), bs=16))
    assert len(done.runs)==5 and len(done)==60 and 0<=done.score()<=1
    other = bengali.train(at, fold=0, **tiny|dict(folds=partial(unseen_graphemes, n=5, held=5), size=(16,24), bs=16))
    assert 3 not in other.run.valid.rows and other.run.done

# --- command line

def test_command_line(path, capsys):
    options = '--arch test_resnet --pretrained false --size 16,24 --resize () --epochs 1 --bs 32 --lr 1e-3 --folds 2'
    main(f'train bengali --path {path} {options}'.split())
    run, = (o.parent for o in (path.cwd()/'runs').rglob('done.json'))
    recipe = Run(run).recipe
    assert (recipe.name, recipe.arch, recipe.size, recipe.lr, recipe.folds)==('house', 'test_resnet', (16,24), 1e-3, 2)
    main(['predict', str(run), '--out', 'out.csv'])
    assert 'out.csv written' in capsys.readouterr().out
    assert rows('out.csv').row_id.tolist()==rows(path/'sample_submission.csv').row_id.tolist()
    main(f'cross_validate bengali.yk --path {path} {options} --parallel 1'.split())
    assert 'out-of-fold: ' in capsys.readouterr().out
    main(['list'])
    said = capsys.readouterr().out
    assert all(f'bengali.{o}' in said for o in names)
    main(['show', 'bengali.argus'])
    assert 'unseen_graphemes(n=5, held=200)' in capsys.readouterr().out
