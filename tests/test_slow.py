"Every named recipe, trained two epochs on its task's sample to a submission the competition would take"
import numpy as np, pandas as pd, pytest
from functools import cache, partial
from importlib import import_module
from recipes import imet
from recipes.words import named
from recipes.data.fixtures import sample
from recipes.data.unseen import unseen_graphemes
from recipes.recipe.ensemble import parts_of

pytestmark = pytest.mark.slow
tasks = {o:import_module(f'recipes.{o}') for o in ('imet','bengali','animal')}
small = dict(arch='test_resnet', pretrained=False)   # instead of the real network; all else but size and epochs is as written
fits = {'bengali.argus':dict(folds=partial(unseen_graphemes, n=5, held=20))}   # the sample has fewer graphemes than the recipe holds out
alone = {f'{t}.{k}':v for t,task in tasks.items() for k,v in named(task).items() if not v.parts}

def but(recipe):
    "The recipe, and each of its parts, with a tiny network; two epochs, or one in each stage that says how many"
    parts = tuple(but(o) for o in recipe.parts)
    stages = tuple(o|{k:v for k,v in dict(size=64, epochs=1).items() if k in o} for o in recipe.stages)
    rounds = tuple(o|dict(parts=tuple(but(p) for p in o.get('parts', ()))) for o in recipe.rounds)
    more = fits.get(f'{recipe.competition.name}.{recipe.name}', {})
    return recipe.but(**small, size=64, epochs=2, stages=stages, parts=parts, rounds=rounds, **more)

@cache
def folder(name): return sample(name, 240)   # enough for 40 folds

def check_imet(df):
    vocab = {str(i) for i in range(30)}
    assert df.attribute_ids.str.split().map(lambda o: len(o)>0 and set(o)<=vocab and len(o)==len(set(o))).all()

def check_bengali(df):
    sizes = dict(grapheme_root=168, vowel_diacritic=11, consonant_diacritic=7)
    assert all(0<=int(v)<sizes[i.split('_', 2)[2]] for i,v in zip(df.row_id, df.target))

def check_animal(df): assert set(df.label)<={'hare','bear','fox','deer','bird','snake'}

checks = dict(imet=check_imet, bengali=check_bengali, animal=check_animal)

def submitted(runs, path, name='imet'):
    "A submission's frame, as written: the sample's ids in its order, and nothing but labels there are"
    f = tasks[name].predict(runs).submit('submission.csv')
    df,want = (pd.read_csv(o, dtype=str, keep_default_na=False) for o in (f, path/'sample_submission.csv'))
    assert list(df)==list(want) and df.iloc[:,0].tolist()==want.iloc[:,0].tolist()
    checks[name](df)
    return df

@pytest.mark.parametrize('name', alone)
def test_trained(name):
    task,recipe = name.split('.')[0],but(alone[name]).but(rounds=())
    fold = (recipe.run_folds or (0,))[-1]
    run = tasks[task].train(folder(task), fold=fold, recipe=recipe).run
    assert run.done and len(run.history)==max(2, len(recipe.stages)) and 0<run.score<1
    assert run.history.train_loss.notna().all() and (run.history.train_loss.iloc[-1]<run.history.train_loss.iloc[0]*1.5)
    submitted(run.path, folder(task), task)

def test_parts():
    "Several networks, one submission"
    recipe = but(imet.yk_nets)
    runs = [imet.train(folder('imet'), fold=o.run_folds[0], recipe=o).run for o in recipe.parts]
    df = submitted([o.path for o in runs], folder('imet'))
    assert len(runs)==3 and df.attribute_ids.nunique()>1

def test_parts_whole():
    "A recipe of parts trains all of them itself"
    run = imet.train(folder('imet'), fold=5, recipe=but(imet.yk_nets))
    run = getattr(run, 'run', run)
    assert run.done and len(list(run.path.rglob('model.safetensors')))==3
    submitted(run, folder('imet'))

@pytest.mark.parametrize('name', ['first','second'])
def test_rounds(name):
    "Every round of a winner, with two folds, and a submission from the last"
    recipe = but(getattr(imet, name))
    steps = [o|dict(parts=tuple(p.but(folds=2, epochs=max(1, len(p.stages))) for p in o['parts'])) for o in recipe.rounds]
    oof = imet.cross_validate(folder('imet'), recipe=recipe.but(folds=2, rounds=tuple(steps)))
    assert len(oof)==240 and 0<oof.score()<1
    more = [o.trained_on for r in oof.runs for o in parts_of(r)]
    assert all((o.train.source=='pseudo').sum()>0 for o in more) and set(oof.ids)==set(oof.table.train.id)
    submitted(oof.runs, folder('imet'))

def commonest(table):
    "Decisions that are the same for every picture: the commonest class of each head, or three labels"
    if table.is_multi: return np.stack([np.full(len(table), counts.argmax()) for *_,counts in table.heads], 1)
    (_,_,counts), = table.heads
    if table.y.ndim==1: return np.full(len(table), counts.argmax())
    always = table.y.toarray()*0
    always[:,counts.argsort()[-3:]] = 1
    return always

@pytest.mark.parametrize('name', tasks)
def test_house_learns(name):
    "Well above the commonest labels, where there is time for it"
    task = tasks[name]
    learn = task.train(folder(name), **small, size=48, resize=(), epochs=12, bs=16, lr=1e-2, precision='fp32')
    table = learn.table
    assert learn.run.score>task.competition.metric(table.y, commonest(table))+.1
