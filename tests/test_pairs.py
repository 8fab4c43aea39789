"Pairs: symmetric to the bit, never of one id where they should be of two, each picture four times, the same after a kill"
import pickle
from functools import partial
from types import SimpleNamespace
import numpy as np, pytest, torch
from callbacks.checkpoint import ResumableLearner, fit_state
from callbacks.pairs import FlipPairs
from callbacks.precision import Precision
from fastai.callback.core import Callback
from recipes.data.augment import light, squish
from recipes.data.clusters import cluster_batches
from recipes.data.loaders import Items, make_dls
from recipes.data.noise import kernel2_noise, short_noise
from recipes.data.pairs import alternated, check_epoch, epoch_others, other_pairs, pairable, round_others, same_pairs
from recipes.data.targets import Identity
from recipes.infer.conquer import Conquer
from recipes.infer.embed import by_retrieval
from recipes.infer.gallery import max_by_id
from recipes.infer.mining import Gallery, Pairs
from recipes.infer.pairs import by_pairs, pair_features, pair_scores
from recipes.infer.tta import as_is, class_scores, hflip
from recipes.losses.metric import MarginLoss, TripletLoss
from recipes.losses.pairs import GalleryLoss, PairLoss, score_loss
from recipes.metrics import EpochMetric
from recipes.models.gallery import MetricHead, PairHead, bare, per_id
from recipes.models.heads import build
from recipes.models.pooling import GlobalMax
from recipes.models.siamese import Branch, PairScorer, Standardised, kernel2
from recipes.ranking import map5_best

# --- the scorer

def test_symmetric_to_the_bit():
    torch.manual_seed(0)
    scorer,a,b = PairScorer(512),torch.randn(64,512)*100,torch.randn(64,512)
    assert sum(o.numel() for o in scorer.parameters())==706
    assert torch.equal(scorer(a, b), scorer(b, a))
    with torch.autocast('cpu', torch.bfloat16):
        one = scorer(a.bfloat16(), b.bfloat16())
        assert one.dtype==torch.float32 and torch.equal(one, scorer(b.bfloat16(), a.bfloat16()))

@torch.no_grad()
def slow_scorer(scorer, a, b):
    "One number of the vectors after the other, from the weights"
    (w1,c1),(w2,c2),(w3,c3) = ((o.weight,o.bias) for o in (scorer.each[0],scorer.each[2],scorer.out))
    total = c3[0]
    for k in range(len(a)):
        x = torch.stack([a[k]*b[k],a[k]+b[k],(a[k]-b[k]).abs(),(a[k]-b[k])**2])
        total = total+w3[0,k]*((w2@(w1@x+c1).relu())+c2)[0]
    return float(total)

@pytest.mark.parametrize('size', [1, 700, 3000, None])
def test_grid_is_the_loop(size):
    torch.manual_seed(1)
    scorer,a,b = PairScorer(6),torch.randn(5,6),torch.randn(9,6)
    want = torch.tensor([[slow_scorer(scorer, x, y) for y in b] for x in a])
    torch.testing.assert_close(scorer.grid(a, b, size), want, rtol=1e-4, atol=1e-5)

def test_grid_holds_a_tile():
    "No tensor is larger than was allowed, however many pairs"
    seen,scorer = [],PairScorer(64)
    scorer.each[0].register_forward_hook(lambda m, i, o: seen.append(o.numel()))
    scorer.grid(torch.randn(40,64), torch.randn(300,64), 2**16)
    assert max(seen)<=2**16 and sum(seen)==40*300*64*32

def test_table_of_pairs(tmp_path):
    torch.manual_seed(2)
    scorer,a,b = PairScorer(6),torch.randn(23,6),torch.randn(9,6)
    want = torch.tensor([[slow_scorer(scorer, x, y) for y in b] for x in a]).sigmoid().numpy()
    for size in 4,9,100: np.testing.assert_allclose(pair_scores(a, b, scorer, size=size), want, rtol=1e-4, atol=1e-5)
    same = pair_scores(a, a, scorer, tmp_path/'same.npy', size=7)
    assert isinstance(same, np.memmap) and np.array_equal(same, same.T)
    np.testing.assert_allclose(same, pair_scores(a, a.clone(), scorer), rtol=1e-5, atol=1e-6)

def test_half_is_worked_out_once():
    seen,scorer,a = [],PairScorer(4),torch.randn(20,4)
    real = scorer.grid
    scorer.grid = lambda x, y: seen.append(len(x)*len(y)) or real(x, y)
    pair_scores(a, a, scorer, size=5)
    assert sum(seen)==25*10

