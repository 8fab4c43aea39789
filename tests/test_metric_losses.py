"Losses between pictures and the first place's, against golden numbers, pytorch-metric-learning and slow loops"
import itertools, math, pickle, sys
import pytest, torch
from pytorch_metric_learning import losses as pml, miners
from torch.nn import functional as F
from recipes.losses.core import known
from recipes.losses.metric import (MarginLoss, TripletLoss, align, batch_hard, distance_weighted, hard_triplets,
    margin_pairs, row_distances, same_different)
from recipes.losses.top import TopBceLoss, lovasz_hinge, one_hot, own_bce, top_bce
from recipes.models.heads import ImageModel, body_head
from recipes.models.margin import EmbedHead, KeepMap
from recipes.models.parts import FirstHead
from torch import nn

def batch(n=24, d=6, ids=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g), dim=1),torch.randint(ids, (n,), generator=g)

# --- triplets

def slow_triplets(d, y, m, classes):
    "One anchor after the other, over all triplets"
    each = []
    for a in range(len(y)):
        ka = int(y[a]) if 0<=y[a]<classes else None
        ps = [float(d[a,p]) for p in range(len(y)) if p==a or (ka is not None and y[p]==y[a])]
        ns = [float(d[a,n]) for n in range(len(y)) if y[n]!=y[a] and (ka is not None or 0<=y[n]<classes)]
        each.append(max(0., max(ps)-min(ns)+m) if ns else 0.)
    return torch.tensor(each)

@pytest.mark.parametrize('classes', [math.inf, 4, 1])
def test_triplets_are_the_loops(classes):
    "From `classes` on all are unknown; a whale alone is its own positive"
    e,y = batch(20)
    d = torch.cdist(e, e)
    torch.testing.assert_close(hard_triplets(d, y, .3, classes), slow_triplets(d, torch.where(y<classes, y, 99), .3, classes))

def test_unknown_with_numbers_of_their_own():
    "Several indices beyond the classes are unknown all the same"
    same,different = same_different(torch.tensor([0,5,6,-1,0]), 5)
    assert same.int().tolist()==[[1,0,0,0,1],[0,1,0,0,0],[0,0,1,0,0],[0,0,0,1,0],[1,0,0,0,1]]
    assert different.int().tolist()==[[0,1,1,1,0],[1,0,0,0,1],[1,0,0,0,1],[1,0,0,0,1],[0,1,1,1,0]]

def test_triplets_are_pmls():
    e,y = batch(32, ids=5)
    hard = miners.BatchHardMiner()(e, y)
    theirs = pml.TripletMarginLoss(.3)   # its mean is over triplets above 0
    each = TripletLoss(.3, reduction='none')(e, y)
    torch.testing.assert_close(each[each>0].mean(), theirs(e, y, hard), rtol=1e-4, atol=1e-5)

def test_distance_zero_is_no_mask():
    "Two negatives at distance 0 are the hardest, not missing"
    e,y = torch.tensor([[1.,0.],[1.,0.],[0.,1.]], requires_grad=True),torch.tensor([0,1,0])
    pos,neg = batch_hard(torch.cdist(e, e), *same_different(y))
    assert neg.tolist()==[0,0,pytest.approx(2**.5)] and pos.tolist()==pytest.approx([2**.5,0,2**.5])
    TripletLoss()(e, y).backward()
    assert e.grad.isfinite().all()

def test_equal_pictures_in_a_large_batch():
    "Above 25 rows torch works out distances another way"
    e = batch(40)[0].repeat(2, 1).requires_grad_()
    rows = batch(80)[0].view(40,2,6).repeat(2, 1, 1).requires_grad_()
    TripletLoss()((e,rows), torch.arange(80)%40).backward()
    assert e.grad.isfinite().all() and rows.grad.isfinite().all()

@pytest.mark.parametrize('y', [[0,0,0], [3,3,3], [0,1,2]])
def test_batches_without_pairs(y):
    "One class, only unknown, or no positives: finite, and so are gradients"
    e = batch(3)[0].requires_grad_()
    loss = TripletLoss().prepare([[1,1,1]])
    out = loss(e, torch.tensor(y))
    out.backward()
    assert out.isfinite() and e.grad.isfinite().all() and (y==[0,1,2] or out==0)

