"Search, id scores, re-ranking and embeddings against slow loops and scikit-learn"
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.learner import Learner
from sklearn.neighbors import NearestNeighbors
from torch import nn
from callbacks.ema import EMA
from callbacks.precision import Precision
from recipes.data.augment import flip_only, random_resized_crop, squish
from recipes.data.loaders import Items, make_dls
from recipes.data.targets import Identity
from recipes.infer.embed import by_retrieval, embeddings, gallery_of
from recipes.infer.gallery import _layout, id_centres, id_scores, max_by_id, nearest, similarities, unit
from recipes.infer.hardest import hardest_pairs
from recipes.infer.neighbours import by_neighbours, neighbour_blend, tune_blend
from recipes.infer.rerank import expanded, k_reciprocal, neighbour_sets, reranked, reranked_scores
from recipes.infer.tta import as_is, class_scores, hflip
from recipes.losses.multilabel import BCELoss
from recipes.models.heads import ImageModel

@pytest.fixture
def cloud():
    "Queries, gallery, its ids (8 is unknown, 5 has no picture): noisy directions"
    rng = np.random.default_rng(0)
    y = rng.choice([0,1,2,3,4,6,7,8], 90)
    way = rng.normal(size=(9,12))
    return unit(way[rng.integers(9, size=40)]+rng.normal(size=(40,12))),unit(way[y]+rng.normal(size=(90,12))),y

def test_nearest_is_scikit_learns(cloud):
    q,g,_ = cloud
    d,at = NearestNeighbors(n_neighbors=7, metric='cosine', algorithm='brute').fit(g).kneighbors(q)
    s,got = nearest(q, g, 7)
    assert (got==at).all()
    np.testing.assert_allclose(s, 1-d, atol=1e-5)

def test_nearest_of_equals_is_the_first_and_of_few_all():
    g = unit(np.array([[0,1],[1,0],[1,0],[1,0]]))
    s,at = nearest(g[1:2], g, 9)
    assert at.tolist()==[[1,2,3,0]] and s.tolist()==[[1,1,1,0]]

def test_faiss_gives_the_same(cloud):
    pytest.importorskip('faiss')
    for a,b in zip(nearest(*cloud[:2]), nearest(*cloud[:2], use_faiss=True)): np.testing.assert_allclose(a, b, atol=1e-5)

def test_faiss_missing_is_said(cloud, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'faiss', None)
    with pytest.raises(ImportError, match='pip install faiss-cpu'): nearest(*cloud[:2], use_faiss=True)

def test_blocks_cover_everything_and_nan_is_refused(cloud):
    q,g,_ = cloud
    for size in (1,500,2**24): np.testing.assert_allclose(np.concatenate([b for _,b in similarities(q, g, size)]), q@g.T, atol=1e-6)
    bad = g.copy()
    bad[3] = np.nan
    with pytest.raises(ValueError, match='NaN among the embeddings'): nearest(q, bad)

@pytest.mark.parametrize('how', ['max','mean'])
def test_id_scores_against_a_slow_loop(cloud, how):
    q,g,y = cloud
    want = [[getattr(v@g[y==i].T, how)() if (y==i).any() else -1 for i in range(8)] for v in q]
    np.testing.assert_allclose(id_scores(q, g, y, 8, how), want, atol=1e-5)

def slow_centre(vectors):
    "As the third place of the whale competition trimmed it"
    centre = lambda o: np.mean(o, 0)/np.linalg.norm(np.mean(o, 0))
    for _ in range(2):
        if len(vectors)<4: break
        vectors = sorted(vectors, key=lambda o: -(o@centre(vectors)))
        near = [o for o in vectors if o@centre(vectors)>.5]
        vectors = near if len(near)>len(vectors)*3//4 else vectors[:len(vectors)*3//4]
    return centre(vectors)

def test_centres_against_a_slow_loop(cloud):
    q,g,y = cloud
    want = np.stack([slow_centre(g[y==i]) if (y==i).any() else np.zeros(12) for i in range(8)])
    assert np.abs(want-id_centres(g, y, 8, rounds=0)).max()>.05   # there was something to trim
    np.testing.assert_allclose(id_centres(g, y, 8), want, atol=1e-5)
    np.testing.assert_allclose(id_scores(q, g, y, 8, 'centre')[:,:5], q@want[:5].T, atol=1e-5)
    assert (id_scores(q, g, y, 8, 'centre')[:,5]==-1).all()

