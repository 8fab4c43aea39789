"Runs listed, noted and compared, from folders written by hand; broken ones among them"
import json, os
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from scipy.stats import pearsonr, spearmanr
from types import SimpleNamespace
from recipes import animal, imet
from recipes.look import against
from recipes.look.against import compare_runs, history_of, paired, plot_curves, plot_trust, trust
from recipes.look.changes import apart, say, written
from recipes.look.record import as_text, folder_of, note, runs
from recipes.recipe.folder import Run

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def fold(path, recipe=animal.house, score=.5, epochs=2, time='2026-01-02T03:04:05', loss=1., **env):
    "A fold's folder, as training leaves it"
    path.mkdir(parents=True)
    (path/'recipe.json').write_text(recipe.to_json())
    env = dict(fold=0, data='gone', seed=42, time=time, command='/usr/bin/recipes train animal --bs 16', commit='abc123') | env
    (path/'env.json').write_text(json.dumps(env))
    rows = [dict(epoch=i, train_loss=loss/(i+1), valid_loss=loss, top1=.1*i, time=f'01:0{i}', stage=0, lr=1e-3) for i in range(epochs)]
    if rows: pd.DataFrame(rows).to_csv(path/'history.csv', index=False)
    if score is not None: (path/'done.json').write_text(json.dumps(dict(score=score, values={})))
    return path

@pytest.fixture
def base(tmp_path):
    "Five runs: done, three folds of which one was stopped, other recipe, rounds, parts"
    base = tmp_path/'runs'
    fold(base/'animal/20260102-030405-house-resnet18/fold0', animal.house.but(arch='resnet18', lr=1e-3), .8)
    cv = base/'animal/20260103-030405-house-seresnext50'
    for i in (0,1): fold(cv/f'fold{i}', score=(.6,.7)[i], time='2026-01-03T03:04:05')
    fold(cv/'fold10', score=None, epochs=3, time='2026-01-03T03:04:05')
    fold(base/'imet/20260104-030405-yk-x/all', imet.yk, time='2026-01-04T03:04:05').joinpath('done.json').write_text('{"score": null, "values": {}}')
    rounds = base/'animal/20260105-030405-house-x'
    for i in (0,9,10): fold(rounds/f'round{i}/fold0', animal.house.but(epochs=i+1), score=i/20, time='2026-01-05T03:04:05')
    (rounds/'rounds.json').write_text(animal.house.but(rounds=(dict(epochs=1),dict(epochs=11))).to_json())
    parts = fold(base/'animal/20260106-030405-house-y/fold0', epochs=0, time='2026-01-06T03:04:05')
    fold(parts/'part0/fold0', epochs=2)
    return base

def test_all_runs(base):
    df = runs()
    assert df.index.tolist()==[f'{t}/{n}' for t,n in (('animal','20260102-030405-house-resnet18'), ('animal','20260103-030405-house-seresnext50'),
        ('imet','20260104-030405-yk-x'), ('animal','20260105-030405-house-x'), ('animal','20260106-030405-house-y'))]
    assert df.task.tolist()==['animal']*2+['imet']+['animal']*2 and df.recipe.tolist()==['house','house','yk','house','house']
    a,cv,whole,rounds,parts = (o for _,o in df.iterrows())
    assert a.changed=='arch=resnet18 lr=0.001' and a.score==.8 and np.isnan(a['std']) and a.epochs==2 and a.state=='done'
    assert a.minutes==pytest.approx((60+61)/60) and a.commit=='abc123' and a.command=='recipes train animal --bs 16'
    assert cv.score==pytest.approx(.65) and cv['std']==pytest.approx(np.std([.6,.7], ddof=1)) and cv.folds==2
    assert cv.state=='fold10 3 of 40 epochs, running or killed' and cv.changed==''
    assert np.isnan(whole.score) and whole.state=='done' and whole.folds==1
    assert rounds.score==.5 and rounds.folds==1 and rounds.changed.startswith('rounds=(dict(epochs=1)')
    assert rounds.minutes==pytest.approx(3*121/60)   # of all rounds
    assert parts.epochs==0 and parts.minutes==pytest.approx(121/60)
    assert runs(task='imet').index.tolist()==df.index[2:3].tolist() and len(runs(base/'animal'))==4
    assert all(o in as_text(df) for o in df.index)

def test_why_a_run_stopped(base):
    (base/'animal/20260103-030405-house-seresnext50/fold10/stopped.json').write_text('{"by": "KeyboardInterrupt"}')
    assert runs().state.iloc[1]=='fold10 3 of 40 epochs, stopped by KeyboardInterrupt'

@pytest.mark.parametrize('name,text,said', [('recipe.json','{"arch"','recipe.json'), ('env.json',None,'env.json is missing'), ('done.json','','done.json'),
    ('done.json','[]','broken'), ('history.csv','a\nb','history.csv'), ('recipe.json','{}','broken'), ('recipe.json','[]','broken')])
