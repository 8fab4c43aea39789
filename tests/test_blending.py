"Blends: rows that belong together, weights that help where it can be known, and gains that are honest"
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from scipy import sparse
from recipes.data.table import Table
from recipes.infer.blending import Blend, blend, gains, greedy_weights
from recipes.infer.decide import binarise
from recipes.infer.predictions import Predictions
from recipes.infer.search import best_threshold
from recipes.metrics import f2
from recipes.look.scores import gaps, plot_gap

def predictions(p, y, rows=None, folds=None, **kw):
    "Held-out rows, with a threshold that is found"
    n = len(p)
    rows = np.arange(n) if rows is None else np.asarray(rows)
    y = np.zeros((n,6)) if y is None else y
    table = Table(pd.DataFrame(dict(id=range(y.shape[0]))), None, y, list('abcdef'))
    comp = SimpleNamespace(name='x', metric=f2, higher=True)
    folds = rows%4 if folds is None else folds
    return Predictions(p, [f'id{o}' for o in rows], table, comp, binarise, best_threshold, rows=rows, folds=folds, **kw)

def test_set(p, ids, oof):
    o = oof or predictions(np.zeros((2,6)), None)
    return Predictions(p, ids, o.table, o.competition, o.rule, o.tune, oof=oof)
test_set.__test__ = False

@pytest.fixture(scope='module')
def truth(): return np.random.default_rng(0).random((240,6))<.3

def noisy(y, noise, seed, sees=slice(None)):
    "Scores that know some classes, with noise"
    rng,p = np.random.default_rng(seed),np.full(y.shape, .3)
    p[:,sees] = y[:,sees]
    return (p+noise*rng.standard_normal(y.shape)).clip(0, 1).astype(np.float32)

@pytest.fixture(scope='module')
def members(truth):
    y = sparse.csr_matrix(truth.astype(np.float32))
    ps = noisy(truth, .35, 1, slice(0,4)),noisy(truth, .35, 2, slice(3,6)),np.random.default_rng(3).random(truth.shape, np.float32)
    return [predictions(o, y) for o in ps]

def test_given(members):
    "Given weights, against numpy; float32 stays"
    got = blend(members, [3,1,0], .5)
    assert np.allclose(got.p, .75*members[0].p**.5+.25*members[1].p**.5, atol=1e-6) and got.p.dtype==np.float32
    assert got.weights.tolist()==[.75,.25,0]
    for bad in [1,1],[1,-1,1],[0,0,0]:
        with pytest.raises(ValueError, match='3 weights'): blend(members, bad)
    with pytest.raises(ValueError, match='best'): blend(members, 'best')

def test_greedy_is_near_best():
    "Against all weights of a fine grid"
    rng = np.random.default_rng(4)
    target,a = rng.random(50),rng.random((3,50))
    score = lambda w: -((w@a-target)**2).mean()
    grid = [np.array([i,j,20-i-j])/20 for i in range(21) for j in range(21-i)]
    assert score(greedy_weights(score, 3, 20))>max(map(score, grid))-2e-3
    assert greedy_weights(lambda w: 0., 3).tolist()==[1,0,0]   # nothing helps: one alone

def test_found(members):
    "Two that know different classes are used, one that guesses is not"
    b = blend(members, 'find')
    assert b.weights.sum()==pytest.approx(1) and b.weights[2]<.1 and min(b.weights[:2])>.2
    assert b.score()>max(o.score() for o in members)+.1
    assert np.array_equal(b.weights, blend(members, 'find').weights)

def test_cross_fitted(members):
    "Each fold is scored with weights and threshold of the others: the loop"
    b,parts = Blend(members),[o.p for o in members]
    got = np.zeros(b.p.shape, bool)
    for k in range(4):
        here = b.folds==k
        def score(w):
            p = sum(v*o[~here] for v,o in zip(w, parts))
            return f2(b.y[~here], binarise(p, **best_threshold(p, b.y[~here])))
        w = greedy_weights(score, 3)
        p = sum(float(v)*o for v,o in zip(w, parts))
        got[here] = binarise(p[here], **best_threshold(p[~here], b.y[~here])).toarray()
    assert np.array_equal(b.labels.toarray(), got) and b.score()==pytest.approx(f2(b.y, got))

