"Wrong labels that were planted are found: one label, heads, many labels, identities"
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, scipy.sparse as sparse
from dataclasses import replace
from recipes import animal, bengali, imet, whale
from recipes.data.fixtures import sample
from recipes.infer.predictions import Predictions
from recipes.look.chances import softmax_at
from recipes.look.doubts import confident_joint, counts_as, entry_doubts, label_doubts, own_chances, row_doubts, usual_chances
from recipes.look.slices import training_counts
from recipes.look.suspects import label_suspects, noise_shares, picture_suspects, show_suspects
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

@pytest.fixture(scope='module')
def digits():
    "scikit-learn's digits with a twentieth relabelled, and out-of-fold probabilities of a model that learned from them"
    x,true = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    bad = rng.permutation(len(true))[:len(true)//20]
    y = true.copy()
    y[bad] = (y[bad]+rng.integers(1, 10, len(bad)))%10
    p = cross_val_predict(LogisticRegression(C=.1, max_iter=200), x/16, y, cv=3, method='predict_proba')
    return p,y,bad

def test_joint():
    "A slow loop over the definition"
    rng = np.random.default_rng(0)
    p,y = rng.dirichlet(np.ones(4), 200),rng.integers(4, size=200)
    t = [np.mean([p[i,j] for i in range(200) if y[i]==j]) for j in range(4)]
    assert np.allclose(own_chances(p, y), t)
    c = np.zeros((4,4))
    for i in range(200):
        over = [j for j in range(4) if p[i,j]>=t[j]]
        if over: c[y[i],max(over, key=lambda j: p[i,j])] += 1
    want = np.array([r/r.sum()*(y==k).sum() for k,r in enumerate(c)])/200
    assert np.allclose(confident_joint(p, y), want)
    none = own_chances(p, np.zeros(200, int))
    assert np.isinf(none[1:]).all() and set(counts_as(p, none))<={-1,0}

def test_planted(digits):
    "Of the first so many suspects most are planted, and the share of noise is found"
    p,y,bad = digits
    best,doubt,sure = label_doubts(p, y)
    first = np.argsort(-doubt)[:len(bad)]
    precision = np.isin(first, bad).mean()
    print(f'{precision:.0%} of the first {len(bad)} are planted; chance finds {len(bad)/len(y):.0%}')
    assert precision>.75
    assert .03<1-np.trace(confident_joint(p, y))<.09
    assert sure[bad].mean()>.7 and sure[np.setdiff1d(np.arange(len(y)), bad)].mean()<.06

def made_up(task, table, p): return Predictions(p.astype(np.float32), list(table.train.id), table, task.competition, task.house.rule,
    task.house.tune, rows=np.arange(len(table)), folds=np.arange(len(table))%2)

def test_one_label():
    "Suspects of a table are the flipped ones, with what they were before"
    table,rng = animal.table(sample('animal', 300)),np.random.default_rng(0)
    n,k = len(table),len(table.vocab)
    bad = rng.permutation(n)[:15]
    y = table.y.copy()
    y[bad] = (y[bad]+1)%k
    o = made_up(animal, replace(table, y=y), softmax_at(3*np.eye(k)[table.y]+rng.normal(size=(n,k)), 1))
    df = label_suspects(o, 15)
    found = df[df.row.isin(bad)]
    assert len(found)>=10
    assert (found.suggested==np.array(table.names)[table.y[found.row]]).mean()>.9 and (found.given==np.array(table.names)[y[found.row]]).all()
    assert df.id.tolist()==table.train.id.iloc[df.row].tolist() and df.suspicion.is_monotonic_decreasing
    assert list(picture_suspects(o, 5).row)==list(df.row[:5])
    assert len(show_suspects(o, 4).axes)==4
    plt.close('all')

def test_heads():
    "The head of a flipped label is named; pictures add up their heads"
    table,rng = bengali.table(sample('bengali', 120)),np.random.default_rng(0)
    n = len(table)
    p = np.concatenate([softmax_at(4*np.eye(len(v))[y]+rng.normal(size=(n,len(v))), 1) for v,y in zip(table.vocab, table.y.T)], 1)
    y = table.y.copy()
    y[:6,1] = (y[:6,1]+1)%len(table.vocab[1])
    o = made_up(bengali, replace(table, y=y), p)
    df = label_suspects(o, 6)
    assert df.row.isin(range(6)).sum()>=4 and (df.kind[df.row<6]=='vowel_diacritic').all()
    assert set(noise_shares(o).index)==set(bengali.competition.target.heads)

def test_untrained():
    "An id without another picture cannot be doubted"
    table,rng = whale.table(sample('whale', 120)),np.random.default_rng(0)
    o = made_up(whale, table, rng.random((len(table),len(table.vocab)))*2-1)
    lone = np.flatnonzero(training_counts(o)==0)
    assert len(lone) and not label_suspects(o, None).row.isin(lone).any()

def test_usual():
    "Means of a slow loop, over more rows than a block has"
    rng = np.random.default_rng(0)
    p,y = rng.random((3000,3)).astype(np.float32),rng.random((3000,3))<.3
    y[:,2] = False
    has,hasnt = usual_chances(p, sparse.csr_matrix(y.astype(np.float32)))
    assert np.allclose(has[:2], [p[y[:,j],j].mean() for j in range(2)], rtol=1e-4) and np.isinf(has[2])
    assert np.allclose(hasnt, [p[~y[:,j],j].mean() for j in range(3)], rtol=1e-4)

def test_entries():
    "Missing and wrong are told apart; a class that is found nowhere accuses nobody"
    rng = np.random.default_rng(0)
    true = rng.random((2000,4))<.3
    p = 1/(1+np.exp(3-6*true-rng.normal(size=true.shape)))
    p[:,3] = .3
    given = true.copy()
    given[:30,0] = ~given[:30,0]
    df = entry_doubts(p.astype(np.float32), sparse.csr_matrix(given.astype(np.float32)))
    top = df.sort_values('suspicion', ascending=False)[:30]
    assert (top['at']<30).mean()>.9 and (top.column==0).all()
    assert (top.missing==~given[top['at'],top.column]).all() and not df[df.suspicion>.01].column.isin([3]).any()

def test_many_labels():
    "Rows of the drawn sample that got another's labels are found, better than by the mean error; nothing of the table is changed"
    path = sample('imet', 400)
    table,bad = imet.table(path),pd.read_csv(path/'corrupted.csv').set_index('id').attribute_ids.astype(str)
    right = table.y.toarray()
    for i in np.flatnonzero(table.train.id.isin(bad.index)): right[i] = np.isin(table.vocab, bad[table.train.id[i]].split())
    p = 1/(1+np.exp(4-6*right-1.5*np.random.default_rng(0).normal(size=right.shape)))
    o,before = made_up(imet, table, p),table.y.copy()
    df = picture_suspects(o, len(bad))
    precision = df.id.isin(bad.index).mean()
    print(f'{precision:.0%} of the first {len(bad)} are planted; chance finds {len(bad)/len(table):.0%}')
    assert precision>.7 and df.suspicion.is_monotonic_decreasing
    assert np.allclose(df.suspicion, row_doubts(o.p, table.y)[df.index])
    assert (table.y!=before).nnz==0
    assert {'missing','wrong'}==set(label_suspects(o).kind)
    assert len(show_suspects(o, 3).axes)==3
    plt.close('all')
