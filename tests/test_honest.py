"What could be wrong without a word: best weights of the wrong stage, edited functions, pictures that find themselves, other thresholds in a kernel"
import shutil
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Metric
from torch import nn
from dataclasses import replace
from functools import partial
from scipy import sparse
from types import SimpleNamespace
from callbacks.checkpoint import Checkpoint
from callbacks.resize import ProgressiveResize
from callbacks.schedule import flat
from recipes import animal, imet, inclusive, whale
from recipes.data.fixtures import sample
from recipes.data.table import Table
from recipes.infer.blending import blend, gains
from recipes.infer.embed import gallery_of
from recipes.infer.joined import each_group
from recipes.infer.keypoints import settings_of, sift
from recipes.infer.newness import by_newness
from recipes.infer.openset import tune_map5, with_unknown
from recipes.infer.postprocess import singles_first
from recipes.infer.predictions import Predictions, save_scores
from recipes.infer.tta import as_is, class_scores, hflip
from recipes.losses.only import OnlyGroup
from recipes.metrics import f2_best
from recipes.recipe import effects, fitting
from recipes.recipe.build import folds_of
from recipes.recipe.ensemble import _views, predict_runs
from recipes.recipe.fitting import fit_run
from recipes.recipe.folder import Run, make_run
from recipes.recipe.packed import predict_pack
from recipes.recipe.packing import pack
from recipes.recipe.rounds import test_predictions as round_predictions, with_test
from recipes.recipe.settling import changed, settle
from recipes.recipe.tuned import predicted
from recipes.recipe.unknown import distil_unknown, pseudo_ids

tiny = dict(arch='test_resnet', pretrained=False, size=24, resize=(), bs=16, epochs=1, folds=2, lr=3e-3, precision='fp32', schedule=flat)

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def test_best_of_the_stage(monkeypatch):
    "A stage that scores less than the one before is kept all the same, and not begun with the older score"
    seen,real = [],fitting.stage_cbs
    class Watch(Callback):
        "Notes what the stage begins with"
        def before_fit(self): seen.append((self.learn.checkpoint.stage, self.learn.checkpoint.best))
    monkeypatch.setattr(fitting, 'stage_cbs', lambda step: [*real(step), Watch()])
    run = animal.train(sample('animal', 60), **tiny|dict(epochs=3, stages=(dict(epochs=2),dict(epochs=1, lr=0.)))).run
    assert seen==[(0,None),(1,None)]
    assert run.learner().validate()[1]==pytest.approx(run.history.top1.iloc[-1])

def test_edited_folds():
    "A function that was defined anew under its old name gives new folds"
    recipe,table = animal.house,animal.table(sample('animal', 60))
    def define(k):
        def mine(table, seed=0): return np.arange(len(table))//k%2
        mine.__module__,mine.__qualname__ = 'recipes.animal','mine'
        return mine
    a,b = (folds_of(recipe.but(folds=define(k)), table) for k in (1,2))
    assert a[:4].tolist()==[0,1,0,1] and b[:4].tolist()==[0,0,1,1]

def test_edited_keypoints():
    def define(text):
        space = dict(__name__='mine')
        exec(text, space)   # as a notebook does
        return space['look']
    a,b = define('def look(im): return im'),define('def look(im): return im+1')
    assert settings_of(a)!=settings_of(b) and 'source' not in settings_of(partial(sift, n=9))

def test_nobody_finds_himself():
    "A test picture with a pseudo label is not in the gallery: held-out pictures and the test set are compared with the same ones"
    table = whale.table(sample('whale', 60))
    more = with_test(table, np.arange(4), np.zeros(4, int))
    dls = whale.dls(path=sample('whale', 60), **tiny|dict(folds=whale.house.folds))
    learn = SimpleNamespace(table=table, target=whale.competition.target, dls=dls)
    items = dls.train.dataset
    at = len(items.ids)
    ids = [*items.ids,*more.train.id[-4:]]
    learn.dls = SimpleNamespace(train=SimpleNamespace(dataset=items.but(ids=ids, rows=[*items.rows,*range(at, at+4)]), y=np.append(dls.train.y, [0]*4)))
    asked = items.but(ids=list(table.test.id), rows=[0,1])
    found = []
    gallery_of(learn, SimpleNamespace(dataset=asked, new=lambda items, **kw: found.append(items)))
    assert not set(found[0].rows) & {*range(at, at+4)} and len(found[0].rows)