def test_wrong_way_of_scoring(cloud):
    with pytest.raises(ValueError, match="not 'median'"): id_scores(*cloud, 8, 'median')

def test_an_empty_gallery_knows_nobody(cloud):
    q,g,y = cloud
    for how in ('max','mean','centre'): assert (id_scores(q, g, np.full(90, 8), 8, how)==-1).all()

def test_memory_is_that_of_a_block():
    "The whole matrix would be 320 MB; scores are 8"
    rng = np.random.default_rng(0)
    q,g,y = unit(rng.normal(size=(4000,16))),unit(rng.normal(size=(20000,16))),rng.integers(500, size=20000)
    tracemalloc.start()
    id_scores(q, g, y, 500), nearest(q, g)
    peak = tracemalloc.get_traced_memory()[1]/1e6
    tracemalloc.stop()
    assert peak<220

@pytest.mark.parametrize('k,alpha', [(1,0),(4,0),(5,3)])
def test_expansion_against_a_slow_loop(cloud, k, alpha):
    q,g,_ = cloud
    def slow(v):
        near = np.argsort(-(g@v), kind='stable')[:k]
        return v+sum((g[i]@v)**alpha*g[i] for i in near if g[i]@v>0)
    np.testing.assert_allclose(expanded(q, g, k, alpha), unit(np.stack([slow(o) for o in q])), atol=1e-5)

def slow_sets(v, k1):
    "The expanded k-reciprocal neighbours of Zhong et al. (2017), equations 2 to 4"
    order = np.argsort(-(v@v.T), 1, kind='stable')
    def R(i, k): return {int(j) for j in order[i,:k+1] if i in order[j,:k+1]}
    res = []
    for i in range(len(v)):
        own = R(i, k1)
        res.append(own.union(*(half for j in own if len(half := R(j, round(k1/2)))*2/3 < len(half&own))))
    return res

def slow_rerank(q, g, k1, k2, lam):
    v = np.concatenate([q,g])
    cos,sets = v@v.T,slow_sets(v, k1)
    V = np.zeros_like(cos)
    for i,s in enumerate(sets): V[i,list(s)] = np.exp(cos[i,list(s)]-1)
    V /= V.sum(1, keepdims=True)
    V = np.stack([V[o[:k2]].mean(0) for o in np.argsort(-cos, 1, kind='stable')])
    jac = np.array([[np.minimum(V[i],V[j]).sum()/np.maximum(V[i],V[j]).sum() for j in range(len(q), len(v))] for i in range(len(q))])
    return (1-lam)*jac+lam*q@g.T

@pytest.mark.parametrize('k1,k2,lam', [(6,3,.3),(9,1,0.)])
def test_reranking_against_a_slow_loop(cloud, k1, k2, lam):
    q,g,y = cloud
    v = np.concatenate([q,g])
    assert [set(o.indices.tolist()) for o in k_reciprocal(nearest(v, v, k1+1)[1])]==slow_sets(v, k1)
    want = slow_rerank(q, g, k1, k2, lam)
    np.testing.assert_allclose(np.concatenate([b for _,b in reranked(q, g, k1, k2, lam)]), want, atol=1e-5)
    np.testing.assert_allclose(np.asarray(neighbour_sets(v, k1, k2).sum(1)).ravel(), 1, atol=1e-5)
    ok = y<8
    s = slow_rerank(q, g[ok], k1, k2, lam)
    got = reranked_scores(q, g, y, 8, k1=k1, k2=k2, lam=lam)
    np.testing.assert_allclose(got[:,3], s[:,y[ok]==3].max(1), atol=1e-5)
    assert (got[:,5]==-1).all()

def test_hardest_pairs_against_a_slow_loop(cloud):
    _,g,y = cloud
    pairs = [(float(g[i]@g[j]),i,j) for i in range(90) for j in range(i+1, 90)]
    same,other = [o for o in pairs if y[o[1]]==y[o[2]]<8],[o for o in pairs if y[o[1]]!=y[o[2]]]
    one,two = hardest_pairs(g, y, 8, 3)
    for got,want in (one,min(same)),(two,max(other)): assert (got[0][0],got[1][0])==want[1:]
    assert (np.diff(one[2])>=0).all() and (np.diff(two[2])<=0).all() and len(set(zip(*two[:2])))==3

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, x): return self.conv(x).mean(2).flatten(1)

