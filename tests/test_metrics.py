"Metrics against scikit-learn, golden vectors and slow loops"
import tracemalloc, warnings
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from scipy.sparse import csr_array, csr_matrix, issparse
from sklearn.metrics import fbeta_score
from types import SimpleNamespace
from recipes.data import arrays
from recipes.metrics import EpochMetric, as_labels, compact, f2, f2_best, f2_counts, f2_curve, f2_groups, f2_rows
from recipes.thresholds import GRID, at_thresholds, blocks, true_ranks

Y = [[1,0,0,0],[1,1,0,0],[0,0,0,0],[1,1,1,0],[0,0,0,0]]
P = [[1,1,0,0],[1,0,0,0],[0,0,0,0],[0,0,0,0],[1,0,0,0]]

def random_labels(seed, n=200, c=30, share=.08):
    rng = np.random.default_rng(seed)
    y = rng.random((n,c))<share
    y[:5] = False
    return y

def decide_slow(p, thr, lo, hi):
    "One row after the other: over the threshold, cut to `lo` to `hi`, stable"
    res = np.zeros(p.shape, bool)
    for i,row in enumerate(p):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        n = sum(v>thr for v in row)
        res[i,order[:min(max(n, lo), len(row) if hi is None else hi)]] = True
    return res

def ties(seed, n=150, c=12):
    "Probabilities with many equal values, some on the grid"
    return np.random.default_rng(seed).integers(0, 20, (n,c)).astype(np.float32)/20

def test_f2_golden():
    np.testing.assert_allclose(f2_rows(Y, P), [.8333333,.5555556,0,0,0], atol=1e-6)
    assert f2(Y, P)==pytest.approx(.2777778, abs=1e-6)
    assert f2(Y, P, empty=1.)==pytest.approx(.4777778, abs=1e-6)

@pytest.mark.parametrize('seed', range(3))
def test_f2_sklearn(seed):
    y,p = random_labels(seed),random_labels(seed+10, share=.1) | (random_labels(seed) & random_labels(seed+20, share=.6))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ours = f2(y, p),f2(y, p, empty=1.)
    for empty,o in enumerate(ours):
        ref = fbeta_score(y, p, beta=2, average='samples', zero_division=0) + empty*(~y.any(1) & ~p.any(1)).mean()
        assert o==pytest.approx(ref)

@pytest.mark.parametrize('make', [csr_matrix, csr_array, torch.tensor, lambda o: o.astype(np.float32)])
def test_f2_forms(make):
    y,p = random_labels(0),random_labels(1)|random_labels(0)
    assert f2(make(y), make(p))==f2(y, p)==f2(make(y), p)

def test_stored_zeros_are_no_labels():
    y = csr_matrix(np.array(Y, dtype=np.float32))
    y.data[0] = 0
    dense = y.toarray()
    assert f2(y, P)==f2(dense, P)
    assert y.nnz==6   # the caller's matrix is as it was

def test_f2_small_integers_do_not_overflow():
    n = np.array([200], dtype=np.uint8)
    assert f2_counts(n, n, n)==[1]

def test_f2_shapes():
    with pytest.raises(ValueError, match=r'\(5, 3\).*\(5, 4\)'): f2(Y, np.ones((5,3)))

def test_f2_groups():
    y,p = random_labels(0),random_labels(1)|random_labels(0)
    groups = dict(a=list(range(10)), b=np.arange(10, 30))
    df = f2_groups(csr_matrix(y), p, groups)
    assert list(df.index)==['all','a','b']
    assert df.f2['b']==f2(y[:,10:], p[:,10:], empty=1.)
    assert df.true['a']==pytest.approx(y[:,:10].sum(1).mean())
    assert df.decided['all']==pytest.approx(p.sum(1).mean())

def test_ranks_with_ties():
    p = ties(0)
    row,col = np.nonzero(random_labels(0, *p.shape, .3))
    order = np.argsort(-p, axis=1, kind='stable')
    assert (true_ranks(p, row, col)==[list(order[r]).index(c) for r,c in zip(row, col)]).all()

@pytest.mark.parametrize('lo,hi', [(0,None),(1,None),(1,3),(0,0),(2,5),(20,None)])
def test_counts_at_thresholds(lo, hi):
    p,grid = ties(1),[.05,.3,.5,.95]
    y = random_labels(1, *p.shape, .2)
    tp,n = at_thresholds(as_labels(y), p, grid, lo, hi)
    for k,t in enumerate(grid):
        ref = decide_slow(p, np.float32(t), lo, hi)
        assert (n[:,k]==ref.sum(1)).all() and (tp[:,k]==(ref&y).sum(1)).all()

def test_f2_curve_over_blocks(tmp_path):
    rng = np.random.default_rng(0)
    y,p = random_labels(0, 5000),rng.random((5000,30), dtype=np.float32)**8
    assert len(list(blocks(p)))>1
    mm = np.lib.format.open_memmap(tmp_path/'p.npy', 'w+', np.float32, p.shape)
    mm[:] = p
    ref = [f2(y, decide_slow(p, np.float32(t), 1, 4)) for t in (GRID[3],GRID[40])]
    np.testing.assert_allclose(f2_curve(csr_matrix(y), mm, min_labels=1, max_labels=4)[[3,40]], ref)
    assert f2_best(y, p)==f2_curve(y, p).max()

