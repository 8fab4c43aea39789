"Optimizers: against bare torch step by step, under everything fastai does to an optimizer"
import io
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.schedule import Learner
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from callbacks.optim import SplitOpt, adam, adamw, fusable, radam, scaled_lr, sgd, split_decay

T = torch.optim
PAIRS = [(adam, partial(T.Adam, fused=True)), (adamw, partial(T.AdamW, fused=True))]
PAIRS += [(radam, partial(T.RAdam, decoupled_weight_decay=True)), (sgd, partial(T.SGD, momentum=.9, nesterov=True))]
ids = [f.__name__ for f,_ in PAIRS]

def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))

def groups(m): return [list(m[:2].parameters()), list(m[2:].parameters())]

def backward(m, seed):
    torch.manual_seed(100+seed)
    nn.functional.cross_entropy(m(torch.randn(6, 2, 5, 5)), torch.randint(3, (6,))).backward()

def same(a, b): return all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
def snap(ps): return [p.detach().clone() for p in ps]

def dls(n=24, bs=4):
    torch.manual_seed(3)
    ds = [(torch.randn(2, 5, 5), torch.tensor(i%3)) for i in range(n)]
    return DataLoaders.from_dsets(ds, ds[:6], bs=bs, num_workers=0, device='cpu')

def learner(f=adam, cbs=None, **kwargs):
    return Learner(dls(), net(), loss_func=CrossEntropyLossFlat(), opt_func=f, splitter=groups, cbs=cbs, **kwargs)

