"A budget: the fit that ends in time is the fit of so many epochs, on a loader that slows down too"
import json, time
from pathlib import Path
import numpy as np, pytest
from fastai.callback.core import Callback
from fastai.torch_core import default_device
from safetensors.torch import load_file
from callbacks.ema import EMA
from callbacks.mix import MixUp
from callbacks.schedule import steps
from functools import partial
from recipes import animal
from recipes.data.fixtures import sample
from recipes.data.loaders import Items
from recipes.recipe import budget, clock, fitting

pytestmark = pytest.mark.slow

tiny = dict(arch='test_resnet', pretrained=False, size=32, bs=16, lr=3e-3, precision='fp32', folds=4)

@pytest.fixture(scope='module')
def data(): return sample('animal', 120)

@pytest.fixture(autouse=True)
def on_cpu():
    default_device(False)
    yield
    default_device(None)

def weights(run): return load_file(run.path/'model.safetensors')
def same(a, b): return all((a[k]==b[k]).all() for k in a)

class Slow(Callback):
    "From `epoch` on, pictures take `secs` longer"
    order = -20
    def __init__(self, patch, epoch, secs): self.patch,self.epoch_at,self.secs = patch,epoch,secs
    def before_train(self):
        if self.epoch!=self.epoch_at: return
        real,secs = Items.read,self.secs
        self.patch.setattr(Items, 'read', lambda items, row: (time.sleep(secs), real(items, row))[1])

def slowed(patch, epoch, secs):
    "Let the loaders of a fit, not those of the trial, become slower"
    real = fitting.fit_stage
    def fit_stage(learn, i, checkpoint, cbs=()): return real(learn, i, checkpoint, [*cbs, Slow(patch, epoch, secs)])
    patch.setattr(fitting, 'fit_stage', fit_stage)

def planned_as(patch, **costs):
    "What the trial finds, without its noise"
    base = dict(find=0., sizes=[[0,0.,.1,.05]])
    real = budget.measure
    def measure(learn, timer, more=None):
        real(learn, timer, more)   # warms up, too
        stages = [base|costs|dict(epochs=o.epochs) for o in learn.run.recipe.steps()]
        return dict(stages=stages, end=.5, held=.3)
    patch.setattr(budget, 'measure', measure)

def frozen(patch):
    "A clock that stands still: the machine does what was planned"
    patch.setattr(clock.Clock, 'spent', property(lambda self: 0.))
    patch.setattr(clock.Deadline, 'lengthen', lambda self, x: None)

@pytest.mark.parametrize('epoch,secs,limit', [(2,.015,20),(0,.012,16)])
def test_slowed_loader(data, monkeypatch, capsys, epoch, secs, limit):
    animal.learner(path=data, **tiny)   # imports are not what is timed
    planned_as(monkeypatch, sizes=[[0,0.,.5,.25],[.5,0.,.6,.25]])   # a trial on a busy machine would find more, and slower would not be slower
    slowed(monkeypatch, epoch, secs)
    start = time.perf_counter()
    learn = animal.train(data, budget=limit, **tiny, epochs=500, resize=((0,.5),(.5,1.)), mix=partial(MixUp, cooldown=1), ema=EMA)
    took = time.perf_counter()-start
    out,run = capsys.readouterr().out,learn.run
    assert .3*limit<took<=1.05*limit, (took, out)
    assert run.done and (run.path/'valid.npy').exists() and 'now' in out and '500 epochs, ends after about' in out
    history = run.history
    assert 1<=len(history)<500 and history.lr.iloc[-1]<.3*history.lr.max()   # the last of few batches
    assert learn.dls.valid.dataset.size==(32,32)
    assert json.loads((run.path/'budget.json').read_text())['spent']<=1.05*limit

def test_plenty_of_time_changes_nothing(data, monkeypatch):
    fields = tiny|dict(epochs=3, resize=((0,.5),(.5,1.)), mix=MixUp, ema=EMA)
    plain = animal.train(data, **fields)
    timed = animal.train(data, budget='2h', **fields)
    assert same(weights(plain.run), weights(timed.run)) and np.array_equal(plain.run.valid.p, timed.run.valid.p)