def test_views():
    learn = SimpleNamespace(recipe=animal.house)
    assert _views(learn, [hflip])==(hflip,) and _views(learn, ())==_views(learn, False)==(as_is,) and _views(learn, True)==animal.house.tta
    assert _views(SimpleNamespace(recipe=animal.house.but(tta=())), True)==(as_is,)

def test_a_quick_look_keeps_nothing():
    "Only the recipe's own views are kept for rounds and blends"
    run = animal.train(sample('animal', 60), **tiny).run
    animal.predict(run, tta=False)
    assert not (run.path/'test.npy').exists()
    animal.predict(run)
    assert (run.path/'test.npy').exists()

def test_pack_takes_the_tuning_set(tmp_path):
    data = shutil.copytree(inclusive.competition.sample(60), tmp_path/'data')
    run = inclusive.train(data, **tiny).run
    want = predicted(run)
    pack(run, tmp_path/'pack')
    got = predict_pack(tmp_path/'pack', data)
    assert want.values and got.values==want.values!=run.valid.values
    assert (got.submission().to_csv()==want.submission().to_csv())

def test_a_join_that_learns_sees_held_out_rows(monkeypatch):
    "Views of parts are joined as held-out rows, not as a test set whose truth is known"
    held = SimpleNamespace(rows=np.array([1,2]), folds=np.array([0,0]))
    seen = []
    def join(preds, table):
        seen.extend((o.rows, o.oof) for o in preds)
        return preds[0]
    table = SimpleNamespace(train=SimpleNamespace(iloc=np.arange(5)))
    run = SimpleNamespace(recipe=SimpleNamespace(parts=(1,), join=join), table=table)
    monkeypatch.setattr(effects, 'parts_of', lambda run: [['a'],['b']])
    one = lambda *args: Predictions(np.ones((2,3)), ['x','y'], table, None, None, oof='truth')
    monkeypatch.setattr(effects, 'predict_runs', one)
    assert effects._seen_by(run, held, (as_is,)).shape==(2,3)
    assert [(o[0].tolist(),o[1]) for o in seen]==[([1,2],None)]*2

def test_a_stage_of_one_group_watches_it():
    "Outputs of other groups drift; the best epoch is that of the classes that are trained"
    stages = dict(epochs=1),dict(epochs=2, loss=partial(OnlyGroup, group='tag'))
    learn = imet.train(sample('imet', 60), **tiny|dict(epochs=3, stages=stages))
    table,valid = learn.table,learn.run.valid
    cols = table.groups['tag']
    f2s = [f2_best(valid.y[:,o], class_scores(learn, learn.dls.valid)[:,o]) for o in (cols,slice(None))]
    best = learn.run.history.f2_best[learn.run.history.stage==1].max()
    assert best==pytest.approx(f2s[0], abs=1e-4)!=pytest.approx(f2s[1], abs=1e-4)

def test_all_rows_with_parts():
    "A recipe of parts that was trained on all rows predicts, by the values that were given; one whose join learns says that it cannot"
    path,net = sample('imet', 60),imet.house.but(**tiny)
    both = net.but(name='both', parts=(net,net.but(seed=1)), join=partial(each_group, parts=dict(culture=0, tag=1)))
    prior = imet.train(path, recipe=net).run.valid
    run = imet.train(path, recipe=both, fold='all', prior=prior)
    preds = imet.predict(run)
    assert preds.values==prior.values and np.isfinite(preds.p).all() and len(preds.submission())==len(preds)
    with pytest.raises(ValueError, match='learned from held-out rows'):
        by_newness([Predictions(np.ones((1,2)), ['a'], prior.table, prior.competition, None)]*2)

