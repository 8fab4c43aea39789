"Nothing is lost: a run killed anywhere goes on to the same weights as if nothing had happened"
import csv, multiprocessing, os, signal
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.torch_core import default_device
from safetensors.torch import load_file
from callbacks import checkpoint
from callbacks.ema import EMA
from callbacks.mix import MixUp
from callbacks.schedule import flat
from callbacks.swa import SWA
from recipes import imet
from recipes.data.fixtures import draw_imet
from recipes.infer.tta import as_is, random_view
from recipes.recipe import fitting
from recipes.recipe.core import BadField
from recipes.recipe.folder import Run

ways = dict(arch='test_resnet', pretrained=False, size=24, epochs=4, bs=12, folds=4, lr=3e-3, tta=(as_is,random_view))
whole = ways | dict(resize=((0,.7,12),(.5,1.,8)), mix=MixUp, ema=partial(EMA, decay=.9), clip=1., precision='fp32')
bf16 = whole | dict(size=64, precision='bf16')   # smaller maps than 2 x 2 have wrong gradients in bf16 on a CPU
stages = ways | dict(epochs=3, lr='find', precision='fp32',
    stages=(dict(epochs=1, freeze=1, schedule=flat, bs=18), dict(mix=MixUp, ema=partial(EMA, decay=.9))))

def die(): os.kill(os.getpid(), signal.SIGKILL)
def interrupt(): raise KeyboardInterrupt

class Stop(Callback):
    "Does `act` at `event`, where the fit is in `stage`, `epoch` and batch `it`"
    order = 95   # after `Checkpoint`
    def __init__(self, act, event, epoch, it=None, stage=0, training=True, finding=False):
        self.act,self.at,self.it = act,(stage,epoch,training,finding),it
        setattr(self, event, self.look)
    def look(self):
        finding = hasattr(self.learn, 'lr_finder')
        stage = self.learn.run.recipe.steps().index(self.step) if finding else self.learn.checkpoint.stage
        where = stage,self.epoch,bool(self.training),finding
        if where==self.at and self.it in (None,self.iter): self.act()

def plant(patch, act, **where):
    "Have every stage carry a `Stop`"
    real = fitting.stage_cbs
    def stage_cbs(step):
        stop = Stop(act, **where)
        stop.step = step
        return [*real(step), stop]
    patch.setattr(fitting, 'stage_cbs', stage_cbs)

def half_written(patch, name, times):
    "Die when `name` is written for the `times`-th time, with half of it on disk"
    real,left = os.replace,[times]
    def replace(src, dst):
        left[0] -= Path(dst).name==name
        if left[0]: return real(src, dst)
        os.truncate(src, os.path.getsize(src)//2)
        die()
    patch.setattr(checkpoint.os, 'replace', replace)

def train(path, fields, resume=None):
    default_device(False)   # same weights are promised on a CPU
    return imet.train(resume=resume) if resume else imet.train(path, **fields)

def doomed(cwd, path, fields, write=None, **where):
    "What the process that is going to die does"
    os.chdir(cwd)
    patch = pytest.MonkeyPatch()
    if write: half_written(patch, *write)
    else: plant(patch, die, **where)
    train(path, fields)

server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['pytest','recipes.imet'])

def kill(path, fields, **where):
    "The folder of a run that was killed"
    p = server.Process(target=doomed, args=(Path.cwd(),path,fields), kwargs=where)
    p.start()
    p.join(300)
    assert p.exitcode==-signal.SIGKILL
    run, = Path('runs/imet').glob('*/fold0')
    assert not (run/'done.json').exists()
    return run

def lines(run):
    rows = list(csv.DictReader(open(run/'history.csv')))
    return [{k:v for k,v in o.items() if k!='time'} for o in rows]

def equal(a, b):
    "Whether two states are the same to the last bit"
    if isinstance(a, dict): return set(a)==set(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor): return a.dtype==b.dtype and a.shape==b.shape and a.numpy().tobytes()==b.numpy().tobytes()
    return a==b

def stripped(state):
    "A state without times of day, which two runs do not share"
    state['cbs']['checkpoint'].update(history=[{k:v for k,v in o.items() if k!='time'} for o in state['cbs']['checkpoint']['history']])
    return state

