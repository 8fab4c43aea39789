"Folds: the rules they follow, against slow or other people's code, and what is refused"
import random, time
from collections import Counter, defaultdict
from functools import partial
import numpy as np, pandas as pd, pytest
from scipy import sparse
from sklearn.model_selection import GroupKFold, ShuffleSplit, StratifiedKFold
from recipes.data.folds import assign_folds, balance, fold_rows, greedy_folds, holdout, kfold, one_hot, split_folds
from recipes.data.folds import stratified_folds, stratify
from recipes.data.table import Table

def _table(y, **cols):
    rows = pd.DataFrame(dict(id=[str(i) for i in range(y.shape[0])], path='', **cols))
    if sparse.issparse(y): vocab = [str(i) for i in range(y.shape[1])]
    elif y.ndim==2: vocab = [[str(i) for i in range(o.max()+1)] for o in y.T]
    else: vocab = [str(i) for i in range(y.max()+1)]
    return Table(rows, rows[:0], y, vocab)

def _multi(n, classes, seed=0, per_row=3):
    rng = np.random.RandomState(seed)
    p = 1/np.arange(1, classes+1)
    col = rng.choice(classes, (n,per_row), p=p/p.sum())
    y = sparse.csr_matrix((np.ones(col.size, np.float32), (np.repeat(np.arange(n), per_row), col.ravel())), shape=(n,classes))
    y.data[:] = 1
    return _table(y)

@pytest.fixture(scope='module')
def multi(): return _multi(600, 30)

def _baseline(rows, n_folds):
    "The public baseline of iMet 2019, as it stands, on a frame of label strings"
    df = pd.DataFrame({'attribute_ids':rows})
    cls_counts = Counter(cls for classes in df['attribute_ids'].str.split() for cls in classes)
    fold_cls_counts,folds = defaultdict(int),[-1]*len(df)
    for item in df.sample(frac=1, random_state=42).itertuples():
        cls = min(item.attribute_ids.split(), key=lambda cls: cls_counts[cls])
        fold_counts = [(f, fold_cls_counts[f,cls]) for f in range(n_folds)]
        min_count = min(count for _,count in fold_counts)
        random.seed(item.Index)
        fold = random.choice([f for f,count in fold_counts if count==min_count])
        folds[item.Index] = fold
        for cls in item.attribute_ids.split(): fold_cls_counts[fold,cls] += 1
    return np.array(folds)

@pytest.mark.parametrize('n', [5,40])
def test_greedy(multi, n):
    "Row for row the folds of the baseline"
    rows = [' '.join(map(str, sorted(o.indices))) for o in multi.y]
    assert (greedy_folds(multi, n)==_baseline(rows, n)).all()

def test_greedy_pure(multi):
    "The same seed, the same folds; another, others; and nobody's random numbers are touched"
    random.seed(1)
    np.random.seed(1)
    a = random.getstate(),np.random.get_state()[1].tolist()
    assert (greedy_folds(multi, 5)==greedy_folds(multi, 5)).all()
    assert (greedy_folds(multi, 5, seed=1)!=greedy_folds(multi, 5)).any()
    assert (random.getstate(),np.random.get_state()[1].tolist())==a

def test_greedy_empty_rows():
    "Rows without a label are spread evenly, and an explicit zero is no label"
    y = sparse.csr_matrix(np.eye(3, dtype=np.float32)[[0]*10+[1]*10])
    y = sparse.vstack([y, sparse.csr_matrix((20,3), dtype=np.float32)], format='csr')
    y.indices,y.data,y.indptr = np.append(2, y.indices),np.append(0, y.data),np.append(0, y.indptr[1:]+1)
    folds = greedy_folds(_table(y), 5)
    assert np.bincount(folds[20:]).tolist()==[4]*5 and np.bincount(folds[:10]).tolist()==[2]*5

def test_greedy_fast():
    "A table like iMet's in seconds"
    table = _multi(109_237, 1103)
    start = time.time()
    folds = greedy_folds(table)
    assert time.time()-start<20 and np.bincount(folds).min()>2000

def test_stratify_guard():
    "Class indices would be taken for 0 and 1; they are refused, sparse or dense"
    for y in np.array([[0,2],[1,0]]),sparse.csr_matrix([[0,2],[1,0]]),np.array([[.5,0],[1,0]]),np.array([[np.nan,0],[1,0]]):
        with pytest.raises(ValueError, match='column of 0 and 1'): stratify(y, 2)

def test_stratified_heads():
    "Three heads are balanced by their classes, where the integer columns would not be"
    rng = np.random.RandomState(0)
    p = 1/np.arange(1, 41)
    y = np.stack([rng.choice(40, 2000, p=p/p.sum()), rng.choice(4, 2000), rng.choice(3, 2000)], 1)
    table = _table(y)
    assert (one_hot(table).sum(1)==3).all() and one_hot(table).shape==(2000,47)
    naive = stratify((y>0).astype(int), 5)
    res = balance(table, ours=stratified_folds(table), naive=naive)
    assert res.deviation.ours<res.deviation.naive/2 and res.missing.ours<res.missing.naive/2