def test_counts_without_the_held_out():
    "A rule that counts training pictures counts those of the fold: of two pictures of an id, one held out, the other is a single one"
    table = whale.table(sample('whale', 60))
    y,n = table.y,len(table.vocab)
    rows = np.flatnonzero(pd.Series(y).duplicated()&(y<n))
    seen = []
    def rule(p, t, **kw):
        seen.append(t.heads[0][-1])
        return np.zeros((len(p),5), int)
    p = np.zeros((len(rows),n), np.float32)
    def labels(folds): return Predictions(p, list(table.train.id[rows]), table, whale.competition, rule, rows=rows, folds=folds).labels
    labels(np.zeros(len(rows), int))
    whole,left = np.bincount(y[y<n], minlength=n),np.bincount(np.delete(y, rows)[np.delete(y, rows)<n], minlength=n)
    assert (whole==2).any() and [o.tolist() for o in seen]==[left.tolist()]*2 and left.max()==1
    seen.clear()
    labels(np.arange(len(rows))%2)
    for k in (0,1): np.testing.assert_array_equal(seen[k], whole-np.bincount(y[rows[k::2]], minlength=n))

def test_blend_counts_without_the_held_out():
    "Found weights decide held-out rows as their members do, by the pictures of the fold"
    rng,n = np.random.default_rng(0),60
    y = np.concatenate([np.repeat(np.arange(n), 2), n+np.arange(40), np.full(30, n+40)])
    frame = pd.DataFrame(dict(id=[f'p{i}' for i in range(len(y))], path='', width=10, height=10))
    table = Table(frame, frame[:0], y, [f'w{i}' for i in range(n+40)])
    rows = np.concatenate([np.arange(0, 2*n, 2), np.flatnonzero(y==n+40)])
    p = rng.random((len(rows),n+40)).astype(np.float32)*.6
    p[1:n:2][np.arange(n//2),y[rows[1:n:2]]] = .55+.1*rng.random(n//2)
    kw = dict(ids=list(frame.id[rows]), table=table, competition=whale.competition, rule=partial(with_unknown, steps=(singles_first,)), tune=tune_map5)
    a,b = (Predictions(p.copy(), rows=rows, folds=np.zeros(len(rows), int), **kw) for _ in range(2))
    both = blend([a,b], 'find')
    np.testing.assert_array_equal(both.labels, a.labels)
    assert both.score()==a.score() and (gains([a,b], n=20).gain==0).all()
    table.y[:] = np.roll(y, 1)   # the rule does look at counts
    assert a.score()!=Predictions(p, rows=rows, folds=np.zeros(len(rows), int), **kw).score()

def test_round_after_a_kill(tmp_path):
    "A run that was stopped, looked at and resumed hands its last word to the next round"
    class Stop(Callback):
        order = 95
        def after_epoch(self):
            if self.epoch==0: raise KeyboardInterrupt
    table = imet.table(sample('imet', 60))
    recipe = imet.house.but(**tiny|dict(epochs=2, tta=(as_is,)))
    run = make_run(recipe, table, 0, tmp_path/'runs')
    with pytest.raises(KeyboardInterrupt): fit_run(run, cbs=[Stop()])
    predict_runs([Run(run.path, table=table)])
    save_scores(run.path, 'test', np.zeros((len(table.test),30)), table.test.id)   # as a net of one epoch, but further off
    fit_run(Run(run.path, table=table))
    late = round_predictions([Run(run.path, table=table)])
    assert late.p.max()>0 and np.allclose(late.p, predict_runs([Run(run.path, table=table)]).p)
    moved = replace(table, test=table.test.iloc[::-1].reset_index(drop=True))
    turned = round_predictions([Run(run.path, table=moved)])
    assert turned.ids==late.ids[::-1]
    np.testing.assert_allclose(turned.p, late.p[::-1], atol=1e-5)
    held = pd.Index(table.train.id).get_indexer(run.valid.ids)
    with pytest.raises(ValueError, match='3 of .* held-out pictures are no longer'): Run(run.path, table=table.subset(np.delete(np.arange(60), held[:3]))).valid

def test_rounds_need_the_one_before():
    table = whale.table(sample('whale', 60))
    for o in pseudo_ids,distil_unknown:
        with pytest.raises(ValueError, match='prior='): o(table, None)
    with pytest.raises(ValueError, match='first round'): whale.train(sample('whale', 60), recipe=whale.fifth, prior=[], arch='test_resnet')

def test_more_rows_keep_the_teacher():
    "Test pictures that are added stand below what the rows before learn from"
    table = imet.table(sample('imet', 60))
    y = table.y[:3]
    more = with_test(replace(table, soft=table.y*.5, mask=table.y), np.arange(3), y)
    np.testing.assert_allclose(more.soft.toarray(), np.concatenate([table.y.toarray()*.5, y.toarray()]))
    assert more.mask.shape==more.y.shape and (more.mask[60:]!=y).nnz==0 and with_test(table, np.arange(3), y).soft is None
    ids = whale.table(sample('whale', 60))
    soft = sparse.csr_matrix(np.full((60,len(ids.vocab)), .1, np.float32))
    np.testing.assert_allclose(with_test(replace(ids, soft=soft), np.arange(2), np.array([3,0])).soft[60:].toarray(), np.eye(len(ids.vocab))[[3,0]])

def test_detectors_of_a_factory():
    "Detectors that differ in what they close over do not share a cache"
    def keeping(n):
        def detect(im): return sift(im, most=n)
        return detect
    assert settings_of(keeping(5))!=settings_of(keeping(50)) and settings_of(keeping(5))==settings_of(keeping(5))
    def named(source, by):
        def detect(im): return sift(im, most=source+by)
        return detect
    kept = settings_of(named(3, 4))
    assert 'sift' in kept['source'] and kept['by'].endswith('detect') and kept!=settings_of(named(4, 3)), 'whatever the outer names are'

def test_epochs_and_size_bring_the_rest():
    "A shorter training falls at the same shares of it, and random sizes go with the size; what is given stays as given"
    short = changed(whale.kernel2, dict(epochs=40))
    assert [o.epochs for o in short.steps()]==[25,15]
    first,then = (o.schedule.keywords['at'] for o in short.steps())
    np.testing.assert_allclose(first, [15,20,24])
    np.testing.assert_allclose(then, [5,10,14])
    assert changed(whale.kernel2, dict(epochs=40, schedule=flat)).steps()[1].schedule is flat
    assert changed(whale.kernel2, dict(epochs=400))==whale.kernel2 and changed(imet.house, dict(epochs=3)).schedule is imet.house.schedule
    assert changed(inclusive.softf2, dict(size=112)).scales==(96,112,128) and changed(inclusive.softf2, dict(size=112, scales=(64,))).scales==(64,)

def test_parts_made_alike(capsys):
    "Networks that differ only in what was given are said to be one"
    settle(imet.first, imet.table(sample('imet', 60)), dict(arch='resnet18'))
    assert 'of 6 different parts 4 are left' in capsys.readouterr().out
    settle(imet.first, imet.table(sample('imet', 60)), dict(lr=1e-3))
    assert 'parts' not in capsys.readouterr().out

def test_best_at_the_last_size(tmp_path):
    "A score that was higher on smaller pictures does not keep their weights, also when a fit goes on"
    class Side(Metric):
        def reset(self): pass
        def accumulate(self, learn): self.side = learn.x.shape[-1]
        value = property(lambda self: -self.side)
        name = 'side'
    def learner():
        torch.manual_seed(0)
        x,y = torch.randn(16, 3, 16, 16),torch.randn(16, 3)
        dls = DataLoaders.from_dsets(*[list(zip(x, y))]*2, bs=8, device='cpu', num_workers=0)
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        return Learner(dls, net, loss_func=nn.MSELoss(), metrics=Side(), cbs=ProgressiveResize(((0,8),(.5,16))))
    learn,best = learner(),Checkpoint(tmp_path, 'side')
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-2, cbs=best)
    assert [o['side'] for o in best.history]==[-8,-8,-16,-16] and best.best==-16 and best.shape==[16,16]
    again = Checkpoint(tmp_path, 'side')
    again.load_state_dict(best.state_dict())
    again.shown = [16,16]
    assert again.is_best(dict(side=-15)) and not again.is_best(dict(side=-16))
    seen = []
    learn,best = learner(),Checkpoint(tmp_path, 'side')
    best.is_best,real = lambda row: (seen.append(real(row)), seen[-1])[1],best.is_best
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-2, cbs=best)
    assert seen==[True,False,True,False]

def test_folds_of_each_round():
    "The fifth place deals its folds anew after each round"
    table = whale.table(sample('whale', 60))
    dealt = [folds_of(whale.fifth.but(**o, rounds=()), table) for o in whale.fifth.rounds]
    assert len(dealt)==3 and all((a!=b).any() for a,b in zip(dealt, dealt[1:]))
