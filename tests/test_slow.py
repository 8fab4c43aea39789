"Every named recipe, trained two epochs on its sample to a submission the competition would take"
import pandas as pd, pytest
from recipes import imet
from recipes.cli import named
from recipes.data.fixtures import sample

pytestmark = pytest.mark.slow
small = dict(arch='test_resnet', pretrained=False)   # instead of the real network; all else but size and epochs is as written

def but(recipe):
    "The recipe, and each of its parts, with a tiny network"
    parts = tuple(but(o) for o in recipe.parts)
    return recipe.but(**small, size=64, epochs=2, parts=parts)

@pytest.fixture(scope='module')
def path(): return sample('imet', 240)   # enough for 40 folds

def submitted(runs, path):
    "A submission's frame, as written"
    f = imet.predict(runs).submit('submission.csv')
    df,want = (pd.read_csv(o, dtype=str, keep_default_na=False) for o in (f, path/'sample_submission.csv'))
    assert list(df)==list(want) and df.id.tolist()==want.id.tolist()
    vocab = {str(i) for i in range(30)}
    assert df.attribute_ids.str.split().map(lambda o: len(o)>0 and set(o)<=vocab and len(o)==len(set(o))).all()
    return df

@pytest.mark.parametrize('name', [k for k,v in named(imet).items() if not v.parts])
def test_trained(path, name):
    recipe = named(imet)[name]
    fold = (recipe.run_folds or (0,))[-1]
    run = imet.train(path, fold=fold, recipe=but(recipe)).run
    assert run.done and len(run.history)==2 and 0<run.score<1
    assert run.history.train_loss.notna().all() and (run.history.train_loss.iloc[-1]<run.history.train_loss.iloc[0]*1.5)
    submitted(run.path, path)

def test_parts(path):
    "Several networks, one submission"
    recipe = but(imet.yk_nets)
    runs = [imet.train(path, fold=o.run_folds[0], recipe=o).run for o in recipe.parts]
    df = submitted([o.path for o in runs], path)
    assert len(runs)==3 and df.attribute_ids.nunique()>1

def test_parts_whole(path):
    "A recipe of parts trains all of them itself"
    run = imet.train(path, fold=5, recipe=but(imet.yk_nets))
    run = getattr(run, 'run', run)
    assert run.done and len(list(run.path.rglob('model.safetensors')))==3
    submitted(run, path)

def test_house_learns(path):
    "More than the commonest labels, where there is time for it"
    table = imet.table(path)
    learn = imet.train(path, arch='test_resnet', pretrained=False, size=48, resize=(), epochs=12, bs=16, lr=1e-2, precision='fp32')
    common = table.y.toarray().sum(0).argsort()[-3:]
    always = table.y.toarray()*0
    always[:,common] = 1
    assert learn.run.score>imet.competition.metric(table.y, always)-.05
