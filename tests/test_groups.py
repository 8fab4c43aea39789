"Batches of groups: what belongs together is in one batch of the loader, the same when asked again"
import pickle
from collections import Counter
from functools import partial
from random import Random
import numpy as np, pandas as pd, pytest
from recipes.data.augment import none, squish
from recipes.data.groups import identity_items, known, pk
from recipes.data.loaders import Items, PictureDL
from recipes.data.samplers import at_least
from recipes.data.table import Table
from recipes.data.targets import Identity

counts = [1,1,2,3,5,8,13,21,2,4]
C = len(counts)
y = np.random.RandomState(0).permutation(np.concatenate([np.repeat(np.arange(C), counts), np.full(20, C)]))
df = pd.DataFrame(dict(id=[f'i{i}' for i in range(len(y))]))
table,rows = Table(df, df[:0], y, list('abcdefghij')),np.arange(len(y))
some = np.random.RandomState(1).permutation(len(y))[:60]   # training rows of a fold, in any order
samplers = dict(pk=partial(pk, p=4, k=3), pk_new=partial(pk, p=4, k=2, unknown=.25), pairs=partial(pk, p=5, k=2, rounds=1),
    fours=identity_items, known=known, topped=partial(known, sampler=partial(at_least, k=6)), nested=partial(known, sampler=partial(pk, p=3), least=2))
every = pytest.mark.parametrize('name', samplers)

@every
@pytest.mark.parametrize('which', [rows,some], ids=['all','fold'])
def test_order(name, which):
    "As many places as promised, all in `rows`; a seed gives the same; epochs differ; it survives pickling"
    order = samplers[name](table, which)
    drawn = order(Random(3))
    assert len(drawn)==len(order) and 0<=min(drawn) and max(drawn)<len(which) and all(type(o) is int for o in drawn)
    assert drawn==order(Random(3))==pickle.loads(pickle.dumps(order))(Random(3))
    rng = Random(3)
    assert order(rng)==drawn and order(rng)!=drawn

@pytest.mark.parametrize('p,k', [(2,2),(4,3),(10,4)])
def test_pk(p, k):
    "Each batch has p ids with k rows; rows differ where there are k; unknown ones never come"
    order = pk(table, rows, p=p, k=k)
    for s in range(3):
        for batch in np.array(order(Random(s))).reshape(-1, p*k):
            n = Counter(y[batch].tolist())
            assert len(n)==p and set(n.values())=={k} and C not in n
            for c in n: assert len(set(batch[y[batch]==c]))==min(k, counts[c])
    assert abs(len(order)-len(rows))<=C*k

def test_pk_deals_all():
    "Ids come equally often, to those left over at the end of a deck"
    drawn = y[pk(table, rows, p=5, k=2, rounds=7)(Random(0))]
    assert set(np.bincount(drawn)[:C])=={14}
    n = sum(np.bincount(y[pk(table, rows, p=4, k=1, rounds=1)(Random(s))], minlength=C) for s in range(500))
    assert abs(n-400).max()<60   # 8 of 10 ids each time

def test_pk_rows_are_fair():
    "Over many epochs each row of an id is as likely"
    n = Counter(o for s in range(400) for o in pk(table, rows, p=10, k=2, rounds=1)(Random(s)) if y[o]==4)
    assert len(n)==5 and max(n.values())-min(n.values())<80   # 160 expected of each

def test_pk_unknown():
    "A share of the groups is of nobody known, all different"
    for batch in np.array(pk(table, rows, p=8, k=4, unknown=.25)(Random(0))).reshape(-1, 32):
        new = batch[y[batch]==C]
        assert len(new)==8 and len(set(y[batch]))==7
    ids = rows[y<C]
    assert (y[ids[pk(table, ids, p=4, k=2, unknown=.25)(Random(0))]]<C).all()   # none there: all groups are ids

def test_pairs():
    "Two of each id an epoch, a single one twice"
    drawn = y[pk(table, rows, p=5, k=2, rounds=1)(Random(0))]
    assert Counter(drawn.tolist())=={c:2 for c in range(C)}

def test_fours():
    "Same, same, another, unknown; the two of an id differ where they can"
    order = identity_items(table, rows)
    for s in range(20):
        a,b,c,d = np.array(order(Random(s))).reshape(-1, 4).T
        assert (y[a]==y[b]).all() and (y[a]!=y[c]).all() and (y[c]<C).all() and (y[d]==C).all()
        assert sorted(y[a])==list(range(C)) and ((a==b)==(np.array(counts)[y[a]]==1)).all()
    others = Counter((y[o[0]],y[o[2]]) for s in range(300) for o in np.array(order(Random(s))).reshape(-1, 4))
    assert len(others)==C*(C-1)   # any other id

def test_fours_of_many():
    "The first stage has ids with many pictures, as itself and as another"
    drawn = y[identity_items(table, rows, least=8)(Random(0))].reshape(-1, 4)
    assert set(drawn[:,:3].ravel())<={5,6,7} and len(drawn)==3

def test_known():
    "Nobody unknown, no id with too few; what is left is topped up"
    assert sorted(known(table, rows)(Random(0)))==np.flatnonzero(y<C).tolist()
    drawn = y[known(table, rows, sampler=partial(at_least, k=10))(Random(0))]
    assert np.bincount(drawn).tolist()==[max(10, o) for o in counts]
    assert set(y[known(table, rows, least=4)(Random(0))])==set(np.flatnonzero(np.array(counts)>=4))
    order = known(table, some, sampler=partial(pk, p=3, k=2), least=2)
    assert all(len(set(o))==3 for o in y[some[np.array(order(Random(0))).reshape(-1, 6)]])

def test_refused():
    wrong = [(partial(pk, p=11), 'make `p` smaller'),(partial(pk, least=99), 'groups need two ids'),
        (partial(identity_items, least=21), '1 ids have 21'),(partial(known, least=99), 'no id has 99')]
    for f,text in wrong:
        with pytest.raises(ValueError, match=text): f(table, rows)

def test_in_the_loader():
    "A batch of the loader is a batch of the sampler, pass after pass"
    class Flat:
        def __getitem__(self, i): return np.full((8,8,3), i, np.uint8)
    order = pk(table, some, p=4, k=3)
    items = Items(Flat(), list(df.id), list(some), (squish,none), (8,8))
    target = Identity('new_whale').of(table)
    dl = PictureDL(items, target, y, ((.5,)*3,(.5,)*3), table.vocab, order, bs=12, shuffle=True, drop_last=True, device='cpu')
    for _ in range(2):
        batches = [b[1] for b in dl]
        assert len(batches)==len(dl)==len(order)//12
        for b in batches: assert len(b.unique())==4 and (b.bincount().unique()[1:]==3).all() or set(b.bincount().tolist())=={0,3}
