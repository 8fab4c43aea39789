"Decision rules and the search for their values against slow loops and golden vectors"
import json
from types import SimpleNamespace
import numpy as np, pytest
from scipy.sparse import csr_matrix
from recipes.infer.decide import binarise, clip_labels, highest
from recipes.infer.search import best_threshold, threshold_curve
from recipes.metrics import f2
from recipes.thresholds import GRID

P = np.array([[.9,.2,.12,.05],[.07,.02,.011,.0099],[.3,.3,.3,.01]])

def table(c): return SimpleNamespace(groups=dict(culture=np.arange(c//3), tag=list(range(c//3, c))))

def preds(seed, n=300, c=24, kind='beta'):
    "Truth of about two labels a row, some rows without, and probabilities that know of it"
    rng = np.random.default_rng(seed)
    y = rng.random((n,c))<.08
    p = rng.beta(1, 12, y.shape) + .3*y*rng.random(y.shape)
    p[:,c//3:] *= 1.7
    if kind=='ties': p = np.round(p*20)/20
    return y,p.clip(0, 1).astype(np.float32)

def clip_slow(on, p, lo, hi):
    "Chosen labels first, then by value, then by index"
    order = sorted(range(len(p)), key=lambda j: (not on[j], -p[j], j))
    n = min(max(sum(on), lo), len(p) if hi is None else hi)
    res = np.zeros(len(p), bool)
    res[order[:n]] = True
    return res

def binarise_slow(p, thr, groups=None, lo=1, hi=None, relative=False):
    "`thr` rows x classes; `lo` and `hi` numbers, or dicts by group"
    res = []
    for row,t in zip(p, np.broadcast_to(np.asarray(thr, p.dtype), p.shape)):
        if relative and row.max()>0: row = row/row.max()
        on = row>t
        if isinstance(lo, dict):
            for g,i in groups.items(): on[i] = clip_slow(on[i], row[i], lo[g], hi[g])
        else: on = clip_slow(on, row, lo, hi)
        res.append(on)
    return np.array(res)

@pytest.mark.parametrize('kwargs,ref', [
    (dict(thr=.1, max_labels=2), [[1,1,0,0],[1,0,0,0],[1,1,0,0]]),
    (dict(thr=1/7, max_labels=10, relative=True), [[1,1,0,0],[1,1,1,0],[1,1,1,0]]),
    (dict(thr=P.max(1, keepdims=True)/7, max_labels=10), [[1,1,0,0],[1,1,1,0],[1,1,1,0]]),
    (dict(thr=.5, min_labels=0, max_labels=3), [[1,0,0,0],[0,0,0,0],[0,0,0,0]]),
    (dict(thr=0, min_labels=0, max_labels=0), np.zeros((3,4))),
    (dict(thr=2, min_labels=9), np.ones((3,4))),
    (dict(thr=.3, min_labels=0), [[1,0,0,0],[0,0,0,0],[0,0,0,0]])])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_golden(kwargs, ref, dtype):
    got = binarise(P.astype(dtype), **kwargs)
    assert got.dtype==bool and got.format=='csr' and got.has_canonical_format
    np.testing.assert_array_equal(got.toarray(), ref)

@pytest.mark.parametrize('kind', ['beta','ties'])
@pytest.mark.parametrize('lo,hi', [(0,None),(1,None),(1,2),(0,0),(0,3),(3,3),(30,None)])
@pytest.mark.parametrize('relative', [False, True])
def test_slow_loop(kind, lo, hi, relative):
    p = preds(0, kind=kind)[1]
    p[7] = 0
    for thr in (.1, np.linspace(.05, .4, p.shape[1]), np.linspace(.05, .4, len(p))[:,None]):
        got = binarise(p, thr=thr, min_labels=lo, max_labels=hi, relative=relative)
        np.testing.assert_array_equal(got.toarray(), binarise_slow(p, thr, None, lo, hi, relative))

@pytest.mark.parametrize('kind', ['beta','ties'])
def test_groups(kind):
    p = preds(1, kind=kind)[1]
    t,lo,hi = table(24),dict(culture=0, tag=1),dict(culture=1, tag=3)
    thr = np.repeat([.28,.5], [8,16])
    got = binarise(p, t, dict(tag=.5, culture=.28), lo, hi).toarray()
    np.testing.assert_array_equal(got, binarise_slow(p, thr, t.groups, lo, hi))
    np.testing.assert_array_equal(binarise(p, t, dict(culture=.28, tag=.5), 1, 2).toarray(), binarise_slow(p, thr, None, 1, 2))
    assert got[:,:8].sum(1).max()<=1 and got[:,8:].sum(1).min()==1

def test_a_list_is_by_class_and_a_column_by_row():
    p,thr = np.full((2,2), .5),[.1,.9]
    np.testing.assert_array_equal(binarise(p, thr=thr, min_labels=0).toarray(), [[1,0],[1,0]])
    np.testing.assert_array_equal(binarise(p, thr=np.array(thr)[:,None], min_labels=0).toarray(), [[1,1],[0,0]])

def test_highest_and_clip_leave_their_input():
    p = np.array([[1.,1,1]])
    on = p>0
    assert clip_labels(on, p, 0, 1).tolist()==[[True,False,False]] and on.all()
    assert highest(p, 2).tolist()==[[True,True,False]]

def test_masked_scores():
    p = np.array([[-np.inf,-3.,-np.inf,2.]])
    np.testing.assert_array_equal(binarise(p, thr=0, max_labels=1).toarray(), [[0,0,0,1]])
    np.testing.assert_array_equal(binarise(p, thr=9, min_labels=2).toarray(), [[0,1,0,1]])

def test_empty(): assert binarise(np.zeros((0,4), np.float32)).shape==(0,4)

@pytest.mark.parametrize('kwargs,says', [
    (dict(thr=[.1,.2,.3]), r'one a class \(4,\) or one a row \(3,1\)'),
    (dict(thr=np.nan), 'without NaN'),
    (dict(min_labels=3, max_labels=2), '0 <= min <= max'),
    (dict(min_labels=-1), '0 <= min <= max'),
    (dict(thr=dict(a=1)), 'need a table with groups'),
    (dict(table=table(4), thr=dict(cultur=1, tag=2)), "'cultur', 'tag'.*has .'culture', 'tag'"),
    (dict(table=table(9), thr=dict(culture=1, tag=2)), 'each of the 4 classes once')])
def test_refused(kwargs, says):
    with pytest.raises(ValueError, match=says): binarise(P, **kwargs)

def test_nan_is_refused():
    p = P.copy()
    p[1:,2] = np.nan
    with pytest.raises(ValueError, match='2 of 3 rows .* first is row 1'): binarise(p)

def test_memmap(tmp_path):
    y,p = preds(2, 6000)
    mm = np.lib.format.open_memmap(tmp_path/'p.npy', 'w+', np.float32, p.shape)
    mm[:] = p
    mm = np.load(tmp_path/'p.npy', mmap_mode='r')
    thr = np.linspace(.05, .4, len(p))[:,None]
    np.testing.assert_array_equal(binarise(mm, thr=thr, max_labels=3).toarray(), binarise_slow(p, thr, None, 1, 3))
    assert best_threshold(mm, y)==best_threshold(p, csr_matrix(y, dtype=np.float32))

RULES = [{}, dict(min_labels=0), dict(max_labels=2), dict(min_labels=2, max_labels=3), dict(relative=True, max_labels=3),
    dict(min_labels=dict(culture=0, tag=1), max_labels=dict(culture=1, tag=3)), dict(max_labels=dict(culture=1, tag=2))]

@pytest.mark.parametrize('kind', ['beta','ties'])
@pytest.mark.parametrize('rule', RULES)
def test_one_threshold(kind, rule):
    y,p = preds(3, kind=kind)
    t = table(24)
    grid,scores = threshold_curve(p, y, t, **rule)
    every = [f2(y, binarise(p, t, thr=float(g), **rule)) for g in grid]
    np.testing.assert_allclose(scores, every, rtol=1e-12)
    best = best_threshold(p, y, t, thr=.9, **rule)
    assert json.loads(json.dumps(best))==best and type(best['thr']) is float
    assert f2(y, binarise(p, t, **best, **rule))==pytest.approx(max(every), rel=1e-12)

@pytest.mark.parametrize('kind', ['beta','ties'])
@pytest.mark.parametrize('rule', [RULES[i] for i in (0,1,5,6)] + [dict(relative=True)])
def test_threshold_by_group(kind, rule):
    y,p = preds(4, kind=kind)
    t,grid = table(24),np.arange(1, 16)/25
    best = best_threshold(p, csr_matrix(y), t, by_group=True, grid=grid, **rule)
    assert json.loads(json.dumps(best))==best and set(best['thr'])=={'culture','tag'}
    def score(a, b): return f2(y, binarise(p, t, dict(culture=a, tag=b), **rule))
    a,b = best['thr'].values()
    found = score(a, b)
    assert found>=threshold_curve(p, y, t, grid=grid, **rule)[1].max()-1e-12
    assert found==pytest.approx(max(score(float(g), b) for g in grid), rel=1e-12)   # no group wants to move
    assert found==pytest.approx(max(score(a, float(g)) for g in grid), rel=1e-12)

def test_groups_want_their_own():
    y,p = preds(5)
    t = table(24)
    one,two = (best_threshold(p, y, t, by_group=b) for b in (False,True))
    assert f2(y, binarise(p, t, **two))>f2(y, binarise(p, t, **one))
    assert two['thr']['tag']>two['thr']['culture']

def test_search_says_what_it_cannot():
    y,p = preds(0)
    with pytest.raises(ValueError, match='dicts by group'): best_threshold(p, y, table(24), by_group=True, max_labels=3)
    with pytest.raises(ValueError, match='need a table'): best_threshold(p, y, by_group=True)
    with pytest.raises(ValueError, match='rows x classes'): best_threshold(p, y[:9])
    with pytest.raises(TypeError): best_threshold(p, y, min_label=1)

def test_default_grid_is_of_round_numbers(): assert .12 in GRID and len(GRID)==199

def test_scattered_groups_are_the_same_groups():
    y,p = preds(6)
    order,t = np.random.default_rng(0).permutation(24),table(24)
    mixed = SimpleNamespace(groups={k:np.argsort(order)[v] for k,v in t.groups.items()})
    rule = dict(thr=dict(culture=.2, tag=.3), min_labels=dict(culture=0, tag=1), max_labels=dict(culture=1, tag=3))
    np.testing.assert_array_equal(binarise(p[:,order], mixed, **rule).toarray(), binarise(p, t, **rule).toarray()[:,order])
    rule.pop('thr')
    assert best_threshold(p[:,order], y[:,order], mixed, by_group=True, **rule)==best_threshold(p, y, t, by_group=True, **rule)
