"Trackers read back: every batch once, through stages and after an interrupt; config; nothing sent anywhere"
import json, os, socket, struct, subprocess, sys
import pytest
from functools import partial
from pathlib import Path
from fastai.callback.core import Callback
from recipes import animal
from recipes.data.fixtures import sample
from recipes.look.trackers import Track, config_of, tensorboard, trackio_run, wandb_run
from recipes.recipe.core import from_json

kw = dict(arch='test_resnet', pretrained=False, size=32, bs=16, lr=1e-3, precision='fp32', tta=())

@pytest.fixture(scope='module')
def path(): return sample('animal', 60)

@pytest.fixture
def offline(monkeypatch):
    "Only this machine can be reached"
    def local(f):
        def call(self, address, *args):
            assert self.family==socket.AF_UNIX or address[0] in ('127.0.0.1','::1','localhost'), f'{address} was called'
            return f(self, address, *args)
        return call
    for o in ('connect','connect_ex'): monkeypatch.setattr(socket.socket, o, local(getattr(socket.socket, o)))

def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    seen = EventAccumulator(str(folder)).Reload()
    return {k:[(o.step,o.value) for o in seen.Scalars(k)] for k in seen.Tags()['scalars']},seen

class Stop(Callback):
    "An interrupt in the middle of the third epoch"
    on = True
    def after_batch(self):
        if Stop.on and self.epoch==2 and self.iter==1 and self.training: raise KeyboardInterrupt

def stopping(): return [*tensorboard(),Stop()]

def test_tensorboard_after_an_interrupt(path, offline, monkeypatch):
    pytest.importorskip('tensorboard')
    monkeypatch.setattr(Stop, 'on', False)
    whole = animal.train(path, epochs=4, cbs=stopping, recipe=animal.house, **kw)
    n = len(whole.dls.train)
    want,seen = scalars(whole.run.path/'tensorboard')
    assert [o for o,_ in want['train_loss']]==[*range(1, 4*n+1)] and [o for o,_ in want['top1']]==[n,2*n,3*n,4*n]
    assert set(want)=={'train_loss','valid_loss','top1','lr'}
    assert want['top1'][-1][1]==pytest.approx(whole.run.history.top1.iloc[-1])
    text = seen.Tensors('recipe/text_summary')[0].tensor_proto.string_val[0].decode()
    assert 'lr = 0.001' in text and 'opt = adamw(wd=0.05)' in text and 'fold = 0' in text
    monkeypatch.setattr(Stop, 'on', True)
    with pytest.raises(KeyboardInterrupt): animal.train(path, epochs=4, cbs=stopping, **kw)
    monkeypatch.setattr(Stop, 'on', False)
    run = sorted(whole.run.path.parent.parent.iterdir())[-1]/'fold0'
    assert run!=whole.run.path
    animal.train(resume=trackers_run(run))
    assert scalars(run/'tensorboard')[0]==want

def trackers_run(path):
    from recipes.recipe.folder import Run
    return Run(path, modules=(__name__,))

class Kept:
    "A tracker in memory"
    rows,closed,configs = [],0,[]

def to_memory(learn, step):
    Kept.configs.append((step,config_of(learn)))
    def close(): Kept.closed += 1
    return (lambda values,at: Kept.rows.append((at,values))),close
def in_memory(): return [Track(to_memory)]

def test_batches_are_counted_through_stages(path):
    Kept.rows,Kept.closed,Kept.configs = [],0,[]
    learn = animal.train(path, epochs=3, stages=(dict(epochs=1),dict(epochs=2, lr=1e-4)), cbs=in_memory, **{k:v for k,v in kw.items() if k!='lr'}|dict(lr='find'))
    n = len(learn.dls.train)
    assert [o for o,v in Kept.rows if 'lr' in v]==[*range(1, 3*n+1)] and Kept.closed==2
    assert [o for o,_ in Kept.configs]==[0,n] and Kept.configs[0][1]['epochs']=='3'
    assert [o for o,v in Kept.rows if 'top1' in v]==[n,2*n,3*n]
    rows = len(Kept.rows)
    learn.validate(cbs=in_memory())
    assert len(Kept.rows)==rows   # nothing is trained

class Once(Callback):
    "An interrupt in the first epoch of the second stage"
    on = True
    def after_batch(self):
        if not Once.on or self.learn.checkpoint.stage!=1 or not self.training: return
        Once.on = False
        raise KeyboardInterrupt

