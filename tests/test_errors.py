"Losses, worst pictures, pairs and groups of held-out predictions, for every target"
from functools import partial
import matplotlib.pyplot as plt, numpy as np, pytest, scipy.sparse as sparse
from recipes import animal, bengali, imet, whale
from recipes.data.fixtures import sample
from recipes.infer.decide import binarise
from recipes.infer.predictions import Predictions
from recipes.infer.search import best_threshold
from recipes.look.chances import best_temperature, chances_of, class_frame, columns_of, softmax_at
from recipes.look.classes import most_confused, per_class
from recipes.look.errors import cross_entropy, losses_of, mean_entropy, show_worst, thumbnails, worst_pictures
from recipes.look.mixed_up import class_table, group_table, mixed_pairs, mixed_rows, show_mixed
from recipes.recall import by_head
from sklearn.metrics import log_loss, precision_recall_fscore_support

def made_up(task, seed=0, n=120):
    "Held-out predictions of a drawn sample with scores out of thin air"
    table,rng = task.table(sample(task.competition.name, n)),np.random.default_rng(seed)
    n,target = len(table),task.competition.target.of(table)
    if sparse.issparse(table.y): p = 1/(1+np.exp(3-4*table.y.toarray()-rng.normal(size=table.y.shape)))
    elif table.is_multi:
        parts = [softmax_at(2*np.eye(len(v))[y]+rng.normal(size=(n,len(v))), 1) for v,y in zip(table.vocab, table.y.T)]
        p = np.concatenate(parts, 1)
    else:
        k = len(table.vocab)
        z = 2*np.eye(k+1)[table.y][:,:k]+rng.normal(size=(n,k))
        p = softmax_at(z, 1) if target.kind=='prob' else np.tanh(z/3)
    kw = dict(rows=np.arange(n), folds=np.arange(n)%2)
    by_threshold = partial(binarise, min_labels=1),partial(best_threshold, by_group=True)
    rule,tune = by_threshold if sparse.issparse(table.y) else (task.house.rule,task.house.tune)
    return Predictions(p.astype(np.float32), list(table.train.id), table, task.competition, rule, tune, **kw)

@pytest.fixture(scope='module')
def made(): return {o.competition.name:made_up(o) for o in (animal, bengali, imet, whale)}

def test_cross_entropy():
    "As scikit-learn has it; finite where a chance is 0 and where rows do not sum to one"
    rng = np.random.default_rng(0)
    p,y = rng.dirichlet(np.ones(4), 50),rng.integers(4, size=50)
    assert np.isclose(cross_entropy(p, y).mean(), log_loss(y, p, labels=range(4)))
    assert np.allclose(cross_entropy(3*p, y), cross_entropy(p, y))
    hard = cross_entropy(np.eye(3, dtype=np.float32), np.array([0,2,1]))
    assert np.isfinite(hard).all() and hard[0]==0 and hard[1]>10

def test_mean_entropy():
    "A slow loop, both ways, over more rows than a block has; certainty does no harm"
    rng = np.random.default_rng(0)
    p,y = rng.random((3000,6)).astype(np.float32),(rng.random((3000,6))<.3).astype(np.float32)
    own = -(y*np.log(p)+(1-y)*np.log(1-p))
    assert np.allclose(mean_entropy(p, sparse.csr_matrix(y)), own.mean(1), rtol=1e-4)
    assert np.allclose(mean_entropy(p, sparse.csr_matrix(y), axis=0), own.mean(0), rtol=1e-4)
    assert np.isfinite(mean_entropy(np.eye(2, dtype=np.float32), sparse.csr_matrix([[0.,1],[0,1]]))).all()

def test_losses_of(made):
    "Of one label, heads and many labels, each worked out by hand"
    o = made['animal']
    assert np.allclose(losses_of(o), -np.log(o.p[range(len(o)),o.y]), rtol=1e-3, atol=1e-6)
    o = made['bengali']
    want = np.mean([log for log in (-np.log(p[range(len(o)),y]) for p,y in zip(by_head(o.p, o.table), o.y.T))], 0)
    assert np.allclose(losses_of(o), want, rtol=1e-3, atol=1e-6)
    o = made['imet']
    y = o.y.toarray()
    assert np.allclose(losses_of(o), -np.log(np.where(y>0, o.p, 1-o.p)).mean(1), rtol=1e-3)

def test_nan(made):
    "NaN is refused, and said where"
    o = made['animal']
    bad = Predictions(o.p.copy(), o.ids, o.table, o.competition, o.rule, rows=o.rows, folds=o.folds)
    bad.p[3,1] = np.nan
    with pytest.raises(ValueError, match='1 of 120 rows of predictions hold NaN, the first is row 3'): losses_of(bad)

def test_temperature():
    "The right one is found at any scale, and the likelihood is no worse on either side"
    rng = np.random.default_rng(1)
    s = rng.normal(size=(1500,4))
    y = np.array([rng.choice(4, p=o) for o in softmax_at(s, .5)])
    for k in (1e-3,1,500): assert np.isclose(best_temperature(k*s, y)/k, .5, rtol=.15)
    def nll(t): return log_loss(y, softmax_at(s, t).astype(float), labels=range(4))
    t = best_temperature(s, y)
    assert nll(t)<=min(nll(.9*t), nll(1.1*t))