def test_mirror_images_are_negatives():
    loss = TripletLoss(twins=True).prepare([[5]*4])
    assert loss.classes==8
    e = F.normalize(torch.tensor([[1.,0.],[1.,.1],[1.,.2]]), dim=1)
    assert loss(e, torch.tensor([0,4,0]))>.3*2/3            # class 0 and its mirror image 4
    assert loss(e, torch.tensor([0,8,8]))==pytest.approx(float(slow_triplets(torch.cdist(e, e), torch.tensor([0,99,99]), .3, 8).mean()))

# --- rows

def slow_align(cost):
    "The cheapest of all ways"
    h,w = cost.shape
    best = math.inf
    for downs in itertools.combinations(range(h+w-2), h-1):
        i = j = 0
        total = float(cost[0,0])
        for k in range(h+w-2):
            i,j = (i+1,j) if k in downs else (i,j+1)
            total += float(cost[i,j])
        best = min(best, total)
    return best

@pytest.mark.parametrize('h,w', [(1,1), (1,4), (4,1), (3,3), (4,5)])
def test_align_is_the_cheapest_way(h, w):
    cost = torch.rand(2,3,h,w, generator=torch.Generator().manual_seed(h*10+w))
    want = torch.tensor([[slow_align(o) for o in row] for row in cost])
    torch.testing.assert_close(align(cost), want)

def test_row_distances_by_hand():
    a,b = F.normalize(torch.randn(2,4,5), dim=2),F.normalize(torch.randn(3,4,5), dim=2)
    got = row_distances(a, b)
    for i in range(2):
        for j in range(3):
            d = torch.tensor([[(p-q).norm() for q in b[j]] for p in a[i]])
            assert got[i,j]==pytest.approx(slow_align((d.exp()-1)/(d.exp()+1)), rel=1e-4)

def test_row_gradients_are_finite():
    rows = F.normalize(torch.randn(4,8,5), dim=2).requires_grad_()
    TripletLoss(1.)((batch(4)[0],rows), torch.tensor([0,0,1,1])).backward()
    assert rows.grad.isfinite().all() and rows.grad.abs().sum()>0

# --- margin loss

@pytest.mark.parametrize('each', [False, True])
def test_margin_pairs_are_pmls(each):
    e,y = batch(40)
    beta = torch.linspace(.7, 1.3, 6) if each else torch.tensor([1.1])
    triples = torch.randint(40, (3,90), generator=torch.Generator().manual_seed(3)).unbind()
    theirs = pml.MarginLoss(.2, beta=1., learn_beta=True, num_classes=6 if each else None)
    theirs.beta.data = beta.clone()
    ours = beta.clone().requires_grad_()
    want,got = theirs(e, y, triples),margin_pairs(e, ours[y] if each else ours.expand(40), triples).mean()
    want.backward(), got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.grad, theirs.beta.grad)

def test_distance_weighted_leaves_the_unknown_apart():
    e,y = batch(60, ids=8)
    torch.manual_seed(0)
    a,p,n = distance_weighted(e, y, classes=6)
    assert len(a) and (y[a]==y[p]).all() and (y[a]<6).all() and (y[a]!=y[n]).all()
    assert (n[:,None]==torch.where(y>=6)[0]).any()   # they are negatives
    assert (torch.cdist(e, e)[a,n]<1.4).all()

def test_margin_loss_in_a_model():
    "The distance is the head's; a batch without triples costs nothing"
    torch.manual_seed(0)
    model = ImageModel(nn.Identity(), nn.Flatten(), EmbedHead(6, 4, 8, beta=1.2, each=True))
    loss = MarginLoss().prepare([[9,9,9,9]])
    assert not list(loss.parameters()) and any(p is model.head.beta for p in body_head(model)[1])
    x,y = torch.randn(20,6),torch.arange(20)%5   # 4 is unknown
    opt = torch.optim.SGD(model.parameters(), .5)
    first = loss(model(x), y)
    first.backward()
    assert model.head.beta.grad.abs().sum()>0
    for _ in range(20): opt.zero_grad(), loss(model(x), y).backward(), opt.step()
    assert loss(model(x), y)<first and not torch.equal(model.head.beta, torch.full((4,), 1.2))
    nothing = loss(model(x[:4]), torch.tensor([0,1,2,4]))
    nothing.backward()
    assert nothing==0
    assert MarginLoss(reduction='none')(model(x), y).shape==(20,)

def test_without_the_miner_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning.miners', None)
    with pytest.raises(ImportError, match='pip install pytorch-metric-learning'): distance_weighted(*batch())

# --- first place