@pytest.mark.parametrize('f,ref', PAIRS, ids=ids)
def test_equals_torch(f, ref):
    "Fifteen steps, the rate and the momentum changing as in one-cycle, weights decayed and norms and biases not"
    a,b = net(),net()
    o = f(groups(a), lr=slice(1e-3, 1e-2), wd=.1)
    halves = [h for g in groups(b) for h in split_decay(g)]
    r = ref([dict(params=p, weight_decay=w) for p,w in zip(halves, (.1, 0., .1, 0.))], lr=1e-2)
    for i in range(15):
        lrs,mom = np.array([1e-3, 1e-2])*(1+i)/15,.95-.01*i
        o.set_hypers(lr=lrs, mom=mom)
        for j,pg in enumerate(r.param_groups):
            pg['lr'] = float(lrs[j//2])
            if 'betas' in pg: pg['betas'] = (mom,.999)
            else: pg['momentum'] = mom
        for m,opt in ((a,o), (b,r)):
            backward(m, i)
            opt.step()
            opt.zero_grad()
    assert same(a, b) and not same(a, net())

def test_defaults_are_the_sources():
    ps = lambda: [nn.Parameter(torch.ones(2, 2))]
    h = adam(ps()).hypers[0]
    assert (h['lr'], h['mom'], h['sqr_mom'], h['eps'], h['wd'], h['decoupled_weight_decay']) == (1e-3, .9, .999, 1e-8, 0., False)
    assert adamw(ps()).hypers[0]['wd'] == .01 and radam(ps()).hypers[0]['decoupled_weight_decay']
    h = sgd(ps()).hypers[0]
    assert (h['mom'], h['nesterov'], h['wd']) == (.9, True, 0.)
    assert not sgd(ps(), mom=0.).hypers[0]['nesterov']
    assert adam(ps()).hypers[0]['fused'] and not adam([nn.Parameter(torch.ones(2, device='meta'))]).hypers[0]['fused']

def test_split_decay():
    m = nn.ModuleList([nn.Linear(2, 3), nn.GroupNorm(1, 4), nn.Embedding(5, 2)])
    d,n = split_decay([*m.parameters(), nn.Parameter(torch.tensor(3.))])
    assert [p.ndim for p in d] == [2, 2] and [p.ndim for p in n] == [1, 1, 1, 0]

def test_looks_whole_to_fastai():
    m = net()
    o = adamw(groups(m), lr=1e-3, wd=.05)
    assert [len(g) for g in o.param_lists] == [3, 2] and len(o.hypers) == 2
    assert {id(p) for g in o.param_lists for p in g} == {id(p) for p in m.parameters()}
    o.set_hypers(lr=slice(1e-5, 1e-3), wd=.2)
    assert np.allclose([h['lr'] for h in o.hypers], [1e-5, 1e-3])
    assert [pg['weight_decay'] for pg in o.opt.param_groups] == [.2, 0., .2, 0.]
    o.set_hyper('lr', slice(1e-2))
    assert np.allclose([pg['lr'] for pg in o.opt.param_groups], [1e-3, 1e-3, 1e-2, 1e-2])
    with pytest.raises(AssertionError): o.set_hyper('lr', [1., 2., 3.])

@pytest.mark.parametrize('params', [
    lambda m: m.parameters(), lambda m: [m.parameters()], lambda m: [list(m[0].parameters()), list(m[1].parameters())],
    lambda m: [[], list(m.parameters())]], ids=['flat', 'generator', 'halves empty', 'group empty'])
@pytest.mark.parametrize('f', [f for f,_ in PAIRS], ids=ids)
def test_shapes_of_params(f, params):
    m = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LayerNorm(3))
    before,o = snap(m.parameters()),f(params(m), lr=.1)
    m(torch.randn(4, 3)).pow(3).sum().backward()
    o.step()
    assert all(not torch.equal(p, q) for p,q in zip(before, m.parameters()))
    o.load_state_dict(o.state_dict())

@pytest.mark.parametrize('f', [f for f,_ in PAIRS], ids=ids)
def test_state_dict_is_safe_and_whole(f):
    "Reading it back with `weights_only=True` continues to the same weights"
    a = net()
    o = f(groups(a), lr=slice(1e-3, 1e-2), wd=.1)
    for i in range(3):
        o.set_hypers(lr=np.array([1e-3, 1e-2])*np.float64(1+i), mom=.9)
        backward(a, i)
        o.step()
        o.zero_grad()
    file = io.BytesIO()
    torch.save(dict(model=a.state_dict(), opt=o.state_dict()), file)
    file.seek(0)
    sd,b = torch.load(file, weights_only=True),net(1)
    r = f(groups(b), lr=1.)
    b.load_state_dict(sd['model'])
    r.load_state_dict(sd['opt'])
    assert r.hypers == o.hypers
    for m,opt in ((a,o), (b,r)):
        backward(m, 9)
        opt.step()
    assert same(a, b)

@pytest.mark.parametrize('f', [f for f,_ in PAIRS], ids=ids)
def test_frozen_gets_nothing(f):
    "Neither decay, nor left-over momentum, nor a gradient from before moves a frozen parameter"
    m = net()
    o = f(groups(m), lr=.1, wd=.5)
    for i in range(3):
        backward(m, i)
        o.step()                       # gradients are left where they are
    o.freeze()
    body,head = snap(m[:2].parameters()),snap(m[3].parameters())
    for i in range(3):
        backward(m, i)
        o.step()
    assert all(torch.equal(p, q) for p,q in zip(body, m[:2].parameters()))
    assert all(not torch.equal(p, q) for p,q in zip(head, m[3].parameters()))
    o.unfreeze()
    o.zero_grad()
    backward(m, 7)
    o.step()
    assert all(not torch.equal(p, q) for p,q in zip(body, m[:2].parameters()))

@pytest.mark.parametrize('f', [f for f,_ in PAIRS], ids=ids)
def test_late_first_gradient(f):
    "A parameter that joins later has no state beside neighbours that have"
    a,b = nn.Parameter(torch.ones(2, 2)),nn.Parameter(torch.ones(2, 2))
    o = f([a, b], lr=.1)
    a.grad = torch.ones(2, 2)
    o.step()
    b.grad = torch.ones(2, 2)
    o.step()
    assert (b<1).all() and (a<b).all()

def test_learner_freezes():
    learn = learner(partial(sgd, wd=.1))
    learn.freeze()
    body,stats = snap(learn.model[0].parameters()),learn.model[1].running_mean.clone()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    assert torch.equal(body[0], learn.model[0].weight) and not torch.equal(stats, learn.model[1].running_mean)
    assert learn.model[1].weight.requires_grad      # fastai keeps training the norms of a frozen body
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    assert not torch.equal(body[0], learn.model[0].weight)

def test_learner_wd():
    for kw,fit,want in ((dict(), dict(), .3), (dict(wd=.1), dict(), .1), (dict(wd=.1), dict(wd=.2), .2)):
        learn = learner(partial(adamw, wd=.3), **kw)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, **fit)
        assert [pg['weight_decay'] for pg in learn.opt.opt.param_groups] == [want, 0., want, 0.]