def test_stages_keep_their_proportion_and_schedules_their_share(data, monkeypatch, capsys):
    planned_as(monkeypatch)
    frozen(monkeypatch)
    late = dict(epochs=30, schedule=partial(steps, at=(15,), factor=.1))
    learn = animal.train(data, budget=1.5, **tiny, stages=(dict(epochs=10),late))
    history = learn.run.history
    n = history.stage.value_counts()
    assert abs(n[1]-3*n[0])<=2 and '+' in capsys.readouterr().out
    lrs = history.lr[history.stage==1].to_numpy()   # at the end of each epoch
    assert (lrs[:len(lrs)//2]>lrs[-1]*5).all() and lrs[-1]==pytest.approx(tiny['lr']/10)
    assert learn.run.recipe.stages[1]['epochs']==30

def test_a_stopped_run_goes_on_to_the_same_weights(data, monkeypatch):
    planned_as(monkeypatch)
    frozen(monkeypatch)
    fields = tiny|dict(epochs=40, mix=MixUp, ema=EMA, resize=((0,.5),(.5,1.)))
    class Moved(Callback):
        order = 60
        def after_epoch(self):
            if self.epoch==0: self.learn.deadline.move(1., 4.5, [5])
    real = fitting.stage_cbs
    monkeypatch.setattr(fitting, 'stage_cbs', lambda step: [*real(step), Moved()])
    whole = animal.train(data, budget=1.5, **fields)
    assert len(whole.run.history)==5 and whole.run.history.train_loss.notna().all()
    class Stop(Callback):
        order = 95
        def after_epoch(self):
            if self.epoch==1: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(fitting, 'stage_cbs', lambda step: [*real(step), Moved(), Stop()])
        with pytest.raises(KeyboardInterrupt): animal.train(data, budget=1.5, **fields)
    folder = next(o.parent for o in whole.run.path.parent.parent.glob('*/fold0/budget.json') if o.parent!=whole.run.path)
    done = animal.train(resume=folder)
    assert same(weights(whole.run), weights(done.run)) and done.run.history.drop(columns='time').equals(whole.run.history.drop(columns='time'))

def test_resume_with_less_time_ends_early(data, monkeypatch, capsys):
    class Stop(Callback):
        order = 95
        def after_epoch(self):
            if self.epoch==1: raise KeyboardInterrupt
    real = fitting.stage_cbs
    with monkeypatch.context() as m:
        m.setattr(fitting, 'stage_cbs', lambda step: [*real(step), Stop()])
        with pytest.raises(KeyboardInterrupt): animal.train(data, **tiny, epochs=300)
    folder = next(o.parent for o in Path('runs').glob('animal/*/fold0/last.ckpt'))
    start = time.perf_counter()
    run = animal.train(resume=folder, budget=8).run
    assert time.perf_counter()-start<=8 and run.done and run.history.lr.iloc[-1]<.1*tiny['lr']

def test_too_small(data):
    with pytest.raises(ValueError, match='single epoch with its predictions needs about'): animal.train(data, budget=.2, **tiny)
    with pytest.raises(ValueError, match='8h30m'): animal.train(data, budget='soon', **tiny)
    assert not list(Path('runs').glob('**/history.csv'))

def test_test_pictures_and_all_rows(data):
    learn = animal.train(data, budget=60, test=True, fold='all', **tiny, epochs=1)
    assert len(np.load(learn.run.path/'test.npy'))==len(learn.table.test)

def test_folds_share_the_time(data, capsys):
    start = time.perf_counter()
    oof = animal.cross_validate(data, budget=16, test=True, **tiny|dict(folds=2), epochs=500)
    assert time.perf_counter()-start<=16
    n = [len(o.history) for o in oof.runs]
    limits = [json.loads((o.path/'budget.json').read_text())['limit'] for o in oof.runs]
    assert limits[0]==pytest.approx(8, abs=1) and 7<=limits[1]<=14 and min(n)>=2
    assert all((o.path/'test.npy').exists() for o in oof.runs)

def test_a_fold_in_a_process_is_told_its_end():
    from recipes.recipe.parallel import _time
    assert _time(None, 3)==[] and _time(clock.Clock(test=True), 3)==['--test','true']
    words = _time(clock.Clock(90.), 3)
    assert words[0]=='--until' and float(words[1])-time.time()==pytest.approx(30, abs=.5)

def test_parts_that_look_for_a_rate_share_with_the_rest(data, monkeypatch, tmp_path):
    "The first fold runs alone until all its parts are done, so it may not take the time of the others"
    from types import SimpleNamespace
    from recipes.recipe import parallel
    from recipes.recipe.settling import settled
    house = animal.house.but(lr='find')
    recipe,table = settled(house.but(parts=(house,house.but(name='b'))), data, {k:v for k,v in tiny.items() if k!='lr'})
    given = []
    class Procs:
        parallel,running,failed = 5,{},[]
        def start(self, run, words):
            given.append(float(words[1])-time.time())
            self.running[run.fold] = run
        def look(self):
            run = self.running.pop(next(iter(self.running)))
            if run.fold==0: run.keep(run.recipe.but(parts=tuple(o.but(lr=1e-3) for o in run.recipe.parts)))   # as at its end
    monkeypatch.setattr(parallel, 'time', SimpleNamespace(sleep=lambda s: None))
    parallel._train_all([0,1,2,3,4], recipe, table, tmp_path/'at', Procs(), clock.Clock(1000.))
    assert given==pytest.approx([500]+[1000]*4, abs=20)
