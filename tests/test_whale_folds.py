"Whale splits: what is held out is known in training, and the unknown are as many as asked for"
from functools import partial
import numpy as np, pandas as pd, pytest
from recipes.data.folds import assign_folds
from recipes.data.table import Table
from recipes.data.whale_folds import hold_each, hold_one, hold_pairs, hold_some, id_folds
from recipes.recipe.codec import decode, encode

def table_of(counts, unknown, seed=0):
    n = len(counts)
    y = np.random.RandomState(seed).permutation(np.concatenate([np.repeat(np.arange(n), counts), np.full(unknown, n)]))
    df = pd.DataFrame(dict(id=range(len(y))))
    return Table(df, df[:0], y, [f'w_{i:04}' for i in range(n)])

rng = np.random.RandomState(1)
whole = table_of(np.concatenate([np.ones(2073, int), np.full(1285, 2), 3+rng.geometric(.17, 1646)]), 9664)   # the competition's proportions
small = table_of([1,1,2,2,3,6], 5)
ways = dict(some=hold_some, pairs=hold_pairs, each=hold_each, folds=id_folds, folds_28=partial(id_folds, share=.28))
each = pytest.mark.parametrize('name', ways)

def held_of(table, f, fold=0):
    held = assign_folds(table, f)==fold
    n = len(table.vocab)
    return table.y[held],table.y[~held],n

@each
@pytest.mark.parametrize('table', [whole,small], ids=['whole','small'])
def test_known_in_training(table, name):
    "In each fold every id keeps a picture to be known by, and an id with one picture is never held out"
    folds = assign_folds(table, ways[name])
    n,count = len(table.vocab),np.bincount(table.y)
    for k in range(folds.max()+1): assert set(table.y[folds!=k])>=set(range(n))
    assert (folds[(table.y<n)&(count[table.y]==1)]==-1).all()

def test_first():
    "512 ids, a picture each, and 230 unknown, as in the files of the first place"
    y,_,n = held_of(whole, hold_some)
    assert (y==n).sum()==230 and len(y)==742 and len(set(y))==513

def test_third():
    "One of the two pictures of 400 ids, and .276 unknown for each"
    y,left,n = held_of(whole, hold_pairs)
    assert (y<n).sum()==400 and (y==n).sum()==110 and (np.bincount(left)[y[y<n]]==1).all()

def test_seventh():
    "A picture of each id that has two or more, and 1,000 unknown"
    y,_,n = held_of(whole, hold_each)
    assert set(y)==set(np.flatnonzero(np.bincount(whole.y)>1)) and (y==n).sum()==1000 and (y<n).sum()==1285+1646

@pytest.mark.parametrize('share', [0,.1,.28])
def test_share(share):
    "The share asked for, in one fold or in four"
    y,_,n = held_of(whole, partial(hold_one, share=share))
    assert abs((y==n).mean()-share)<.001
    folds = assign_folds(whole, partial(id_folds, share=share))
    for k in range(4): assert abs((whole.y[folds==k]==n).mean()-share)<.002
    assert id_folds(whole, share=share).shape==whole.y.shape

def test_dealt():
    "Folds hold out each id equally often, to one row, and the unknown too"
    folds = assign_folds(whole, id_folds)
    n = pd.crosstab(whole.y[folds>=0], folds[folds>=0])
    assert len(n)==1285+1646+1 and (n.max(axis=1)-n.min(axis=1)).max()==1
    assert (folds[whole.y==len(whole.vocab)]>=0).all()

@each
def test_seeded(name):
    f = ways[name]
    assert (assign_folds(whole, f, 1)==assign_folds(whole, f, 1)).all() and (assign_folds(whole, f, 1)!=assign_folds(whole, f, 2)).any()

def test_few():
    "A set with fewer ids and unknown than asked for gives what it has; one with none says so"
    y,left,n = held_of(small, hold_each)
    assert sorted(y)==[2,3,4,5,6,6,6,6,6] and not (left==n).any()
    y,*_ = held_of(table_of([2,2,3], 0), hold_some)
    assert sorted(y)==[0,1,2]
    for f in hold_some,hold_each: pytest.raises(ValueError, f, table_of([1,1,1], 5)).match('nothing can be held out')
    pytest.raises(ValueError, hold_pairs, table_of([3,1,1], 5)).match('no id has 2 pictures')

@each
def test_in_a_recipe(name):
    "A split is written into a recipe's JSON and read back"
    f = decode(encode(ways[name]))
    assert (assign_folds(small, f)==assign_folds(small, ways[name])).all()
