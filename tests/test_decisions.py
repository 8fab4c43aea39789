"Thresholds of classes and expected F2 against brute force and slow loops"
import json
from functools import partial
from itertools import product
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from recipes.data.table import Table
from recipes.infer.decide import binarise
from recipes.infer.each_class import ClassSearch, best_cut, class_thresholds, gain_of_one, shrunk
from recipes.infer.expected import calibrated, expected_f2, fit_odds, most_expected, odds_counts, tune_expected
from recipes.infer.joined import each_group
from recipes.infer.predictions import Predictions
from recipes.infer.search import best_threshold
from recipes.infer.tuning import tuned_on, tuning_predictions
from recipes.metrics import as_labels, f2
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

def preds(seed=0, n=300, c=12, kind='beta'):
    rng = np.random.default_rng(seed)
    y = rng.random((n,c))<.3/np.arange(1, c+1)
    p = rng.beta(1, 9, y.shape)+.4*y*rng.random(y.shape)
    if kind=='ties': p = np.round(p*20)/20
    return y,p.clip(0, 1).astype(np.float32)

# --- a threshold a class

def f2_of(y, p, thr, min_labels): return f2(y, binarise(p, thr=np.asarray(thr), min_labels=min_labels))

@pytest.mark.parametrize('kind', ['beta','ties'])
@pytest.mark.parametrize('min_labels', [0, 1])
def test_step_is_the_best_cut(kind, min_labels):
    "A step without drawing back finds what trying every threshold of the class finds"
    y,p = preds(1, 80, 6, kind)
    start = np.full(6, .2, np.float32)
    search = ClassSearch(p, as_labels(y), start, .01, min_labels)
    for c,v in search.columns():
        thr = search.thr.copy()
        cuts = np.unique([.01,1,*v[v>.01]])
        tried = [f2_of(y, p, [*thr[:c],t,*thr[c+1:]], min_labels) for t in [1,*(cuts[1:]+cuts[:-1])/2]]
        search.step(c, v, prior=0)
        assert f2_of(y, p, search.thr, min_labels)==pytest.approx(max(*tried, f2_of(y, p, thr, min_labels)), abs=1e-9)
    on = p>search.thr
    np.testing.assert_array_equal(search.n, on.sum(1))
    np.testing.assert_array_equal(search.tp, (on&y).sum(1))

@pytest.mark.parametrize('prior', [0, 20])
@pytest.mark.parametrize('groups', [None, dict(a=np.arange(4), b=np.arange(4, 12))])
def test_never_worse_than_the_group(groups, prior):
    table = groups and SimpleNamespace(groups=groups)
    for seed in range(4):
        y,p = preds(seed)
        start = best_threshold(p, y, table, by_group=bool(groups), min_labels=1)
        found = class_thresholds(p, y, table, prior=prior, min_labels=1)
        assert f2(y, binarise(p, table, **found))>=f2(y, binarise(p, table, **start))-1e-9
        assert json.loads(json.dumps(found))==found and len(found['thr'])==12

def test_drawn_to_the_group():
    "A class without labels keeps its group's threshold; one with few goes part of the way"
    y,p = preds(2, 500)
    y[:,5] = False
    table = SimpleNamespace(groups=dict(a=np.arange(4), b=np.arange(4, 12)))
    group = best_threshold(p, y, table, by_group=True)['thr']
    assert class_thresholds(p, y, table)['thr'][5]==pytest.approx(group['b'])
    far = class_thresholds(p, y, table, prior=1e9)['thr']
    np.testing.assert_allclose(far, [group['a']]*4+[group['b']]*8, atol=1e-4)
    assert shrunk(.9, .1, 0, 0)==.1 and shrunk(.9, .1, 10, 10)==pytest.approx(.5)

def test_class_thresholds_generalise():
    "Rare classes overfit alone; drawn to the group they do not"
    gains = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        z = rng.normal(-1-np.log(np.arange(1, 61)), 1, (6000,60))*1.3
        y,p = rng.random(z.shape)<1/(1+np.exp(-z)),(1/(1+np.exp(-z-.4*rng.normal(size=60)))).astype(np.float32)
        ways = best_threshold(p[:1200], y[:1200]),*(class_thresholds(p[:1200], y[:1200], prior=o) for o in (0,20))
        gains.append([f2(y[1200:], binarise(p[1200:], **o)) for o in ways])
    one,alone,drawn = np.mean(gains, 0)
    assert drawn>alone+.002 and drawn>one

@pytest.mark.parametrize('v,gain,want', [([.5,.4,.3], [1,-2,1.5], .35+.1), ([.5,.4,.3], [1,-2,3.5], .15), ([.5,.5,.1], [-1,2,0], .3),
    ([1.,.5], [-5,6], .25)])
def test_best_cut(v, gain, want): assert best_cut(np.array(v), np.array(gain))==pytest.approx(want)

