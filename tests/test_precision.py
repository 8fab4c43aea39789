"Precision against a bare PyTorch loop, under interrupts, and out of the way where it should be"
import pickle, pytest, torch, torch.nn.functional as F
from copy import deepcopy
from functools import partial
from callbacks.core import AroundForward, unwrap_forward, wrap_forward
from callbacks.precision import Precision, _Probe, autocast_call, autocast_dtype, model_channels_last, unscale
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, OptimWrapper
from torch import nn

def flat_loss(pred, y): return F.cross_entropy(pred, y)

def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))

def learner(*cbs, model=None, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    y = (x[:,0].mean((1,2))>0).long()
    items = list(zip(x, y))
    dls = DataLoaders.from_dsets(items[:48], items[48:], bs=16, device=torch.device('cpu'), num_workers=0)
    dls.train.rng.seed(0)
    kwargs = dict(opt_func=partial(SGD, mom=.9), lr=.05) | kwargs
    return Learner(dls, model or net(), flat_loss, cbs=cbs, **kwargs)

def quiet(learn, n=2):
    with learn.no_logging(): learn.fit(n, wd=0.)
    return learn

def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

class Spy(Callback):
    "What the model, the loss and the metrics see"
    order = 5
    def __init__(self): self.seen = []
    def before_fit(self): self.learn.model[0].register_forward_hook(lambda m,i,o: self.seen.append(o.dtype))
    def after_pred(self): assert self.pred.dtype==torch.float32 and not torch.is_autocast_enabled('cpu')
    def after_loss(self): assert self.learn.loss.dtype==torch.float32

class Interrupt(Callback):
    "Ctrl-C at one event: of the second batch of training, the first of validation"
    def __init__(self, event, training=True):
        setattr(self, event, self.hit)
        self.when = training
    def hit(self):
        if self.training==self.when and self.iter==self.when: raise KeyboardInterrupt

def interrupting(m, *args):
    if m.on: raise KeyboardInterrupt

@pytest.mark.parametrize('dtype', ['bf16','fp16'])
def test_every_forward_is_low_and_every_loss_full(dtype):
    learn = quiet(learner(Precision(dtype), Spy()))
    learn.validate()
    preds,_ = learn.get_preds()
    assert set(learn.spy.seen)=={getattr(torch, dict(bf16='bfloat16', fp16='float16')[dtype])}
    assert preds.dtype==torch.float32
    assert 'forward' not in vars(learn.model)
    assert all(p.dtype==torch.float32 for p in learn.model.parameters())

def test_fp32_changes_nothing():
    plain,ours = quiet(learner()),quiet(learner(Precision('fp32', channels_last=False)))
    assert same(plain.model.state_dict(), ours.model.state_dict())
    assert torch.equal(plain.get_preds()[0], ours.get_preds()[0])
    assert ours.model[0].weight.is_contiguous()

def batches(learn):
    with learn.no_logging(): return [list(learn.dls.train) for _ in range(2)]

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('wrapped', [True, False])
def test_against_a_bare_loop(dtype, wrapped):
    name = {torch.bfloat16:'bf16', torch.float16:'fp16'}[dtype]
    opt = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9) if wrapped else partial(SGD, mom=.9)
    learn = quiet(learner(Precision(name, channels_last=False), GradientClip(.1), opt_func=opt, wd_bn_bias=True))
    m = net()
    sgd = torch.optim.SGD(m.parameters(), lr=.05, momentum=.9)
    scaler = torch.amp.GradScaler('cpu', enabled=name=='fp16')
    for epoch in batches(learner()):
        for x,y in epoch:
            m.train()
            with torch.autocast('cpu', dtype=dtype): pred = m(x)
            scaler.scale(F.cross_entropy(pred.float(), y)).backward()
            scaler.unscale_(sgd)
            nn.utils.clip_grad_norm_(m.parameters(), .1)
            scaler.step(sgd)
            scaler.update()
            sgd.zero_grad()
    for k,v in m.state_dict().items(): torch.testing.assert_close(learn.model.state_dict()[k], v, rtol=1e-4, atol=1e-6)

