"Rows are drawn as often as they should be, the same when asked again, and by the loader that trains"
import pickle
from collections import Counter
from functools import partial
from random import Random
import numpy as np, pandas as pd, pytest
from scipy import sparse
from recipes.data.augment import none, squish
from recipes.data.loaders import Items, PictureDL, make_dls
from recipes.data.samplers import Draw, TopUp, at_least, class_balanced, log_weight, power_weight, rank_weight, row_weights
from recipes.data.samplers import square_root, weighted
from recipes.data.table import Table
from recipes.data.targets import SingleLabel

counts = np.array([600,300,150,80,50,20])
single = np.random.RandomState(0).permutation(np.repeat(np.arange(6), counts))

def table_of(y, vocab):
    df = pd.DataFrame(dict(id=range(y.shape[0])))
    return Table(df, df[:0], y, vocab)

def multi_hot():
    "Every row has one of the labels; one in three has another"
    rng = np.random.RandomState(1)
    y = np.zeros((1200,6), np.float32)
    y[np.arange(1200),single] = 1
    y[np.arange(0, 1200, 3),rng.randint(0, 6, 400)] = 1
    return sparse.csr_matrix(y)

tables = dict(single=table_of(single, list('abcdef')), multi=table_of(multi_hot(), list('abcdef')),
    heads=table_of(np.stack([single,single%2], 1), [list('abcdef'),list('xy')]))
each = pytest.mark.parametrize('kind', tables)
samplers = dict(balanced=class_balanced, root=square_root, log=partial(weighted, weight_of=log_weight),
    rank=partial(weighted, weight_of=rank_weight), top=partial(at_least, k=70))
every = pytest.mark.parametrize('name', samplers)

def dense(table, rows):
    "Which classes each of the rows has, heads side by side"
    y = table.y[rows]
    if sparse.issparse(y): return y.toarray()>0
    return np.hstack([o[:,None]==np.arange(o.max()+1) for o in (y.T if y.ndim==2 else [y])])

def slow_weights(table, rows, f):
    "A row's weight: the largest of its classes', class by class"
    has,n = dense(table, rows),len(rows)
    w = [f(np.array([o.sum()/n]))[0] for o in has.T]
    return np.array([max(w[j] for j in range(len(w)) if o[j]) for o in has])

@each
@pytest.mark.parametrize('f', [np.reciprocal,power_weight,partial(power_weight, power=1),log_weight])
def test_weights(kind, f):
    rows = np.arange(100, 1100)
    assert np.allclose(row_weights(tables[kind], rows, f), slow_weights(tables[kind], rows, f))

def test_weights_count_the_rows_given():
    "Classes are counted among the training rows, not in the table"
    rows = np.concatenate([np.flatnonzero(single==0)[:10], np.flatnonzero(single==1)[:10]])
    w = row_weights(tables['single'], rows, np.reciprocal)
    assert np.allclose(w, 2)

def test_weights_without_label():
    "A row without a label weighs as the lightest class; if no row has one, all weigh the same"
    y = sparse.csr_matrix(np.array([[1,0,0],[1,1,0],[0,0,0],[1,0,0]], np.float32))
    assert np.allclose(row_weights(table_of(y, list('abc')), np.arange(4), np.reciprocal), [4/3,4,4/3,4/3])
    none = table_of(sparse.csr_matrix((4,3), dtype=np.float32), list('abc'))
    assert row_weights(none, np.arange(4), np.reciprocal).tolist()==[1,1,1,1]
    stored = sparse.csr_matrix((np.array([1,0,1], np.float32), ([0,0,1],[0,1,1])), shape=(2,2))   # a zero that is stored
    assert row_weights(table_of(stored, list('ab')), np.arange(2), np.reciprocal).tolist()==[2,2]

@pytest.mark.parametrize('power', [0,.5,1,2])
def test_frequencies(power):
    "Classes come as often as their count to the power of `1-power`, within five standard errors"
    order,rng,passes = weighted(tables['single'], np.arange(1200), partial(power_weight, power=power)),Random(3),40
    got = sum(np.bincount(single[order(rng)], minlength=6) for _ in range(passes))
    p = counts**(1.-power)
    p /= p.sum()
    n = 1200*passes
    assert (abs(got-n*p)<5*np.sqrt(n*p*(1-p))).all()

def test_named_are_powers():
    rows = np.arange(1200)
    for f,power in (class_balanced,1),(square_root,.5):
        same = weighted(tables['single'], rows, partial(power_weight, power=power))
        assert f(tables['single'], rows)(Random(0))==same(Random(0))

def test_rows_of_a_class_alike():
    "Within a class every row comes equally often"
    order,rng = class_balanced(tables['single'], np.arange(1200)),Random(0)
    n = np.bincount(sum((order(rng) for _ in range(60)), []), minlength=1200)[single==4]
    assert abs(n-n.mean()).max()<5*n.mean()**.5

