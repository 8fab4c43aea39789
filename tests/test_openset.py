"The unknown's place against a walk down the list, its thresholds, and what is done to answers afterwards"
from functools import partial
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from recipes.data.table import Table
from recipes.infer.blending import blend
from recipes.infer.gallery import max_by_id
from recipes.infer.openset import inserted, share_threshold, tune_map5, tune_share, with_share, with_unknown
from recipes.infer.postprocess import balanced, by_size, column_best, put_first, singles_first, with_twins
from recipes.infer.predictions import Predictions
from recipes.ranking import map5
from recipes.recipe.codec import decode, encode

def walk(pairs, threshold):
    "Ids in the order of their scores; the unknown before the first that is below; five at most, each once"
    res = []
    for id,s in sorted(pairs, key=lambda o: -o[1]):
        if id in res: continue
        if s<threshold and 'new_whale' not in res: res.append('new_whale')
        res.append(id)
    return res[:5]

def as_names(labels, names): return [[names[o] for o in row if o>=0] for row in labels]

@pytest.mark.parametrize('threshold,want', [(.5,'a b new_whale c d'),(.05,'a b c d e'),(.95,'new_whale a b c d')])
def test_golden(threshold, want):
    p = np.array([[.9,.5,.4,.3,.2,.1]])
    assert as_names(with_unknown(p, threshold=threshold), [*'abcdef','new_whale'])==[want.split()]
    assert walk(zip('abcdef', p[0]), threshold)==want.split()

def test_golden_of_repeated_ids():
    s,ids = np.array([[.9,.9,.8,.8,.7,.1]]),np.array([0,0,1,1,2,3])
    p = max_by_id([(slice(0, 1),s)], ids, np.empty((1,4)))
    assert as_names(with_unknown(p, threshold=.75), [*'abcd','new_whale'])==['a b new_whale c d'.split()]
    assert walk(zip('aabbcd', s[0]), .75)=='a b new_whale c d'.split()

@pytest.mark.parametrize('threshold', [-1.,.3,.5,.7,2.])
def test_walk_and_constant_column(threshold):
    p = (np.random.default_rng(0).random((300,9))*10).round().astype(np.float32)/10
    got = with_unknown(p, threshold=threshold)
    names = [*range(9),'new_whale']
    assert as_names(got, names)==[walk(enumerate(row), np.float32(threshold)) for row in p]
    col = np.concatenate([p, np.full((300,1), threshold, np.float32)], 1)
    assert (got==np.argsort(-col, 1, kind='stable')[:,:5]).all()

def test_fewer_ids_than_answers():
    assert with_unknown(np.array([[.9,.1]]), threshold=.5).tolist()==[[0,2,1,-1,-1]]
    assert inserted(np.array([[4,5]]), np.array([2]), 9).tolist()==[[4,5,9]]

@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    y = np.where(rng.random(600)<.4, 30, rng.integers(30, size=600))
    return (rng.beta(2, 8, (600,30))+.4*np.eye(31)[y][:,:30]).astype(np.float32),y

def test_tuned_threshold_is_the_best_of_the_grid(scored):
    p,y = scored
    grid = np.linspace(0, .95, 121)
    found = tune_map5(p, y, grid=grid)['threshold']
    every = [map5(y, with_unknown(p, threshold=np.float32(o))) for o in grid]
    assert map5(y, with_unknown(p, threshold=found))==pytest.approx(max(every))
    assert found in grid.astype(np.float32)

def test_share_moves_the_threshold(scored):
    t = [tune_map5(*scored, share=o)['threshold'] for o in (.05,.4,.9)]
    assert t[0]<t[1]<t[2]

def test_by_share(scored):
    p,y = scored
    for share in (0,.276,.5,1): assert abs((with_share(p, share=share)[:,0]==30).sum()-share*600)<=.5
    grid = np.arange(50, 29, -1)/100
    n = [abs((p.max(1)<o).sum()-round(.276*600)) for o in grid]
    assert share_threshold(p, .276, grid)==grid[int(np.argmin(n))]
    assert tune_share(p, y, share=.276)=={'threshold':share_threshold(p)}
    with pytest.raises(ValueError, match='hold NaN'): share_threshold(np.full((3,2), np.nan))

def predictions(p, y, rule, tune=None, **kw):
    comp = SimpleNamespace(name='demo', metric=map5, higher=True)
    table = Table(pd.DataFrame(dict(id=range(len(p)))), None, y, [str(o) for o in range(p.shape[1])])
    return Predictions(p, list(range(len(p))), table, comp, rule, tune, np.arange(len(p)), np.arange(len(p))%3, **kw)