def test_gain_of_one():
    "Against F2 with and without the label"
    rng = np.random.default_rng(0)
    for _ in range(200):
        y,on = rng.random(8)<.4,rng.random(8)<.3
        c,more = rng.integers(8),on.copy()
        on[c],more[c] = False,True
        alone = .37
        before = f2(y[None], on[None]) if on.any() else alone
        want = f2(y[None], more[None])-before
        got = gain_of_one((on&y).sum(), on.sum(), y.sum(), y[c], alone)
        assert got==pytest.approx(want)

def test_class_thresholds_memmap(tmp_path):
    y,p = preds(3, 200)
    np.save(tmp_path/'p.npy', p)
    assert class_thresholds(np.load(tmp_path/'p.npy', mmap_mode='r'), csr_matrix(y))==class_thresholds(p, y)
    with pytest.raises(ValueError, match='0 or 1'): class_thresholds(p, y, min_labels=dict(a=0))
    p[7,3] = np.nan
    with pytest.raises(ValueError, match='row 7'): class_thresholds(p, y)

# --- expected F2

def brute(p):
    "Expected F2 of every set, by every truth"
    truths = np.array(list(product((0,1), repeat=len(p))))
    w = np.where(truths, p, 1-np.asarray(p)).prod(1)
    f = {}
    for s in truths[1:]:
        tp = truths@s
        f[tuple(s)] = float(w@np.where(tp, 5*tp/(4*truths.sum(1)+s.sum()), 0))
    return f

@pytest.mark.parametrize('c', [1, 3, 7, 10])
def test_expected_brute(c):
    "No subset has a higher expected F2 than the one decided"
    rng = np.random.default_rng(c)
    for kind in range(5 if c<10 else 2):
        p = [rng.random(c), rng.beta(.4, 3, c), rng.beta(.1, .1, c), np.full(c, .3), rng.choice([0,1,.5], c)][kind]
        f = brute(p)
        got = most_expected(p[None]).toarray()[0]
        assert f[tuple(got.astype(int))]==pytest.approx(max(f.values()), abs=1e-9)
        e = expected_f2(p[None])[0]
        order = np.argsort(-p, kind='stable')
        for k in range(1, c+1): assert e[k-1]==pytest.approx(f[tuple(np.isin(np.arange(c), order[:k]).astype(int))], abs=1e-9)

def recursion(p, most):
    "Ye et al. 2012 for F2: counts of true labels among the first k, and the expectation over the rest, exactly"
    p = np.sort(p)[::-1]
    c = len(p)
    s = 1/np.arange(1, 5*c+6, dtype=float)   # E of 1/(a+4*rest), rest empty
    rest = {c:s}
    for k in range(c, 0, -1):
        s = p[k-1]*np.append(s[4:], s[-1:].repeat(4)) + (1-p[k-1])*s
        rest[k-1] = s
    res,q = [],np.ones(1)
    for k in range(1, most+1):
        q = np.append(q*(1-p[k-1]), 0)+np.append(0, q*p[k-1])
        tp = np.arange(k+1)
        res.append((q*5*tp*rest[k][4*tp+k-1]).sum())
    return np.array(res)

@pytest.mark.parametrize('mean,sure', [(-7,0), (-4,5), (-2,0), (-6,30), (3,0)])
def test_expected_recursion(mean, sure):
    "1,103 labels, of which few, many or all are likely: the integral is as good as the exact recursion"
    rng = np.random.default_rng(0)
    z = rng.normal(mean, 1.5, 1103)
    z[:sure] = 12
    p = 1/(1+np.exp(-z))
    want = recursion(p, 100)
    tol = 1e-4 if mean==3 else 1e-6   # a thousand labels are expected there
    np.testing.assert_allclose(expected_f2(p[None])[0], want, rtol=0, atol=tol)
    np.testing.assert_allclose(expected_f2(p[None].astype(np.float32))[0], want, rtol=0, atol=tol+2e-5)
    assert (want<=5*p.sum()/(np.arange(1, 101)+4)+1e-12).all()   # the bound behind `most`

def test_recursion_is_right():
    p = np.random.default_rng(1).random(7)
    f,order = brute(p),np.argsort(-p)
    want = [f[tuple(np.isin(np.arange(7), order[:k]).astype(int))] for k in range(1, 8)]
    np.testing.assert_allclose(recursion(p, 7), want, atol=1e-12)

def test_most_expected_edges():
    assert most_expected(np.zeros((2,5), np.float32)).sum(1).ravel().tolist()==[[1,1]]
    assert most_expected(np.zeros((0,5), np.float32)).shape==(0,5)
    assert most_expected(np.ones((1,300), np.float32)).sum()==100
    assert most_expected(np.ones((1,300), np.float32), most=300).sum()==300
    got = most_expected(np.full((1,6), .3, np.float32))
    assert got.dtype==bool and got.format=='csr' and got.indices.tolist()==list(range(got.sum()))
    with pytest.raises(ValueError, match='NaN'): most_expected(np.full((1,3), np.nan, np.float32))

