"EMA against a slow loop, with everything that decides whether a step was a step"
import pickle, pytest, signal, torch, torch.nn.functional as F
from copy import deepcopy
from callbacks.ema import EMA, call_with, ema_weights
from callbacks.precision import Precision
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.schedule import Learner
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from torch import nn

def flat_loss(pred, y): return F.cross_entropy(pred, y)

def learner(*cbs, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    items = list(zip(x, (x[:,0]>0).long()))
    dls = DataLoaders.from_dsets(items[:48], items[48:], bs=16, device=torch.device('cpu'), num_workers=0)
    dls.train.rng.seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return Learner(dls, model, flat_loss, cbs=cbs, **kwargs)

def fit(learn, n=2):
    with learn.no_logging(): learn.fit(n, 1e-2)
    return learn

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def assert_same(a, b):
    assert a.keys()==b.keys()
    for k,v in a.items(): assert torch.equal(v, b[k]), k

class Trail(Callback):
    "The raw weights after each step the optimizer took"
    order = 30
    def before_fit(self): self.states,self.took = [state(self.learn)],False
    def before_batch(self): self.took = False
    def after_step(self): self.states.append(state(self.learn))

class Skip(Callback):
    "Refuses every third step"
    order = 15
    def before_step(self):
        if self.train_iter%3==2: raise CancelStepException

def decay(t, d, warmup, start):
    t -= start+1
    if t<=0: return 0.
    return min(d, 1-(1+t)**-warmup) if warmup else d

def slow(states, *args):
    avg = dict(states[0])
    for t,s in enumerate(states[1:], 1):
        d = decay(t, *args)
        for k,v in s.items(): avg[k] = d*avg[k] + (1-d)*v if v.is_floating_point() else v
    return avg

@pytest.mark.parametrize('args', [(.9,2/3,0), (.5,0,0), (.9999,.8,3)])
def test_against_a_slow_loop(args):
    learn = fit(learner(EMA(*args), Trail()), 3)
    assert learn.ema.n_steps==9
    got,want = ema_weights(learn),slow(learn.trail.states, *args)
    for k,v in want.items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got['1.running_mean'], learn.model[1].running_mean, atol=1e-4)

def test_training_is_untouched():
    plain,ours = fit(learner(Trail())),fit(learner(EMA(), Trail()))
    for a,b in zip(plain.trail.states, ours.trail.states): assert_same(a, b)
    assert len(plain.trail.states)==len(ours.trail.states)

def test_accumulated_and_skipped_batches_do_not_count():
    learn = fit(learner(EMA(), GradientAccumulation(48)), 4)
    assert learn.ema.n_steps==4
    learn = fit(learner(EMA(.9, 0), Skip(), Trail()), 4)
    assert learn.ema.n_steps==8
    kept = [s for i,s in enumerate(learn.trail.states[1:]) if i%3!=2]
    got = ema_weights(learn)
    want = slow([learn.trail.states[0]]+kept, .9, 0, 0)
    for k,v in want.items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6)

def test_overflow_in_fp16_does_not_count():
    class Huge(Callback):
        order = 11
        def before_fit(self): self.precision.scaler,self.n = torch.amp.GradScaler('cpu', init_scale=2.**40),0
        def before_step(self): self.n += 1
    learn = fit(learner(EMA(), Precision('fp16'), Huge()), 8)
    assert 0<learn.huge.n<24 and learn.ema.n_steps==learn.huge.n

def test_validation_and_inference_use_the_average():
    learn = fit(learner(EMA(.9)))
    raw,row = state(learn),learn.recorder.values[-1]
    preds,targs = learn.get_preds()
    loss = learn.validate()[0]
    other = deepcopy(learn.model).eval()
    other.load_state_dict(ema_weights(learn))
    x = torch.stack([o[0] for o in learn.dls.valid.dataset])
    want = other(x)
    assert torch.equal(preds, want) and loss==pytest.approx(flat_loss(want, targs).item())
    assert row[1]==pytest.approx(loss)
    assert_same(raw, state(learn))
    assert not torch.allclose(learn.model.eval()(x), want, atol=1e-4)

@pytest.mark.parametrize('cbs', [[EMA, Precision], [Precision, EMA]])
def test_with_precision(cbs):
    learn = fit(learner(*[cb('bf16') if cb is Precision else cb(.9) for cb in cbs]))
    other = deepcopy(learn.model).eval()
    other.load_state_dict(ema_weights(learn))
    x = torch.stack([o[0] for o in learn.dls.valid.dataset])
    with torch.autocast('cpu', dtype=torch.bfloat16): want = other(x).float()
    assert torch.equal(learn.get_preds()[0], want)
    assert 'forward' not in vars(learn.model)

class Stop(Callback):
    def __init__(self, event): setattr(self, event, self.hit)
    def hit(self):
        if not self.training: raise KeyboardInterrupt

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','after_batch','forward'])
def test_an_interrupted_validation_leaves_raw_weights(event):
    learn = learner(EMA(.9), Trail())
    if event=='forward':
        def stop(m, *args):
            if not m.training: raise KeyboardInterrupt
        h = learn.model[2].register_forward_hook(stop)
    else: learn.add_cb(Stop(event))
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert_same(learn.trail.states[-1], state(learn))
    for o in (deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))) if event!='forward' else ():
        assert_same(state(learn), o.state_dict())
    if event=='forward': h.remove()
    else: learn.remove_cb(Stop)
    x = torch.randn(4, 6)
    learn.model.train()   # the wrapper left behind keeps out of training
    assert torch.equal(learn.model(x), nn.Sequential.forward(learn.model, x))
    fit(learn, 1)
    assert 'forward' not in vars(learn.model)

@pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='needs timers')
def test_a_signal_at_any_moment_finds_all_or_nothing():
    "Real signals, at 200 moments of many swaps"
    tensors = [nn.Parameter(torch.zeros(1)) for _ in range(200)]
    values,hits = [torch.ones(1)]*200,0
    def stop(*args): raise KeyboardInterrupt
    old = signal.signal(signal.SIGALRM, stop)
    try:
        for i in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4+i*3e-6)
                while True: call_with(lambda: None, tensors, values)
            except KeyboardInterrupt: hits += 1
            assert not torch.cat([t.data for t in tensors]).any()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert hits==200

def test_call_with_gives_back_after_an_error():
    t = nn.Parameter(torch.zeros(2))
    where = t.data_ptr()
    def fail():
        assert t.sum()==2
        raise RuntimeError
    with pytest.raises(RuntimeError): call_with(fail, [t], [torch.ones(2)])
    assert t.data_ptr()==where and not t.any()

def test_resume_continues_identically():
    class Snap(Callback):
        "Saves after the first epoch, as a checkpoint would"
        def after_epoch(self):
            if self.epoch==0: self.got = deepcopy((self.ema.state_dict(), self.learn.model.state_dict(), self.opt.state_dict(),
                torch.get_rng_state(), self.dls.train.rng.getstate()))
    class Load(Callback):
        order = 60
        def before_fit(self):
            e,m,o,rng,r = deepcopy(snap.got)
            self.learn.model.load_state_dict(m)
            self.opt.load_state_dict(o)
            self.ema.load_state_dict(e)
            torch.set_rng_state(rng)
            self.dls.train.rng.setstate(r)
    snap = Snap()
    whole = fit(learner(EMA(.9), snap), 3)
    part = fit(learner(EMA(.9), Load()), 2)
    assert part.ema.n_steps==whole.ema.n_steps==9
    assert_same(state(whole), state(part))
    assert_same(ema_weights(whole), ema_weights(part))

def test_state_is_plain(tmp_path):
    learn = fit(learner(EMA()))
    torch.save(learn.ema.state_dict(), tmp_path/'x')
    d = torch.load(tmp_path/'x', weights_only=True)
    assert type(d) is dict and d['n_steps']==6
    other = learner(EMA())
    other.ema.load_state_dict(EMA().state_dict())
    assert other.ema.n_steps==0
    other.ema.load_state_dict(d)
    assert_same(d['model'], ema_weights(other))
    assert torch.equal(other.get_preds()[0], learn.get_preds()[0])

def test_goes_on_over_fits_and_starts_anew():
    learn = fit(learner(EMA(.9)), 1)
    fit(learn, 1)
    assert learn.ema.n_steps==6
    learn.model[3] = nn.Linear(8, 2, bias=False)   # another shape: another average
    learn.opt = None
    fit(learn, 1)
    assert learn.ema.n_steps==3
    avg = {k:v.clone() for k,v in ema_weights(learn).items()}
    learn.ema.to_model()
    assert_same(avg, state(learn))
    assert learn.ema.n_steps==0
    assert_same(ema_weights(learn), state(learn))
    plain = learner()
    assert_same(ema_weights(plain), state(plain))

def test_lr_find_does_not_count(tmp_path):
    learn = learner(EMA(), path=tmp_path)
    learn.lr_find(num_it=6, show_plot=False)
    learn.get_preds()
    assert learn.ema.n_steps==0 and learn.ema.avg is None   # no copy of a model that does not train
    fit(learn, 1)
    learn.lr_find(num_it=6, show_plot=False)
    assert learn.ema.n_steps==3

def test_a_compiled_model():
    plain,comp = learner(EMA(.9)),learner(EMA(.9))
    comp.model = torch.compile(comp.model, backend='eager')
    fit(plain), fit(comp)
    a,b = ema_weights(plain),ema_weights(comp)
    assert a.keys()==b.keys()
    for k,v in a.items(): torch.testing.assert_close(b[k], v)
    torch.testing.assert_close(comp.get_preds()[0], plain.get_preds()[0])

def test_pickles_with_its_average():
    learn = fit(learner(EMA(.9)))
    other = pickle.loads(pickle.dumps(learn))
    assert torch.equal(other.get_preds()[0], learn.get_preds()[0])
    pickle.loads(pickle.dumps(EMA()))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    learn = learner(EMA(.9, 0), Precision(), Trail())
    learn.dls.to(torch.device('cuda'))
    fit(learn)
    got = ema_weights(learn)
    for k,v in slow(learn.trail.states, .9, 0, 0).items(): torch.testing.assert_close(got[k], v, rtol=1e-4, atol=1e-5)
    preds = learn.get_preds()[0]
    learn.ema.to_model()
    torch.testing.assert_close(learn.get_preds()[0], preds)