def test_a_broken_fold_hides_nothing(base, name, text, said):
    good = runs()
    f = base/'animal/20260102-030405-house-resnet18/fold0'/name
    f.unlink() if text is None else f.write_text(text)
    df = runs()
    assert len(df)==5 and sorted(df.index)==sorted(good.index)
    bad = df.loc['animal/20260102-030405-house-resnet18']
    assert bad.state.startswith('fold0 broken') and said in bad.state
    rest = good.index[1:]
    pd.testing.assert_frame_equal(df.loc[rest], good.loc[rest], check_dtype=False)
    as_text(df)

def test_a_broken_fold_leaves_its_siblings(base):
    (base/'animal/20260103-030405-house-seresnext50/fold0/env.json').write_text('')
    o = runs().iloc[1]
    assert o.score==.7 and o.folds==1 and 'fold0 broken' in o.state and 'fold10 3 of 40' in o.state

def test_an_empty_fold_and_a_broken_note(base):
    (base/'animal/new/fold0').mkdir(parents=True)
    (base/'animal/20260102-030405-house-resnet18/note.json').write_text('{')
    df = runs()
    assert 'recipe.json is missing' in df.loc['animal/new'].state
    assert 'note.json' in df.loc['animal/20260102-030405-house-resnet18'].state and df.loc['animal/20260102-030405-house-resnet18'].score==.8

def test_runs_without_any(tmp_path):
    with pytest.raises(FileNotFoundError, match='no run was made'): runs()
    (tmp_path/'runs').mkdir()
    assert len(runs())==0 and as_text(runs())=='no runs'

def test_a_recipe_of_the_users_own(base):
    d = json.loads(animal.house.to_json())
    d['competition'],d['loss'] = {'fn':'their.module:competition'},{'fn':'their.module:Loss', 'kw':{'gamma':2.}}
    f = base/'mine/20260107-030405-house-z/fold0'
    fold(f)
    (f/'recipe.json').write_text(json.dumps(d))
    o = runs().loc['mine/20260107-030405-house-z']
    assert o.task=='mine' and o.score==.5 and o.state=='done' and pd.isna(o.changed)

def test_a_run_is_found_by_whatever_stands_for_it(base):
    path = base/'animal/20260102-030405-house-resnet18'
    run = Run(path/'fold0')
    for o in (path, str(path), path/'fold0', run, 'animal/20260102', '20260102', 'runs/animal/20260102-030405-house-resnet18'):
        assert folder_of(o).resolve()==path.resolve()
    assert folder_of(base/'animal/20260105-030405-house-x/round9/fold0')==base/'animal/20260105-030405-house-x'
    with pytest.raises(FileNotFoundError, match='4 begin like that'): folder_of('animal/2026')
    with pytest.raises(FileNotFoundError, match='no run nowhere'): folder_of('nowhere')
    with pytest.raises(FileNotFoundError, match='no run /nowhere'): folder_of('/nowhere')
    with pytest.raises(FileNotFoundError, match='not a run'): folder_of(base)

def test_notes(base):
    path = base/'animal/20260102-030405-house-resnet18'
    done = (path/'fold0/done.json').read_bytes()
    assert note('20260102', lb=.66)==dict(lb=.66)
    assert note(path, private=np.float32(.5), text='first')==dict(lb=.66, private=.5, text='first')
    assert note(path/'fold0', lb=1)==dict(lb=1., private=.5, text='first')
    o = runs().iloc[0]
    assert (o.lb,o.private,o.note)==(1.,.5,'first') and (path/'fold0/done.json').read_bytes()==done
    assert sorted(os.listdir(path))==['fold0','note.json']

@pytest.mark.parametrize('bad', ['0.66', float('nan'), float('inf'), True, [.5], 1j])
def test_nonsense_is_not_noted(base, bad):
    for k in ('lb','private'):
        with pytest.raises(ValueError, match=f'{k}='): note('20260102', **{k:bad})
    with pytest.raises(ValueError, match='nothing to note'): note('20260102')
    with pytest.raises(FileNotFoundError): note('nowhere', lb=.5)
    assert not list(base.rglob('note.json'))

def test_fields_as_text():
    assert say(None)=='None' and say([1,.00012345,'x'])=='(1, 0.000123, x)' and say([3])=='(3,)'
    a,b = (json.loads(o.to_json()) for o in (animal.house, animal.stefano))
    assert apart(a, a)=={} and apart(a, b)['opt']==('adamw(wd=0.05)','radam(wd=0.01)') and 'name' not in apart(a, b)
    assert apart(a, {k:v for k,v in b.items() if k!='opt'}).get('opt') is None   # a file of another version