class Head(nn.Module):
    "Cosines of `twins` times 4 classes"
    def __init__(self, n_in, twins=1):
        super().__init__()
        self.neck,self.weight = nn.Linear(n_in, 8),nn.Parameter(torch.randn(4*twins, 8))
    def embed(self, v): return nn.functional.normalize(self.neck(v), dim=1)
    def forward(self, v): return self.embed(v)@nn.functional.normalize(self.weight, dim=1).T

def make(twins=False, cbs=(), y=None):
    "A learner for 30 pictures of 4 ids, the last ten held out; id 4 is unknown"
    torch.manual_seed(0)
    pics,y = np.random.default_rng(0).integers(256, size=(30,16,16,3)).astype(np.uint8),np.arange(30)%5 if y is None else y
    tfms = random_resized_crop,flip_only
    parts = Items(pics, list(range(30)), range(20), tfms, (16,16), True),Items(pics, list(range(30)), range(20, 30), (squish,flip_only), (16,16))
    target,table = Identity('new', twins=twins),SimpleNamespace(vocab=list('abcd'), names=list('abcd'), test=SimpleNamespace(id=[]))
    dls = make_dls(parts, 4, (y,y), device='cpu', target=target, stats=((.5,)*3,(.25,)*3), names=table.names)
    learn = Learner(dls, ImageModel(Body(), nn.Identity(), Head(42, 1+twins)), loss_func=BCELoss(), cbs=list(cbs))
    learn.target,learn.table = target,table
    learn.read_out = lambda raw,mirrored=False: target.read_out(raw, None, mirrored)
    return learn

def by_hand(learn, items, model=None):
    "Embeddings in one batch"
    model = (model or learn.model).eval()
    with torch.no_grad(): return model.head.embed(model.body(learn.dls.valid.new(items, bs=64, y=None, shuffle=False).one_batch()[0])).numpy()

def test_embeddings_are_the_heads():
    learn = make()
    items = learn.dls.valid.dataset
    v = embeddings(learn, learn.dls.valid, (as_is,hflip))
    want = np.concatenate([by_hand(learn, items),by_hand(learn, hflip(items))], 1)/2**.5
    np.testing.assert_allclose(v, want, atol=1e-5)
    np.testing.assert_allclose((v*v).sum(1), 1, atol=1e-5)

def test_scores_of_the_same_pass():
    learn = make(twins=True)
    p = np.zeros((10,4), np.float32)
    embeddings(learn, learn.dls.valid, (as_is,hflip), scores=p)
    np.testing.assert_allclose(p, class_scores(learn, learn.dls.valid, (as_is,hflip)), atol=1e-6)

def test_streamed_to_a_file(tmp_path):
    learn = make()
    v = embeddings(learn, learn.dls.valid, out=tmp_path/'v.npy')
    assert isinstance(v, np.memmap) and [o.name for o in tmp_path.iterdir()]==['v.npy']
    np.testing.assert_allclose(v, embeddings(learn, learn.dls.valid), atol=1e-6)

def test_averaged_weights_are_used():
    learn = make(cbs=[EMA(.9)])
    learn.loss_func = lambda p,y: (p*torch.randn_like(p)).mean()
    learn.fit(2, lr=.05)
    avg = next(o for o in learn.cbs if isinstance(o, EMA)).avg.module
    v = embeddings(learn, learn.dls.valid)
    np.testing.assert_allclose(v, by_hand(learn, learn.dls.valid.dataset, avg), atol=1e-5)
    assert np.abs(v-by_hand(learn, learn.dls.valid.dataset)).max()>1e-3