def test_branch():
    "As many weights as the layers of the description have"
    def bn(n): return 2*n
    def conv(a, b, k): return a*b*k*k+b
    n = conv(1, 64, 9)+2*(bn(64)+conv(64, 64, 3))
    for a,w,i in (64,128,64),(128,256,64),(256,384,96),(384,512,128):
        n += bn(a)+conv(a, w, 1)+4*(bn(w)+conv(w, i, 1)+bn(i)+conv(i, i, 3)+bn(i)+conv(i, w, 1))
    assert sum(o.numel() for o in Branch().parameters())==n
    model = build('kernel2', 3, pretrained=False, in_chans=1, pool=GlobalMax, head=PairHead, wrap=Standardised)
    x = torch.rand(4,1,64,128)
    torch.testing.assert_close(model.eval().body(x), model.body(5*x+3), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match='no pretrained'): kernel2(pretrained=True)

# --- pairs

def random_scores(n, seed=0):
    s = np.random.default_rng(seed).random((n,n), dtype=np.float32)
    return (s+s.T)/2

@pytest.mark.parametrize('blocks', [1, 3, 8])
@pytest.mark.parametrize('shares', ['even', 'long tail', 'one rules', 'two'])
def test_an_epoch_keeps_its_promise(blocks, shares):
    "Never one id where it should be two, also where an id fills more than half of all, or of a block"
    y = {'even':np.arange(60)//3, 'long tail':np.repeat(np.arange(10), [30,10,5,4,3,2,2,2,2,2]),
        'one rules':np.repeat(np.arange(6), [70,2,2,2,2,2]), 'two':np.repeat([0,1], [30,30])}[shares]
    s,rng = random_scores(len(y)),np.random.default_rng(1)
    y = rng.permutation(y)
    for pairs in round_others(lambda rows: s[np.ix_(rows, rows)], y, .1, rng, blocks):
        a,b = pairs.T
        assert (y[a]!=y[b]).all() and len(set(a))==len(a) and len(set(b))==len(b)
        order = alternated(same_pairs(y, rng), pairs, rng)
        lost = check_epoch(order, y)
        assert lost==len(y)-len(pairs) and (np.bincount(order, minlength=len(y))==4).all() or lost
        if shares=='even' or (shares=='two' and blocks==1): assert lost==0
        if shares=='one rules': assert lost>=60

def test_pairs_do_not_come_again():
    s,y,rng = random_scores(80),np.arange(80)//2,np.random.default_rng(0)
    rounds = round_others(lambda rows: s[np.ix_(rows, rows)], y, 0, rng)
    sets = [{frozenset(o) for o in p.tolist()} for p in rounds]
    assert all(not a&b for i,a in enumerate(sets) for b in sets[:i]) and len(rounds)==5
    means = [s[p[:,0],p[:,1]].mean() for p in rounds]
    assert means==sorted(means, reverse=True) and means[-1]>s.mean()+.1

