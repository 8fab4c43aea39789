"Schedules against fastai's and slow references; a learning-rate test that leaves nothing behind"
import io, os, pickle, random, warnings
from functools import partial
from math import inf, nan

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Learner, SchedCos, SchedLin, combine_scheds, combined_cos, minimum, slide, steep, valley
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from torch import nn

from callbacks.checkpoint import ResumableLearner, fit_state
from callbacks.finder import lr_find, suggest_lr, unchanged
from callbacks.optim import adam, adamw, sgd
from callbacks.schedule import Schedule, cosine, flat, one_cycle, steps
from callbacks.stuck import Plateau, SwitchOptimizer, plateau, plateaued, switch

def net(): return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.2), nn.Linear(6, 2))
def groups(m): return [list(m[:2].parameters()), list(m[2:].parameters())]

def learner(n=32, bs=8, cls=Learner, opt_func=adam, seed=1, **kwargs):
    set_seed(seed)
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    ds = list(zip(x, (x.sum(1)>0).long()))
    dls = DataLoaders.from_dsets(ds, ds[:8], bs=bs, num_workers=0, device='cpu', drop_last=True)
    return cls(dls, net(), opt_func=opt_func, splitter=groups, **{'loss_func': CrossEntropyLossFlat()}|kwargs)

def fit(learn, n, cbs=None, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=cbs, **kwargs)
    return learn

def lrs_of(schedule, lr=1e-2, n=4, **kwargs): return fit(learner(**kwargs), n, schedule(lr, n)).recorder.lrs
def pos(n=4): return [i/(4*n) for i in range(4*n)]      # 4 batches an epoch

# By position

def test_one_cycle_is_fastais():
    for lr in (1e-2, slice(1e-4, 1e-2)):
        a = fit(learner(opt_func=sgd), 3, one_cycle(lr, 3))
        b = learner(opt_func=sgd)
        with b.no_bar(), b.no_logging(): b.fit_one_cycle(3, lr)
        for k in ('lr','mom'): assert np.allclose(a.recorder.hps[k], b.recorder.hps[k], rtol=1e-5, atol=0)
        assert all(torch.allclose(p, q, atol=1e-5) for p,q in zip(a.model.parameters(), b.model.parameters()))

def test_one_cycle_numbers():
    got = lrs_of(partial(one_cycle, pct_start=.5, div=10., div_final=100.))
    assert np.allclose(got, [combined_cos(.5, 1e-3, 1e-2, 1e-4)(p) for p in pos()], rtol=1e-5)

def test_cosine():
    assert np.allclose(lrs_of(cosine), [SchedCos(1e-2, 0)(p) for p in pos()])
    ref = combine_scheds([.25, .75], [SchedLin(0, 1e-2), SchedCos(1e-2, 1e-5)])
    assert np.allclose(lrs_of(partial(cosine, warmup=.25, floor=1e-5)), [ref(p) for p in pos()], rtol=1e-5)
    ref = combine_scheds([.5, .5], [SchedCos(1e-2, 0)]*2)
    assert np.allclose(lrs_of(partial(cosine, cycles=2)), [ref(p) for p in pos()], atol=1e-8)
    at = cosine(1., 1, floor=.1, cycles=3)[0].at
    assert np.isclose(at(1., 1.), .1) and np.isclose(at(1/3, 1.), 1.)

def test_groups_are_scaled_alike():
    for lr in (slice(1e-4, 1e-2), [1e-4, 1e-2], np.array([1e-4, 1e-2])):
        learn = learner()
        seen = []
        fit(learn, 2, [*cosine(lr, 2), Callback(after_batch=lambda self: seen.append([h['lr'] for h in learn.opt.hypers]))])
        assert np.allclose([a/b for a,b in seen[:8]], .01) and np.allclose(seen[0], [1e-4, 1e-2])
    learn = fit(learner(), 1, flat(slice(1e-2), 1))
    assert np.allclose([h['lr'] for h in learn.opt.hypers], [1e-3, 1e-2])

def test_steps_brodt():
    "Epoch by epoch, for every length where k/n*n is not k"
    at = steps(1.25e-3, 10, at=(7,9), warmup=5)[0].at
    ref = [min(e/5, 1)*1.25e-3*(.5 if e>=7 else 1)*(.5 if e>=9 else 1) for e in range(10)]
    assert np.allclose([at(e/10, 1.25e-3) for e in range(10)], ref, rtol=1e-5)
    for n in range(1, 120):
        at = steps(1., n, at=tuple(range(1, n)), factor=.5)[0].at
        assert [at(e/n, 1.) for e in range(n)] == [.5**e for e in range(n)]
    assert np.allclose(lrs_of(partial(steps, at=(1,3), factor=.1)), [1e-2]*4+[1e-3]*8+[1e-4]*4)