def test_one_cycle_moves_the_momentum():
    for f in (adam, sgd):
        learn = learner(f)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-3)
        mom = learn.recorder.hps['mom']
        assert np.isclose(mom[0], .95) and min(mom)<.86 and type(mom[-1]) is float
        torch.load(_saved(learn.opt.state_dict()), weights_only=True)

def _saved(o):
    file = io.BytesIO()
    torch.save(o, file)
    file.seek(0)
    return file

def _bare(steps, clip=None):
    "The same training, by hand: `steps` is a list of lists of batches whose losses count together"
    m = net()
    o = T.SGD(m.parameters(), lr=.1, momentum=.9, nesterov=True)
    for bs in steps:
        n = sum(len(y) for _,y in bs)
        for x,y in bs: (nn.functional.cross_entropy(m(x), y)*len(y)/n).backward()
        if clip: nn.utils.clip_grad_norm_(m.parameters(), clip)
        o.step()
        o.zero_grad()
    return m

def _close(a, b): return all(torch.allclose(p, q, atol=1e-6) for p,q in zip(a.parameters(), b.parameters()))

def test_clip_and_accumulation():
    for cb,k,clip in ((GradientClip(.1), 1, .1), (GradientAccumulation(8), 2, None)):
        learn = learner(sgd, cbs=cb)
        learn.dls.train.shuffle = False
        bs = list(learn.dls.train)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
        assert _close(learn.model, _bare([bs[i:i+k] for i in range(0, len(bs), k)], clip))

@pytest.mark.parametrize('f', [adam, adamw, sgd], ids=['adam', 'adamw', 'sgd'])
def test_memory_order_does_not_matter(f):
    "A model that goes channels-last between steps, and a gradient ordered otherwise than its parameter"
    a,b = (nn.Conv2d(3, 4, 2, bias=False) for _ in range(2))
    b.load_state_dict(a.state_dict())
    oa,ob = f(a.parameters(), lr=.1),f(b.parameters(), lr=.1)
    for i in range(4):
        if i==1: b.to(memory_format=torch.channels_last)
        if i==3: b.to(memory_format=torch.contiguous_format)
        g = torch.randn(4, 3, 2, 2)
        a.weight.grad,b.weight.grad = g.clone(),g.clone() if i==2 else torch.empty_like(b.weight).copy_(g)
        oa.step()
        ob.step()
    assert torch.allclose(a.weight, b.weight, atol=1e-6)

def test_clear_state_and_copy():
    m = net()
    o = adam(groups(m))
    backward(m, 0)
    o.step()
    assert len(o.state_dict()['state']) == 5
    o.clear_state()
    assert not o.state_dict()['state'] and o.hypers[0]['lr'] == 1e-3
    backward(m, 1)
    o.step()
    assert isinstance(deepcopy(o), SplitOpt)

def test_scaled_lr(): assert scaled_lr(128) == .015 and scaled_lr(256) == .03 and np.isclose(scaled_lr(32, 1e-2, 256), 1.25e-3)

def test_fusable(): assert fusable(net().parameters()) and not fusable(nn.Linear(2, 2, device='meta').parameters())
