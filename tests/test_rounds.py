"What rounds do to training rows: which are dropped, added and taught, and that none of them is ever held out"
from functools import partial
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from recipes import imet
from recipes.data.fixtures import draw_imet
from recipes.data.relabel import confidence, distil, drop_noisy, label_errors, taught
from recipes.data.table import Table
from recipes.infer.decide import binarise
from recipes.infer.predictions import Predictions
from recipes.infer.search import best_threshold
from recipes.metrics import f2
from recipes.recipe.build import split, training
from recipes.recipe.core import from_json
from recipes.recipe.rounds import in_turn
from recipes.recipe.sure import pseudo_labels
from scipy import sparse

def table_of(y, n_test=40):
    frame = pd.DataFrame(dict(id=[f'{i:05}' for i in range(len(y))], path='a.png', width=3))
    test = pd.DataFrame(dict(id=[f't{i}' for i in range(n_test)], path='b.png', width=4))
    return Table(frame, test, sparse.csr_matrix(y.astype(np.float32)), [str(o) for o in range(y.shape[1])])

def oof_of(table, p): return SimpleNamespace(p=p, ids=list(table.train.id), y=table.y)

def planted(n=3000, c=60, share=.05, seed=0):
    "Labels of which some rows have another row's, features that know the truth, and out-of-fold ridge regression on the labels given"
    rng = np.random.default_rng(seed)
    true = (rng.random((n,c))<.4/np.arange(1, c+1)**.6).astype(np.float32)
    wrong = np.sort(rng.permutation(n)[:round(share*n)])
    y = true.copy()
    y[wrong] = true[np.roll(wrong, 1)]
    x = np.hstack([true@rng.normal(size=(c,80))+rng.normal(size=(n,80)), np.ones((n,1))])
    p = np.zeros((n,c), np.float32)
    for f in range(5):
        a,b = np.arange(n)%5!=f,np.arange(n)%5==f
        p[b] = (x[b]@np.linalg.solve(x[a].T@x[a]+np.eye(81), x[a].T@y[a])).clip(0, 1)
    return y,true,p,wrong[(y!=true)[wrong].any(1)]

def test_planted_noise():
    "Wrong labels are found far more often than by chance"
    y,true,p,wrong = planted()
    table = table_of(y)
    kept = drop_noisy(table, oof_of(table, p), .05)
    dropped = np.flatnonzero(~table.train.id.isin(kept.train.id))
    hit = np.isin(dropped, wrong).sum()
    print(f'precision {hit/len(dropped):.2f}, recall {hit/len(wrong):.2f}')
    assert len(dropped)==150 and hit/len(dropped)>.5 and hit/len(wrong)>.5
    np.testing.assert_array_equal(kept.y.toarray(), y[np.setdiff1d(np.arange(3000), dropped)])

def test_label_errors_slow():
    y,_,p,_ = planted(300)
    want = [np.mean([abs(a-b) for a,b in zip(*o)]) for o in zip(p, y)]
    np.testing.assert_allclose(label_errors(p, sparse.csr_matrix(y)), want, rtol=1e-4)
    np.testing.assert_allclose(confidence(p), [np.mean([abs(a-.5) for a in o]) for o in p], rtol=1e-4)

def test_drop_only_what_was_predicted():
    y,_,p,_ = planted(300)
    table = table_of(y)
    some = SimpleNamespace(p=p[100:200], ids=list(table.train.id[100:200]), y=table.y[100:200])
    kept = drop_noisy(table, some, .1)
    assert len(kept)==290 and set(table.train.id[:100])|set(table.train.id[200:]) <= set(kept.train.id)
    with pytest.raises(ValueError, match='prior='): drop_noisy(table, None)

def runs_of(table, q, oof, n=2):
    "Runs that have predicted the test set: `q`, a little more and a little less"
    class Path:
        def __truediv__(self, o): return self
        def exists(self): return True
    kw = dict(table=table, competition=oof.competition, rule=oof.rule, tune=oof.tune)
    return [SimpleNamespace(path=Path(), fold=i, table=table, recipe=SimpleNamespace(parts=()), valid=oof,
        test=Predictions(q+d, list(table.test.id), **kw)) for i,d in enumerate(np.linspace(-.01, .01, n, dtype=np.float32))]

def with_runs(table, p, q):
    comp = SimpleNamespace(name='toy', metric=f2, higher=True)
    n = len(table)
    oof = Predictions(p, list(table.train.id), table, comp, partial(binarise, min_labels=1), best_threshold, np.arange(n), np.arange(n)%2)
    oof.runs = runs_of(table, q, oof)
    return oof