def test_position_needs_no_state():
    "A fit that begins at epoch 2 has the rates of one that came there"
    class Late(Learner):
        def _do_fit(self):
            for self.epoch in range(2, self.n_epoch): self._with_events(self._do_epoch, 'epoch', KeyError)
    for f in (one_cycle, partial(cosine, warmup=.2), partial(steps, at=(1,3)), flat):
        late = fit(learner(cls=Late), 4, f(1e-2, 4))
        assert np.allclose(late.recorder.lrs, lrs_of(f)[8:])

def test_picklable_after_a_fit():
    for f in (one_cycle, cosine, steps, flat, plateau, switch):
        cb = f(1e-2, 1)[0]
        fit(learner(), 1, cb)
        assert type(pickle.loads(pickle.dumps(cb))) is type(cb)
    for cls in (Schedule, Plateau, SwitchOptimizer): fit(learner(), 1, cls())

def test_plot():
    for f in (one_cycle, cosine, steps, flat):
        for lr in (1e-3, slice(1e-5, 1e-3), [1e-5, 1e-3]): assert np.isclose(max(f(lr, 3)[0].plot().lines[0].get_ydata()), 1e-3, rtol=1e-3)

# By plateau

def slow_plateau(losses, patience=4, factor=5, drops=2, lr=1.):
    "The rule as the public baseline runs it, epochs from 1: the rate of each epoch that is trained"
    best,reset,changes,lrs,seen = inf,1,0,[],[]
    for epoch,loss in enumerate(losses, 1):
        lrs.append(lr)
        seen.append(loss)
        if loss<best: best = loss
        elif epoch-reset>patience and min(seen[-patience:])>best:
            changes += 1
            if changes>drops: break
            lr /= factor
            reset = epoch
    return lrs

class MadeUp(Callback):
    "Writes made-up validation losses into the record"
    order = 55
    def __init__(self, losses): self.made_up = losses
    def after_epoch(self): self.recorder.values[-1][1] = self.made_up[self.epoch]

def run_plateau(losses, lr=1., **kwargs):
    seen = []
    log = Callback(after_epoch=lambda self: seen.append(learn.opt.hypers[-1]['lr']))
    learn = learner(n=8)
    fit(learn, len(losses), [MadeUp(losses), log, *plateau(lr, len(losses), **kwargs)])
    return seen

def test_plateau_against_the_slow_rule():
    rng = random.Random(0)
    walks = [[abs(rng.gauss(1/(1+i)**.5, s)) for i in range(40)] for s in (.01, .05, .1, .3)*3]
    ties = [[rng.choice([1,2,3]) for _ in range(40)] for _ in range(6)]
    for losses in walks+ties:
        for kw in (dict(), dict(patience=2), dict(drops=1, factor=10), dict(patience=1, drops=3)):
            lr,lrs,changes,seen = 1.,[],[],[]
            for loss in losses:      # as the callback does, without a fit
                if len(changes)>kw.get('drops', 2): break
                lrs.append(lr/kw.get('factor', 5)**len(changes))
                seen.append(loss)
                if plateaued(seen, changes[-1] if changes else 0, kw.get('patience', 4)): changes.append(len(seen)-1)
            assert np.allclose(lrs, slow_plateau(losses, **kw)) and len(lrs)==len(slow_plateau(losses, **kw))

def test_plateau_in_a_fit():
    "Six epochs at least before the first drop, four more before the next; the third plateau ends the fit"
    bad = [1.]+[2.]*39
    assert run_plateau(bad) == slow_plateau(bad) == [1.]*6+[1/5]*5+[1/25]*5
    good = [1/(1+i) for i in range(12)]
    assert run_plateau(good) == [1.]*12
    assert run_plateau([.5]*12) == [1.]*12                      # no worse is not worse
    mixed = [.9,.5,.6,.7,.6,.6,.4,.5,.5,.5,.5,.5,.3,.4,.4,.4,.4,.4,.4,.4]
    assert np.allclose(run_plateau(mixed), slow_plateau(mixed))