def test_stratified_sparse(multi):
    "Sparse and dense give the same, and every label is balanced"
    folds = stratified_folds(multi, 5)
    assert (folds==stratify(multi.y.toarray(), 5)).all()
    res = balance(multi, ours=folds, chance=kfold(multi))
    assert res.deviation.ours<res.deviation.chance/2

def test_stratified_single():
    "One label a row is scikit-learn's own"
    y = np.repeat([0,1,2], [60,30,9])
    folds,kf = stratified_folds(_table(y), 3, seed=1),StratifiedKFold(3, shuffle=True, random_state=1)
    for i,(_,idx) in enumerate(kf.split(y, y)): assert (np.flatnonzero(folds==i)==idx).all()

def test_kfold_holdout(multi):
    assert np.ptp(np.bincount(kfold(multi, 7)))<=1 and (kfold(multi)!=np.sort(kfold(multi))).any()
    assert (holdout(multi, .25)==0).sum()==150 and set(holdout(multi))=={0,-1}
    for share in 0,1,1.5,.0001:
        with pytest.raises(ValueError, match='rows: give more than 0, less than 1'): holdout(multi, share)

def test_groups():
    "A group is on one side only, and a column called `group` is used by itself"
    y,place = np.tile([0,1], 50),np.arange(100)//4
    named = split_folds(_table(y, place=place), GroupKFold(5), by='place')
    found = assign_folds(_table(y, group=place), GroupKFold(5))
    for folds in named,found: assert pd.Series(folds).groupby(place).nunique().eq(1).all()
    with pytest.raises(ValueError, match="no column 'plaec' in train: there are id, path, place"):
        split_folds(_table(y, place=place), GroupKFold(5), by='plaec')

def test_splitter_twice(multi):
    with pytest.raises(ValueError, match='holds a row out twice'): assign_folds(multi, ShuffleSplit(5, test_size=.5, random_state=0))

def test_splitter_once(multi):
    "A splitter with one split leaves the rest in training"
    folds = assign_folds(multi, ShuffleSplit(1, test_size=.1, random_state=0))
    assert (folds==0).sum()==60 and (folds==-1).sum()==540

def test_assign(multi):
    "A number, a column, a function, a partial of one"
    assert (assign_folds(multi, 5)==greedy_folds(multi, 5)).all()
    assert (assign_folds(multi, partial(greedy_folds, n=3), seed=7)==greedy_folds(multi, 3, seed=7)).all()
    assert (assign_folds(multi, kfold, seed=7)==kfold(multi, seed=7)).all()
    cv = np.arange(600)%3-1
    for o in cv,cv.astype(str),cv.astype(float): assert (assign_folds(_table(multi.y, cv=o), 'cv')==cv).all()
    assert (assign_folds(_table(np.tile([0,1,2], 20)), 4)==stratified_folds(_table(np.tile([0,1,2], 20)), 4)).all()

@pytest.mark.parametrize('col,msg', [
    (['0','1','x','1'], r"column cv: 1 fields are no whole number \(first: 'x'\)"), ([0,1,.5,1], 'no whole number'),
    ([0,1,np.nan,1], 'no whole number'), ([1,2,1,2], 'fold 0 is empty'), ([0,2,0,2], 'fold 1 is empty'), ([-1]*4, 'no row is in a fold')])
def test_bad_column(col, msg):
    with pytest.raises(ValueError, match=msg): assign_folds(_table(np.array([0,1,0,1]), cv=col), 'cv')

@pytest.mark.parametrize('folds,msg', [(5, '5 folds of 4 rows: some would be empty, give at most 4'), (1, '1 folds: give a whole number'),
    (2.5, '2.5 folds'), ('cv', "no column 'cv' in train"), (lambda t, seed: [0,1], r'shape \(2,\)'), (partial(kfold, n=9), '9 folds of 4 rows')])
def test_bad_folds(folds, msg):
    for y in sparse.csr_matrix(np.eye(4, dtype=np.float32)),np.array([0,1,0,1]):
        with pytest.raises(ValueError, match=msg): assign_folds(_table(y), folds)

def test_fold_rows():
    folds = np.array([0,1,-1,0])
    train,valid = fold_rows(folds, 0)
    assert train.tolist()==[1,2] and valid.tolist()==[0,3]
    train,valid = fold_rows(folds, 'all')
    assert train.tolist()==[0,1,2,3] and valid.tolist()==[]
    for o in 2,-1,'1':
        with pytest.raises(ValueError, match="there are 2, from 0 to 1, or 'all'"): fold_rows(folds, o)

def test_stratify_has_a_limit():
    "What would take gigabytes and hours is refused at once, and what can be done instead is said"
    y = sparse.csr_matrix((np.ones(9), (range(9), range(9))), shape=(300_000,7178))
    with pytest.raises(ValueError, match='300,000 rows of 7,178 classes.*greedy_folds'): stratify(y)
