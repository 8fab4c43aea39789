"Folds, rounds and parts: one after another, in processes, stopped and taken up; and what is made of their runs"
import inspect, json, os, signal, subprocess, sys, traceback
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import default_device
from safetensors.torch import load_file
from scipy import sparse
import recipes
from recipes import imet
from recipes.cli import main
from recipes.data.fixtures import draw_imet
from recipes.data.folds import assign_folds
from recipes.infer.blending import blend as blend_scores
from recipes.infer.tta import as_is
from recipes.recipe import fitting, parallel
from recipes.recipe.core import BadField
from recipes.recipe.effects import effect_of_tta, held_out
from recipes.recipe.ensemble import parts_of, predict_runs, runs_in
from recipes.recipe.folder import Run
from recipes.recipe.parallel import FoldFailed, check_readable, child_env, end_with, rates_open

few = dict(arch='test_resnet', pretrained=False, size=16, resize=(), epochs=1, bs=12, folds=2, lr=3e-3, precision='fp32')

@pytest.fixture(scope='module', autouse=True)
def same_weights():
    "Same weights are promised on a CPU, with as many threads"
    was,n = default_device(),torch.get_num_threads()
    default_device(False)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
    default_device(was.type!='cpu')

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    at = tmp_path_factory.mktemp('imet')
    draw_imet(at, 48, n_test=8)
    return at

@pytest.fixture(scope='module')
def oof(path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('oof'))
        return imet.cross_validate(path, **few)

def folder_of(preds): return preds.runs[0].path.parent

def check_same(a, b):
    "Two folders of folds hold the same weights and predictions"
    names = sorted(str(o.relative_to(a)) for o in a.rglob('model.safetensors'))
    assert names and names==sorted(str(o.relative_to(b)) for o in b.rglob('model.safetensors'))
    for o in names:
        x,y = load_file(a/o),load_file(b/o)
        assert set(x)==set(y) and all(torch.equal(x[k], y[k]) for k in x), o
        for f in 'recipe.json','done.json': assert (a/o).with_name(f).read_text()==(b/o).with_name(f).read_text(), (o,f)
        assert np.array_equal(np.load((a/o).with_name('valid.npy')), np.load((b/o).with_name('valid.npy')))

# --- processes

class Here:
    "A fold's process that runs in this one"
    started = []
    def __init__(self, cmd, stdout, **kwargs):
        i = cmd.index('--parent')
        self.words,self.returncode = cmd[3:i]+cmd[i+2:],0
        Here.started.append(self)
        with redirect_stdout(stdout):
            try: main(self.words)
            except (Exception, SystemExit):
                print(traceback.format_exc())
                self.returncode = 1
    def poll(self): return self.returncode
    def terminate(self): pass
    def wait(self, timeout): pass

def swap(patch, popen):
    "Fold processes are started by `popen`; others as ever"
    patch.setattr(parallel, 'subprocess', SimpleNamespace(**vars(subprocess)|dict(Popen=popen)))

@pytest.fixture
def here(monkeypatch):
    swap(monkeypatch, Here)
    monkeypatch.setattr(Here, 'started', [])
    return Here

def test_processes(path, oof, capfd):
    "Two at a time: the same weights as one after another, a line and a log each"
    got = imet.cross_validate(path, parallel=2, **few)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(o.split(':')[0] for o in lines)==['imet.house fold 0','imet.house fold 1']
    check_same(folder_of(got), folder_of(oof))
    assert np.array_equal(got.p, oof.p) and got.score()==oof.score()
    for o in got.runs: assert 'epoch' in (o.path/'train.log').read_text()

def test_rate_found_once(path, here):
    "The first fold's rate is found, and the others get it, as one after another"
    fields = few|dict(lr='find', folds=3, run_folds=(0,2))
    want = imet.cross_validate(path, **fields)
    got = imet.cross_validate(path, parallel=2, **fields)
    check_same(folder_of(got), folder_of(want))
    assert got.runs[1].recipe.lr==got.runs[0].recipe.lr!='find'
    assert ['lr_find' in (o.path/'train.log').read_text() for o in got.runs]==[True,False]