def test_pseudo_rows():
    "The surest test rows with the labels that a submission would have, and marked"
    y,_,p,_ = planted(300)
    table,q = table_of(y),np.random.default_rng(0).random((40,60)).astype(np.float32)**4*.9
    oof = with_runs(table, p, q)
    more = pseudo_labels(table, oof, .25)
    sure = np.sort(np.argsort(-np.abs(q-.5).mean(1))[:10])
    new = more.train[more.train.source=='pseudo']
    assert list(new.id)==[f't{i}' for i in sure] and len(more)==310==more.y.shape[0] and (new.path=='b.png').all() and (new.width==4).all()
    np.testing.assert_array_equal(more.y[300:].toarray(), binarise(q, **best_threshold(p, table.y)).toarray()[sure])
    assert more.y.dtype==np.float32 and (more.train.source[:300]=='given').all() and 'source' not in table.train and len(more.test)==40
    for share in 0,1: assert len(pseudo_labels(table, oof, share))==300+40*share
    with pytest.raises(ValueError, match='runs'): pseudo_labels(table, oof_of(table, p))

def test_taught():
    y,_,p,_ = planted(300)
    table = table_of(y)
    some = np.random.default_rng(0).permutation(300)[:120]
    soft = distil(table, SimpleNamespace(p=p[some], ids=list(table.train.id[some])), k=.7, least=.01)
    want = y.copy()
    want[some] = np.maximum(y[some], np.where(.7*p[some]>=.01, .7*p[some], 0))
    np.testing.assert_allclose(soft.soft.toarray(), want, atol=1e-6)
    assert soft.soft.dtype==np.float32 and soft.soft.nnz<p.size and soft.y is table.y and taught(table.y[:0], p[:0]).shape==(0,60)
    np.testing.assert_array_equal(table.y.toarray(), y)

def test_never_held_out():
    "Each fold holds out what it held out before, dropped rows included; trains on pseudo rows, not on dropped ones"
    y,_,p,_ = planted(300)
    table = table_of(y)
    kept = drop_noisy(table, oof_of(table, p), .2)
    more,recipe = pseudo_labels(kept, with_runs(table, p, p[:40]), .5),imet.house.but(folds=5)
    for fold in (0,3):
        _,own,train,held = training(recipe, table, fold, more)
        assert own is table
        np.testing.assert_array_equal(held, split(recipe, table, fold)[1])
        assert not set(more.train.id[train]) & set(table.train.id[held])
        assert (more.train.source[train]=='pseudo').sum()==20
        assert set(more.train.id[train])<=set(kept.train.id)|set(table.test.id)

def test_in_turn():
    y,_,p,_ = planted(300)
    table = table_of(y)
    steps = partial(drop_noisy, share=.1),partial(distil, k=.5)
    got = in_turn(table, oof_of(table, p), steps)
    assert len(got)==270==got.soft.shape[0] and (got.soft.data<1).any()
    kept = np.flatnonzero(table.train.id.isin(got.train.id))
    np.testing.assert_allclose(got.soft.toarray(), np.maximum(y, np.where(.5*p>=.01, .5*p, 0))[kept], atol=1e-6)
    both = in_turn(table, with_runs(table, p, p[:40]), (steps[0], partial(pseudo_labels, share=.5), steps[1]))
    assert len(both)==290==both.soft.shape[0]
    np.testing.assert_array_equal(both.soft[270:].toarray(), both.y[270:].toarray())   # nobody taught test rows

def test_rounds_go_to_text():
    recipe = imet.house.but(rounds=(dict(), dict(data=partial(in_turn, steps=(partial(drop_noisy, share=.05), pseudo_labels)))))
    assert from_json(recipe.to_json())==recipe

def test_rounds_train():
    "Two rounds of two folds: the second without noisy rows and with test pictures, predicted once"
    draw_imet('data', 60, 20, classes=8, cut=3)
    rounds = (dict(), dict(data=partial(in_turn, steps=(partial(drop_noisy, share=.1), partial(pseudo_labels, share=.5)))))
    kw = dict(arch='resnet10t', pretrained=False, size=16, resize=(), epochs=1, bs=8, lr=1e-3, folds=2, rounds=rounds)
    preds = imet.cross_validate('data', **kw)
    assert len(preds)==60 and isinstance(preds, Predictions) and 0<=preds.score()<=1
    first = preds.runs[0].path.parent.parent/'round0'
    assert all((first/f'fold{o}'/'test.npy').exists() for o in (0,1)) and not list(first.parent.glob('round1/*/test.npy'))
    assert f2(preds.y, preds.labels)==pytest.approx(preds.score())
