"The second level: candidates, their features, folds of whole pictures, and a gain that is not a leak"
import sys
from functools import partial
from types import SimpleNamespace
import cv2, numpy as np, pandas as pd, pytest
from recipes.data.stats import STATS, colourfulness, one_picture, picture_stats
from recipes.data.table import Table
from recipes.infer.blending import blend
from recipes.infer.candidate_rows import back, candidates, feature_names, features, truth_of
from recipes.infer.compare import gain_over
from recipes.infer.decide import binarise
from recipes.infer.predictions import Predictions
from recipes.infer.search import best_threshold
from recipes.infer.second import cross_fit, image_folds, lightgbm_trees, second_level, sklearn_trees
from recipes.metrics import f2
from scipy.sparse import csr_matrix

def setting(n=900, c=30, folds=3, seed=0, n_test=200):
    "A table, two models that are good at every other class and too sure in dark pictures, and their test predictions"
    rng = np.random.default_rng(seed)
    y,dark = rng.random((n+n_test,c))<.5/np.arange(2, c+2)**.7,rng.random(n+n_test)<.5
    def model(good):
        p = rng.beta(1, 9, y.shape)+np.where(np.isin(np.arange(c)%2, good), .6, .2)*y*rng.random(y.shape)
        return (p*np.where(dark, 1.8, 1)[:,None]).clip(0, 1).astype(np.float32)
    ids = np.array([f'{i:05}' for i in range(n+n_test)])
    train,test = (pd.DataFrame(dict(id=ids[s], dark=dark[s])) for s in (slice(n), slice(n, None)))
    table = Table(train, test, csr_matrix(y[:n].astype(np.float32)), [str(o) for o in range(c)])
    kw = dict(table=table, competition=SimpleNamespace(name='toy', metric=f2, higher=True), rule=partial(binarise, min_labels=1), tune=best_threshold)
    ps = [model(o) for o in (0,1)]
    oof = [Predictions(p[:n], list(ids[:n]), rows=np.arange(n), folds=np.arange(n)%folds, **kw) for p in ps]
    return table,oof,[Predictions(p[n:], list(ids[n:]), oof=o, **kw) for p,o in zip(ps, oof)],y[n:]

def darkness(frame): return frame[['dark']].to_numpy(np.float32)
quick = partial(sklearn_trees, rounds=25)

class Spy:
    "Remembers the pictures that it was fitted on and asked about"
    fits,asks = [],[]
    def fit(self, x, t):
        Spy.fits.append((set(x[:,-1].tolist()), len(x), t.sum()))
        return self
    def predict_proba(self, x):
        Spy.asks.append((set(x[:,-1].tolist()), len(x)))
        return np.stack([1-x[:,0], x[:,0]], 1)

@pytest.fixture
def spy():
    Spy.fits,Spy.asks = [],[]
    return Spy

@pytest.mark.parametrize('folds', [1, 3])
def test_folds_are_of_pictures(spy, folds):
    "No picture has candidates both in training and in what is scored; rows are n x k"
    table,oof,_,_ = setting(folds=folds)
    def number(frame): return frame.id.astype(int).to_numpy(np.float32)[:,None]
    got = second_level(oof, table, k=10, make=spy, pictures=number)
    n = 5 if folds==1 else 3
    assert len(spy.fits)==len(spy.asks)==n
    for (a,rows,_),(b,asked) in zip(spy.fits, spy.asks): assert not a&b and len(a|b)==900 and rows==10*len(a) and asked==10*len(b)
    assert set().union(*(b for b,_ in spy.asks))==set(map(float, range(900)))
    assert len(np.unique(got.folds))==n and got.rows.tolist()==list(range(900))
    if folds>1: np.testing.assert_array_equal(got.folds, oof[0].folds)
    np.testing.assert_allclose(got.p.max(1), np.take_along_axis(oof[0].p, candidates((oof[0].p+oof[1].p)/2, 10), 1).max(1), rtol=1e-6)

def test_gain_is_honest():
    "Trees that know the picture beat the best blend on rows they have not seen; on labels of chance they gain nothing"
    table,oof,_,_ = setting(1500)
    second = second_level(oof, table, k=12, make=partial(sklearn_trees, rounds=40), pictures=darkness)
    gain,low,_,n = gain_over(second, blend(oof, 'find'), 200)
    assert low>0 and gain>.01 and n==1500
    rng = np.random.default_rng(1)
    table.y = table.y[rng.permutation(1500)]
    chance = second_level(oof, table, k=12, make=quick, pictures=darkness)
    always = np.broadcast_to(np.asarray(table.y.mean(0)), (1500,30)).astype(np.float32)
    best = f2(table.y, binarise(always, **best_threshold(always, table.y)))
    assert chance.score()<best+.01

def test_test_set():
    "What the test set gets was learned from out-of-fold rows, and scores as they do"
    table,oof,test,truth = setting(1500)
    got = second_level(test, table, k=12, make=quick, pictures=darkness)
    assert got.rows is None and len(got)==200 and got.oof.rows is not None
    score,plain = f2(truth, got.decide()),f2(truth, blend(test).decide())
    assert abs(score-got.oof.score())<.05 and score>plain
    bare = [Predictions(o.p, o.ids, o.table, o.competition, o.rule, o.tune) for o in test]
    with pytest.raises(ValueError, match='out-of-fold'): second_level(bare, table)
    far = [Predictions(o.p, [f'x{i}' for i in range(200)], o.table, o.competition, o.rule, o.tune, oof=o.oof) for o in test]
    with pytest.raises(ValueError, match='pictures=None'): second_level(far, table, k=12, make=Spy, pictures=darkness)

