"Recall and accuracy against scikit-learn, golden vectors and a slow loop"
import warnings
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from functools import partial
from sklearn.metrics import accuracy_score, recall_score
from torch import nn
from recipes.losses.heads import MultiHeadLoss
from recipes.metrics import EpochMetric
from recipes.recall import accuracy, by_head, found_counts, hmacro_recall, hmar, macro_recall, top1

def sk(y, labels):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return recall_score(y, labels, average='macro', zero_division=0)

@pytest.mark.parametrize('seed', range(40))
def test_official_is_sklearns(seed):
    "With classes that are never true, never decided, or neither"
    rng = np.random.default_rng(seed)
    c,n = rng.integers(1, 60),rng.integers(1, 400)
    used,said = (rng.choice(c, rng.integers(1, c+1), replace=False) for _ in range(2))
    y,labels = rng.choice(used, n),rng.choice(said, n)
    labels = np.where(rng.random(n)<.6, y, labels)
    assert macro_recall(y, labels)==pytest.approx(sk(y, labels), abs=1e-12)

def test_phantom_class():
    assert macro_recall([0,0,1], [0,2,1])==.5
    assert macro_recall([0,0,1], [0,2,1], mode='fixed_classes')==.75
    assert macro_recall([0,0,1], [0,2,1], 3, 'fixed_classes')==.5
    assert macro_recall([0,0,1], [0,0,1], 168, 'fixed_classes')==pytest.approx(2/168)
    assert macro_recall([0,0,1], [0,9,1])==.5, 'a hole in the indices is no class'

def test_truth_comes_first():
    "Swapped, it would be macro precision"
    assert macro_recall([0,0,0,1], [0,0,1,1])!=macro_recall([0,0,1,1], [0,0,0,1])
    assert macro_recall([0,0,0,1], [0,0,1,1])==pytest.approx((2/3+1)/2)

def test_golden():
    y = np.transpose([[0,0,1,1,2], [0,1,1,0,0], [0,0,0,1,1]])
    labels = np.transpose([[0,1,1,1,2], [0,1,1,0,3], [0,0,1,1,1]])
    assert [macro_recall(*o) for o in zip(y.T, labels.T)]==pytest.approx([.8333333,.5555556,.8333333], abs=1e-7)
    assert hmacro_recall(y, labels)==pytest.approx(.7638889, abs=1e-7)
    assert hmacro_recall(y, labels, mode='fixed_classes')==pytest.approx(.8333333, abs=1e-7)

def official(y, labels):
    "As the competition's page has it"
    return np.average([sk(y[:,i], labels[:,i]) for i in range(3)], weights=[2,1,1])

@pytest.mark.parametrize('seed', range(10))
def test_heads_are_the_official_code(seed):
    rng = np.random.default_rng(seed)
    y,labels = (np.stack([rng.integers(0, c, 300) for c in (168,11,7)], 1) for _ in range(2))
    labels = np.where(rng.random(y.shape)<.7, y, labels)
    assert hmacro_recall(y, labels)==pytest.approx(official(y, labels), abs=1e-12)

def test_hmar_is_that_of_the_likeliest():
    rng = np.random.default_rng(0)
    sizes = 168,11,7
    table = SimpleNamespace(vocab=[[str(i) for i in range(c)] for c in sizes])
    y = np.stack([rng.integers(0, c, 500) for c in sizes], 1)
    p = np.concatenate([rng.random((500,c))+.8*np.eye(c)[y[:,i]] for i,c in enumerate(sizes)], 1).astype(np.float32)
    labels = np.stack([p[:,a:b].argmax(1) for a,b in ((0,168),(168,179),(179,186))], 1)
    assert hmar(y, p, table)==pytest.approx(official(y, labels))
    assert .3<hmar(y, p, table)<1
    assert [o.shape[1] for o in by_head(p, table)]==[168,11,7]
    with pytest.raises(ValueError, match='185 columns'): hmar(y, p[:,1:], table)

@pytest.mark.parametrize('shape', [(200,), (200,3)])
def test_accuracy_is_sklearns(shape):
    rng = np.random.default_rng(1)
    y,labels = rng.integers(0, 5, shape),rng.integers(0, 5, shape)
    assert accuracy(y, labels)==pytest.approx(accuracy_score(y.ravel(), labels.ravel()))
    if len(shape)==1: assert top1(y, np.eye(5)[labels])==accuracy(y, labels)

def test_found_counts_loop():
    rng = np.random.default_rng(2)
    y,labels = rng.integers(0, 9, 100),rng.integers(0, 12, 100)
    for n in 0,12,9,20:
        right,true,decided = found_counts(y, labels, n)
        assert len(right)==len(true)==len(decided)==(n or 12)
        for k in range(n or 12): assert (right[k],true[k],decided[k])==(((y==k)&(labels==k)).sum(), (y==k).sum(), (labels==k).sum())

def test_refuses():
    with pytest.raises(ValueError, match='decisions are'): macro_recall([0,1], [0])
    with pytest.raises(ValueError, match='decisions are'): accuracy(np.zeros((3,1)), np.zeros(3))
    with pytest.raises(ValueError, match='negative'): macro_recall([0,1], [0,-1])
    with pytest.raises(ValueError, match='n x 3'): hmacro_recall(np.zeros((4,2), int), np.zeros((4,2), int))
    with pytest.raises(ValueError, match="'fixed'"): macro_recall([0], [0], mode='fixed')

def test_watched_over_the_whole_set():
    "Not the mean over batches, which is another number"
    torch.manual_seed(0)
    sizes = 5,3,2
    table = SimpleNamespace(vocab=[list('abcde'),list('xyz'),list('no')])
    items = [(torch.rand(1,4,4), *(torch.tensor(i*7%c) for c in sizes)) for i in range(60)]
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
    dls.n_inp = 1
    for dl in dls.loaders: dl._n_inp = 1
    loss = MultiHeadLoss().prepare([[1]*c for c in sizes])
    watch = EpochMetric(partial(hmar, table=table))
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(16, 10)), loss_func=loss, metrics=watch)
    learn.remove_cb(ProgressCallback)
    assert watch.name=='hmar'
    with learn.no_logging():
        learn.fit(1)
        p,t,dec = learn.get_preds(with_decoded=True)
    got,y = learn.recorder.values[-1][-1],torch.stack(list(t), 1).numpy()
    assert got==pytest.approx(official(y, np.asarray(dec)))