def test_plateau_without_a_number():
    "No validation, or NaN at first: never a drop for lack of a best"
    assert run_plateau([None]*8) == [1.]*8
    assert run_plateau([nan]*8) == [1.]*8
    assert run_plateau([1.]+[nan]*7) == [1.]*6+[.2]*2

def test_plateau_begins_the_optimizer_anew():
    seen,losses = [],[1.]+[2.]*7
    learn = learner(n=8)
    log = Callback(after_batch=lambda self: seen.append(int(learn.opt.opt.state[learn.model[0].weight]['step'])) if learn.training else None)
    fit(learn, 8, [MadeUp(losses), log, *plateau(1e-3, 8)])
    assert seen == [1,2,3,4,5,6,1,2]
    assert learn.opt.hypers[0]['lr'] == 1e-3/5

def resumed(cbs, n, k, **kwargs):
    "Ends a fit after `k` epochs, and goes on in a new process's stead: a new Learner from what was saved"
    class Stop(Exception): pass
    def stop(self):
        if a.epoch!=k-1: return
        torch.save(fit_state(a), file)
        raise Stop('here')
    file,a = io.BytesIO(),learner(cls=ResumableLearner, **kwargs)
    stop_cb = Callback(after_epoch=stop)
    stop_cb.order = 90
    with pytest.raises(Stop): fit(a, n, [*cbs(), stop_cb])
    file.seek(0)
    b = learner(cls=ResumableLearner, seed=7, **kwargs)
    b.state = torch.load(file, weights_only=True)
    return fit(b, n, cbs())

def same_model(a, b): return all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))

def test_resume_gives_the_same_weights():
    stuck,planned = partial(switch, to_lr=.1),partial(switch, to=partial(adamw, wd=.1), to_lr=.1, at=(4,9))
    for schedule in (plateau, stuck, planned, one_cycle):
        cbs = lambda: [MadeUp([1.]+[2.]*11), *schedule(slice(1e-3, 1e-2), 12)]
        whole = fit(learner(cls=ResumableLearner), 12, cbs())
        for k in (2, 6, 8):
            part = resumed(cbs, 12, k)
            assert same_model(whole, part) and type(whole.opt.opt) is type(part.opt.opt)

def test_stopped_plateau_stays_stopped():
    losses = [1.]+[2.]*29
    cbs = lambda: [MadeUp(losses), *plateau(1e-2, 30)]
    assert len(fit(learner(), 30, cbs()).recorder.values) == 16
    assert len(resumed(cbs, 30, 16).recorder.values) == 16

# Another optimizer

def run_switch(vals, n=None, **kwargs):
    seen,learn = [],learner(n=8, wd=.01)
    log = Callback(after_batch=lambda self: learn.training and seen.append((type(learn.opt.opt).__name__, learn.opt.hypers[-1]['lr'])))
    fit(learn, len(vals), [MadeUp(vals), log, *switch(1e-3, len(vals), to_lr=.1, **kwargs)])
    return seen,learn

def test_switch_when_stuck():
    seen,learn = run_switch([3.,2.,2.,2.5,1.,1.5,1.5,1.5], patience=2)
    a,s = ('Adam', 1e-3),('SGD', .1)
    assert seen == [a]*4+[s]*3+[a]
    assert learn.opt_func is adam and learn.lr == 1e-3
    assert [pg['weight_decay'] for pg in learn.opt.opt.param_groups] == [.01, 0., .01, 0.]
    seen,_ = run_switch([.1,.2,.3,.4,.3,.2], patience=2, higher=True)
    assert seen == [a]*6
    assert run_switch([None]*6, patience=1)[0] == [a]*6

def test_switch_at_epochs():
    seen,_ = run_switch([1.]*6, patience=1, at=(2,5))
    assert [o for o,_ in seen] == ['Adam']*2+['SGD']*3+['Adam']

def test_switch_starts_again_and_keeps_frozen():
    cb = SwitchOptimizer(1e-3, at=(1,))
    learn = learner(cbs=cb)
    learn.freeze()
    w = learn.model[0].weight.clone()
    fit(learn, 2)
    assert type(learn.opt.opt) is torch.optim.SGD and not learn.model[0].weight.requires_grad
    assert torch.equal(learn.model[0].weight, w)
    seen = []
    fit(learn, 1, Callback(after_step=lambda self: seen.append(type(learn.opt.opt))))
    assert set(seen) == {torch.optim.Adam}

def test_monitor_is_named():
    with pytest.raises(ValueError, match="monitors 'f2', but there is only"): fit(learner(), 1, switch(1e-3, 1, monitor='f2'))

# The range test