@pytest.mark.parametrize('task', ['imet','bengali','animal','whale','inclusive'])
def test_every_named_recipe_is_found(task):
    import recipes
    from recipes.recipe.core import Recipe
    named = {k:v for k,v in vars(getattr(recipes, task)).items() if isinstance(v, Recipe)}
    for k,v in named.items():
        d = json.loads(v.to_json())
        where,base = written(d['competition']['fn'], d['name'])
        assert where==task and base is not None and (k!=v.name or apart(d, base)=={})

def test_histories_are_averaged(base):
    path = base/'animal/20260103-030405-house-seresnext50'
    df = history_of(path)
    assert df.index.tolist()==[1,2,3] and df.top1.tolist()==pytest.approx([0,.1,.2])
    fold(path/'fold2', loss=3., epochs=1)
    assert history_of(path).valid_loss.tolist()==pytest.approx([6/4,1,1])
    with pytest.raises(FileNotFoundError, match='no history'): history_of(base/'animal/20260106-030405-house-y')

def test_curves(base):
    fig = plot_curves(runs().iloc[:2])
    fig.canvas.draw()
    assert [len(o.lines) for o in fig.axes]==[4,2] and fig.axes[1].get_ylabel()=='top1'
    assert [o.get_text() for o in fig.legends[0].get_texts()]==['0102-0304-house-resnet18','0103-0304-house-seresnext50']
    twice = plot_curves(['20260102','20260102']).legends[0]
    assert [o.get_text()[-3:] for o in twice.get_texts()]==['(1)','(2)']
    assert [len(o.lines) for o in plot_curves('20260102').axes]==[2,1]

def test_trust():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(task='imet', score=rng.random(9), lb=rng.random(9)))
    df.loc[8,'lb'] = np.nan
    got = trust(df)
    assert got==pytest.approx((pearsonr(df.score[:8], df.lb[:8])[0], spearmanr(df.score[:8], df.lb[:8])[0], 8))
    ax = plot_trust(df)
    assert ax.get_title()==f'8 entries: Pearson {got[0]:.2f}, Spearman {got[1]:.2f}' and len(ax.texts)==8
    ax.figure.canvas.draw()
    assert 'too few' in plot_trust(df[:2]).get_title() and np.isnan(trust(df[:2])[0])
    with pytest.raises(ValueError, match='give task='): trust(df.assign(task=['imet','animal']*4+['imet']))

def test_trust_of_noted_runs(base):
    for o,lb in zip(runs(task='animal').index, (.7,.6,.4,.45)): note(o, lb=lb)
    assert plot_trust(task='animal').get_title().startswith('4 entries: Pearson')

class Preds(SimpleNamespace):
    "What `gain_over` needs"
    def __len__(self): return len(self.ids)

def pair(monkeypatch, y2=None, ids2=None, right=(.5,.9), name2='x', higher=True):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    metric = lambda y,labels: float((y==labels).mean())
    comp = lambda n: SimpleNamespace(name=n, metric=metric, higher=higher)
    labels = [np.where(rng.random(200)<r, y, (y+1)%3) for r in right]
    p = Preds(ids=[f'i{i}' for i in range(200)], y=y, labels=labels[0], competition=comp('x'))
    q = Preds(ids=ids2 or p.ids, y=y if y2 is None else y2, labels=labels[1], competition=comp(name2))
    monkeypatch.setattr(against, '_held', lambda o: dict(a=p, b=q)[o])
    monkeypatch.setattr(against, 'short', str)
    return p,q

def test_paired(monkeypatch):
    p,q = pair(monkeypatch)
    said = paired('a', 'b')
    assert said.startswith(f'b over a: {(q.labels==q.y).mean()-(p.labels==p.y).mean():+.4f}') and said.endswith('on 200 pictures: helps')
    assert paired('b', 'a').endswith('hurts')
    pair(monkeypatch, higher=False)
    assert paired('a', 'b').endswith('hurts')

def test_paired_only_on_rows_of_both(monkeypatch):
    p,_ = pair(monkeypatch, ids2=[f'i{i+150}' for i in range(200)], y2=np.roll(pair(monkeypatch)[0].y, -150))
    assert 'on 50 pictures' in paired('a', 'b')

def test_what_cannot_be_compared(monkeypatch):
    p,_ = pair(monkeypatch)
    pair(monkeypatch, y2=(p.y+1)%3)
    assert 'other labels' in paired('a', 'b')
    pair(monkeypatch, name2='z')
    assert paired('a', 'b')=='x and z: not to be compared'

def test_compare_runs_without_data(base, capsys):
    df = compare_runs('20260102', '20260103')
    assert df.loc['arch'].tolist()==['resnet18','seresnext50'] and df.loc['score'].tolist()==pytest.approx([.8,.65])
    assert {'lr','folds','state'}<=set(df.index) and 'task' not in df.index and 'size' not in df.index
    assert capsys.readouterr().out.startswith('not compared row by row:')
    (base/'animal/20260102-030405-house-resnet18/fold0/recipe.json').write_text('{')
    with pytest.raises(ValueError, match='recipe.json'): compare_runs('20260102', '20260103')