def test_as_rules_of_predictions(scored):
    tuned = predictions(*scored, with_unknown, tune_map5)
    fixed = predictions(*scored, partial(with_unknown, threshold=.99))
    with_step = predictions(*scored, partial(with_unknown, steps=(balanced,)), partial(tune_map5, share=.4))
    assert tuned.score()>fixed.score()+.1
    assert abs(tuned.score()-predictions(*scored, partial(with_share, share=.4)).score())<.05
    assert with_step.labels.shape==(600,5)

def test_a_rule_with_steps_goes_to_json_and_back(scored):
    rule = partial(with_unknown, steps=(balanced,partial(singles_first, threshold=.9)))
    back = decode(encode(rule))
    assert back.keywords['steps'][0] is balanced and back.keywords['steps'][1].keywords=={'threshold':.9}

@pytest.mark.parametrize('power,want', [(1,.5),(.5,.632456),(.1,.891924)])
def test_power_blend_golden(power, want):
    a,b = (predictions(np.array([[o,-.2]]*3), np.zeros(3, int), with_unknown) for o in (.9,.1))
    both = blend([a,b], power=power)
    np.testing.assert_allclose(both.p, [[want,0]]*3, atol=1e-6)   # a cosine below 0 counts as 0
    assert with_unknown(both.p, threshold=want+.01)[0,0]==2 and with_unknown(both.p, threshold=want-.01)[0,0]==0

def slow_balance(labels, p, gap=.3, many=2):
    labels = [list(o) for o in labels]
    calls = sorted((p[i][o[0]]-p[i][o[1]],i) for i,o in enumerate(labels) if 0<=o[0]<len(p[0]) and 0<=o[1]<len(p[0]))
    for d,i in calls:
        first = [o[0] for o in labels]
        a,b = labels[i][:2]
        if d<gap and first.count(b)==0 and first.count(a)>many: labels[i][:2] = b,a
    return labels

def test_balance_against_a_slow_loop():
    rng = np.random.default_rng(0)
    p = rng.random((200,40))+np.linspace(.5, 0, 40)
    labels = with_unknown(p, threshold=1.1)
    got = balanced(labels, p)
    assert got.tolist()==slow_balance(labels, p) and (got!=labels).any()
    assert (np.sort(got)==np.sort(labels)).all() and (got[labels[:,0]==40]==labels[labels[:,0]==40]).all()

def test_put_first_against_a_slow_loop():
    rng = np.random.default_rng(0)
    labels,first = np.stack([rng.permutation(9)[:5] for _ in range(200)]),rng.integers(-1, 9, (200,3))
    def slow(f, o): return list(dict.fromkeys(v for v in (*f,*o) if v>=0))[:5]
    assert put_first(labels, first).tolist()==[slow(*o) for o in zip(first.tolist(), labels.tolist())]

@pytest.fixture
def whales():
    "Ids 1, 4 and 6 are one whale; 4 and 6 have pictures of the same size"
    train = pd.DataFrame(dict(width=[800,900,900,700], height=[400,400,400,300]))
    names = [f'w{o}' if o not in (1,4,6) else 'w1 = w4 = w6' for o in range(8)]
    return SimpleNamespace(names=names, train=train, y=np.array([1,4,6,0]), heads=[(0,0,np.array([1,1,5,5,1,2,1,0]))])

def test_twins_follow(whales):
    labels = np.array([[4,0,2,6,3],[0,4,2,3,5],[8,4,0,2,3]])
    assert with_twins(labels, None, whales).tolist()==[[4,1,6,0,2],[0,4,2,3,5],[8,4,0,2,3]]

def test_size_goes_first_only_where_it_says_one(whales):
    labels = np.array([[4,0,1,2,3]]*3+[[0,4,1,2,3]])
    sizes = pd.DataFrame(dict(width=[800,900,123,800], height=[400]*4))
    assert by_size(labels, sizes, whales).tolist()==[[1,4,0,2,3],[4,0,1,2,3],[4,0,1,2,3],[0,4,1,2,3]]

def test_singles_against_a_slow_loop(whales):
    p = np.random.default_rng(3).random((3000,8)).astype(np.float32)
    p[7,[0,1]] = 2,3   # two ids claim one picture
    labels = with_unknown(p, threshold=.5)
    want = labels.tolist()
    claims = sorted((p[:,o].max(),int(p[:,o].argmax()),o) for o in (0,1,4,6))
    for s,i,o in claims:
        if s>.99: want[i] = [o,*(v for v in want[i] if v!=o)][:5]
    got = singles_first(labels, p, whales, .99)
    assert got.tolist()==want and got[7,:2].tolist()==[1,0]
    assert column_best(p, np.array([1]))[0].tolist()==[7]
