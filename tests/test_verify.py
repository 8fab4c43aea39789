"Candidates, scores and the override: against slow loops, at their edges, and out-of-fold"
from functools import partial
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from PIL import Image
from recipes.data.augment import none, squish
from recipes.data.fixtures import sample
from recipes.data.loaders import Files, Items, make_dls
from recipes.data.table import Table
from recipes.data.targets import Identity
from recipes.infer import verify
from recipes.infer.openset import tune_map5, with_unknown
from recipes.infer.postprocess import singles_first
from recipes.infer.predictions import Predictions
from recipes.infer.together import lifted, mixed, verified
from recipes.infer.verify import by_keypoints, certainty, id_counts, keypoints_last, likely_pairs, with_keypoints
from recipes.infer.words import by_words
from recipes.ranking import map5
from recipes.recipe.build import dls_of, target_of
from test_keypoints import skin, warped

def whales(folder, y, n):
    "A table of pictures: those of an id are one skin from several places"
    frame = pd.DataFrame(dict(id=[f'{i}.png' for i in range(len(y))], path=[str(folder/f'{i}.png') for i in range(len(y))], width=240, height=150))
    for i,p in enumerate(frame.path): Image.fromarray(warped(skin(y[i] if y[i]<n else 100+i), i)).save(p)
    return Table(frame, frame[:0], np.asarray(y), [f'w_{i}' for i in range(n)])

def learner(table, train, held):
    "What a scorer looks at"
    parts = [Items(Files(list(table.train.path)), list(table.train.id), list(o), (squish,none), (32,32)) for o in (train,held)]
    dls = make_dls(parts, 4, (table.y,table.y), target=Identity('nobody'), device='cpu')
    return SimpleNamespace(dls=dls, table=table, target=Identity('nobody'))

@pytest.fixture(scope='module')
def table(tmp_path_factory): return whales(tmp_path_factory.mktemp('whales'), [*np.repeat(np.arange(6), 3),6,6], 6)

@pytest.fixture(scope='module')
def learn(table): return learner(table, [o for o in range(18) if o%3], [*range(0, 18, 3),18,19])

# --- candidates and scores

def test_candidates_are_the_slow_loop():
    rng = np.random.default_rng(0)
    p,y = rng.random((9,7)),rng.integers(0, 9, 30)   # ids 7 and 8 are no columns
    for k in 1,3,7,50:
        want = [(i,j) for i in range(9) for o in np.argsort(-p[i])[:k] for j in np.flatnonzero(y==o)]
        assert list(zip(*(o.tolist() for o in likely_pairs(p, y, k))))==want

def test_id_counts_are_the_slow_loop():
    rng = np.random.default_rng(0)
    q,g,n,y = rng.integers(0, 5, 80),rng.integers(0, 12, 80),rng.integers(0, 99, 80),rng.integers(0, 4, 12)
    want = np.zeros((5,4))
    for a,b,c in zip(q, g, n): want[a,y[b]] = max(want[a,y[b]], c)
    assert (id_counts((q,g), n, y, (5,4))==want).all()

def test_certainty(): np.testing.assert_allclose(certainty(np.array([0,20,180])), [0,.5,.9])

# --- the scorer

def test_scorer(learn):
    p = by_keypoints(learn, learn.dls.valid)
    assert p.shape==(8,6) and (p[:6].argmax(1)==np.arange(6)).all() and p[:6].max(1).min()>.5>p[6:].max()
    assert (by_keypoints(learn, learn.dls.valid)==p).all()
    out = np.ones_like(p)
    assert by_keypoints(learn, learn.dls.valid, out=out, weight=.5) is out
    np.testing.assert_allclose(out, 1+.5*p, atol=1e-6)

def test_scorer_with_candidates(learn, capsys):
    every = by_keypoints(learn, learn.dls.valid, near='all')
    some = by_keypoints(learn, learn.dls.valid, near=by_words, k=2)
    assert (some[:6].argmax(1)==np.arange(6)).all() and ((some==every)|(some==0)).all() and ((some>0).sum(1)<=2).all()
    assert '96 pairs' in capsys.readouterr().out.splitlines()[0]

def test_too_many_pairs_are_not_begun(learn, monkeypatch):
    monkeypatch.setattr(verify, 'MOST', 50)
    with pytest.raises(ValueError, match='96 pairs of pictures.*give `near`'): by_keypoints(learn, learn.dls.valid)
    assert by_keypoints(learn, learn.dls.valid, near='all').any()

def test_gallery_of_one(table):
    one = learner(table, [0], [1,3])
    p = by_keypoints(one, one.dls.valid)
    assert p[0].argmax()==0 and p[0,0]>.5 and p[1].max()<.5 and p.shape==(2,6)

def test_all_of_one_id(tmp_path):
    t = whales(tmp_path, [0]*6, 1)
    one = learner(t, range(4), range(4, 6))
    assert (by_keypoints(one, one.dls.valid)>.5).all()
    assert (with_unknown(by_keypoints(one, one.dls.valid))[:,:2]==[0,1]).all()

def test_no_gallery_is_said(table):
    none_ = learner(table, [18,19], [0])
    with pytest.raises(ValueError, match='no picture of a known id'): by_keypoints(none_, none_.dls.valid)

def test_in_a_recipe():
    "The built-in sample, with masks and twins: its items and table fit"
    from recipes import whale
    from recipes.whale_nets import masked_box
    path = sample('whale', 148)
    table = whale.table(path)
    recipe = whale.house.but(box=masked_box, channels=4, size=(32,64), arch='test_resnet', pretrained=False, resize=())
    dls = dls_of(recipe, table)
    p = by_keypoints(SimpleNamespace(dls=dls, table=table, target=target_of(recipe, table)), dls.valid, near=by_words, k=3)
    assert p.shape==(len(dls.valid.dataset),len(table.vocab)) and (p>=0).all() and (p<1).all()
    labels = with_unknown(p)
    assert all(len(set(o))==5 for o in labels.tolist())

