"Differences of scores and their intervals, against scipy, the truth behind synthetic data, and slow loops"
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from scipy import sparse
from scipy.stats import bootstrap
from sklearn.metrics import f1_score
from recipes.data.table import Table
from recipes.infer.compare import gain_over, paired_bootstrap
from recipes.infer.predictions import Predictions
from recipes.metrics import f2

def accuracy(y, labels): return (y==labels).mean()

def guesses(rng, n, first=.8, second=.7):
    "Truth, and two guesses whose rows of luck are partly the same"
    y,u = rng.integers(5, size=n),rng.random(n)
    wrong = (y+1)%5
    v = np.where(rng.random(n)<.7, u, rng.random(n))
    return y,np.where(u<first, y, wrong),np.where(v<second, y, wrong)

def test_scipy():
    "The interval of a mean, as scipy has it"
    y,a,b = guesses(np.random.default_rng(3), 400)
    gain,low,high = paired_bootstrap(accuracy, y, a, b, 4000)
    d = (y==a).astype(float)-(y==b)
    want = bootstrap((d,), np.mean, n_resamples=4000, method='percentile', rng=np.random.default_rng(0)).confidence_interval
    sd = d.std()/20
    assert gain==pytest.approx(d.mean()) and abs(low-want.low)<.15*sd and abs(high-want.high)<.15*sd

def test_paired():
    "What both share is no noise: the interval is narrower than that of two scores apart"
    y,a,b = guesses(np.random.default_rng(4), 400)
    _,low,high = paired_bootstrap(accuracy, y, a, b)
    apart = 2*1.96*np.sqrt((accuracy(y, a)*(1-accuracy(y, a))+accuracy(y, b)*(1-accuracy(y, b)))/400)
    assert high-low<.9*apart

def test_coverage():
    "The true difference, .1, lies inside 95 of 100 intervals"
    rng,inside = np.random.default_rng(0),0
    for i in range(300):
        _,low,high = paired_bootstrap(accuracy, *guesses(rng, 250), n=300, seed=i)
        inside += low<=.1<=high
    assert .91<inside/300<.985

def test_no_mean():
    "A metric that is no mean of rows: against the loop"
    y,a,b = guesses(np.random.default_rng(5), 120)
    macro = lambda y,labels: f1_score(y, labels, average='macro')
    got = paired_bootstrap(macro, y, a, b, n=60, seed=7)
    rng = np.random.default_rng(7)
    rows = [rng.integers(120, size=120) for _ in range(60)]
    want = [f1_score(y[o], a[o], average='macro')-f1_score(y[o], b[o], average='macro') for o in rows]
    assert got[1:]==pytest.approx(np.percentile(want, (2.5,97.5)))

def test_sparse():
    "CSR truth and labels give what dense ones give"
    rng = np.random.default_rng(6)
    y,a,b = (rng.random((80,6))<.3 for _ in range(3))
    dense = paired_bootstrap(f2, y, a, b, n=50)
    assert paired_bootstrap(f2, *map(sparse.csr_matrix, (y,a,b)), n=50)==pytest.approx(dense)

def test_seed():
    y,a,b = guesses(np.random.default_rng(8), 90)
    assert paired_bootstrap(accuracy, y, a, b, 50, 1)==paired_bootstrap(accuracy, y, a, b, 50, 1)!=paired_bootstrap(accuracy, y, a, b, 50, 2)

def predictions(y, labels, rows, metric=accuracy, higher=True):
    table = Table(pd.DataFrame(dict(id=range(y.shape[0]))), None, y, list('abcdef'))
    comp = SimpleNamespace(name='x', metric=metric, higher=higher)
    p,rows = np.eye(6)[labels[rows]],np.asarray(rows)
    return Predictions(p, [f'id{o}' for o in rows], table, comp, lambda p,table: p.argmax(1), rows=rows, folds=rows%3)

def test_rows_by_id():
    "Rows that both have, whatever their order"
    y,a,b = guesses(np.random.default_rng(9), 200)
    got = gain_over(predictions(y, a, np.arange(150)), predictions(y, b, np.arange(50, 200)[::-1]))
    assert got[3]==100 and got[0]==pytest.approx(accuracy(y[50:150], a[50:150])-accuracy(y[50:150], b[50:150]))
    with pytest.raises(ValueError, match='none of 50 ids'): gain_over(predictions(y, a, np.arange(50)), predictions(y, b, np.arange(50, 99)))

def test_less_is_better():
    "A gain is positive when it is better"
    y,a,b = guesses(np.random.default_rng(10), 300)
    wrong = lambda y,labels: (y!=labels).mean()
    want = gain_over(predictions(y, a, np.arange(300)), predictions(y, b, np.arange(300)))
    got = gain_over(*(predictions(y, o, np.arange(300), wrong, False) for o in (a,b)))
    assert got==pytest.approx(want) and got[0]>0
