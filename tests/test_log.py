"Redirected output, a terminal, and the stop on NaN"
import io, math, os, pickle, pytest, torch
from contextlib import redirect_stdout
from callbacks.log import LineLog, epoch_line, is_watched, show_progress
from callbacks.nan import StopOnNaN, norm_stats
from callbacks.precision import Precision
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.metrics import mae
from fastai.test_utils import synth_learner
from torch import nn

def caught(f):
    out = io.StringIO()
    with redirect_stdout(out): f()
    return out.getvalue()

def test_one_line_an_epoch():
    def run():
        learn = show_progress(synth_learner(metrics=mae, cbs=ProgressCallback()))
        learn.fit(3)
        learn.validate()
        learn.get_preds()
        learn.fit(1)
    text = caught(run)
    lines = text.splitlines()
    assert '\r' not in text and len(lines)==4
    assert [o.split()[1] for o in lines]==['1/3','2/3','3/3','1/1']
    for o in lines: assert o.split()[2:7:2]==['train_loss','valid_loss','mae'] and o.endswith(' s')

def test_values_are_the_recorders():
    learn = show_progress(synth_learner(), watched=False)
    line = caught(lambda: learn.fit(1))
    assert f'valid_loss {learn.recorder.values[-1][1]:.4f}' in line

def test_lr_find_is_quiet(tmp_path):
    learn = show_progress(synth_learner(path=tmp_path), watched=False)
    assert caught(lambda: learn.lr_find(num_it=5, show_plot=False))==''

def test_an_interrupt_leaves_a_learner_that_prints_once():
    class Stop(Callback):
        def after_batch(self): raise KeyboardInterrupt
    learn = show_progress(synth_learner(cbs=Stop()), watched=False)
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    learn.remove_cb(Stop)
    assert len(caught(lambda: learn.fit(2)).splitlines())==2
    assert learn.logger is print

def test_beside_the_progress_bar():
    "Both at once: nothing breaks, and the logger is put back"
    learn = synth_learner(cbs=LineLog())
    if not hasattr(learn, 'progress'): learn.add_cb(ProgressCallback())
    text = caught(lambda: learn.fit(2))
    assert sum('epoch 2/2' in o for o in text.splitlines())==1
    assert learn.logger is print
    pickle.dumps(LineLog())

def test_lines_without_the_time_column():
    learn = show_progress(synth_learner(), watched=False)
    learn.recorder.add_time = False
    line = caught(lambda: learn.fit(1))
    assert 'valid_loss' in line and line.rstrip().endswith(' s')

def test_line_of_odd_values():
    line = epoch_line(['a','b','c','d'], [float('nan'), 3, None], 0, 1, 100.4)
    assert line=='epoch 1/1  a nan  b 3  100 s'

@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='needs pseudo-terminals')
def test_a_terminal_is_watched_and_a_file_is_not(tmp_path):
    a,b = os.openpty()
    with os.fdopen(b, 'w') as tty: assert is_watched(tty)
    os.close(a)
    with open(tmp_path/'log', 'w') as f: assert not is_watched(f)
    assert not is_watched(io.StringIO())
    learn = synth_learner()
    assert hasattr(show_progress(learn, watched=True), 'progress')
    assert not hasattr(show_progress(learn, watched=False), 'progress')

class Spoil(Callback):
    "Makes one batch bad: its pictures, or its loss only"
    order = 1
    def __init__(self, at, what='x', value=math.nan): self.at,self.what,self.value = at,what,value
    def before_batch(self):
        if not self.training: return
        if self.train_iter==self.at: self.before = {k:v.clone() for k,v in self.learn.model.state_dict().items()}
        if self.train_iter==self.at and self.what=='x': self.learn.xb = (self.xb[0]*self.value,)
    def after_loss(self):
        if self.training and self.train_iter==self.at and self.what=='loss':
            self.learn.loss_grad = self.learn.loss_grad*self.value
            self.learn.loss = self.learn.loss_grad.clone()

def bn_learner(*cbs):
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    items = list(zip(x, x.sum(1, keepdim=True)))
    dls = DataLoaders.from_dsets(items[:32], items[32:], bs=8, device=torch.device('cpu'), num_workers=0)
    dls.train.rng.seed(0)
    return Learner(dls, nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), nn.MSELoss(), cbs=cbs)

def fit(learn, n=2):
    with learn.no_logging(): learn.fit(n, 1e-2)

@pytest.mark.parametrize('what,value', [('x', math.nan), ('x', math.inf), ('loss', math.nan), ('loss', math.inf)])
@pytest.mark.parametrize('more', [(), (Precision('fp16'),), (GradientAccumulation(32),)])
def test_stops_before_the_step_and_keeps_the_good_weights(what, value, more):
    learn = bn_learner(StopOnNaN(), Spoil(5, what, value), *more)
    with pytest.raises(FloatingPointError, match='epoch 2 of 2, batch 2 of 4'): fit(learn)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, learn.spoil.before[k]), k
    assert len(learn.recorder.values)==1   # no `after_epoch`, so no checkpoint
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    learn.remove_cb(learn.spoil)
    fit(learn, 1)

def test_without_it_the_weights_are_lost():
    learn = bn_learner(Spoil(5))
    fit(learn)
    assert not all(v.isfinite().all() for v in learn.model.state_dict().values())

def test_fp16_overflow_is_no_nan_loss():
    class Huge(Callback):
        order = 11
        def before_fit(self): self.precision.scaler = torch.amp.GradScaler('cpu', init_scale=2.**60)
    learn = bn_learner(StopOnNaN(), Precision('fp16'), Huge())
    fit(learn)
    assert learn.precision.scaler.get_scale()<2.**60

def test_nothing_changes_when_all_is_well():
    a,b = bn_learner(),bn_learner(StopOnNaN())
    fit(a, 1)
    fit(b, 1)
    assert a.recorder.losses==b.recorder.losses
    assert len(norm_stats(a.model))==3
    pickle.loads(pickle.dumps(b))

def test_lr_find_may_diverge(tmp_path):
    learn = synth_learner(path=tmp_path, cbs=StopOnNaN())
    learn.lr_find(end_lr=1e30, num_it=50, show_plot=False, stop_div=False)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('what', ['x','loss'])
def test_stops_on_a_gpu(what):
    learn = bn_learner(StopOnNaN(), Spoil(5, what))
    learn.dls.to(torch.device('cuda'))
    with pytest.raises(FloatingPointError, match='epoch 2 of 2, batch 2 of 4'): fit(learn)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, learn.spoil.before[k]), k