def test_no_process_for_done(path, oof, here):
    "Folds that are done are opened"
    again = imet.cross_validate(resume=folder_of(oof), parallel=2)
    assert not here.started and np.array_equal(again.p, oof.p)

@pytest.mark.parametrize('n', [0,-1,1.5,True])
def test_bad_number(path, n):
    with pytest.raises(ValueError, match='whole number'): imet.cross_validate(path, parallel=n, **few)

mine = '''from pathlib import Path
def order(table, rows):
    "Breaks in the fold that trains on the first row, while a file is there"
    if Path('broken').exists() and 0 in rows: raise RuntimeError('the loader is broken')
    return In(rows)
class In:
    def __init__(self, rows): self.n = len(rows)
    def __len__(self): return self.n
    def __call__(self, rng): return rng.sample(range(self.n), self.n)
'''

@pytest.fixture
def module(monkeypatch):
    "A module of the user's own, in the working folder"
    Path('mine.py').write_text(mine)
    monkeypatch.syspath_prepend(Path.cwd())
    sys.modules.pop('mine', None)
    import mine as o
    yield o
    sys.modules.pop('mine')

def test_failing(path, module, here, capsys):
    "The log's end is shown, what is done stays, and the rest is trained when the fault is mended"
    recipe = imet.house.but(sampler=module.order, **few)
    bad = 1-assign_folds(imet.table(path), 2, recipe.seed)[0]
    Path('broken').touch()
    with pytest.raises(FoldFailed, match=f'fold {bad} failed.*resume='): imet.cross_validate(path, parallel=2, recipe=recipe)
    out = capsys.readouterr().out
    assert f'fold {bad} failed with status 1' in out and 'RuntimeError: the loader is broken' in out
    at, = Path('runs/imet').iterdir()
    made = [o for o in (0,1) if (at/f'fold{o}/done.json').exists()]
    assert bad not in made
    Path('broken').unlink()
    here.started.clear()
    got = imet.cross_validate(resume=at, parallel=2, recipe=recipe)
    assert len(here.started)==2-len(made)
    assert 'mine' in here.started[0].words and np.array_equal(got.p, imet.cross_validate(path, recipe=recipe).p)

def test_unreadable(path, monkeypatch):
    "A function that was typed in is named, before anything is made"
    def typed(): pass
    typed.__module__,typed.__qualname__ = '__main__','typed'
    with pytest.raises(ValueError, match='typed was defined in a notebook.*put it into a module'):
        imet.cross_validate(path, parallel=2, **few|dict(loss=typed))
    assert not Path('runs').exists()
    assert check_readable(imet.house.but(loss=test_unreadable))==(__name__,)

fake = '''#!{python}
import json, os, sys, time
from pathlib import Path
at = Path(sys.argv[sys.argv.index('--resume')+1])
time.sleep(.6)
recipe = json.loads((at/'recipe.json').read_text())
log = dict(lr=recipe['lr'], began=time.time()-.6, found=time.time(), threads=os.environ['OMP_NUM_THREADS'], gpu=os.environ.get('CUDA_VISIBLE_DEVICES'))
if recipe['lr']=='find':
    (at/'.r').write_text(json.dumps(recipe|dict(lr=.125)))
    os.replace(at/'.r', at/'recipe.json')
time.sleep(.9)
(at/'log').write_text(json.dumps(log|dict(ended=time.time())))
(at/'done.json').write_text('{{"score": 0.5, "values": {{}}}}')
'''

@pytest.fixture
def fakes(monkeypatch):
    "Processes that only say what they were given"
    Path('fake').write_text(fake.format(python=sys.executable))
    os.chmod('fake', 0o755)
    monkeypatch.setattr(parallel.sys, 'executable', str(Path('fake').absolute()))
    monkeypatch.setattr(parallel.torch, 'get_num_threads', lambda: 8)

def test_schedule(path, fakes, monkeypatch):
    "At most three at a time; the first alone until its rate is known, which the others get; cores and GPUs are shared"
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,6')
    recipe = imet.house.but(**few|dict(lr='find', folds=5))
    parallel.train_apart(recipe, imet.table(path), range(5), Path('at'), parallel=3)
    logs = [json.loads((Path('at')/f'fold{o}/log').read_text()) for o in range(5)]
    assert [o['lr'] for o in logs]==['find']+[.125]*4
    assert all(o['began']>logs[0]['found']-.1 for o in logs[1:]) and logs[1]['began']<logs[0]['ended']
    assert max(sum(o['began']<=t<o['ended'] for o in logs) for t in [o['began']+.05 for o in logs])==3
    assert {o['threads'] for o in logs}=={'2'} and {o['gpu'] for o in logs}=={'4','6'}