def test_16_bits_are_made_unit_vectors_in_32():
    learn = make(cbs=[Precision('bf16')])
    v = embeddings(learn, learn.dls.valid)
    assert v.dtype==np.float32
    np.testing.assert_allclose((v*v).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(v, by_hand(learn, learn.dls.valid.dataset), atol=.05)

def test_an_interrupt_leaves_nothing_behind(tmp_path):
    learn = make()
    @contextmanager
    def stopped():
        hook = learn.model.head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        try: yield
        finally: hook.remove()
    with stopped(), pytest.raises(KeyboardInterrupt): embeddings(learn, learn.dls.valid, out=tmp_path/'v.npy')
    assert not learn.model.head._forward_pre_hooks and not list(tmp_path.iterdir())
    assert embeddings(learn, learn.dls.valid).shape==(10,8)

def test_a_head_without_embeddings_gives_its_input():
    learn = make()
    learn.model.head = nn.Linear(42, 4)
    v = embeddings(learn, learn.dls.valid)
    assert v.shape==(10,42)
    np.testing.assert_allclose((v*v).sum(1), 1, atol=1e-5)

@pytest.mark.parametrize('twins,views', [(False,(as_is,)),(True,(as_is,hflip))])
def test_retrieval_by_hand(twins, views):
    learn = make(twins)
    known = [i for i in range(20) if i%5<4]
    plain = learn.dls.train.dataset.but(rows=known, train=False)
    sims = [by_hand(learn, o(learn.dls.valid.dataset))@by_hand(learn, o(plain)).T for o in views]
    want = np.stack([np.mean(sims, 0)[:,np.array(known)%5==i].max(1) for i in range(4)], 1)
    np.testing.assert_allclose(by_retrieval(learn, learn.dls.valid, views), want, atol=1e-5)
    out = np.ones((10,4), np.float32)
    by_retrieval(learn, learn.dls.valid, views, out, .5)
    np.testing.assert_allclose(out, 1+.5*want, atol=1e-5)

def test_other_scores_and_the_blend():
    learn = make()
    dl = learn.dls.valid
    q,(pictures,y) = embeddings(learn, dl),gallery_of(learn, dl)
    g = embeddings(learn, pictures)
    np.testing.assert_allclose(by_retrieval(learn, dl, score='centre'), id_scores(q, g, y, 4, 'centre'), atol=1e-6)
    np.testing.assert_allclose(by_retrieval(learn, dl, score=reranked_scores, expand=2), reranked_scores(expanded(q, g, 2), g, y, 4), atol=1e-6)
    want = neighbour_blend(id_scores(q, g, y, 4), class_scores(learn, dl), .3, 2.)
    np.testing.assert_allclose(by_neighbours(learn, dl, share=.3, temperature=2.), want, atol=1e-5)

def test_a_resized_pass_resizes_the_gallery():
    learn = make()
    learn.dls.valid.resize((24,24))
    assert gallery_of(learn, learn.dls.valid)[0].one_batch()[0].shape[-2:]==(24,24)
    assert learn.dls.train.dataset.size==(16,16) and learn.dls.train.dataset.train

def test_nobody_known_in_training():
    learn = make(y=np.full(30, 4))
    with pytest.raises(ValueError, match='no picture of a known id among 20'): by_retrieval(learn, learn.dls.valid)

def test_blend_found_is_the_best_of_all():
    rng = np.random.default_rng(0)
    y = rng.integers(9, size=80)
    p,cos = rng.dirichlet(np.ones(8), 80)+np.eye(9)[y][:,:8],np.tanh(rng.normal(size=(80,8))+np.eye(9)[y][:,:8])
    p /= p.sum(1, keepdims=True)
    grid = dict(shares=(0.,.2,1.), temperatures=(.5,2.))
    best = tune_blend(cos, p, y, **grid)
    each = [tune_blend(cos, p, y, shares=(s,), temperatures=(t,))['score'] for s in grid['shares'] for t in grid['temperatures']]
    assert best['score']==max(each)>each[0]

def test_max_by_id_with_every_count():
    "Ids with none to fourteen pictures, and the unknown among them, laid out or not"
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(16), [*range(15),5]))   # the last is no id
    b = np.random.default_rng(1).standard_normal((70, len(y))).astype(np.float32)
    want = np.stack([b[:,y==i].max(1) if (y==i).any() else np.full(70, -1) for i in range(15)], 1)
    np.testing.assert_array_equal(max_by_id([(slice(0, 70),b)], y, np.empty((70,15), np.float32)), want)
    order = _layout(y, 15)[0]
    assert (_layout(y[order], 15)[0]==np.arange(len(order))).all()
    np.testing.assert_array_equal(max_by_id([(slice(0, 70),b[:,order])], y[order], np.empty((70,15), np.float32)), want)