def check_same(run, other):
    for o in 'recipe.json','done.json': assert (run/o).read_text()==(other/o).read_text(), o
    assert equal(load_file(run/'model.safetensors'), load_file(other/'model.safetensors'))
    last,want = stripped(Run(run).last()),stripped(Run(other).last())
    for o in set(want)-{'cbs'}: assert equal(last[o], want[o]), o
    for o in 'ema','swa','checkpoint','precision': assert equal(last['cbs'].get(o), want['cbs'].get(o)), o
    assert lines(run)==lines(other)
    assert np.array_equal(np.load(run/'valid.npy'), np.load(other/'valid.npy'))

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    at = tmp_path_factory.mktemp('imet')
    draw_imet(at, 48, n_test=8)
    return at

@pytest.fixture(scope='module')
def done(path, tmp_path_factory):
    "Runs that nothing stopped, each made when first asked for"
    runs,at = {},tmp_path_factory.mktemp('whole')
    def one(name, fields):
        with pytest.MonkeyPatch.context() as m:
            m.chdir(at)
            if name not in runs: runs[name] = train(path, fields).run.path
        return runs[name]
    return one

kills = dict(first_epoch=dict(event='before_step', epoch=0, it=1), mid_batch=dict(event='before_step', epoch=1, it=2))
kills |= dict(after_backward=dict(event='after_step', epoch=3, it=0), in_larger=dict(event='after_batch', epoch=2, it=0))
kills |= dict(mid_validation=dict(event='after_loss', epoch=2, it=0, training=False), at_larger=dict(event='before_train', epoch=2))
kills |= {k:dict(event='after_epoch', epoch=v, training=False) for k,v in dict(before_larger=1, after_last=3).items()}
kills |= {f'write_{name}_{i}':dict(write=(name,i)) for name,i in (('model.safetensors',2), ('history.csv',3), ('last.ckpt',1),
    ('last.ckpt',3), ('valid.npy',1), ('done.json',1))}

@pytest.mark.parametrize('name', kills)
def test_killed(path, done, name):
    "Progressive resizing, MixUp, EMA, clipping, a random view: the process dies, another one goes on"
    run = kill(path, whole, **kills[name])
    train(path, whole, run)
    check_same(run, done('fp32', whole))

def test_killed_bf16(path, done):
    run = kill(path, bf16, **kills['mid_batch'])
    train(path, bf16, run)
    check_same(run, done('bf16', bf16))

@pytest.mark.parametrize('where', [kills['mid_batch'], kills['mid_validation'], dict(event='after_step', epoch=3, it=1)])
def test_killed_while_averaging(path, done, where):
    "The mean of the last three of four epochs, whose statistics are made from batches of the training loader"
    fields = whole | dict(ema=partial(SWA, share=.75))
    run = kill(path, fields, **where)
    train(path, fields, run)
    assert Run(run).last()['cbs']['swa']['n_steps']==3
    check_same(run, done('swa', fields))

def test_killed_after_found(path, done):
    "The rate that `lr_find` found is kept, and was drawn from no generator that the fit draws from"
    fields = whole | dict(lr='find')
    run = kill(path, fields, event='before_step', epoch=0, it=1)
    train(path, fields, run)
    check_same(run, done('find', fields))

in_stages = dict(first=dict(event='before_step', epoch=0, it=1), boundary=dict(event='after_epoch', epoch=0, training=False))
in_stages |= dict(finding=dict(event='before_step', epoch=1, stage=1, finding=True), write_lr=dict(write=('recipe.json',3)))
in_stages |= dict(found=dict(event='before_step', epoch=0, it=2, stage=1), second=dict(event='before_step', epoch=1, it=2, stage=1))
in_stages |= dict(write_last=dict(write=('last.ckpt',2)))

@pytest.mark.parametrize('name', in_stages)
def test_killed_in_stage(path, done, name):
    "A head alone, then all of it, each with its `lr_find`"
    run = kill(path, stages, **in_stages[name])
    train(path, stages, run)
    check_same(run, done('stages', stages))

