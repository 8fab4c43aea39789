"A run and the data it was made from: other classes, other rows, new files are noticed; folds and lengths mean what they say"
import shutil, time
import numpy as np, pytest
from dataclasses import replace
from fastai.callback.core import Callback
from functools import partial
from pathlib import Path
from callbacks.schedule import flat
from callbacks.stuck import plateau, switch
from recipes import animal, whale
from recipes.cli import main
from recipes.data.fixtures import sample
from recipes.infer.blending import blend
from recipes.infer.predictions import Predictions
from recipes.recipe import fitting
from recipes.recipe.build import folds_of
from recipes.recipe.core import BadField
from recipes.recipe.ensemble import predict_runs
from recipes.recipe.folder import Run
from recipes.recipe.settling import changed

tiny = dict(arch='test_resnet', pretrained=False, size=24, resize=(), bs=16, epochs=2, folds=3, lr=3e-3, precision='fp32', schedule=flat, cache=False)

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

@pytest.fixture
def files(tmp_path): return Path(shutil.copytree(sample('animal', 60), tmp_path/'files'))

def edit(files, f):
    "Change the lines of train.csv"
    at = files/'train.csv'
    head,*rows = at.read_text().splitlines()
    at.write_text('\n'.join([head, *f(rows)])+'\n')

class Stop(Callback):
    "An interrupt after the first epoch"
    order = 95
    def after_epoch(self): raise KeyboardInterrupt

def test_other_classes(files):
    "As many, but not the same: each column would stand for another"
    run = animal.train(files, **tiny).run
    assert Run(run.path).valid.score()==pytest.approx(run.score)
    first = run.table.vocab[0]
    edit(files, lambda rows: [o.replace(f',{first}', ',zz') for o in rows])
    opened = partial(Run, run.path)
    for call in (lambda: opened().learner(), lambda: opened().valid, lambda: predict_runs(run.path), lambda: opened(table=animal.table(files))):
        with pytest.raises(ValueError, match=f"trained on .*number 1 '{first}'"): call()

def test_blend_of_other_classes():
    table = animal.table(sample('animal', 60))
    other = replace(table, vocab=[*table.vocab[1:],'zz'], names=None)
    def perfect(t): return Predictions(np.eye(len(t.vocab), dtype=np.float32)[t.y], list(t.train.id), t, animal.competition, animal.house.rule,
        rows=np.arange(len(t)), folds=np.zeros(len(t), int))
    assert blend([perfect(table)]*2).score()==1
    with pytest.raises(ValueError, match='different classes'): blend([perfect(table),perfect(other)])

def test_other_rows(files, monkeypatch):
    "Folds are dealt from the table: one row less, and pictures that were trained on would be held out"
    real = fitting.stage_cbs
    with monkeypatch.context() as m:
        m.setattr(fitting, 'stage_cbs', lambda step: [*real(step), Stop()])
        with pytest.raises(KeyboardInterrupt): animal.train(files, **tiny)
    oof = animal.cross_validate(files, run_folds=(0,1), **tiny)
    whole = oof.runs[0].path.parent
    text = (files/'train.csv').read_text()
    edit(files, lambda rows: rows[1:])
    begun = next(o.parent for o in Path('runs').glob('animal/*/fold0/last.ckpt') if not (o.parent/'done.json').exists())
    with pytest.raises(ValueError, match='begun with other training rows'): animal.train(resume=begun)
    with pytest.raises(ValueError, match='begun with other training rows'): animal.cross_validate(resume=whole)
    (files/'train.csv').write_text(text)
    assert animal.train(resume=begun).run.done and len(animal.cross_validate(resume=whole).runs)==2

def test_resumed_runs_keep_their_data(files):
    run = animal.train(files, **tiny).run
    for o in (dict(path='elsewhere'),dict(fold=1)):
        with pytest.raises(BadField, match=f'leave out {[*o][0]}'): animal.train(resume=run.path, **o)

def test_new_pictures_are_seen(files):
    "Also in folders of classes, where no table changes"
    rows = [o.split(',') for o in (files/'train.csv').read_text().splitlines()[1:]]
    at,n = files/'classes',0
    table = animal.table(files)
    for path,y in zip(table.train.path, table.y):
        to = at/'train'/table.vocab[y]/Path(path).name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    shutil.copytree(files/'test', at/'test')
    n = len(animal.table(at))
    assert n==len(rows)
    time.sleep(.02)
    shutil.copyfile(to, to.parent/'another.jpg')
    assert len(animal.table(at))==n+1