def test_overflow_skips_the_step_and_halves_the_scale():
    class Huge(Callback):
        order = 11
        def before_fit(self):
            self.precision.scaler = torch.amp.GradScaler('cpu', init_scale=2.**40, growth_interval=2000)
            self.steps,self.trail = [],[]
        def before_batch(self): self.before = deepcopy(dict(self.learn.model.named_parameters()))
        def after_cancel_step(self): self.steps.append(False)
        def before_step(self): self.steps.append(True)
        def after_batch(self):
            if not self.training: return
            assert same(self.before, dict(self.learn.model.named_parameters()))!=self.steps[-1]
            self.trail.append(self.precision.state_dict()['scale'])
    learn = quiet(learner(Precision('fp16'), Huge()), 12)
    steps,scales = learn.huge.steps,[2.**40]+learn.huge.trail
    assert len(steps)==36 and steps.count(False)>5 and steps.count(True)>5
    for ok,old,new in zip(steps, scales, scales[1:]): assert new==(old if ok else old/2)

def test_gradient_accumulation_is_the_big_batch():
    "Without BatchNorm 16+16+16 pictures accumulated are one batch of 48"
    def bare():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    low = quiet(learner(Precision('fp16'), GradientAccumulation(48), model=bare()), 4)
    full = quiet(learner(GradientAccumulation(48), model=bare()), 4)
    for k,v in full.model.state_dict().items(): torch.testing.assert_close(low.model.state_dict()[k], v, rtol=.02, atol=2e-3)
    assert low.precision.scaler.state_dict()['_growth_tracker']==4   # one update a step, not a batch

forward_events = ['before_batch','after_pred','after_loss','after_batch']
step_events = ['before_backward','after_backward','before_step','after_step']

@pytest.mark.parametrize('event,training', [(o,True) for o in forward_events+step_events]+[(o,False) for o in forward_events])
def test_interrupt_leaves_nothing_on(event, training):
    learn = learner(Precision('fp16'), Interrupt(event, training))
    with pytest.raises(KeyboardInterrupt): quiet(learn)
    assert not torch.is_autocast_enabled('cpu')
    pickle.loads(pickle.dumps(learn.model))(torch.randn(2, 3, 8, 8))
    assert 'forward' not in vars(deepcopy(learn.model)) or deepcopy(learn.model).forward.__func__ is nn.Sequential.forward
    learn.remove_cb(learn.interrupt)
    quiet(learn, 1)
    assert 'forward' not in vars(learn.model)

def test_interrupt_inside_the_forward():
    learn = learner(Precision('bf16'))
    learn.model[2].on = True
    h = learn.model[2].register_forward_hook(interrupting)
    with pytest.raises(KeyboardInterrupt): quiet(learn)
    assert not torch.is_autocast_enabled('cpu')
    h.remove()
    learn.remove_cb(learn.precision)   # what was left behind does not act any more
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(learn.model(x), type(learn.model).forward(learn.model, x))

def test_scaler_resumes():
    whole = learner(Precision('fp16'))
    quiet(whole, 1)
    saved = whole.precision.state_dict()
    class Resume(Callback):
        order = 11
        def before_fit(self): self.precision.load_state_dict({**saved, 'scale':2048., '_growth_tracker':7})
    other = quiet(learner(Precision('fp16'), Resume()), 1)
    now = other.precision.state_dict()
    assert (now['scale'], now['_growth_tracker'])==(2048., 10)
    assert all(type(v) in (int,float) for v in now.values())
    assert Precision('fp32').state_dict()=={}