# --- the override

def test_verified_goes_first():
    labels = np.array([[4,0,1,2,3],[4,0,1,2,3],[2,4,0,1,3]])
    counts = np.array([[0,0,21,0],[0,20,0,0],[0,0,90,30]])
    assert verified(labels, counts).tolist()==[[2,4,0,1,3],[4,0,1,2,3],[2,4,0,1,3]]
    assert verified(labels, counts, threshold=19)[1].tolist()==[1,4,0,2,3]
    assert (verified(labels, 0*counts)==labels).all() and (labels[0]==[4,0,1,2,3]).all()
    step = with_unknown(counts.astype(float), threshold=25, steps=(verified,))
    assert step[0,0]==2 and step[1,0]==4

def test_lifted_order():
    "Proven ids by what they have in common, then the others as they were, the unknown among them"
    p,s = np.array([[.9,.2,.1,.3]]),certainty(np.array([[0,30,90,20]]))
    assert with_unknown(lifted(p, s), threshold=.5).tolist()==[[2,1,0,4,3]]
    assert (lifted(p, 0*s)==p.astype(np.float32)).all() and lifted(p, s).dtype==np.float32
    np.testing.assert_allclose(mixed(p, s, .25), .75*p+.25*s, atol=1e-6)

def test_single_pictures_and_the_override():
    "The N=1 rule promotes an id to its best picture, unless that one is proven to be another"
    steps = partial(singles_first, threshold=.5),partial(verified, threshold=1)
    t,rule = SimpleNamespace(heads=[(None,None,np.array([5,3,1]))]),partial(with_unknown, threshold=.05, steps=steps)
    p,none_ = np.array([[.9,.2,.6],[.1,.3,.2]]),np.zeros((2,3))
    assert rule(lifted(p, none_), t)[:,0].tolist()==[2,1]
    proven = rule(lifted(p, np.array([[0,.7,0],[0,0,0]])), t)
    assert proven[0,:3].tolist()==[1,2,0] and proven[1,0]==1

# --- predictions

COMP = SimpleNamespace(name='whale', metric=map5, higher=True)

@pytest.fixture
def preds(table):
    "Of two folds, by a model that knows a little"
    rows = np.array([0,1,3,4,6,7,9,10,12,13,18,19])
    p = (np.random.default_rng(1).random((12,6))*.7+.1*np.eye(7)[table.y[rows],:6]).astype(np.float32)
    return Predictions(p, list(table.train.id[rows]), table, COMP, with_unknown, tune_map5, rows, np.arange(12)%2)

def test_with_keypoints_out_of_fold(preds, monkeypatch):
    "Nobody is compared with a picture held out together with it"
    seen = []
    def common(queries, gallery, y, n, pairs):
        rows = [np.asarray(o.items.rows) for o in (queries,gallery)]
        seen.append(rows)
        assert (preds.table.y[rows[1]]==y).all() and (y<n).all()
        return np.zeros((len(queries),n), np.float32)
    monkeypatch.setattr(verify, 'common_scores', common)
    same = with_keypoints(preds)
    assert (same.p==preds.p).all() and same.ids==preds.ids and (same.rows==preds.rows).all()
    assert [o[0].tolist() for o in seen]==[preds.rows[::2].tolist(),preds.rows[1::2].tolist()]
    for q,g in seen: assert not set(q)&set(g) and set(q)|set(g)>=set(range(18))

def test_with_keypoints_gains(preds):
    better = with_keypoints(preds, k=6)
    assert better.score()>preds.score()+.2
    assert (better.p[10:]==preds.p[10:]).all() and ((better.p[:10]>1).sum(1)==1).all()

def test_only_candidates_can_gain(preds):
    few = with_keypoints(preds, k=1, mix=lambda p,s: s)
    top = preds.p.argmax(1)
    assert set(np.argwhere(few.p>0)[:,1].tolist())<=set(top.tolist()) and ((few.p>0).sum(1)<=1).all()

def test_of_the_test_set(table, preds):
    t = Table(table.train, table.train.iloc[[2,19]].reset_index(drop=True), table.y, table.vocab)
    asked = Predictions(preds.p[[0,11]], list(t.test.id), t, COMP, with_unknown, tune_map5, oof=preds)
    res = with_keypoints(asked, k=6)
    assert res.p[0].argmax()==0 and res.p[0].max()>1 and (res.p[1]==preds.p[11]).all()
    assert res.values==with_keypoints(preds, k=6).values
    stranger = Predictions(preds.p[:1], ['x.png'], t, COMP, with_unknown)
    with pytest.raises(ValueError, match='1 of 1 predictions are of no test picture of the table, the first of x.png'): with_keypoints(stranger)

def test_parts(preds):
    s = certainty(np.random.default_rng(0).integers(0, 40, preds.p.shape))
    kw = dict(ids=preds.ids, table=preds.table, competition=COMP, rule=with_unknown, tune=tune_map5, rows=preds.rows, folds=preds.folds)
    points,other = Predictions(s, **kw),Predictions(preds.p[:,::-1].copy(), **kw)
    res = keypoints_last([preds,points])
    assert (res.p==lifted(preds.p, s)).all() and (res.rows==preds.rows).all()
    np.testing.assert_allclose(keypoints_last([preds,other,points], mix=partial(mixed, share=.2)).p, .4*preds.p+.4*other.p+.2*s, atol=1e-6)