def test_rank():
    "Equal steps; ties in the order of the classes; the rarest is heaviest"
    assert rank_weight(np.array([.1,.5,.4]), 1, 3).tolist()==[3,1,2] and rank_weight(np.array([.5,.5]), 1, 3).tolist()==[1,3]

@pytest.mark.parametrize('k', [1,10,70,100,700])
def test_at_least(k):
    "Exactly the larger of a class's own number and `k`, and no row is left out"
    order = at_least(tables['single'], np.arange(1200), k)
    idx = order(Random(0))
    assert np.bincount(single[idx]).tolist()==np.maximum(counts, k).tolist() and set(idx)==set(range(1200)) and len(idx)==len(order)
    n = Counter(idx)
    assert all(n[i]==1 for i in np.flatnonzero(counts[single]>=k))

def test_at_least_is_random():
    "Rows to repeat and their order are drawn anew"
    order,rng = at_least(tables['single'], np.arange(1200), 100),Random(0)
    a,b = order(rng),order(rng)
    assert sorted(a)!=sorted(b) and a!=sorted(a) and np.mean(np.array(a)==b)<.05

@pytest.mark.parametrize('kind', ['multi','heads'])
def test_at_least_with_several_labels(kind):
    rows = np.arange(200, 1200)
    has = dense(tables[kind], rows)
    idx = at_least(tables[kind], rows, 90)(Random(0))
    n = has[idx].sum(0)
    assert (n>=np.maximum(has.sum(0), 90)).all() and set(idx)==set(range(1000))

@each
@every
def test_order(kind, name):
    "Indices into the rows; as many as it says; the same from the same state of the generator, as on resume; pickles"
    rows = np.random.RandomState(2).permutation(1200)[:900]
    order = samplers[name](tables[kind], rows)
    rng = Random(5)
    order(rng)
    state = rng.getstate()
    idx = order(rng)
    assert len(idx)==len(order) and all(type(o) is int for o in idx) and 0<=min(idx) and max(idx)<900
    again = Random()
    again.setstate(state)
    assert samplers[name](tables[kind], rows)(again)==idx==pickle.loads(pickle.dumps(order))(_at(state))!=order(rng)

def _at(state):
    rng = Random()
    rng.setstate(state)
    return rng

def test_rows_are_positions():
    "`order` speaks of places in `rows`, so that rare rows are found wherever the fold puts them"
    rows = np.flatnonzero((single==0)|(single==5))[::-1]
    got = single[rows[class_balanced(tables['single'], rows)(Random(0))]]
    assert abs((got==5).mean()-.5)<5*(.25/len(rows))**.5

def test_large():
    "Many rows and classes"
    y = np.random.RandomState(0).randint(0, 1000, 10**5)
    order = square_root(table_of(y, [str(i) for i in range(1000)]), np.arange(10**5))
    assert len(order(Random(0)))==10**5

# --- the loader

class Gray:
    def __len__(self): return 1200
    def __getitem__(self, i): return np.full((4,4,1), i%256, np.uint8)

def items(rows, train=True): return Items(Gray(), [f'id{i}' for i in range(1200)], list(rows), (squish,none), (4,4), train)

def classes(dl): return np.bincount(np.concatenate([b[1].numpy() for b in dl]), minlength=6)

@pytest.mark.parametrize('workers', [0,2])
def test_loader_takes_them(workers):
    rows = np.random.RandomState(3).permutation(1200)[:1000]
    order = at_least(tables['single'], rows, 60)
    kw = dict(target=SingleLabel(), stats=((0.,),(1.,)), bs=64, num_workers=workers)
    dl = PictureDL(items(rows), y=single, order=order, shuffle=True, **kw)
    own = np.bincount(single[rows])
    assert classes(dl).tolist()==np.maximum(own, 60).tolist() and len(dl)==-(-len(order)//64)
    back = dl.new(items(rows), shuffle=False)
    got = np.concatenate([b[1].numpy() for b in back])
    assert got.tolist()==single[rows].tolist()   # each item once, in order

def test_loader_repeats_a_pass():
    "The loader's generator decides: put back, it gives the same pass"
    both,order = (items(range(1200)),items(range(10), False)),class_balanced(tables['single'], np.arange(1200))
    dl = make_dls(both, 50, (single,single), order=order, target=SingleLabel(), stats=((0.,),(1.,))).train
    state = dl.rng.getstate()
    a = np.concatenate([b[1].numpy() for b in dl])
    b = np.concatenate([b[1].numpy() for b in dl])
    dl.rng.setstate(state)
    c = np.concatenate([b[1].numpy() for b in dl])
    assert (a==c).all() and (a!=b).any() and abs(np.bincount(a)-200).max()<5*200**.5

def test_empty_top_up(): assert sorted(TopUp(3, [])(Random(0)))==[0,1,2] and len(Draw([1,2]))==2