def test_nested_outputs_come_out_full():
    def f(x): return dict(a=(x.half(), [x.bfloat16()]), n=3, i=x.long())
    res = autocast_call(f, torch.bfloat16, 'cpu', torch.ones(2))
    assert (res['a'][0].dtype, res['a'][1][0].dtype, res['n'], res['i'].dtype)==(torch.float32, torch.float32, 3, torch.int64)

def test_channels_last_keeps_parameters():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(4, 4, 1), nn.BatchNorm2d(4))
    ids,before = [id(p) for p in m.parameters()],deepcopy(m.state_dict())
    model_channels_last(m)
    assert ids==[id(p) for p in m.parameters()] and same(before, m.state_dict())
    assert m[0].weight.is_contiguous(memory_format=torch.channels_last)

def test_model_and_input_are_channels_last_in_use():
    seen = []
    learn = learner(Precision('fp32'))
    learn.model[0].register_forward_hook(lambda m,i,o: seen.append(i[0].is_contiguous(memory_format=torch.channels_last)))
    quiet(learn, 1)
    assert seen and all(seen)
    assert learn.model[0].weight.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('caps,want', [({}, torch.float32), ({'avx512_f':True}, torch.float32),
    ({'avx512_bf16':True}, torch.bfloat16), ({'amx_bf16':True}, torch.bfloat16)])
def test_auto_on_cpu_never_emulates(monkeypatch, caps, want):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: caps, raising=False)
    assert autocast_dtype('auto', 'cpu')==want

@pytest.mark.parametrize('has,want', [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_cuda(monkeypatch, has, want):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: has or including_emulation)
    assert autocast_dtype('auto', torch.device('cuda', 1))==want

def test_unscale_takes_both_kinds_of_optimizer():
    p = nn.Parameter(torch.ones(2))
    for opt in (SGD([p], lr=1.), OptimWrapper([p], opt=torch.optim.SGD, lr=1.)):
        scaler = torch.amp.GradScaler('cpu', init_scale=8.)
        p.grad = None
        scaler.scale(p.sum()).backward()
        assert unscale(scaler, opt) and p.grad.tolist()==[1.,1.]
        assert not _Probe(opt).stepped

class Add(AroundForward):
    def __init__(self, n=1): self.n,self.learn = n,'any'
    def around(self, forward, *args, **kwargs): return forward(*args, **kwargs)+self.n
class Add2(Add): pass

@pytest.mark.parametrize('order', [(0,1), (1,0)])
def test_wrappers_are_independent(order):
    m,x,cbs = nn.Linear(2, 1),torch.ones(1, 2),[Add(1), Add2(10)]
    raw = m(x)
    for cb in cbs*2: wrap_forward(m, cb)   # twice is once
    assert torch.equal(deepcopy(m)(x), raw)
    a,b = (cbs[i] for i in order)
    unwrap_forward(m, a)
    torch.testing.assert_close(m(x), raw+b.n)
    wrap_forward(m, type(b)(100))   # the next of its kind replaces it
    torch.testing.assert_close(m(x), raw+100)
    unwrap_forward(m, b)
    assert 'forward' not in vars(m) and torch.equal(m(x), raw)

def test_wraps_a_compiled_model():
    m = torch.compile(net().eval(), backend='eager')
    x,cb = torch.randn(2, 3, 8, 8),Add(1)
    raw = m(x)
    wrap_forward(m, cb)
    torch.testing.assert_close(m(x), raw+1)
    unwrap_forward(m, cb)
    torch.testing.assert_close(m(x), raw)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', ['auto','fp16','bf16'])
def test_on_a_gpu(dtype):
    learn = learner(Precision(dtype), Spy())
    learn.dls.to(torch.device('cuda'))
    quiet(learn, 2)
    assert torch.float32 not in learn.spy.seen
    assert learn.get_preds()[0].dtype==torch.float32
    assert (learn.precision.scaler is not None)==(learn.spy.seen[0]==torch.float16)
    assert all(p.isfinite().all() for p in learn.model.parameters())
