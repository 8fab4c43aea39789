"A search: nothing is lost by a kill, processes share it, a bad trial does not end it"
import multiprocessing, os, signal
from dataclasses import replace
from functools import partial
from pathlib import Path
import optuna, pytest
from optuna.trial import TrialState
from fastai.callback.core import Callback
from callbacks.mix import CutMix, MixUp
from recipes.losses.core import SoftmaxLoss
from recipes import animal
from recipes.data.fixtures import sample
from recipes.recipe import searching
from recipes.recipe.core import BadField
from recipes.recipe.folder import Run
from recipes.recipe.space import integers, log_uniform, uniform

pytestmark = pytest.mark.slow

ways = dict(arch='test_resnet', pretrained=False, size=24, epochs=2, bs=40, precision='fp32', resize=(), tta=())
space = dict(lr=log_uniform(1e-4, 1e-2), mix=[None,MixUp,partial(CutMix, alpha=.5)])

@pytest.fixture(scope='module')
def data(): return sample('animal', 120)

def search(data, n, space=space, **kw): return searching.search(animal.house, space, data, trials=n, **dict(store='s')|ways|kw)

def write(ids, labels, table): raise NotImplementedError

class Die(Callback):
    "Ends the process without a word in the second epoch of the third trial"
    order = 95
    def after_epoch(self):
        if self.learn.run.path.parent.name=='trial0002' and self.epoch==0 and self.training is not None: os.kill(os.getpid(), signal.SIGKILL)

def doomed(cwd, data):
    os.chdir(cwd)
    real = searching.fit_run
    searching.fit_run = lambda run, cbs: real(run, cbs=[*cbs, Die()])
    search(data, 5)

def helper(cwd, data, n):
    os.chdir(cwd)
    search(data, n)

server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['pytest','recipes.animal','recipes.recipe.searching','optuna'])

def test_goes_on_after_a_kill(data):
    p = server.Process(target=doomed, args=(Path.cwd(),data))
    p.start()
    p.join(90)
    assert p.exitcode==-signal.SIGKILL
    study = optuna.load_study(study_name='search', storage='sqlite:///s/trials.sqlite')
    before = {o.number:o.value for o in study.trials if o.state==TrialState.COMPLETE}
    killed = study.trials[2]
    assert len(before)==2 and killed.state==TrialState.RUNNING and Path('s/trial0002/fold0/last.ckpt').exists()
    found = search(data, 5)
    assert len(found.trials)==5 and (found.trials.state!='running').all()
    assert all(found.trials.score[k]==v for k,v in before.items())
    assert study.trials[2].state==TrialState.FAIL and 2 not in found.trials.index
    again = next(o for o in study.trials[3:] if o.params==killed.params)
    assert again.user_attrs['folder']=='trial0002' and again.state==TrialState.COMPLETE
    assert len(Run('s/trial0002/fold0').history)==2   # gone on with, not begun anew

def test_two_processes_share_a_store(data):
    p = server.Process(target=helper, args=(Path.cwd(),data,6))
    p.start()
    found = search(data, 6)
    p.join(90)
    assert p.exitcode==0 and len(found.trials)==6 and set(found.trials.state)<={'done','lagged'}
    assert len(set(found.trials.run))==6
    assert len(list(Path('s').rglob('*.safetensors')))==1 and not list(Path('s').rglob('*.ckpt'))

def test_a_bad_trial_is_recorded(data, capsys):
    found = search(data, 4, dict(lr=[1e-3,float('1e30')], clip=[0.,1.]), seed=3)
    rows = found.trials
    assert len(rows)==4 and 'failed' in set(rows.state) and 'done' in set(rows.state)
    assert rows.why[rows.state=='failed'].str.contains('FloatingPointError').all()
    assert found.best['lr']==1e-3 and 'best' in repr(found)

def scripted(monkeypatch, values):
    "Trials whose watched values are given: one row of `values` a trial"
    def value(self, i): return values[int(self.path.parent.name[5:])][i]
    monkeypatch.setattr(searching.Report, 'value', value)

def test_laggards_are_ended(data, monkeypatch, capsys):
    scripted(monkeypatch, [[.5]*4]*5+[[.1]*4])
    found = search(data, 6, epochs=4)
    assert found.trials.state.tolist()==['done']*5+['lagged'] and found.trials.n_epoch.tolist()==[4]*5+[2]
    assert 'to go on' not in capsys.readouterr().out

class Stop(Callback):
    "Interrupts the sixth trial, once, after two epochs that are better than all others"
    order,done = 95,False
    def after_epoch(self):
        if self.learn.run.path.parent.name!='trial0005' or Stop.done or self.epoch!=1: return
        Stop.done = True
        raise KeyboardInterrupt

