"Reports by class against scikit-learn's, and their pictures"
import warnings
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from recipes.data.table import Table
from recipes.look.classes import confusion, drawable, most_confused, per_class, plot_confusion, plot_recall, worst

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def case(sizes=(30,5), n=400, seed=0):
    "A table of more rows than are looked at, the truth of those rows, and decisions; classes are missing on all sides"
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.choice(c-1, 3*n, p=(w := 1/np.arange(1, c))/w.sum()) for c in sizes], 1)
    y = rows[:n]
    labels = np.where(rng.random(y.shape)<.6, y, np.stack([rng.integers(0, c, n) for c in sizes], 1))
    vocab = [[f'{h}-{i}' for i in range(c)] for h,c in enumerate(sizes)]
    if len(sizes)==1: rows,y,labels,vocab = rows[:,0],y[:,0],labels[:,0],vocab[0]
    names = [[f'class {o}' for o in v] for v in vocab] if len(sizes)>1 else [f'class {o}' for o in vocab]
    return Table(pd.DataFrame(dict(id=range(3*n))), pd.DataFrame(dict(id=[])), rows, vocab, names),y,labels

@pytest.mark.parametrize('sizes', [(30,), (30,5), (168,11,7)])
def test_per_class_is_sklearns(sizes):
    table,y,labels = case(sizes)
    df = per_class(y, labels, table)
    assert list(df)==['group','label','name','count','support','recall','precision','f1'] and len(df)==sum(sizes)
    for h,c in enumerate(sizes):
        a,b,rows = (o if len(sizes)==1 else o[:,h] for o in (y, labels, table.y))
        p,r,f,s = precision_recall_fscore_support(a, b, labels=range(c), zero_division=np.nan)
        got = df[df.label.str.startswith(f'{h}-')]
        assert got['count'].is_monotonic_decreasing and (got.name=='class '+got.label).all()
        at = got.label.str.split('-').str[1].astype(int)
        np.testing.assert_array_equal(got['count'], np.bincount(rows, minlength=c)[at])
        np.testing.assert_array_equal(got.support, s[at])
        for o,want in (got.recall,r),(got.precision,p),(got.f1,f): np.testing.assert_allclose(o, want[at])
    assert df.recall.isna().any() and (len(sizes)==1 or df.group.unique().tolist()==[f'head {i}' for i in range(len(sizes))])

def test_groups_of_one_label():
    table,y,labels = case((30,))
    table.groups = dict(beast=np.arange(10), bird=np.arange(10, 30))
    df = per_class(y, labels, table)
    assert set(df.group)=={'beast','bird'} and df['count'].is_monotonic_decreasing
    assert len(plot_recall(y, labels, table).collections)==2

@pytest.mark.parametrize('sizes', [(30,), (30,5)])
def test_confusion_is_sklearns(sizes):
    table,y,labels = case(sizes)
    for h,c in enumerate(sizes):
        a,b = (o if len(sizes)==1 else o[:,h] for o in (y, labels))
        df = confusion(y, labels, table, h)
        np.testing.assert_array_equal(df.values, confusion_matrix(a, b, labels=range(c)))
        assert df.index.tolist()==df.columns.tolist()==(table.names if len(sizes)==1 else table.names[h])

def test_unknown_identity_is_no_class():
    table = Table(pd.DataFrame(dict(id=range(4))), pd.DataFrame(dict(id=[])), np.array([0,1,2,2]), ['a','b'])
    y,labels = np.array([0,1,2,2]),np.array([0,0,1,2])
    assert confusion(y, labels, table).values.tolist()==[[1,0],[1,0]]
    assert per_class(y, labels, table).support.tolist()==[1,1]

def test_most_confused():
    table,y,labels = case()
    df = most_confused(y, labels, table, most=50)
    pairs = {}
    for a,b in zip(y[:,0], labels[:,0]):
        if a!=b: pairs[a,b] = pairs.get((a,b), 0)+1
    assert df.times.tolist()==sorted(pairs.values(), reverse=True)[:50]
    for o in df.itertuples():
        a,b = (int(n.split('-')[1]) for n in (o.truth,o.decided))
        assert pairs[a,b]==o.times and o.share==pytest.approx(o.times/(y[:,0]==a).sum())
    assert len(most_confused(y, y, table))==0

def test_worst():
    m = np.array([[5,1,0,0],[2,5,0,0],[0,0,9,0],[0,4,0,1]])
    assert worst(m).tolist()==[1,3,0] and worst(m, 1).tolist()==[1] and worst(np.eye(3, dtype=int)).tolist()==[0]

@pytest.mark.parametrize('sizes', [(30,), (30,5)])
def test_plot_recall_has_a_dot_a_class(sizes):
    table,y,labels = case(sizes)
    ax = plot_recall(y, labels, table)
    df = per_class(y, labels, table).dropna(subset='recall')
    dots = np.concatenate([o.get_offsets() for o in ax.collections])
    assert sorted(map(tuple, dots.tolist()))==sorted(zip(df['count'].astype(float), df.recall))
    ax.figure.canvas.draw()

def test_plot_confusion():
    table,y,labels = case()
    ax = plot_confusion(y, labels, table, most=8)
    m = confusion(y, labels, table).values
    at = sorted(worst(m, 8))
    assert [o.get_text() for o in ax.get_yticklabels()]==[f'class 0-{i}' for i in at]
    said = {tuple(map(int, o.get_position()[::-1])):int(o.get_text()) for o in ax.texts}
    assert said=={(i,j):m[a,b] for i,a in enumerate(at) for j,b in enumerate(at) if m[a,b]}
    for most,head in ((100,0), (20,1)): plot_confusion(y, labels, table, head, most).figure.canvas.draw()

def test_plots_without_mistakes_or_with_few():
    table,y,_ = case((3,))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for labels in y,np.zeros_like(y): plot_confusion(y, labels, table).figure.canvas.draw()
        plot_recall(y, y, table).figure.canvas.draw()

def test_scripts_the_font_lacks():
    table = Table(pd.DataFrame(dict(id=range(2))), pd.DataFrame(dict(id=[])), np.array([0,1]), ['0','1'], ['ক','খ'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ax = plot_confusion(np.array([0,1]), np.array([1,0]), table)
        ax.figure.canvas.draw()
    assert [o.get_text() for o in ax.get_xticklabels()]==['0','1']
    assert drawable(['élan'], ['x'])==['élan'] and len(drawable(['a'*40], ['x'])[0])==18