class Noise(nn.Module):
    "A loss with a parameter, a buffer and randomness of every kind"
    def __init__(self):
        super().__init__()
        self.w,self.calls = nn.Parameter(torch.ones(1)),0
        self.register_buffer('n', torch.zeros(1))
    def forward(self, pred, y):
        self.n += 1
        self.calls += 1
        with torch.no_grad(): self.w += .1
        return nn.functional.cross_entropy(pred, y)*self.w*(1+.01*(random.random()+np.random.rand()))

class Counted(Callback):
    "A callback that shapes the step, with state of both kinds"
    def __init__(self): self.n,self.t = 0,torch.zeros(1)
    def before_batch(self):
        self.n += 1
        self.t += 1
    def state_dict(self): return dict(n=self.n, t=self.t)
    def load_state_dict(self, d): self.n,self.t = d['n'],d['t']

class Saves(Callback):
    "A callback that must not act in the test"
    during_lr_find,acted = False,False
    def before_fit(self): self.acted = True

def picture(learn):
    "Everything the test may not change, as text"
    opt = learn.opt and learn.opt.state_dict()
    rec = {k:v for k,v in vars(learn.recorder).items() if k in ('values','losses','lrs','iters','hps','metric_names')}
    smooth = learn.recorder.smooth_loss.count,learn.recorder.smooth_loss.val
    mods = [m for o in (learn.model, learn.loss_func) for m in (o.modules() if isinstance(o, nn.Module) else [])]
    tensors = [(k, t, t.requires_grad, t.grad) for m in mods for k,t in [*m.named_parameters(), *m.named_buffers()]]
    rngs = torch.get_rng_state(),np.random.get_state(),random.getstate(),[o.rng.getstate() for o in learn.dls.loaders]
    plain = {k:v for k,v in vars(learn).items() if isinstance(v, (int,float,str,bool,type(None)))}
    cbs = [(id(cb), cb.state_dict() if hasattr(type(cb), 'state_dict') else None, cb.run) for cb in learn.cbs]
    flags = [(m.training, sorted(vars(m))) for m in mods],id(learn.opt),id(learn.recorder),[m.name for m in learn.metrics]
    with torch._tensor_str.printoptions(threshold=10**6, precision=8), np.printoptions(threshold=10**6):
        return repr((opt, rec, smooth, tensors, rngs, plain, cbs, flags, getattr(learn.loss_func, 'calls', None)))

def everything(fresh, frozen=False, **kwargs):
    learn = learner(loss_func=Noise(), metrics=accuracy, cbs=[Counted(), Saves()], **kwargs)
    if frozen: learn.freeze()
    if not fresh: fit(learn, 2, one_cycle(slice(1e-3, 1e-2), 2))
    learn.saves.acted = False
    learn.model.eval()
    return learn

class Interrupt(Callback):
    "Raises at one event of the test"
    def __init__(self, event, after=3):
        self.n,self.after = 0,after
        setattr(self, event, self.tick)
    def tick(self):
        self.n += 1
        if self.n==self.after: raise KeyboardInterrupt

@pytest.mark.parametrize('opt_func', [adam, sgd, Adam], ids=['adam','sgd','fastai'])
@pytest.mark.parametrize('fresh,frozen', [(True,False), (False,False), (False,True), (True,True)])
def test_lr_find_leaves_no_trace(opt_func, fresh, frozen):
    learn = everything(fresh, frozen, opt_func=opt_func)
    before = picture(learn) if not fresh else None
    weights,opt,rng = [t.clone() for t in learn.model.state_dict().values()],learn.opt,random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = lr_find(learn, num_it=40)
    assert len(found.lrs) > 16 and not learn.saves.acted and not hasattr(learn, 'lr_finder')
    if not fresh: assert picture(learn) == before
    else:
        assert all(torch.equal(a, b) for a,b in zip(weights, learn.model.state_dict().values()))
        assert learn.opt is opt and random.getstate() == rng and not hasattr(learn.recorder, 'losses')
        assert learn.loss_func.n == 0 and learn.loss_func.w == 1 and learn.loss_func.calls == 0

@pytest.mark.parametrize('event', ['before_fit', 'before_batch', 'after_pred', 'after_loss', 'before_step', 'after_step', 'after_epoch'])
def test_interrupt_anywhere(event):
    learn = everything(False)
    learn.add_cb(Interrupt(event, 1 if event=='before_fit' else 3))
    before = picture(learn)
    with pytest.raises(KeyboardInterrupt): lr_find(learn)
    assert picture(learn) == before
    learn.remove_cb(learn.interrupt)
    fit(learn, 1)