def test_a_trial_gone_on_with_is_judged_by_all_its_epochs(data, monkeypatch):
    scripted(monkeypatch, [[.5]*4]*5+[[.9,.9,.1,.1]])
    real = searching.fit_run
    monkeypatch.setattr(searching, 'fit_run', lambda run, cbs: real(run, cbs=[*cbs, Stop()]))
    with pytest.raises(KeyboardInterrupt): search(data, 6, epochs=4)
    found = search(data, 6, epochs=4)
    assert Stop.done and found.trials.state.tolist()==['done']*6 and found.trials.n_epoch.tolist()==[4]*6
    last = found.finished[-1]
    assert last.user_attrs['folder']=='trial0005' and last.user_attrs['before']>0 and list(last.intermediate_values.values())==[.9,.9,.1,.1]

def test_losses_do_not_compare(data, monkeypatch):
    "Where nothing but the loss is watched, and losses are searched, the smaller loss is not the better trial"
    scripted(monkeypatch, [[.5]*3]*5+[[.1]*3])
    choice = dict(loss=[SoftmaxLoss,partial(SoftmaxLoss, smooth=.5)])
    blind = animal.house.but(competition=unwatched)
    def states(recipe, store): return set(searching.search(recipe, choice, data, trials=6, store=store, **ways|dict(epochs=3, lr=1e-3)).trials.state)
    assert states(blind, 'blind')=={'done'} and states(animal.house, 'seen')=={'done','lagged'}

def test_no_score_is_a_failed_trial(data, monkeypatch):
    "It counts, and is not drawn again for ever"
    monkeypatch.setattr(Run, 'score', float('nan'))
    found = search(data, 2)
    assert found.trials.state.tolist()==['failed']*2 and found.trials.why.str.contains('score is nan').all()
    with pytest.raises(ValueError, match='nothing out'): search(data, 1, fold='all')

def test_foreign_timeouts_are_failures(data, monkeypatch):
    def late(run, cbs): raise TimeoutError('read timed out')
    monkeypatch.setattr(searching, 'fit_run', late)
    assert search(data, 2).trials.why.tolist()==['TimeoutError: read timed out']*2

def test_epochs_are_counted_over_stages(data):
    found = search(data, 1, stages=(dict(epochs=1),dict(epochs=2)), epochs=3)
    assert [*found.study.trials[0].intermediate_values]==[1,2,3]

def test_epochs_in_the_space_prune_nothing(data, monkeypatch):
    scripted(monkeypatch, [[.5]*3]*5+[[.1]*3])
    found = searching.search(animal.house, dict(epochs=integers(1, 2)), data, trials=6, store='s', lr=1e-3, **{k:v for k,v in ways.items() if k!='epochs'})
    assert (found.trials.state=='done').all()

low = replace(animal.competition, higher=False, watch=None, write=write)
unwatched = replace(animal.competition, watch=None, write=write)

def test_lower_is_better(data):
    found = searching.search(animal.house.but(competition=low), space, data, trials=2, store='low', **ways)
    assert found.score==found.trials.score.min() and found.study.direction.name=='MINIMIZE'
    values = found.study.trials[0].intermediate_values
    assert min(values.values())>0   # the loss as it is

def test_nested_draws_and_choices_of_functions(data):
    nested = dict(mix=lambda trial: partial(CutMix, alpha=trial.suggest_float('alpha', .2, 1)), size=[24,(24,32)], lr=uniform(1e-3, 2e-3))
    found = searching.search(animal.house, nested, data, trials=2, store='n', **{k:v for k,v in ways.items() if k!='size'})
    best = found.best
    assert best['mix'].keywords['alpha']==found.best_trial.params['alpha'] and best['size'] in (24,(24,32))
    assert found.run.recipe.mix.keywords==best['mix'].keywords and found.run.recipe.lr==best['lr']
    found.run.learner()

def test_time(data):
    found = search(data, 500, budget='12s')
    assert 1<=len(found.trials)<500

def test_plots(data):
    found = search(data, 4)
    for o in ('history','slice','parallel','epochs'): assert found.plot(o) is not None
    if found.trials.score.nunique()>1: found.plot('importance')

def test_refused(data):
    with pytest.raises(BadField, match="'lr'"): search(data, 1, dict(lrr=[1]))
    with pytest.raises(ValueError, match='leave out one'): search(data, 1, dict(bs=[1]))
    search(data, 1)
    with pytest.raises(ValueError, match='another space'): search(data, 2, space|dict(clip=[0.,1.]))
    with pytest.raises(ValueError, match='another fold'): search(data, 2, fold=1)
    with pytest.raises(ValueError, match='another data'): search(sample('animal', 100), 2)
