"Decisions for one label and several heads against slow loops, and `gamma` that is found"
import json
from functools import partial
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from sklearn.metrics import recall_score
from recipes.data.table import Table
from recipes.infer.argmax import GAMMAS, best_gamma, corrected, likeliest, likeliest_heads, tune_gamma
from recipes.infer.predictions import Predictions
from recipes.recall import accuracy, hmacro_recall, macro_recall

def skewed(n=1500, c=6, seed=0):
    "A model that knows a long-tailed prior: the truth, its probabilities, the counts"
    rng = np.random.default_rng(seed)
    counts = (2000*.35**np.arange(c)).astype(int)+1
    y = rng.choice(c, n, p=counts/counts.sum())
    p = counts*np.exp(rng.normal(size=(n,c))+1.7*np.eye(c)[y])
    return y,(p/p.sum(1, keepdims=True)).astype(np.float32),counts

def table_of(*counts):
    "A `Table` whose rows have these counts of classes, a list a head"
    n = max(sum(o) for o in counts)
    y = np.stack([np.resize(np.repeat(np.arange(len(o)), o), n) for o in counts], 1)
    vocab = [[f'{h}{i}' for i in range(len(o))] for h,o in enumerate(counts)]
    if len(counts)==1: y,vocab = y[:,0],vocab[0]
    return Table(pd.DataFrame(dict(id=range(n))), pd.DataFrame(dict(id=[])), y, vocab)

def slow(p, counts, gamma):
    res = []
    for row in p:
        best = None
        for c,v in enumerate(row):
            v = v/float(counts[c] or max(counts))**gamma
            if best is None or v>best[0]: best = v,c
        res.append(best[1])
    return res

@pytest.mark.parametrize('gamma', [0, .3, 1, 1.15])
def test_slow_loop(gamma):
    _,p,counts = skewed()
    assert likeliest(p, table_of(counts), gamma).tolist()==slow(p, counts, gamma)

def test_heads_are_their_own():
    (_,a,na),(_,b,nb) = skewed(c=6),skewed(c=3, seed=1)
    na[:] = na//na.min()
    table,p = table_of([40,30,20,5,4,1],[60,39,1]),np.concatenate([a, b], 1)
    counts = [o[-1] for o in table.heads]
    for g in (1.15,0.),(1,1),(0,.5):
        want = [slow(a, counts[0], g[0]),slow(b, counts[1], g[1])]
        assert likeliest_heads(p, table, g).T.tolist()==want
        assert likeliest_heads(p, table, list(g)).T.tolist()==want
    assert (likeliest_heads(p, table, 1.)==likeliest_heads(p, table, (1,1))).all()
    assert (likeliest_heads(p, table)==np.stack([a.argmax(1), b.argmax(1)], 1)).all()

def test_first_of_equals(): assert likeliest(np.full((2,4), .25), table_of([3,3,3,3]), 1.).tolist()==[0,0]

def test_class_without_pictures_is_not_helped():
    "Neither it nor, by it, another"
    table = table_of([1000,10,0])
    assert likeliest(np.array([[.6,.1,.3]]), table, 0).tolist()==[0]
    assert likeliest(np.array([[.6,.001,.3]]), table, 1.).tolist()==[0]
    assert likeliest(np.array([[.3,.001,.6]]), table, 1.).tolist()==[2]
    assert np.isfinite(corrected(np.ones((1,2)), np.zeros(2, int), 1.)).all()

def test_refuses():
    table = table_of([5,3],[4,4])
    p = np.full((3,4), .5)
    p[2,3] = np.nan
    for g in 0.,1.:
        with pytest.raises(ValueError, match='1 of 3 rows .* row 2'): likeliest_heads(p, table, g)
    with pytest.raises(ValueError, match='row 1'): likeliest(np.array([[1,0],[np.nan,0]]), table_of([2,1]))
    with pytest.raises(ValueError, match='2 heads'): likeliest_heads(p[:2], table, (1,1,1))
    with pytest.raises(ValueError, match='3 columns'): likeliest_heads(p[:2,:3], table)

def test_reads_only(tmp_path):
    y,p,counts = skewed()
    np.save(tmp_path/'p.npy', p)
    held = np.load(tmp_path/'p.npy', mmap_mode='r')
    assert (likeliest(held, table_of(counts), 1.)==likeliest(p, table_of(counts), 1.)).all()

def test_best_gamma_is_the_best():
    y,p,counts = skewed()
    score = {g:recall_score(y, slow(p, counts, g), average='macro') for g in GAMMAS}
    found = best_gamma(p, y, counts)
    assert score[found]==pytest.approx(max(score.values())) and all(score[g]<score[found] for g in GAMMAS if g<found)
    assert .4<found<1.4 and score[found]>score[0.]+.05
    assert best_gamma(p, y, counts, metric=accuracy)<found, 'for accuracy the prior is right'

def test_tunes_each_head():
    (ya,a,na),(yb,b,nb) = skewed(),skewed(c=4, seed=3)
    heads = [(0,0,na),(0,0,nb)]
    table = SimpleNamespace(vocab=[list('abcdef'),list('wxyz')], heads=heads)
    p,y = np.concatenate([a, b], 1),np.stack([ya, yb], 1)
    values = tune_gamma(p, y, table)
    assert values=={'gamma':[best_gamma(a, ya, na),best_gamma(b, yb, nb)]}
    assert json.loads(json.dumps(values))==values
    def score(g): return hmacro_recall(y, likeliest_heads(p, table, g), (2,1))
    grid = GAMMAS[::3]
    together = max(score((i,j)) for i in grid for j in grid)
    assert score(tune_gamma(p, y, table, grid=grid)['gamma'])==pytest.approx(together), 'heads do not depend on each other'
    one = SimpleNamespace(vocab=list('abcdef'), heads=[(0,0,na)])
    assert tune_gamma(a, ya, one)=={'gamma':best_gamma(a, ya, na)}
    assert tune_gamma(a, ya, one, grid=(0.,.5))['gamma'] in (0.,.5)

def test_in_predictions():
    "Found on the other folds for the score, on all for the test set; the rule's own `gamma` is no obstacle"
    y,p,_ = skewed(3000)
    table = Table(pd.DataFrame(dict(id=range(3000))), None, y, list('abcdef'))
    comp = SimpleNamespace(name='demo', metric=macro_recall)
    folds = np.arange(3000)%3
    make = lambda rule,tune: Predictions(p, list(range(3000)), table, comp, rule, tune, np.arange(3000), folds)
    plain,tuned = make(likeliest, None),make(partial(likeliest, gamma=.2), tune_gamma)
    assert tuned.values==tune_gamma(p, y, table)
    want = np.empty(3000, int)
    for f in range(3):
        g = tune_gamma(p[folds!=f], y[folds!=f], table)['gamma']
        want[folds==f] = slow(p[folds==f], np.bincount(y[folds!=f], minlength=6), g)
    assert tuned.score()==pytest.approx(recall_score(y, want, average='macro'))
    assert tuned.score()>plain.score()+.05