def test_same_training_with_and_without():
    models = []
    for find in (True, False):
        learn = learner()
        if find: lr_find(learn, num_it=50)
        fit(learn, 2, one_cycle(1e-2, 2))
        if find: lr_find(learn, num_it=50)
        models.append(fit(learn, 1, flat(1e-3, 1)))
    assert same_model(*models)

def test_no_folder_is_written(tmp_path):
    (tmp_path/'ro').mkdir()
    learn = learner(path=tmp_path/'ro', cbs=[SaveModelCallback(), EarlyStoppingCallback(patience=1), CSVLogger()])
    os.chmod(tmp_path/'ro', 0o500)
    cbs = list(learn.cbs)
    lr_find(learn, num_it=40)
    os.chmod(tmp_path/'ro', 0o700)
    assert not list((tmp_path/'ro').iterdir()) and list(learn.cbs) == cbs

def test_little_data():
    "Less than the test asks for, and less than a batch"
    assert len(lr_find(learner(n=16, bs=8), num_it=30, end_lr=.1).lrs) == 30
    learn = learner(n=6, bs=8)
    train,before = learn.dls.train,learn.dls.train.rng.getstate()
    assert len(learn.dls.train) == 0 and len(lr_find(learn, num_it=30, end_lr=.1).lrs) == 30
    assert learn.dls.train is train and train.rng.getstate() == before
    with pytest.raises(ValueError, match='there are none'): lr_find(learner(n=0))

def test_callbacks_that_shape_a_step_take_part():
    "Without accumulation every batch is a step; the count tells whether it took part"
    seen = []
    cbs = [GradientAccumulation(16), Callback(after_step=lambda self: seen.append(1))]
    lr_find(learner(cbs=cbs), num_it=40, end_lr=.1)
    assert len(seen) == 20
    seen.clear()
    lr_find(learner(cbs=[Callback(before_batch=lambda self: seen.append(hasattr(self.learn, 'lr_finder')))]), num_it=20, end_lr=.1)
    assert all(seen) and len(seen) == 20

def test_lr_find_uses_the_rates_asked_for():
    lrs = lr_find(learner(), start_lr=1e-5, end_lr=1e-1, num_it=40).lrs
    assert np.allclose(lrs, np.geomspace(1e-5, 1e-1, 41)[:-1])

def test_nan_and_flat_losses():
    class Bad(nn.Module):
        def forward(self, pred, y):
            loss = nn.functional.cross_entropy(pred, y)
            return loss*nan if learn.train_iter>=8 else loss
    learn = learner(loss_func=Bad(), lr=3e-3)
    with pytest.warns(UserWarning, match='lr_find goes for 0.003: 0 of 9 losses'): found = lr_find(learn)
    assert found.lr == 3e-3 and len(found.losses) == 9 and found.why
    with pytest.warns(UserWarning): assert lr_find(learn, default=1e-4).lr == 1e-4
    found.plot()

def test_suggestions_are_fastais():
    lrs = list(np.geomspace(1e-7, 10, 100))
    losses = [2-1.5/(1+1e-4/o)+o for o in lrs]
    x,y = torch.tensor(lrs[10:-5]),torch.tensor(losses[10:-5])
    for f in (valley, steep, minimum, slide):
        lr,why = suggest_lr(lrs, losses, suggest=f, clamp=(0., inf))
        assert lr == f(x, y, 100)[0] and not why
    assert suggest_lr(lrs, losses, suggest=valley, clamp=(1e-3, 1.))[0] == 1e-3
    broken = losses[:60]+[nan]+losses[61:]
    assert suggest_lr(lrs, broken)[0] == valley(x[:45], y[:45], 100)[0]
    assert suggest_lr(lrs, [1.]*100)[0] == 1e-3 and suggest_lr([], [], default=.5)[0] == .5
    assert suggest_lr(lrs, [inf]*100)[1].startswith('0 of 100')

def test_unchanged_when_the_model_moves_or_grows():
    learn = learner()
    learn.model.register_buffer('memory', torch.zeros(0))
    with unchanged(learn):
        learn.model.memory = torch.ones(5)
        learn.model[0].weight.requires_grad_(False)
        learn.model.extra = 3
        fit(learn, 1)
    assert learn.model.memory.shape == (0,) and learn.model[0].weight.requires_grad and not hasattr(learn.model, 'extra')
