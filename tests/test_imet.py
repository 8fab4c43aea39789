"iMet from its files to a submission: what is refused and how it is said, and that every step keeps ids, rows and values"
import json, shutil
import numpy as np, pandas as pd, pytest, torch
from types import SimpleNamespace
from scipy import sparse
from sklearn.metrics import fbeta_score
from callbacks.resize import hw
from recipes import imet
from recipes.cli import main
from recipes.words import named
from recipes.data.checks import BadInput
from recipes.data.fixtures import draw_imet, sample
from recipes.data.folds import assign_folds
from recipes.infer.expected import most_expected, tune_expected
from recipes.infer.predictions import BadSubmission
from recipes.recipe.build import model_of
from recipes.recipe.core import BadField, from_json
from recipes.recipe.folder import Run

tiny = dict(arch='test_resnet', pretrained=False, size=24, resize=(), epochs=2, bs=20, folds=2, lr=3e-3, precision='fp32')

def rows(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

# --- bad files

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    at = tmp_path_factory.mktemp('drawn')
    draw_imet(at, 40, n_test=8)
    return at

@pytest.fixture
def files(drawn, tmp_path): return shutil.copytree(drawn, tmp_path/'imet')

def edit(f, **cells):
    "Change fields of a CSV file: column -> {row: value}"
    df = rows(f)
    for col,new in cells.items():
        for i,v in new.items(): df.loc[i, col] = v
    df.to_csv(f, index=False)
    return df

def refused(files, **kwargs):
    with pytest.raises(BadInput) as e: imet.table(files, **kwargs)
    return str(e.value),{o.kind:o for o in e.value.problems}

def test_good(files):
    t = imet.table(files)
    assert t.train.id.tolist()==rows(files/'train.csv').id.tolist() and t.test.id.tolist()==rows(files/'sample_submission.csv').id.tolist()
    want = np.zeros((40,30))
    for i,o in enumerate(rows(files/'train.csv').attribute_ids): want[i,[int(v) for v in o.split()]] = 1
    assert np.array_equal(t.y.toarray(), want) and not t.said
    assert {k:len(v) for k,v in t.groups.items()}=={'culture':10,'tag':20}

def test_missing_files(files):
    (files/'labels.csv').unlink()
    shutil.rmtree(files/'test')
    msg,found = refused(files)
    assert found['missing_file'].examples==['labels.csv','test'] and '2 files missing (labels.csv, test)' in msg

def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere is not a folder'): imet.table(tmp_path/'nowhere')

def test_missing_columns(files):
    rows(files/'train.csv').rename(columns=dict(attribute_ids='labels')).to_csv(files/'train.csv', index=False)
    rows(files/'labels.csv').drop(columns='attribute_name').to_csv(files/'labels.csv', index=False)
    msg,found = refused(files)
    assert 'train.csv: 1 column missing (attribute_ids): it has id, labels' in msg
    assert 'labels.csv: 1 column missing (attribute_name)' in msg and msg.startswith('imet: 2 problems')

def test_bad_rows(files):
    "Ids and labels, all in one message"
    df = rows(files/'train.csv')
    test = rows(files/'sample_submission.csv').id
    edit(files/'train.csv', id={1:'../x', 2:df.id[3], 5:'', 6:test[0]}, attribute_ids={8:'1 999', 9:''})
    msg,found = refused(files)
    assert {k:o.examples for k,o in found.items()}==dict(id_leaves=['../x'], same_id=[df.id[3]], no_id=['row 6'],
        train_in_test=[test[0]], unknown_label=['999'], no_label=['row 10'])
    for o in '../x',df.id[3],'row 6',test[0],'999': assert o in msg
    assert msg.startswith('imet: 6 problems in the files')

def spoil(files):
    "A missing, an empty, a cut and a wrong picture"
    paths = [files/f'train/{o}.png' for o in rows(files/'train.csv').id]
    paths[0].unlink()
    paths[1].write_bytes(b'')
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    paths[3].write_bytes(b'<html>')
    return [o.stem for o in paths]

def test_bad_pictures(files):
    ids = spoil(files)
    (files/'test'/f'{rows(files/"sample_submission.csv").id[0]}.png').unlink()
    msg,found = refused(files)
    assert f'train.csv: 1 id without a picture in train/ ({ids[0]})' in msg and 'sample_submission.csv: 1 id without' in msg
    bad = found['bad_picture'].examples
    assert [o.split('.png')[0] for o in bad]==ids[1:4] and 'empty file' in bad[0] and 'not a picture' in bad[2]
    assert 'train/: 3 pictures unreadable' in msg

def test_rows_and_pictures(files):
    "A bad row and a bad picture are said at once"
    spoil(files)
    edit(files/'train.csv', attribute_ids={8:'999'})
    assert {'unknown_label','no_picture','bad_picture'} <= set(refused(files)[1])

def broken_body(files):
    "A picture whose header and end are fine; its id"
    id = rows(files/'train.csv').id[4]
    f = files/f'train/{id}.png'
    b = f.read_bytes()
    i = b.index(b'IDAT')+8
    f.write_bytes(b[:i]+bytes(len(b)-i-100)+b[-100:])
    return id

def test_skip_bad(files):
    "What does not decode is left out, counted and said"
    ids = [*spoil(files)[:4], broken_body(files)]
    with pytest.raises(BadInput): imet.table(files)
    t = imet.table(files, skip_bad=True)
    assert len(t)==t.y.shape[0]==35 and not set(ids)&set(t.train.id)
    assert f'5 of 40 pictures left out (first: {ids[0]}, {ids[1]}, {ids[2]})' in t.said[0]
    learn = imet.train(files, skip_bad=True, **tiny|dict(epochs=1))
    assert learn.run.done and not set(ids)&set(learn.run.valid.ids)
    assert learn.run.recipe.skip_bad and len(Run(learn.run.path).table)==35

@pytest.mark.parametrize('cache', [False,True])
def test_breaks_later(files, cache):
    "A picture that turns out broken stops the run, with its id and path"
    id = broken_body(files)
    imet.table(files)
    with pytest.raises(ValueError, match=rf'{id}.*{id}\.png'): imet.train(files, cache=cache, **tiny)

def test_empty_class(files):
    "Allowed, and said"
    df = rows(files/'train.csv')
    ids = df.attribute_ids.str.split().map(lambda o: ' '.join(v for v in o if v!='17') or '0')
    df.assign(attribute_ids=ids).to_csv(files/'train.csv', index=False)
    t = imet.table(files)
    assert t.said==['class tag::7 has no training picture'] and t.y[:,17].nnz==0
    assert 'class tag::7 has no training picture' in repr(t)
    assert imet.train(files, log_odds=True, **tiny|dict(epochs=1)).run.done

# --- from files to a submission

@pytest.fixture(scope='module')
def path(): return sample('imet', 120)

@pytest.fixture(scope='module')
def oof(path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('oof'))
        return imet.cross_validate(path, **tiny)

def test_end_to_end(path, oof):
    "Train, predict, submit: the sample's ids, in its order"
    learn = imet.train(path, **tiny)
    test = imet.predict(learn)
    want = rows(path/'sample_submission.csv')
    got = rows(test.submit('submission.csv'))
    assert list(got)==list(want) and got.id.tolist()==want.id.tolist()
    labels = test.decide()
    assert got.attribute_ids.tolist()==[' '.join(map(str, sorted(o.indices))) for o in labels]
    assert {o.name for o in learn.run.path.iterdir()} >= {'recipe.json','history.csv','model.safetensors','last.ckpt','valid.npy',
        'valid.json','env.json','done.json','test.npy','test.json'}
    assert np.array_equal(imet.predict(learn.run.path).p, test.p) and np.array_equal(Run(learn.run.path).test.p, test.p)
    assert learn.run.score==Run(learn.run.path).score==learn.run.valid.score()

def test_prediction_is_the_models(path, oof):
    "Against the plain model on plain pictures"
    run = oof.runs[0]
    learn = run.learner()
    got = imet.predict(run, tta=False)
    x = torch.cat([b[0] for b in learn.dls.valid.new(learn.dls.valid.dataset, shuffle=False)])
    with torch.no_grad(): want = learn.model.eval()(x).sigmoid()
    plain = imet.predict(run, test=run.table.train.iloc[run.valid.rows], tta=False)
    assert np.allclose(plain.p, want, atol=1e-4) and got.p.shape==(30,30)
    x = torch.stack([x, x.flip(-1)])
    with torch.no_grad(): want = torch.stack([learn.model(o).sigmoid() for o in x]).mean(0)
    assert np.allclose(run.valid.p, want, atol=1e-4)

def test_list_is_averaged(oof):
    both = imet.predict(oof.runs)
    each = [imet.predict(o).p for o in oof.runs]
    assert np.allclose(both.p, np.mean(each, 0), atol=1e-6) and not np.allclose(each[0], each[1], atol=1e-3)
    assert both.values==oof.values

def test_oof_rows(oof):
    "Exactly the held-out rows, in table order, each from the fold that did not see it"
    folds = assign_folds(oof.table, 2, imet.house.seed)
    assert oof.rows.tolist()==list(range(120)) and list(oof.ids)==oof.table.train.id.tolist()
    assert np.array_equal(oof.folds, folds)
    for k,run in enumerate(oof.runs):
        held = np.flatnonzero(folds==k)
        assert run.valid.rows.tolist()==held.tolist() and np.array_equal(oof.p[held], run.valid.p)
        assert not set(run.learner().dls.train.dataset.rows)&set(held)

def test_some_folds(path):
    "Folds that are not trained have no rows"
    some = imet.cross_validate(path, run_folds=(2,), **tiny|dict(folds=4, epochs=1))
    assert some.rows.tolist()==np.flatnonzero(assign_folds(some.table, 4, imet.house.seed)==2).tolist()

def test_score_is_cross_fitted(oof):
    "A fold is decided with values found on the other, and scored as scikit-learn does"
    y,decided = oof.table.y.toarray(),np.zeros((120,30), bool)
    for k in 0,1:
        here = oof.folds==k
        found = tune_expected(oof.p[~here], oof.table.y[~here])
        decided[here] = most_expected(oof.p[here], **found).toarray()
    assert oof.score()==pytest.approx(fbeta_score(y, decided, beta=2, average='samples'), abs=1e-6)

def test_all_with_prior(path, oof):
    "A model of all rows decides with the prior's values, also when its run is opened later"
    learn = imet.train(path, fold='all', prior=oof.runs, **tiny)
    assert len(learn.dls.train.dataset)==120 and learn.run.score is None
    assert learn.run.values==oof.values and oof.values['scale']
    test = imet.predict(learn)
    assert test.values==oof.values
    assert test.submit('a.csv').read_text()==imet.predict(learn.run.path).submit('b.csv').read_text()
    assert Run(learn.run.path).test.values==oof.values

def test_refused_submission(oof, drawn):
    "Ids that are not the sample's"
    p = imet.predict(oof.runs[0])
    lost,known = p.ids[3],list(p.ids)
    for change,said in ((lambda: known[:-1], '1 ids missing'), (lambda: ['x',*known[1:]], '1 ids unknown'), (lambda: [lost,*known[1:]], 'twice')):
        p.ids = change()
        q = p if len(p.ids)==len(known) else type(p)(p.p[:-1], p.ids, p.table, p.competition, p.rule, p.tune, oof=p.oof)
        with pytest.raises(BadSubmission, match=said): q.submit('bad.csv')
    from pathlib import Path
    assert not Path('bad.csv').exists()

# --- names, text, command line

@pytest.mark.parametrize('verb', ['train','cross_validate','dls','learner'])
def test_wrong_keyword(path, verb):
    "Refused before anything is read or written, with the nearest right one"
    with pytest.raises(BadField, match="no field 'archi': did you mean 'arch'"): getattr(imet, verb)(path=path, archi='resnet18')
    with pytest.raises(BadField, match="'freez'.*'freeze'"): getattr(imet, verb)(path=path, stages=(dict(freez=1),))

@pytest.mark.parametrize('name', named(imet))
def test_json(name):
    recipe = named(imet)[name]
    back = from_json(json.dumps(json.loads(recipe.to_json())))
    assert back==recipe and hash(back)==hash(recipe) and repr(back)==repr(recipe)
    assert back.but(lr=.5)!=recipe and [o.arch for o in back.parts]==[o.arch for o in recipe.parts]

def nets(recipe):
    "Every network of a recipe: of its last round, of its parts"
    last = recipe.but(**recipe.rounds[-1]) if recipe.rounds else recipe
    return last.parts or [last]

@pytest.mark.parametrize('recipe', [o for r in named(imet).values() for o in nets(r)], ids=lambda o: f'{o.name}-{o.arch}')
def test_built_as_written(recipe):
    "The real backbone, size and head, without memory for its weights"
    y = sparse.csr_matrix(np.eye(1103, dtype=np.float32))
    table = SimpleNamespace(y=y, vocab=[str(i) for i in range(1103)], groups={})
    with torch.device('meta'):
        model = model_of(recipe, table).eval()
        assert model(torch.empty(2, 3, *hw(recipe.size))).shape==(2,1103)
    assert sum(o.numel() for o in model.parameters())>2e7

def test_command_line(path, capsys):
    main(f'train imet --path {path} --arch test_resnet --pretrained false --size 24 --resize () --epochs 1 --bs 20 --lr 1e-3 --folds 2'.split())
    run, = (o.parent for o in sorted((path.cwd()/'runs').rglob('done.json')))
    recipe = Run(run).recipe
    assert (recipe.arch, recipe.pretrained, recipe.size, recipe.lr, recipe.folds)==('test_resnet', False, 24, 1e-3, 2)
    main(['predict', str(run), '--out', 'out.csv'])
    assert 'out.csv written' in capsys.readouterr().out
    assert rows('out.csv').id.tolist()==rows(path/'sample_submission.csv').id.tolist()
    main(['train', 'imet', '--resume', str(run)])
    main(['list'])
    assert all(f'imet.{o}' in capsys.readouterr().out for o in ['house'])
    main(['show', 'imet.brodt'])
    assert 'pnasnet5large' in capsys.readouterr().out

@pytest.mark.parametrize('argv,said', [('', 'recipes train'), ('train', 'no task'), ('train imet --archi x', "did you mean 'arch'"),
    ('train cats', 'no task .cats'), ('show imet.yy', 'no recipe'), ('predict nowhere', 'not a run'), ('predict', 'RUN'), ('train imet --path', 'has no value')])
def test_command_line_refuses(argv, said):
    "In a line, without a traceback"
    with pytest.raises(SystemExit, match=said): main(argv.split())