def test_unknown(made):
    "The unknown is a column; order among the ids stays that of the scores; the decision agrees with the chances"
    o = made['whale']
    p = chances_of(o)
    assert p.shape==(len(o),len(o.table.vocab)+1) and np.allclose(p.sum(1), 1, atol=1e-4)
    assert (p[:,:-1].argmax(1)==o.p.argmax(1)).all()
    first = columns_of(o, o.decide()).indices
    assert (first==p.argmax(1)).mean()>.99
    assert class_frame(o).group.tolist()==['known']*(p.shape[1]-1)+['unknown']
    assert (columns_of(o, o.y).indices==o.y).all()

@pytest.mark.parametrize('task', ['animal','bengali','imet','whale'])
def test_worst(made, task):
    "The worst come first, with truth and answer in words, and are drawn"
    o = made[task]
    df = worst_pictures(o, 5)
    assert df.loss.tolist()==sorted(losses_of(o), reverse=True)[:5]
    assert df.id.tolist()==[o.ids[i] for i in df.index] and (df.row==df.index).all()
    assert df[['truth','answer']].map(lambda s: isinstance(s, str)).all().all() and df.truth_score.between(0, 1).all()
    fig = show_worst(o, 5)
    assert [ax.get_title().split('\n')[0] for ax in fig.axes[:5]]==[f'loss {v:.2f}' for v in df.loss]
    plt.close('all')

def test_thumbnails(made):
    "Small, in shape; rows of arrays too"
    frame = made['imet'].table.train
    for im,(h,w) in zip(thumbnails(frame[:8], 32), frame[['height','width']].to_numpy()[:8]):
        assert max(im.shape[:2])==32 and abs(im.shape[0]/im.shape[1]-h/w)<.1*h/w and im.dtype==np.uint8
    assert [o.ndim for o in thumbnails(made['bengali'].table.train[:2])]==[3,3]

def test_class_table(made):
    "What the reports of one label and heads say, and scikit-learn of many labels"
    for task in ('animal','bengali'):
        o = made[task]
        a,b = class_table(o),per_class(o.y, o.labels, o.table)
        if task=='bengali': b['group'] = b.group.replace({f'head {i}':v for i,v in enumerate(o.competition.target.heads)})
        both = a.merge(b, on=['group','label'], suffixes=('','_'))
        assert len(both)==len(a)==len(b)
        for k in ('support','recall','precision','f1'): assert np.allclose(both[k].fillna(-1), both[f'{k}_'].fillna(-1))
    o = made['imet']
    prec,rec,f,n = precision_recall_fscore_support(o.y.toarray()>0, o.labels.toarray(), zero_division=np.nan)
    df = class_table(o).set_index('label').loc[o.table.vocab]
    assert np.allclose(df.support, n) and np.allclose(df.recall, rec, equal_nan=True) and np.allclose(df.precision, prec, equal_nan=True)

def test_group_table(made):
    "iMet's groups, Bengali's heads, known and unknown whales; micro recall and losses by hand"
    df = group_table(made['imet'])
    assert sorted(df.index)==['culture','tag']
    o = made['imet']
    cols = o.table.groups['culture']
    y,p = o.y.toarray()[:,cols],o.p[:,cols]
    assert np.isclose(df.loss['culture'], -np.log(np.where(y>0, p, 1-p)).mean(), rtol=1e-3)
    assert np.isclose(df.recall['culture'], (y*o.labels.toarray()[:,cols]).sum()/y.sum())
    o = made['bengali']
    df = group_table(o)
    assert sorted(df.index)==sorted(o.competition.target.heads)
    assert np.isclose(df.loss.mean(), losses_of(o).mean(), rtol=1e-4)
    assert np.allclose(df.recall[list(o.competition.target.heads)], (o.y==o.labels).mean(0))
    o = made['whale']
    df = group_table(o)
    new = o.y==len(o.table.vocab)
    assert df.support.to_dict()=={'known':(~new).sum(), 'unknown':new.sum()}
    assert np.isclose(df.loss['unknown'], losses_of(o)[new].mean(), rtol=1e-4)

def test_pairs(made):
    "Those of the confusion matrix for one label; known and unknown may be mixed up; heads and groups may not"
    o = made['animal']
    a,b = mixed_pairs(o, 999),most_confused(o.y, o.labels, o.table, most=999)
    assert sorted(zip(a.truth, a.decided, a.times))==sorted(zip(b.truth, b.decided, b.times))
    o = made['whale']
    n = len(o.table.vocab)
    df,first = mixed_pairs(o, 999),columns_of(o, o.labels).indices
    assert df.times.sum()==(first!=o.y).sum() and {n}&{*df.a,*df.b}
    for task in ('bengali','imet'):
        group = class_frame(made[task]).group
        df = mixed_pairs(made[task], 50)
        assert len(df) and (group[df.a].to_numpy()==group[df.b].to_numpy()).all()
    i,j = df.a[0],df.b[0]
    at = mixed_rows(made['imet'], i, j, 999)
    y,d = made['imet'].y.toarray(),made['imet'].labels.toarray()
    assert len(at)==df.times[0] and (y[at,i]>d[at,i]).all() and (d[at,j]>y[at,j]).all()

def test_show_mixed(made):
    "A line a pair, empty places filled; nothing to show is said"
    o = made['animal']
    fig = show_mixed(o, 3, 4)
    assert len(fig.axes)==12
    plt.close('all')
    sure = Predictions(np.eye(o.p.shape[1], dtype=np.float32)[o.y], o.ids, o.table, o.competition, o.rule, rows=o.rows, folds=o.folds)
    with pytest.raises(ValueError, match='nothing is mixed up'): show_mixed(sure)