def test_a_number_of_folds_for_identities():
    "The only picture of an id is never held out: nothing could be known of it"
    table = whale.table(sample('whale', 120))
    folds = folds_of(whale.house.but(folds=5), table)
    known = table.y<len(table.vocab)
    only = known&(np.bincount(table.y)[table.y]==1)
    assert only.any() and (folds[only]==-1).all() and (folds[~only]>=0).all() and folds.max()==4
    assert (folds_of(animal.house.but(folds=5), animal.table(sample('animal', 60)))>=0).all()

@pytest.mark.parametrize('schedule', [plateau,partial(switch, to_lr=1e-2)])
def test_nothing_to_go_by(files, schedule):
    "Who waits for a validation loss says so where nothing is held out"
    with pytest.warns(UserWarning, match='nothing is held out'): animal.train(files, fold='all', prior=[animal.train(files, **tiny).run], **tiny|dict(schedule=schedule))

def test_lengths():
    "Freezing goes with its stage, seeds of rounds stay apart, nothing is trained in 0 epochs"
    long = changed(whale.seventh, dict(epochs=400)).steps()
    assert [(o.epochs,o.freeze) for o in long]==[(200,200),(200,0)]
    assert [(o.epochs,o.freeze) for o in changed(whale.fifth, dict(epochs=160)).steps()][0]==(4,4)
    part = animal.house.but(epochs=6, freeze=3)
    assert changed(part, dict(epochs=3)).freeze==2 and changed(part, dict(epochs=1)).freeze==0 and changed(part, dict(epochs=3, freeze=3)).freeze==3
    assert [o.get('seed') for o in changed(whale.fifth, dict(seed=7)).rounds]==[None,8,9]
    for stages in ((dict(epochs=3, freeze=3),dict(epochs=5)),(dict(epochs=2),dict()),(dict(),dict())):
        assert [o.epochs for o in changed(animal.house.but(stages=stages), dict(epochs=0)).steps()]==[0,0]

def test_precision_of_each_stage(files, monkeypatch):
    "A stage's own, whether the run began there or before"
    seen,real = [],fitting.stage_cbs
    class Look(Callback):
        def before_fit(self): seen.append(self.learn.precision.dtype)
    monkeypatch.setattr(fitting, 'stage_cbs', lambda step: [*real(step), Look()])
    animal.train(files, **tiny|dict(stages=(dict(epochs=1),dict(epochs=1, precision='bf16'))))
    assert seen==['fp32','bf16']

def test_fewer_drawn_than_a_batch(files):
    "A sampler that draws a few pictures makes a small batch, not none"
    few = partial(draw, n=6)
    assert len(animal.train(files, **tiny|dict(sampler=few)).run.history)==2

def draw(table, rows, n):
    class Order:
        def __len__(self): return n
        def __call__(self, rng): return [rng.randrange(len(rows)) for _ in range(n)]
    return Order()

def test_words_too_many():
    "A folder without --path is no folder"
    for o in (['cost','animal','DIR'],['audit','animal','DIR'],['train','animal','DIR'],['show','animal','DIR']):
        with pytest.raises(SystemExit, match="'DIR' beside animal.*--path"): main(o)

def test_kept_scores(files):
    "What a budget had predicted is taken, once it is asked for"
    learn = animal.train(files, test=True, **tiny)
    kept = np.load(learn.run.path/'test.npy')
    (learn.run.path/'test.npy').unlink()
    np.save(learn.run.path/'test.npy', kept+1)
    assert np.array_equal(predict_runs(learn, kept=True).p, kept+1)
    assert np.allclose(predict_runs(learn).p, kept, atol=1e-5)

def test_one_fold_by_its_number(files): assert [o.fold for o in animal.cross_validate(files, run_folds=0, **tiny).runs]==[0]

def test_predict_takes_the_folder_of_folds(files):
    oof = animal.cross_validate(files, run_folds=(0,1), **tiny)
    main(['predict', str(oof.runs[0].path.parent), '--out', 'all.csv'])
    predict_runs(oof.runs).submit('same.csv')
    assert Path('all.csv').read_text()==Path('same.csv').read_text()

def test_batches_are_those_of_training():
    "`dls` shows the rows that `train` makes of the table"
    table = animal.table(sample('animal', 60))
    shown,all_ = (animal.dls(table.path, **tiny|dict(data=o)) for o in (half,None))
    assert len(shown.train.dataset)==len(all_.train.dataset)//2 and len(shown.valid.dataset)==len(all_.valid.dataset)

def half(table, prior):
    held = folds_of(animal.house.but(**{k:v for k,v in tiny.items()}), table)==0
    return table.subset(np.sort(np.r_[np.flatnonzero(held), np.flatnonzero(~held)[::2]]))