def test_interrupt(path, fakes, monkeypatch, capsys):
    "Ctrl-C ends the processes and says how to go on"
    procs = []
    def popen(*args, **kwargs): return procs.append(subprocess.Popen(*args, **kwargs)) or procs[-1]
    def stop(_): raise KeyboardInterrupt
    swap(monkeypatch, popen)
    monkeypatch.setattr(parallel, 'time', SimpleNamespace(sleep=stop))
    with pytest.raises(KeyboardInterrupt): imet.cross_validate(path, parallel=2, **few)
    assert [o.returncode for o in procs]==[-signal.SIGTERM]*2
    at, = Path('runs/imet').resolve().iterdir()
    assert f'to go on: cross_validate(resume={str(at)!r})' in capsys.readouterr().out

def test_orphan():
    "A process ends with the one that started it, even if that one was killed"
    child = f'import os, time\nfrom threading import Thread\n{inspect.getsource(end_with)}\nend_with(os.getppid())\nprint("up", flush=True)\ntime.sleep(60)'
    code = f'import subprocess, sys\nsubprocess.run([sys.executable, "-c", {child!r}])'
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    assert p.stdout.readline()==b'up\n'
    p.kill()
    signal.alarm(20)   # the pipe closes when the last one that holds it is gone
    try: assert p.stdout.read()==b''
    finally: signal.alarm(0)

def test_rates_open():
    "What the others wait for"
    find,given = imet.house,imet.house.but(lr=1e-3)
    assert rates_open(find.but(stages=(dict(lr=1e-3),dict()))) and not rates_open(find.but(stages=(dict(lr=1e-3),dict(lr=1.))))
    assert rates_open(given.but(parts=(given,find))) and not rates_open(find.but(parts=(given,)))

def test_threads(monkeypatch):
    monkeypatch.setattr(parallel.torch, 'get_num_threads', lambda: 3)
    assert [child_env(0, o)['OMP_NUM_THREADS'] for o in (1,2,4)]==['3','1','1']

# --- rounds

seen = []

class Recorded:
    "Remembers which pictures, with which labels, each epoch was trained on"
    def __init__(self, table, rows): self.rows = dict(zip(table.train.id.iloc[rows], table.y[rows].toarray().tolist()))
    def __len__(self): return len(self.rows)
    def __call__(self, rng):
        seen.append(self.rows)
        return rng.sample(range(len(self)), len(self))

def record(table, rows): return Recorded(table, rows)

def errors(predictions): return np.abs(predictions.p-predictions.y.toarray()).mean(1)

def cleaner(table, predictions, n=8):
    "Without the rows that were predicted worst, in another order, and with wrong labels"
    keep = predictions.rows[np.argsort(errors(predictions))[:-n]]
    more = table.subset(keep[::-1])
    return replace(more, y=sparse.csr_matrix(1-more.y.toarray()))

def pseudo(table, predictions):
    "The test pictures too, labelled by the runs before"
    test = predict_runs(predictions.runs)
    y = sparse.vstack([table.y, test.decide().astype(np.float32)]).tocsr()
    return replace(table, train=pd.concat([table.train, table.test], ignore_index=True), y=y)

def check_untouched(preds, before):
    "Held-out rows are all there, and have the truth of the files"
    assert preds.rows.tolist()==list(range(48)) and np.array_equal(preds.folds, before.folds)
    assert (preds.y!=before.table.y).nnz==0 and list(preds.ids)==before.table.train.id.tolist()