def test_found_on_some(members):
    "Of many rows some are drawn: the same ones, of those that were given, all when there are few"
    b,given,seen = blend(members, 'find'),np.arange(240)[1::2],[]
    mixed = b.mixed
    b.mixed = lambda w,rows=slice(None): seen.append(rows) or mixed(w, rows)
    few = b.find(given, most=50)
    assert {len(o) for o in seen}=={50} and all(np.array_equal(o, seen[0]) for o in seen)
    assert np.isin(seen[0], given).all() and len(np.unique(seen[0]))==50 and few.sum()==pytest.approx(1) and few[2]<.1
    seen.clear()
    b.find(given)
    assert all(np.array_equal(o, given) for o in seen)

def test_no_gain_from_noise():
    "Many members without any knowledge: found weights gain on their own rows, and not in the score"
    rng = np.random.default_rng(5)
    truth = rng.random((150,5))<.3
    y = sparse.csr_matrix(truth.astype(np.float32))
    many = [predictions(rng.random(truth.shape, np.float32), y) for _ in range(8)]
    b = blend(many, 'find')
    flattered = f2(b.y, b.decide())
    assert flattered>b.score()+.005
    none = np.mean([o.score() for o in many])
    assert abs(b.score()-none)<.03 and flattered>none
    df = gains(many, n=200)
    assert df.loc['found weights','low']<=.01

def test_report(members):
    "Columns, and a gain that is the difference of the scores"
    df = blend(members, 'find').report(n=100)
    assert df.index[0].startswith('best member') and list(df)==['score','gain','low','high','pictures']
    assert np.allclose(df.gain, df.score-df.score.iloc[0]) and (df.low<=df.gain).all() and (df.gain<=df.high).all()
    assert df.loc['found weights','low']>0 and df.pictures.tolist()==[240]*3

def test_rows(members, capsys):
    "Out-of-fold rows of different folds: those that all have, said with counts"
    a,b = members[:2]
    part = predictions(b.p[60:][::-1], b.table.y, np.arange(60, 240)[::-1])
    got = blend([a,part])
    assert '180 ids are in all of the 2 predictions, which have 240, 180' in capsys.readouterr().out
    assert got.rows.tolist()==list(range(60, 240)) and np.allclose(got.p, (a.p+b.p)[60:]/2) and np.array_equal(got.folds, got.rows%4)
    none = predictions(b.p[:9], b.table.y, np.arange(500, 509))
    with pytest.raises(ValueError, match='0 ids are in all of the 2 predictions, which have 240, 9'): blend([a,none])
    with pytest.raises(ValueError, match='5, 6 classes'): blend([a,predictions(b.p[:,:5], b.table.y)])

def test_test_set(members):
    "Test rows: by id, with weights and threshold of the out-of-fold rows behind them; a missing one is refused"
    p = np.random.default_rng(6).random((2,5,6), np.float32)
    a,b = test_set(p[0], list('abcde'), members[0]),test_set(p[1][::-1], list('edcba'), members[1])
    got = blend([a,b], 'find')
    w = blend(members[:2], 'find').weights
    assert np.allclose(got.p, w[0]*p[0]+w[1]*p[1], atol=1e-6) and got.ids==list('abcde')
    assert got.values==got.oof.values==best_threshold(blend(members[:2], w).p, members[0].y)
    with pytest.raises(ValueError, match='4 ids are in all'): blend([a,test_set(p[1], list('abcdx'), members[1])])
    with pytest.raises(ValueError, match='found on out-of-fold rows'): blend([a,test_set(p[1], list('abcde'), None)], 'find')

def test_values_from_elsewhere():
    "Runs that held nothing out bring values without rows"
    behind = SimpleNamespace(found=lambda: dict(thr=.7))
    two = [test_set(np.full((2,6), o), ['a','b'], None) for o in (.2,.6)]
    for o in two: o.oof = behind
    assert blend(two).values==dict(thr=.7) and np.allclose(blend(two).p, .4)

def test_one_fold(members):
    "With one fold, two halves"
    one = [predictions(o.p, o.table.y, folds=np.zeros(240)) for o in members]
    b = blend(one, 'find')
    assert .5<b.score()<=1 and b.labels.shape==(240,6)

# --- hold-out and leaderboard

def test_gaps():
    "The widest is .134; the best on the leaderboard comes first"
    df = gaps(dict(a=(.785,.651), b=(.7,.66)))
    assert df.gap['a']==pytest.approx(.134) and df.index.tolist()==['b','a']
    with pytest.raises(ValueError, match='two scores'): gaps(dict(a=(.7,)))
    ax = plot_gap(dict(a=(.785,.651), b=(.7,.66)))
    assert [o.get_text() for o in ax.texts]==['b +0.040','a +0.134'] and 'same order: -1.00' in ax.get_title()