def test_rows_in_another_order():
    "Predictions of the same rows in another order are matched by id"
    table,oof,_,_ = setting()
    at = np.random.default_rng(0).permutation(900)
    o = oof[1]
    kw = {k:getattr(o, k) for k in ('table','competition','rule','tune')}
    turned = Predictions(o.p[at], [o.ids[i] for i in at], rows=at, folds=o.folds[at], **kw)
    a,b = (second_level([oof[0],p], table, k=8, make=quick, pictures=darkness) for p in (o,turned))
    np.testing.assert_array_equal(a.p, b.p)

def test_says_what_is_outside(capsys):
    table,oof,_,_ = setting()
    second_level(oof, table, k=5, make=quick, pictures=None)
    mean = (oof[0].p+oof[1].p)/2
    y = table.y.toarray()>0
    inside = np.zeros_like(y)
    np.put_along_axis(inside, np.argsort(-mean, 1, kind='stable')[:,:5], True, 1)
    assert f'{(y&~inside).sum():,} of {y.sum():,} labels are no candidates' in capsys.readouterr().out

def test_candidates_slow():
    p = np.random.default_rng(0).random((50,20)).astype(np.float32)
    y = csr_matrix(np.random.default_rng(1).random((50,20))<.2)
    cand = candidates(p, 6)
    np.testing.assert_array_equal(cand, np.argsort(-p, 1, kind='stable')[:,:6])
    t,out = truth_of(y, cand)
    np.testing.assert_array_equal(t, np.take_along_axis(y.toarray(), cand, 1))
    assert out==y.sum()-t.sum() and candidates(p, 99).shape==(50,20)
    full = back(np.take_along_axis(p, cand, 1), cand, 20)
    assert full.dtype==np.float32 and ((full==p)|(full==0)).all() and ((full>0).sum(1)==6).all()

@pytest.mark.parametrize('m', [1, 2, 3])
def test_features_slow(m, tmp_path):
    rng = np.random.default_rng(m)
    ps,prior,pic = [rng.random((30,9)).astype(np.float32) for _ in range(m)],rng.random(9),rng.random((30,2)).astype(np.float32)
    mean = sum(ps)/m
    cand = candidates(mean, 4)
    out = np.lib.format.open_memmap(tmp_path/'x.npy', 'w+', np.float32, (30,4,len(feature_names(m, ('a','b')))))
    x = features(ps, cand, prior, pic, out)
    assert x is out
    for i in range(30):
        for j in range(4):
            v = [p[i,cand[i,j]] for p in ps]
            want = [*v]
            for a in range(m):
                for b in range(a+1, m): want += [v[a]+v[b], v[a]*v[b], v[a]/v[b]]
            want += [j, mean[i,cand[i,j]]/mean[i].max(), mean[i].max(), mean[i].sum(), prior[cand[i,j]], *pic[i]]
            np.testing.assert_allclose(x[i,j], want, rtol=2e-3, atol=1e-5)

def test_one_sided_fold():
    "Where a fold's candidates hold no label, the first model's word stands"
    x = np.random.default_rng(0).random((20,3,2)).astype(np.float32)
    got = cross_fit(quick, x, np.zeros((20,3), bool), np.arange(20)%2)
    np.testing.assert_array_equal(got, x[...,0])
    assert set(image_folds(np.zeros(40)).tolist())=={0,1,2,3,4}

def test_without_lightgbm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lightgbm', None)
    with pytest.raises(ImportError, match='pip install lightgbm'): lightgbm_trees()

def test_with_lightgbm():
    pytest.importorskip('lightgbm')
    table,oof,_,_ = setting()
    assert second_level(oof, table, k=8, make=partial(lightgbm_trees, rounds=30), pictures=darkness).score()>max(o.score() for o in oof)

# --- statistics of pictures

def test_stats(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i,(h,w) in enumerate([(20,10), (10,20), (1,7)]):
        im = rng.integers(0, 255, (h,w,3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path/f'{i}.png'), im[:,:,::-1])
        paths.append(tmp_path/f'{i}.png')
        s = dict(zip(STATS, one_picture(im).tolist()))
        assert s['max side']==max(h, w) and s['portrait']==(h>w)
        for j,c in enumerate(('red','green','blue')):
            v = im[:,:,j].astype(float)
            want = [v.mean(), np.median(v), v.std(), v.min(), v.max()]
            assert [s[f'{o} {c}'] for o in ('mean','median','std','min','max')]==pytest.approx(want, rel=1e-4)
    got = picture_stats(pd.DataFrame(dict(path=[str(o) for o in paths])))
    assert got.shape==(3,19) and got.dtype==np.float32
    np.testing.assert_array_equal(got[2], one_picture(im))
    for o in paths[:2]: o.unlink()   # not read again while they are as they were
    cv2.imwrite(str(paths[2]), np.zeros((5,5,3), np.uint8))
    with pytest.raises(Exception): picture_stats(pd.DataFrame(dict(path=[str(o) for o in paths])))
    assert picture_stats(pd.DataFrame(dict(path=[str(paths[2])])))[0,0]==0

def test_colourfulness():
    "Hasler and Süsstrunk's formula, term by term"
    im = np.random.default_rng(1).integers(0, 255, (8,8,3)).astype(np.uint8)
    r,g,b = (im[:,:,i].astype(float) for i in range(3))
    rg,yb = r-g,(r+g)/2-b
    want = np.sqrt(rg.var()+yb.var())+.3*np.sqrt(rg.mean()**2+yb.mean()**2)
    assert colourfulness(im)==pytest.approx(want, rel=1e-5)