def test_golden():
    "Of the specification: the top three and the right class, whale and unknown"
    z,y = torch.tensor([[2.,-2.,-3.,0.],[-1.,-1.,-4.,-5.]]),torch.tensor([0,4])
    assert TopBceLoss(k=3, lovasz=0.)(z, y).item()==pytest.approx(.3922074, abs=1e-6)
    assert top_bce(z, one_hot(y, 4), 3)[1].item()==pytest.approx(.2149, abs=1e-4)

def test_top_is_the_loop():
    z,y = torch.randn(7,50)*3,torch.tensor([0,7,49,50,-1,99,3])
    hot = one_hot(y, 50)
    for i in range(7):
        p = z[i].sigmoid()
        order = sorted(range(50), key=lambda k: -abs(float(hot[i,k]-p[k])))[:30]
        want = sum(-math.log(float(p[k] if hot[i,k] else 1-p[k])) for k in order)/30
        assert top_bce(z, hot)[i].item()==pytest.approx(want, rel=1e-3)
    assert hot.sum(1).tolist()==[1,1,1,0,0,0,1]

def slow_lovasz(z, hot):
    "Berman et al.: sorted errors, each times what the Jaccard loss gains by it"
    m = [1-float(s)*(1 if t else -1) for s,t in zip(z, hot)]
    order = sorted(range(len(m)), key=lambda k: -m[k])
    total,out,before,wrong = float(hot.sum()),0.,0.,set()
    for k in order:
        wrong.add(k)
        truth = {j for j in range(len(m)) if hot[j]}
        answer = truth^wrong   # wrong about these
        loss = 1-len(truth&answer)/len(truth|answer) if truth|answer else 0.
        out += max(m[k], 0.)*(loss-before)
        before = loss
    assert total==len(truth)
    return out

@pytest.mark.parametrize('positives', [0, 1, 3])
def test_lovasz_is_the_loop(positives):
    g = torch.Generator().manual_seed(positives)
    z,hot = torch.randn(5,8, generator=g)*2,torch.zeros(5,8)
    for row in hot: row[torch.randperm(8, generator=g)[:positives]] = 1.
    want = torch.tensor([slow_lovasz(a, b) for a,b in zip(z, hot)])
    torch.testing.assert_close(lovasz_hinge(z, hot), want, rtol=1e-4, atol=1e-4)

def test_top_loss_adds_up():
    torch.manual_seed(0)
    head = FirstHead(6, 10, dim=5)
    raw,y = head(torch.randn(6,6,4,8)),torch.tensor([0,0,5,3,10,10])
    z,e,rows = raw
    ok = known(y, 10)
    d,r = torch.cdist(e, e).detach(),row_distances(rows, rows).detach()
    want = (top_bce(z, one_hot(y, 10), 4).mean() + own_bce(z, y)[ok].mean() + .5*lovasz_hinge(z, one_hot(y, 10)).mean()
        + slow_triplets(d, y, .3, 10).mean() + slow_triplets(r, y, .3, 10).mean())
    loss = pickle.loads(pickle.dumps(TopBceLoss(k=4).prepare([[3]*5])))
    torch.testing.assert_close(loss(raw, y), want, rtol=1e-4, atol=1e-4)
    loss(raw, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert loss.outputs(raw) is z and torch.equal(loss.activation(z), z.sigmoid()) and loss.outputs(z) is z
    only_unknown = loss(tuple(o.detach() for o in raw), torch.full((6,), 10))
    assert only_unknown.isfinite()

def test_mixed_targets():
    "Two mixed losses, as `MixUp` takes them; and plain terms are linear in shares"
    z,y = torch.randn(8,12),torch.arange(8)
    soft = .7*one_hot(y, 12)+.3*one_hot(y.flip(0), 12)
    torch.testing.assert_close(own_bce(z, soft), .7*own_bce(z, y)+.3*own_bce(z, y.flip(0)))
    full = TopBceLoss(k=12, lovasz=0., reduction='none')
    torch.testing.assert_close(full(z, soft), .7*full(z, y)+.3*full(z, y.flip(0)), rtol=1e-4, atol=1e-5)

def test_float32_from_bfloat16():
    head = FirstHead(6, 10, dim=5)
    model = ImageModel(nn.Conv2d(3, 6, 1), KeepMap(), head)
    with torch.autocast('cpu', torch.bfloat16): out = TopBceLoss()(model(torch.randn(4,3,4,8)), torch.arange(4))
    assert out.dtype==torch.float32 and out.isfinite()