def test_rows_dropped(path, oof):
    "The second round trains on what `data` left, never on a held-out row, and holds out the same rows as the first"
    seen.clear()
    got = imet.cross_validate(path, **few|dict(rounds=(dict(),dict(data=cleaner)), sampler=record))
    check_untouched(got, oof)
    first = held_out(runs_in(folder_of(got).parent/'round0', (__name__,)))
    dropped = set(np.array(first.ids)[np.argsort(errors(first))[-8:]])
    for k,ids in enumerate(seen[-2:]):
        rest = set(np.array(got.ids)[got.folds!=k])
        assert set(ids)==rest-dropped and len(ids)<len(rest)
        want = dict(zip(got.ids, 1-got.table.y.toarray()))
        assert all(np.array_equal(want[o], y) for o,y in ids.items())
    for run in got.runs: assert run.score==run.valid.score() and (run.valid.y!=got.table.y[run.valid.rows]).nnz==0
    assert not np.allclose(first.p, got.p)

def test_pseudo_rows(path, oof):
    "Test pictures are trained on with their pseudo labels, and none is held out"
    seen.clear()
    got = imet.cross_validate(path, **few|dict(rounds=(dict(),dict(data=pseudo)), sampler=record))
    check_untouched(got, oof)
    labels = predict_runs(runs_in(folder_of(got).parent/'round0', (__name__,))).decide().toarray()
    for k,ids in enumerate(seen[-2:]):
        assert set(ids)=={*np.array(got.ids)[got.folds!=k], *got.table.test.id}
        assert all(ids[o]==y.tolist() for o,y in zip(got.table.test.id, labels.astype(float)))

def test_rounds_apart(path, here):
    "In processes, with the round before as a folder: the same"
    recipe = imet.house.but(**few|dict(rounds=(dict(),dict(data=pseudo))))
    want = imet.cross_validate(path, recipe=recipe)
    got = imet.cross_validate(path, parallel=2, recipe=recipe)
    check_same(folder_of(got).parent, folder_of(want).parent)
    assert '--prior' in here.started[-1].words and '--prior' not in here.started[0].words
    assert here.started[-1].words[-1]==__name__