def test_calibration_is_logistic_regression():
    "Scale and shift from counted log-odds are those of scikit-learn on all entries"
    y,p = preds(4, 500)
    z = np.log(p.astype(float).clip(1e-7, 1-1e-7)/(1-p.astype(float).clip(1e-7, 1-1e-7)))
    ref = LogisticRegression(C=1e9).fit(z.reshape(-1, 1), y.ravel())
    found = tune_expected(p, y)
    assert (found['scale'],found['shift'])==pytest.approx((ref.coef_[0,0],ref.intercept_[0]), rel=.03, abs=.03)
    assert json.loads(json.dumps(found))==found
    z,n,hits = odds_counts(p, as_labels(y))
    assert n.sum()==p.size and hits.sum()==y.sum()
    same = fit_odds(z, 1e4+0*z, 1e4/(1+np.exp(-z)))
    assert same==pytest.approx((1,0), abs=1e-3)
    assert calibrated(p) is p and calibrated(p, 1.5, .1).dtype==np.float32

def test_expected_beats_a_threshold():
    "On labels drawn from the probabilities nothing does better than the best set of each row"
    rng = np.random.default_rng(5)
    z = rng.normal(-4, 1.8, (4000,50))+rng.normal(0, 1.5, (4000,1))
    p = (1/(1+np.exp(-z))).astype(np.float32)
    y = rng.random(p.shape)<p
    other = class_thresholds(p, y)
    assert f2(y, most_expected(p))>f2(y, binarise(p, **best_threshold(p, y)))+.01
    assert f2(y, most_expected(p))>f2(y, binarise(p, **other))

# --- values from elsewhere, columns from elsewhere

def predictions(y, p, rows=True, **kw):
    frame = pd.DataFrame(dict(id=[f'{i:04}' for i in range(len(y))]))
    table = Table(frame, frame[:0], csr_matrix(y.astype(np.float32)), [str(o) for o in range(y.shape[1])],
        groups=dict(a=list(range(4)), b=list(range(4, 12))))
    comp = SimpleNamespace(name='toy', metric=f2, higher=True)
    kw = dict(rule=partial(binarise, min_labels=1), tune=best_threshold)|kw
    if rows: kw |= dict(rows=np.arange(len(y)), folds=np.arange(len(y))%3)
    return Predictions(p, list(frame.id), table, comp, **kw)

def test_tuned_on():
    (y,p),(yu,pu) = preds(0),preds(1, 100)
    oof = predictions(y, p)
    test = Predictions(pu/2, [str(i) for i in range(100)], oof.table, oof.competition, oof.rule, oof.tune, oof=oof)
    tuning = tuning_predictions(test, yu)
    got = tuned_on(test, tuning)
    assert got.values==best_threshold(pu/2, yu, min_labels=1)!=test.values
    assert f2(yu, got.decide())>f2(yu, test.decide())
    assert tuning.score()==pytest.approx(got.oof.score()) and oof.values==best_threshold(p, y, min_labels=1)
    other = tuned_on(test, tuning, tune=tune_expected, rule=most_expected)
    assert set(other.values)=={'scale','shift'} and other.decide().shape==(100,12)
    with pytest.raises(ValueError, match='no truth'): tuned_on(test, test)
    with pytest.raises(ValueError, match='100, 12'): tuning_predictions(test, yu[:50])

@pytest.mark.parametrize('rule,tune', [(partial(binarise, min_labels=1), class_thresholds), (most_expected, tune_expected)])
def test_as_a_recipe_uses_them(rule, tune):
    "Found, cross-fitted and kept as text"
    y,p = preds(6, 600)
    o = predictions(y, p, rule=rule, tune=tune)
    assert .2<o.score()<1 and f2(y, o.decide())>o.score()-.02
    assert json.loads(json.dumps(o.values))==o.values

def test_each_group():
    (y,p),(_,q) = preds(0),preds(1)
    one,two = predictions(y, p),predictions(y, q)
    got = each_group([one,two], one.table, dict(a=1, b=(0,1)))
    np.testing.assert_array_equal(got.p[:,:4], q[:,:4])
    np.testing.assert_allclose(got.p[:,4:], (p[:,4:]+q[:,4:])/2)
    assert got.score()>0
    test = [Predictions(o.p[:50], o.ids[:50], o.table, o.competition, o.rule, o.tune, oof=o) for o in (one,two)]
    joined = each_group(test, one.table, dict(a=1, b=0))
    np.testing.assert_array_equal(joined.oof.p, np.hstack([q[:,:4],p[:,4:]]))
    with pytest.raises(ValueError, match='groups'): each_group([one,two], one.table, dict(a=1))