def test_one_score_a_round_in_one_block():
    calls,s = [],random_scores(40)
    def score(rows):
        calls.append(len(rows))
        return s[np.ix_(rows, rows)]
    round_others(score, np.arange(40)//2, 0, np.random.default_rng(0))
    assert calls==[40]
    round_others(score, np.arange(40)//2, 0, np.random.default_rng(0), blocks=4, epochs=2)
    assert calls[1:]==[10]*8

def test_blocks_are_drawn_anew():
    parts,s,rng = [],random_scores(48),np.random.default_rng(0)
    def score(rows):
        parts.append(frozenset(rows.tolist()))
        return s[np.ix_(rows, rows)]
    for _ in range(2): epoch_others(score, np.arange(48)//2, 0, rng, blocks=4)
    assert not set(parts[:4])&set(parts[4:]) and set().union(*parts[:4])==set(range(48))

def test_the_assignment_is_the_best():
    "Against all permutations of six pictures"
    from itertools import permutations
    y,s = np.array([0,0,1,1,2,2]),random_scores(6)
    ok = [p for p in permutations(range(6)) if all(y[i]!=y[j] for i,j in enumerate(p))]
    best = max(sum(s[i,j] for i,j in enumerate(p)) for p in ok)
    a,b = other_pairs(s, y, 0, np.random.default_rng(0)).T
    assert s[a,b].sum()==pytest.approx(best, rel=1e-5)

def test_noise_decides_at_a_thousand():
    s,y = random_scores(100),np.arange(100)//2
    mean = {k:np.mean([s[tuple(other_pairs(s, y, k, np.random.default_rng(50+i)).T)].mean() for i in range(4)]) for k in (0,1,1000)}
    assert mean[0]>mean[1]>mean[1000] and abs(mean[1000]-s.mean())<.03

def test_noise_goes_up_the_score_not_down():
    "Kernel 2 adds it before the sign changes: a pair with much noise looks alike, and is taken"
    class Rng:
        def random(self, shape, dtype): return np.eye(shape[0], k=2, dtype=dtype)+np.eye(shape[0], k=-2, dtype=dtype)
    y = np.arange(4)
    assert {tuple(o) for o in other_pairs(np.zeros((4,4)), y, 1., Rng()).tolist()}=={(0,2),(1,3),(2,0),(3,1)}

@pytest.mark.parametrize('y,n', [([0,0,0,0], 1), ([0], 1), ([0,0,1,2,3], 3), ([2,2,2], 2)])
def test_who_cannot_be_paired(y, n):
    with pytest.raises(ValueError, match='pairs need two ids'): pairable(np.array(y), n)

def test_derangement_of_one():
    with pytest.raises(ValueError, match='cannot change places'): same_pairs(np.array([0,0,1]), np.random.default_rng(0))

def test_noise_table():
    assert [round(kernel2_noise(o), 2) for o in range(10, 61, 5)]==[100,63.1,39.81,25.12,15.85,10,6.31,3.98,2.51,1.58,1]
    values = [short_noise(o, 40) for o in range(40)]
    assert values==sorted(values, reverse=True) and values[0]==1000 and values[-1]==.25

# --- a small fit

class Drawn:
    "Pictures of ids: a colour each, and noise"
    def __init__(self, y, side=32): self.y,self.side = y,side
    def __len__(self): return len(self.y)
    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        own = np.random.default_rng(1000+self.y[i]).integers(0, 255, (2,2,3)) if self.y[i]<12 else rng.integers(0, 255, (2,2,3))
        im = np.kron(own, np.ones((self.side//2,self.side//2,1)))
        return np.clip(im+rng.normal(0, 20, im.shape), 0, 255).astype(np.uint8)

class Who:
    "What a table has that matters here"
    vocab,test = [f'w{i}' for i in range(13)],SimpleNamespace(id=[])   # the last has no picture

y_all = np.concatenate([np.repeat(np.arange(12), 4),[10]*2,[13]*10])
held = np.r_[np.arange(0, 48, 4),np.arange(55, 60)]
rest = np.setdiff1d(np.arange(len(y_all)), held)

def learner(head=PairHead, loss=PairLoss, y=y_all, bs=16, **kw):
    torch.manual_seed(3)
    src,ids = Drawn(y),list(map(str, range(len(y))))
    both = [Items(src, ids, o.tolist(), (squish,light), (32,32), train) for o,train in ((rest,True),(held,False))]
    dls = make_dls(both, bs, (y,y), target=Identity('new'), stats=((.5,)*3,(.5,)*3), names=Who.vocab)
    for i,dl in enumerate(dls.loaders): dl.rng.seed(i)
    model = build('test_resnet', 13, pretrained=False, pool=GlobalMax, head=head)
    learn = ResumableLearner(dls, model, loss().prepare([np.bincount(y, minlength=14)[:13]]), **kw)
    learn.table,learn.target = Who,Identity('new')
    learn.read_out = lambda raw, mirrored=False: learn.target.read_out(raw, learn.loss_func, mirrored)
    return learn

def fit(learn, n, cbs, lr=3e-3):
    with learn.no_logging(): learn.fit(n, lr, cbs=cbs)
    return learn

class Seen(Callback):
    "What training batches held"
    order = 1
    def before_fit(self): self.ys = []
    def before_batch(self):
        if self.training: self.ys.append(self.yb[0].clone())

def test_a_fit_on_pairs():
    seen,learn = Seen(),learner(metrics=EpochMetric(partial(map5_best, table=None), 'map5'))
    fit(learn, 5, [Pairs(k=short_noise),Precision('fp32'),seen])
    assert all(len(o)%4==0 or len(o)%2==0 for o in seen.ys)
    a,b = torch.cat(seen.ys).reshape(-1, 2).T
    assert ((a==b)[0::2]).all() and not (a==b)[1::2].any() and (a<13).all()
    per_epoch = torch.cat(seen.ys).reshape(5, -1)
    counts = np.bincount(y_all[rest], minlength=14)
    for o in per_epoch: assert (torch.bincount(o, minlength=13).numpy()==4*counts[:13]).all()
    p = class_scores(learn, learn.dls.valid)
    assert p.shape==(len(held),13) and (p[:,12]==-1).all() and ((p[:,:12]>=0)&(p[:,:12]<=1)).all()
    assert learn.recorder.values[-1][2]>.85   # `new` alone is 5/17
    assert np.isfinite(learn.recorder.values[-1][1])

def test_validation_and_prediction_agree():
    "The head's answers in validation are those of `by_pairs`, and of a slow loop"
    learn = fit(learner(), 1, [Pairs(k=short_noise),Precision('fp32')])
    fresh = by_pairs(learn, learn.dls.valid)
    np.testing.assert_allclose(fresh, class_scores(learn, learn.dls.valid), rtol=1e-4, atol=1e-5)
    q = pair_features(learn, learn.dls.valid)
    known = rest[y_all[rest]<13]
    items = learn.dls.valid.dataset.but(rows=known.tolist())
    g,y = pair_features(learn, learn.dls.valid.new(items, y=None)),y_all[known]
    table = np.array([[1/(1+np.exp(-slow_scorer(learn.model.head.scorer, torch.tensor(a), torch.tensor(b)))) for b in g[:20]] for a in q[:3]])
    want = max_by_id([(slice(0, 3),table)], y[:20], np.empty((3,13)))
    got = per_id(torch.tensor(table), torch.tensor(y[:20]), 13).numpy()
    np.testing.assert_allclose(got, want)
    assert (want[:,:5]<=fresh[:3,:5]+1e-4).all()

def test_views_and_adding():
    learn = fit(learner(), 1, [Pairs(k=short_noise)])
    one,two = (by_pairs(learn, learn.dls.valid, (o,)) for o in (as_is,hflip))
    assert not np.allclose(one, two)
    np.testing.assert_allclose(by_pairs(learn, learn.dls.valid, (as_is,hflip)), (one+two)/2, rtol=1e-4, atol=1e-5)
    out = np.ones_like(one)
    by_pairs(learn, learn.dls.valid, out=out, weight=.5, score='mean')
    np.testing.assert_allclose(out, 1+.5*by_pairs(learn, learn.dls.valid, score='mean'), rtol=1e-4)
    assert by_retrieval(learn, learn.dls.valid).shape==one.shape

def test_without_a_gallery_nothing_is_made_up():
    learn = learner()
    assert np.isnan(class_scores(learn, learn.dls.valid)).all()
    assert np.isfinite(by_pairs(learn, learn.dls.valid)).all()
    with pytest.raises(ValueError, match='NaN|nan'): map5_best(y_all[held], class_scores(learn, learn.dls.valid))

def test_a_gallery_of_one():
    head = PairHead(4, 3).eval()
    head.store(torch.randn(1,4), torch.tensor([1]))
    assert (head(torch.randn(2,4))[:,[0,2]]==-1).all()
    with pytest.raises(ValueError, match='known id'): head.store(torch.randn(1,4), torch.tensor([3]))

def test_pictures_of_one_id():
    learn = learner(y=np.where(y_all<13, 0, 13))
    with pytest.raises(ValueError, match='pairs need two ids'): fit(learn, 1, [Pairs()])

def test_an_id_with_most_pictures_is_said(capsys):
    y = np.where(y_all<8, 0, y_all)
    seen = Seen()
    fit(learner(y=y), 2, [Pairs(k=short_noise),seen])
    assert 'were left out, and as many of one' in capsys.readouterr().out
    a,b = torch.cat(seen.ys).reshape(-1, 2).T
    assert (a==b).float().mean()==.5

def test_odd_batches():
    seen = Seen()
    fit(learner(bs=15), 1, [Pairs(k=short_noise),seen])
    assert {len(o) for o in seen.ys[:-1]}=={14}

# --- a kill

class Keep(Callback):
    "Keeps the state at the end of an epoch, as `Checkpoint` does, read back as it would be"
    order = 90
    def __init__(self, at, file): self.at,self.file = at,file
    def after_epoch(self):
        if self.epoch==self.at: torch.save(fit_state(self.learn), self.file)

heads = dict(pairs=(PairHead, PairLoss, partial(Pairs, k=short_noise, reuse=3)),
    conquer=(partial(MetricHead, dim=16), partial(GalleryLoss, partial(MarginLoss)), partial(Conquer, parts=2, last=.4)),
    gallery=(partial(MetricHead, beta=None), partial(GalleryLoss, TripletLoss), Gallery))

@pytest.mark.parametrize('kind', heads)
@pytest.mark.parametrize('at', [0, 2])
def test_resumed_is_as_if_nothing_happened(kind, at, tmp_path):
    "In the middle of a round, and at its end"
    head,loss,cb = heads[kind]
    whole = fit(learner(head, loss), 5, [cb(),Precision('fp32'),Keep(at, tmp_path/'s')])
    learn = learner(head, loss)
    torch.rand(7), np.random.rand(3)   # another process has drawn other numbers
    learn.state = torch.load(tmp_path/'s', weights_only=True)
    fit(learn, 5, [cb(),Precision('fp32')])
    for (k,a),b in zip(whole.model.state_dict().items(), learn.model.state_dict().values()): assert torch.equal(a, b), k
    assert whole.recorder.values==learn.recorder.values

def test_looking_draws_nothing():
    "Training goes the same way with and without a look at the pictures"
    class Blind(Gallery):
        def before_validate(self): self.model.head.store(torch.zeros(1,16), torch.zeros(1).long())
    a,b = (fit(learner(partial(MetricHead, dim=16, beta=None), partial(GalleryLoss, TripletLoss)), 2, [o()]) for o in (Gallery,Blind))
    assert all(torch.equal(x, y) for x,y in zip(a.model.parameters(), b.model.parameters()))

# --- metric learning

def test_slices_are_trained_by_their_cluster():
    "In a batch of cluster c only slice c of the last layer moves"
    learn = learner(partial(MetricHead, dim=16), GalleryLoss)
    class Check(Callback):
        def after_backward(self):
            g = self.model.head.neck[1].weight.grad.abs().sum(1).view(2, 8).sum(1)>0
            i = int(self.conquer.turns[self.iter])
            self.seen.append((i,g.tolist()))
    check = Check()
    check.seen = []
    fit(learn, 2, [Conquer(parts=2, last=0),check])
    assert all(not g[1-i] for i,g in check.seen) and {i for i,_ in check.seen}=={0,1} and any(g[i] for i,g in check.seen)

def test_metric_heads_learn():
    learn = learner(partial(MetricHead, dim=32), GalleryLoss, metrics=EpochMetric(partial(map5_best, table=None), 'map5'))
    fit(learn, 8, [Conquer(parts=2, last=.5, each=4)], 1e-2)
    assert learn.recorder.values[-1][2]>.8 and np.isfinite(np.array(learn.recorder.values)).all()
    assert by_retrieval(learn, learn.dls.valid).shape==(len(held),13)

def test_cluster_batches_hold_all():
    rng = np.random.default_rng(0)
    labels,y = rng.integers(5, size=333),rng.integers(40, size=333)
    rows,parts = cluster_batches(labels, y, 16, rng)
    assert len(rows)==16*len(parts) and set(rows)==set(range(333))
    assert all(set(labels[o])=={c} for o,c in zip(rows.reshape(-1, 16), parts))

# --- losses and mirrors

def test_score_loss_by_hand():
    p,y = torch.rand(40,7)*2-1,torch.randint(0, 9, (40,))
    for o,i,got in zip(p.clamp(1e-4, 1-1e-4), y, score_loss(p, y)):
        own = float(-o[i].log()) if i<7 else 0.
        rest = [float(v) for j,v in enumerate(o) if j!=i]
        assert float(got)==pytest.approx(own-np.log(1-max(rest)), rel=1e-3, abs=1e-4)

def test_two_unknown_are_no_pair():
    loss = PairLoss().prepare([[1]*5])
    z = torch.randn(3, requires_grad=True)
    loss(z, torch.tensor([5,5,0,0,1,5])).backward()
    assert z.grad[0]==0 and z.grad[1]<0<z.grad[2]
    assert pickle.loads(pickle.dumps(loss)).classes==5

def test_pairs_are_mirrored_together():
    class Look(Callback):
        def __init__(self, order): self.order,self.got = order,[]
        def before_batch(self):
            if self.training: self.got.append((self.x.clone(),self.yb[0]))
    class After(Look): pass
    before,after,learn = Look(1),After(6),learner()
    fit(learn, 1, [Pairs(k=short_noise),FlipPairs(),before,after])
    kept,alone = [],[]
    for (x,y),(z,_) in zip(before.got, after.got):
        for k in range(0, len(y), 2):
            on = [torch.equal(z[i], x[i].flip(-1)) for i in (k,k+1)]
            assert all(on[i-k] or torch.equal(z[i], x[i]) for i in (k,k+1))
            (kept if y[k]==y[k+1] else alone).append(on)
    assert all(a==b for a,b in kept) and {a for a,_ in kept}=={True,False} and any(a!=b for a,b in alone)

def test_bare_is_put_back():
    head = PairHead(4, 3)
    with pytest.raises(KeyboardInterrupt), bare(head): raise KeyboardInterrupt
    assert not head.only