def test_rounds_resumed(path, monkeypatch):
    "Stopped in the second round: the first is not trained again, and the folder knows its rounds"
    recipe = imet.house.but(**few|dict(rounds=(dict(),dict(data=pseudo))))
    real = fitting.fit_stage
    def stop(learn, *args):
        if learn.run.recipe.data and learn.run.fold: raise KeyboardInterrupt
        return real(learn, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(fitting, 'fit_stage', stop)
        imet.cross_validate(path, recipe=recipe)
    at, = Path('runs/imet').iterdir()
    was = {o:o.stat().st_mtime_ns for o in at.rglob('done.json')}
    assert len(was)==3
    with pytest.raises(BadField, match='keeps its own fields'): imet.cross_validate(path, resume=at, epochs=2)
    got = imet.cross_validate(resume=at, recipe=recipe)
    assert was=={o:o.stat().st_mtime_ns for o in was} and folder_of(got).name=='round1'
    assert [o.path for o in runs_in(at, (__name__,))]==[o.path for o in got.runs]

def test_one_round_by_hand(path, oof):
    "`train` takes the round before as runs or as their folder"
    fields = few|dict(data=pseudo, sampler=record)
    a,b = (imet.train(path, fold=1, prior=o, **fields).run for o in (oof.runs, folder_of(oof)))
    assert np.array_equal(a.valid.p, b.valid.p) and len(seen[-1])==len(b.table)-len(b.valid)+8

# --- parts

def mostly_first(predictions, table): return blend_scores(predictions, [3,1])

small = imet.house.but(**few)
parted = imet.house.but(name='both', parts=(small,small.but(size=24, lr='find')), join=mostly_first, **few)

@pytest.fixture(scope='module')
def joined(path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('parts'))
        return imet.cross_validate(path, recipe=parted)

def test_parts(path, joined):
    "Held-out and test scores are joined as the recipe says, also when the run is opened later"
    for run in joined.runs:
        a,b = parts_of(run)
        assert a.recipe.size==16 and b.recipe.size==24 and a.valid.ids==run.valid.ids
        assert np.allclose(run.valid.p, .75*a.valid.p+.25*b.valid.p, atol=1e-6) and run.score==run.valid.score()
    one = joined.runs[0]
    each = [imet.predict(o).p for o in parts_of(one)]
    assert np.allclose(imet.predict(one).p, .75*each[0]+.25*each[1], atol=1e-6)
    test = imet.predict(joined.runs)
    assert test.values==joined.values and test.submit('s.csv').exists()

def test_parts_hold_out_the_same(path):
    "Refused before anything is trained"
    with pytest.raises(ValueError, match=r'part 1 of both holds out other rows in fold 0: \d+ of 24'):
        imet.train(path, recipe=parted.but(parts=(small,small.but(seed=1))))
    assert not [*Path('runs').rglob('model.safetensors')]

def test_parts_keep_rates(joined):
    "Each part's rate is found once"
    lrs = [[o.lr for o in run.recipe.parts] for run in joined.runs]
    assert lrs[0]==lrs[1] and 'find' not in lrs[0]
    assert [o.recipe.lr for o in parts_of(joined.runs[1])]==lrs[0]

def test_parts_apart(path, joined, here):
    "Parts run inside their fold's process"
    got = imet.cross_validate(path, recipe=parted, parallel=2)
    check_same(folder_of(got), folder_of(joined))
    assert len(here.started)==2

def test_parts_resumed(path, joined, monkeypatch):
    "Stopped in the second part: the first is opened"
    real = fitting.fit_stage
    def stop(learn, *args):
        if learn.run.recipe.size==24: raise KeyboardInterrupt
        return real(learn, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(fitting, 'fit_stage', stop)
        imet.train(path, recipe=parted)
    run, = Path('runs/imet').glob('*/fold0')
    first = (run/'part0/fold0/done.json').stat().st_mtime_ns
    got = imet.train(resume=Run(run, modules=(__name__,)))
    assert isinstance(got, Run) and got.done and (run/'part0/fold0/done.json').stat().st_mtime_ns==first
    assert np.array_equal(got.valid.p, joined.runs[0].valid.p)

# --- what stands for predictions, blends and views

def test_folder_knows_its_data(path, oof, capsys):
    "To go on needs no `path`"
    at = folder_of(oof)
    assert imet.cross_validate(resume=at).table.path==path
    assert 'sample' not in capsys.readouterr().out

def test_held_out(oof):
    "A run, a learner, a path, a folder, a list"
    one = oof.runs[0]
    for o in one,one.path,str(one.path),one.learner(),[one]: assert np.array_equal(held_out(o).p, one.valid.p)
    for o in oof,folder_of(oof),oof.runs,[r.path for r in oof.runs]: assert np.array_equal(held_out(o).p, oof.p)
    with pytest.raises(FileNotFoundError, match='has no runs'): held_out(Path.cwd())

def test_blend(path, oof, joined, capsys):
    "Different networks and different folds, from anything"
    got = recipes.blend([folder_of(oof),joined.runs], [1,3])
    assert np.allclose(got.p, .25*oof.p+.75*joined.p) and got.rows.tolist()==list(range(48))
    some = recipes.blend([oof,joined.runs[1]])
    assert some.rows.tolist()==joined.runs[1].valid.rows.tolist() and 'in all of the 2 predictions, which have 48' in capsys.readouterr().out
    test = recipes.blend([imet.predict(oof.runs),imet.predict(joined.runs)], 'find')
    assert test.weights.tolist()==recipes.blend([oof,joined], 'find').weights.tolist()
    assert test.submit('s.csv').exists() and len(test.oof.report(20))==3

def test_tta(oof, joined, capsys):
    "With both views the predictions are those of the runs; the gain is the difference of the scores"
    df = effect_of_tta(oof, n=50)
    assert capsys.readouterr().out.startswith('hflip: ') and list(df.index)==['hflip'] and df.pictures.tolist()==[48]
    flip = [imet.predict(o, test=o.table.train.iloc[o.valid.rows], tta=(as_is,)).p for o in oof.runs]
    p = np.zeros_like(oof.p)
    for run,o in zip(oof.runs, flip): p[run.valid.rows] = o
    bare = held_out(oof.runs)
    bare.p = p
    assert df.score['hflip']==pytest.approx(oof.score()) and df.gain['hflip']==pytest.approx(oof.score()-bare.score())
    assert (df.low<=df.gain).all() and (df.gain<=df.high).all()
    assert effect_of_tta(joined, n=20).loc['hflip','score']==pytest.approx(joined.score())