@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_f2_curve_dtypes(dtype):
    y,p = random_labels(2),np.random.default_rng(2).random((200,30)).astype(dtype)
    assert f2_curve(y, p, [.5], 0)==pytest.approx(f2(y, p>.5))

def test_nan_is_refused():
    p = np.zeros((9000,3))
    p[[8000,8999],1] = np.nan
    with pytest.raises(ValueError, match='2 of 9000 rows .* first is row 8000'): f2_best(np.zeros(p.shape), p)

class Same(torch.nn.Module):
    "Gives back its input; fastai wants a parameter"
    def __init__(self):
        super().__init__()
        self.b = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x): return x+self.b

class Items(list): n_inp = 1   # a batch is one input and the rest targets

def learner(x, y, metric, loss):
    items = Items(zip(x, *y))
    dls = DataLoaders.from_dsets(items, items, bs=32, num_workers=0, device='cpu')
    learn = Learner(dls, Same(), loss_func=loss, metrics=metric)
    learn.remove_cb(ProgressCallback)
    return learn

def validate(x, y, func, loss=None):
    m = EpochMetric(func)
    learn = learner(x, y, m, loss or CrossEntropyLossFlat())
    return learn.validate()[-1],m,learn

def test_epoch_metric_multihot():
    x,y = torch.randn(500, 30),torch.tensor(random_labels(0, 500)).float()
    def check(truth, p):
        assert issparse(truth) and truth.dtype==np.float32
        np.testing.assert_array_equal(truth.toarray(), y)
        np.testing.assert_allclose(p, x.sigmoid(), atol=1e-6)
        return f2_best(truth, p)
    got,m,learn = validate(x, [y], check, BCEWithLogitsLossFlat())
    assert got==pytest.approx(f2_best(y, x.sigmoid().numpy()))
    assert m.p is None and m.ys==[]   # nothing is held between epochs
    assert learn.validate()[-1]==got

def test_epoch_metric_ints():
    x,y = torch.randn(100, 5),torch.randint(5, (100,))
    acc,m,_ = validate(x, [y], lambda y,p: (p.argmax(1)==y).mean())
    assert acc==pytest.approx((x.argmax(1)==y).float().mean().item())
    assert m.name=='<lambda>'

def test_epoch_metric_heads():
    x,ys = torch.randn(100, 5),[torch.randint(5, (100,)) for _ in range(3)]
    def head(y, p, i): return (p.argmax(1)==y[:,i]).mean()
    def loss(raw, *yb): return raw.mean()
    acc,m,_ = validate(x, ys, partial(head, i=1), loss)
    assert acc==pytest.approx((x.argmax(1)==ys[1]).float().mean().item())
    assert m.name=='head'

def test_epoch_metric_reads_out():
    x,y = torch.randn(100, 6),torch.randint(3, (100,))
    m = EpochMetric(lambda y,p: p.shape[1]+p.max(), name='n')
    learn = learner(x, [y], m, CrossEntropyLossFlat())
    learn.read_out = lambda raw: raw[:,:3].bfloat16()*0
    assert learn.validate()[-1]==3
    assert learn.recorder.metric_names[-2]=='n'

class FakeLearner:
    "As much of a learner as a metric reads"
    loss_func,to_detach,dl = None,staticmethod(lambda o: o),None

def test_epoch_metric_memory():
    n,c,bs = 20000,500,100
    learn,m = FakeLearner(),EpochMetric(f2_best)
    learn.dl = SimpleNamespace(n=n)
    y = torch.zeros(bs, c)
    y[:,::200] = 1
    tracemalloc.start()
    for _ in range(n//bs):
        learn.pred,learn.yb = torch.rand(bs, c)**9,(y,)
        m.accumulate(learn)
    assert m.value>0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2*n*c*4   # fastai's own accumulating metrics take 8.8 times

@pytest.mark.parametrize('n', [None,7,64,1000])
def test_epoch_metric_grows(n, monkeypatch):
    "However many rows were announced, and beyond a gigabyte in a file"
    monkeypatch.setattr(arrays, 'LARGE', 2000)
    learn,m,p = FakeLearner(),EpochMetric(lambda y,p: p),torch.rand(70, 9)
    learn.dl,seen = n and SimpleNamespace(n=n),[]
    m.func = lambda y,p: seen.append(p) or p.sum()
    for o in p.split(8):
        learn.pred,learn.yb = o,(torch.zeros(len(o), dtype=torch.long),)
        m.accumulate(learn)
    assert isinstance(m.p, np.memmap) and m.value==pytest.approx(p.sum().item(), rel=1e-5) and m.p is None
    np.testing.assert_array_equal(seen[0], p)

def test_compact():
    assert issparse(compact((torch.eye(3),)))
    assert compact((torch.tensor([1,2]),)).tolist()==[1,2]
    assert compact((torch.tensor([1,2]),torch.tensor([3,4]))).tolist()==[[1,3],[2,4]]

def test_empty_metric_has_no_value(): assert EpochMetric(f2_best).value is None