@pytest.mark.parametrize('where', [dict(event='before_step', epoch=1, it=1), dict(event='after_loss', epoch=2, training=False)])
def test_interrupted(path, done, monkeypatch, capsys, where):
    "Ctrl-C says how to go on, and going on in the same process gives the same"
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        plant(m, interrupt, **where)
        train(path, whole)
    run, = Path('runs/imet').resolve().glob('*/fold0')
    assert f'to go on: train(resume={str(run)!r})' in capsys.readouterr().out
    assert 'not finished' in repr(Run(run))
    train(path, whole, run)
    check_same(run, done('fp32', whole))

def test_interrupted_twice(path, done, monkeypatch):
    "A run may be stopped again while it goes on"
    run = kill(path, whole, **kills['mid_batch'])
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        plant(m, interrupt, event='before_step', epoch=3, it=1)
        train(path, whole, run)
    train(path, whole, run)
    check_same(run, done('fp32', whole))

def test_seed(path, done):
    "The same seed twice gives the same run, another one another"
    again = train(path, whole).run.path
    check_same(again, done('fp32', whole))
    other = train(path, whole|dict(seed=1, folds=4)).run.path
    assert not equal(load_file(other/'model.safetensors'), load_file(again/'model.safetensors'))

def test_done_is_opened(path, done):
    "To resume a finished run trains nothing"
    run = done('fp32', whole)
    was = {o:o.stat().st_mtime_ns for o in run.iterdir()}
    learn = imet.train(resume=run)
    assert equal(dict(learn.model.state_dict()), load_file(run/'model.safetensors'))
    assert was=={o:o.stat().st_mtime_ns for o in run.iterdir()}

def test_last_is_plain(done):
    "The state holds nothing that needs unpickling"
    state = Run(done('fp32', whole)).last()   # `weights_only`
    assert {'model','opt','epoch','rng','cbs','train_iter','recorder'} <= set(state)
    assert len(state['rng']['dls'])==2
    assert set(state['cbs'])=={'ema','checkpoint','precision'}   # not the model once more for every other callback

def test_rights(done):
    "A team reads each other's runs: every file has the rights of any new file"
    run = done('fp32', whole)
    (run/'note.txt').touch()
    assert {o.name:o.stat().st_mode for o in run.iterdir()}==dict.fromkeys((o.name for o in run.iterdir()), (run/'note.txt').stat().st_mode)

def test_no_rubbish(path):
    "What a killed write left is not there when the run is done"
    run = kill(path, whole, write=('last.ckpt',2))
    train(path, whole, run)
    assert not [o.name for o in run.iterdir() if o.name.startswith('.')]

def test_resume_takes_no_fields(path, done):
    "A field that could not have an effect is refused, not ignored"
    with pytest.raises((BadField,TypeError,ValueError)): imet.train(resume=done('fp32', whole), epoch=3)
    with pytest.raises((BadField,TypeError,ValueError)): imet.train(resume=done('fp32', whole), epochs=30)

few = ways | dict(epochs=1, folds=2, precision='fp32', size=16)

def test_folds_killed(path, monkeypatch):
    "Cross-validation goes on with the fold that was stopped, with its own recipe, and trains the rest"
    want = imet.cross_validate(path, **few)
    real = fitting.fit_stage
    def stop(learn, *args):
        if learn.run.fold: raise KeyboardInterrupt
        return real(learn, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(fitting, 'fit_stage', stop)
        imet.cross_validate(path, **few)
    at = max(Path('runs/imet').iterdir(), key=lambda o: o.stat().st_mtime)
    first = (at/'fold0/done.json').stat().st_mtime_ns
    got = imet.cross_validate(path, resume=at)
    assert np.array_equal(got.p, want.p) and [o.fold for o in got.runs]==[0,1]
    assert (at/'fold0/done.json').stat().st_mtime_ns==first

def test_folds_resume_own_recipe(path):
    "Resumed folds are those of the runs that are there, whatever is passed"
    at = imet.cross_validate(path, **few).runs[0].path.parent
    got = imet.cross_validate(path, resume=at)
    assert len(got.runs)==2

def test_fold_folder_without_files(path):
    "A kill right after a fold's folder was made"
    at = Path('runs/imet/x')
    (at/'fold0').mkdir(parents=True)
    assert len(imet.cross_validate(path, resume=at, **few).runs)==2
