"MAP@5 against a slow loop and the method's golden vector; thresholds against inserting the unknown at each"
import numpy as np, pytest
from recipes.infer.openset import with_unknown
from recipes.ranking import best_ids, hit_ranks, map5, map5_best, map5_curve, top_k

def slow_map5(truth, answers):
    "As the competition describes it: `1/rank` of the first right one of five"
    def one(t, row): return next((1/(i+1) for i,o in enumerate(row[:5]) if o==t), 0)
    return sum(map(one, truth, answers))/len(truth)

@pytest.fixture
def scored():
    "400 rows of 12 ids with many equal scores; a third is unknown (12)"
    rng = np.random.default_rng(0)
    y = np.where(rng.random(400)<.33, 12, rng.integers(12, size=400))
    p = rng.random((400,12))+.6*np.eye(13)[y][:,:12]
    return y,(p*10).round()/10

def test_golden():
    truth = ['a','b','new_whale','c']
    answers = [['a','x','y','z','w'],['x','b','b','y','z'],['p','q','new_whale'],['1','2','3','4','5','c']]
    names = sorted({*truth,*sum(answers, [])})
    labels = np.array([[names.index(o) for o in row]+[-1]*(6-len(row)) for row in answers])
    y = np.array([names.index(o) for o in truth])
    assert hit_ranks(y, labels).tolist()==[1,2,3,0]
    assert map5(y, labels)==pytest.approx(.4583333, abs=1e-7)
    assert slow_map5(truth, answers)==pytest.approx(.4583333, abs=1e-7)

def test_slow_loop_with_repeats_and_gaps():
    rng = np.random.default_rng(1)
    y,labels = rng.integers(6, size=500),rng.integers(-1, 6, size=(500,7))
    assert map5(y, labels)==pytest.approx(slow_map5(y, labels.tolist()))
    assert map5(y, np.zeros((500,0), int))==0

def test_refuses_what_cannot_be_scored():
    with pytest.raises(ValueError, match='1 of 2 are negative'): map5(np.array([0,-1]), np.zeros((2,5), int))
    with pytest.raises(ValueError, match=r'answers are \(5,\)'): map5(np.array([0]*5), np.zeros(5, int))
    with pytest.raises(ValueError, match='1 of 3 rows of predictions hold NaN, the first is row 1'):
        best_ids(np.array([[1,2],[np.nan,1],[0,1]]))

@pytest.mark.parametrize('k', [1,5,12,20])
def test_best_ids_is_a_stable_sort(scored, k):
    p = scored[1]
    ids,s = best_ids(p, k)
    want = np.argsort(-p, 1, kind='stable')[:,:k]
    assert (ids==want).all() and (s==np.take_along_axis(p, want, 1)).all()

def test_best_ids_leaves_its_input_alone(scored):
    p = scored[1].astype(np.float32)
    before = p.copy()
    best_ids(p)
    assert (p==before).all()
    assert (top_k(p, 2)[1][:,0]==before.max(1)).all()

def test_best_ids_of_a_memory_map(scored, tmp_path):
    np.save(tmp_path/'p.npy', scored[1].astype(np.float16))
    p = np.load(tmp_path/'p.npy', mmap_mode='r')
    assert (best_ids(p)[0]==best_ids(scored[1].astype(np.float16).astype(np.float32))[0]).all()

@pytest.mark.parametrize('share', [None,.1,.9])
@pytest.mark.parametrize('ids', [12,3])
def test_curve_is_what_inserting_gives(scored, share, ids):
    y,p = np.where(scored[0]<ids, scored[0], ids),scored[1][:,:ids]
    grid = np.arange(-1, 20)/10   # on and between the scores
    w = np.ones(len(y))/len(y) if share is None else np.where(y==ids, share/(y==ids).sum(), (1-share)/(y<ids).sum())
    labels = [with_unknown(p, threshold=o) for o in grid]
    want = [sum(w[i]*slow_map5(y[i:i+1], o[i:i+1].tolist()) for i in range(len(y))) for o in labels]
    np.testing.assert_allclose(map5_curve(y, p, grid, share)[1], want, atol=1e-12)

def test_default_grid_finds_nearly_the_best(scored):
    y,p = scored[0],scored[1]+np.random.default_rng(2).random(scored[1].shape)*.01
    every = np.unique(best_ids(p)[1])
    assert map5_best(y, p)>=map5_curve(y, p, every)[1].max()-.005
    assert map5_best(np.full(400, 12), p)==pytest.approx(1)   # all unknown: above every score
    assert map5_best(y[y<12], p[y<12])==pytest.approx(map5(y[y<12], best_ids(p[y<12])[0]))