def in_memory_once(): return [Track(to_memory),Once()]

def test_batches_after_an_interrupt_between_stages(path):
    Kept.rows,Kept.closed,Kept.configs = [],0,[]
    fields = dict(kw, epochs=3, stages=(dict(epochs=2),dict(epochs=1)), cbs=in_memory_once)
    with pytest.raises(KeyboardInterrupt): animal.train(path, **fields)
    n = Kept.configs[1][0]
    from recipes.data.settings import setting
    run = sorted(Path(setting('runs')).glob('animal/*/fold0'), key=lambda o: o.stat().st_mtime)[-1]
    animal.train(resume=trackers_run(run))
    assert [o for o,_ in Kept.configs]==[0,n,n] and max(o for o,_ in Kept.rows)==3*n//2

def test_a_learner_without_a_run(path):
    Kept.rows = []
    learn = animal.learner(path=path, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=in_memory())
    assert [o for o,v in Kept.rows if 'lr' in v]==[*range(1, len(learn.dls.train)+1)] and Kept.configs[-1]==(0,{})

def test_recipes_with_trackers_are_read_back():
    for o in (tensorboard, wandb_run, trackio_run, partial(wandb_run, project='met')):
        recipe = animal.house.but(cbs=o)
        assert from_json(recipe.to_json())==recipe

def test_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    monkeypatch.setitem(sys.modules, 'trackio', None)
    for f,o in ((wandb_run,'wandb'), (trackio_run,'trackio')):
        with pytest.raises(ImportError, match=rf"pip install 'fastai-recipes\[{o}\]'"): f()

def leveldb(data, size=2**15, head=7):
    "Records of a LevelDB log, which W&B writes behind a head of 7 bytes that counts as part of the first block"
    at,part = head,b''
    data = bytes(head)+data
    while at+head<=len(data):
        if size-at%size<head:
            at += size-at%size
            continue
        n,kind = struct.unpack('<HB', data[at+4:at+7])
        part,at = part+data[at+7:at+7+n],at+7+n
        if kind in (1,4):
            yield part
            part = b''

def test_wandb_offline(path, offline, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.delenv('WANDB_MODE', raising=False)
    with pytest.raises(ValueError, match='offline'): wandb_run(mode='no')
    learn = animal.train(path, epochs=1, cbs=partial(wandb_run, project='met'), **kw)
    folder, = (learn.run.path/'wandb').glob('offline-run-*')
    f, = folder.glob('*.wandb')
    from wandb.proto import wandb_internal_pb2 as pb
    records = []
    for o in leveldb(f.read_bytes()[7:]):
        records.append(pb.Record())
        records[-1].ParseFromString(o)
    kinds = [o.WhichOneof('record_type') for o in records]
    run = records[kinds.index('run')].run
    config = {o.key:json.loads(o.value_json) for o in run.config.update}
    assert run.project=='met' and run.run_id==f'{learn.run.path.parent.name}-fold0' and config['opt']=='adamw(wd=0.05)'
    rows = [{'/'.join(i.nested_key) or i.key:json.loads(i.value_json) for i in o.history.item} for o,k in zip(records, kinds) if k=='history']
    assert [o['_step'] for o in rows]==[*range(1, len(learn.dls.train)+1)]
    assert rows[-1]['top1']==pytest.approx(learn.run.history.top1.iloc[-1]) and all(o['lr']>0 for o in rows)

def test_trackio_stays_here(path, offline, tmp_path):
    pytest.importorskip('trackio')
    script = f"""
import socket
def refuse(self, address, *args): raise OSError(f'called {{address}}')
socket.socket.connect = refuse
from recipes import animal
from recipes.look.trackers import trackio_run
learn = animal.train({str(path)!r}, epochs=1, cbs=trackio_run, **{kw!r})
import trackio
run, = trackio.Api().runs('animal')
print('SEEN', run.name, len(learn.dls.train), run.history() if hasattr(run, 'history') else '')
"""
    env = os.environ | dict(TRACKIO_DIR=str(tmp_path/'trackio'), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    out = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert out.returncode==0, out.stderr[-2000:]
    assert 'SEEN' in out.stdout and list((tmp_path/'trackio').glob('animal*'))
