"What is predicted, decided and gone on with after training: by weights that are there, with values that are theirs"
import shutil
import numpy as np, pandas as pd, pytest, torch
from dataclasses import replace
from functools import partial
from recipes import imet, inclusive
from recipes.data.fixtures import sample
from recipes.data.relabel import distil
from recipes.infer.decide import binarise
from recipes.infer.predictions import Predictions
from recipes.infer.search import best_threshold
from recipes.infer.tta import as_is, class_scores
from recipes.losses.f2 import SoftF2Loss
from recipes.losses.missing import PositiveLoss
from recipes.recipe import tuned
from recipes.recipe.core import BadField
from recipes.recipe.ensemble import out_of_fold
from recipes.recipe.folder import Run
from recipes.recipe.rows import rows_of_table
from recipes.recipe.sure import pseudo_labels
from torch.nn import functional as F

tiny = dict(arch='test_resnet', pretrained=False, size=32, resize=(), bs=16, epochs=2, folds=3, lr=3e-3, precision='fp32',
    rule=partial(binarise, min_labels=1), tune=best_threshold)
wide = {k:v for k,v in tiny.items() if k!='folds'}

@pytest.fixture(scope='module')
def met(): return sample('imet', 120)

@pytest.fixture(scope='module')
def wild(): return inclusive.draw(200)

def test_a_learner_that_was_trained_on(met, capsys):
    "Its held-out rows and its values are those of the weights that predict; the run keeps its own"
    learn = imet.train(met, **tiny)
    imet.predict(learn)
    kept,valid = np.array(learn.run.test.p),np.array(learn.run.valid.p)
    learn.loss_func = SoftF2Loss()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    capsys.readouterr()
    got = imet.predict(learn)
    assert '1 of 1 learners were trained on' in capsys.readouterr().out
    now = class_scores(learn, learn.dls.valid, learn.recipe.tta)
    order = np.argsort(np.array(learn.dls.valid.dataset.rows))
    np.testing.assert_allclose(got.oof.p, now[order], atol=1e-6)
    assert abs(got.oof.p-valid).max()>.01 and got.values==best_threshold(got.oof.p, got.oof.y, min_labels=1)
    assert np.array_equal(Run(learn.run.path).test.p, kept)   # of the weights in the folder
    both = imet.predict([learn, learn.run.path])
    np.testing.assert_allclose(both.p, (got.p+kept)/2, atol=1e-6)
    np.testing.assert_allclose(both.oof.p, (got.oof.p+valid)/2, atol=1e-6)

def test_no_views_are_one_view(met):
    learn = imet.learner(path=met, **tiny, tta=())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 3e-3)
    assert np.array_equal(imet.predict(learn).oof.p, class_scores(learn, learn.dls.valid, (as_is,))) and imet.predict(learn).oof.p.max()>0

def test_values_of_the_same_round(met):
    "A network on all rows is the first round's: values of the last round are of other networks"
    recipe = imet.house.but(**tiny|dict(epochs=1, folds=2), rounds=(dict(),dict(loss=SoftF2Loss)))
    oof = imet.cross_validate(met, recipe=recipe)
    folder = oof.runs[0].path.parent.parent
    for prior in (oof,oof.runs,[o.path for o in oof.runs]):
        with pytest.raises(ValueError, match='round0'): imet.train(met, fold='all', recipe=recipe, prior=prior)
    want = out_of_fold([Run(o) for o in sorted((folder/'round0').glob('fold*'))]).values
    for prior in (folder,folder/'round0'): assert imet.train(met, fold='all', recipe=recipe, prior=prior).run.values==want

def test_a_run_decides_as_predict_does(wild):
    "With a tuning set the run's own test predictions take its values too"
    learn = inclusive.train(wild, **wide)
    got,run = inclusive.predict(learn),Run(learn.run.path)
    assert got.values==run.test.values and (got.decide()!=run.test.decide()).nnz==0
    own = learn.table.tuning
    assert got.oof.ids==own.train.id.tolist() and set(got.oof.ids)<=set(got.ids)
    again = inclusive.predict(learn, test=own.train)
    np.testing.assert_allclose(got.oof.p, again.p, atol=1e-5)

def test_scores_of_a_run_need_no_pictures(wild, monkeypatch):
    "Where the tuning pictures are not among the test pictures they are predicted when values are asked for, and not before"
    run = inclusive.train(wild, **wide).run
    inclusive.predict(run)
    own,asked = run.table.tuning,[]
    monkeypatch.setattr(tuned, 'on_tuning', lambda o: asked.append(o) or o.valid)
    run.table = replace(run.table, tuning=replace(own, train=own.train.assign(id='x'+own.train.id)))
    assert len(run.test.p) and not asked
    assert run.test.values==run.valid.found() and asked

def test_pseudo_labels_leave_the_tuning_set(wild, capsys):
    learn = inclusive.train(wild, **wide)
    more = pseudo_labels(learn.table, out_of_fold([learn.run]), share=1.)
    new = more.train.source=='pseudo'
    tuning = set(learn.table.tuning.train.id)
    assert new.sum()==len(learn.table.test)-len(tuning) and not tuning & set(more.train.id)
    preds = inclusive.predict(learn)
    at = pd.Index(preds.ids).get_indexer(more.train.id[new])
    assert (more.y[np.flatnonzero(new)]!=preds.decide()[at].astype('float32')).nnz==0

def test_the_last_round_keeps_the_limits():
    "First place of iMet: no culture or up to three, one tag or up to eight, in each round"
    last = imet.first.but(rounds=(), **imet.first.rounds[-1])
    assert last.rule==imet.first.rule and last.tune.keywords==dict(by_group=True)

@pytest.mark.parametrize('field', ['data','rule','tta','arch','folds'])
def test_stages_change_what_they_can(met, field):
    value = dict(data=print, rule=None, tta=(), arch='resnet18', folds=2)[field]
    with pytest.raises(BadField, match=f'{field} cannot change between the stages'):
        imet.train(met, **tiny|dict(stages=(dict(epochs=1),{'epochs':1,field:value})))

def test_soft_labels_weigh_their_share():
    "1+(w-1)y times the cross entropy, whose minimum stays at p=y"
    raw,y = torch.randn(7, 5, requires_grad=True),torch.rand(7, 5)
    got = PositiveLoss(21.).each_class(raw, y)
    p = raw.sigmoid()
    torch.testing.assert_close(got, -(1+20*y)*(y*p.log()+(1-y)*(1-p).log()))
    at = y.logit().requires_grad_()
    PositiveLoss(21.).each_class(at, y).sum().backward()
    assert at.grad.abs().max()<1e-5
    hard = (y>.5).float()
    want = F.binary_cross_entropy_with_logits(raw, hard, reduction='none', pos_weight=torch.tensor(21.))
    torch.testing.assert_close(PositiveLoss(21.).each_class(raw, hard), want)

def test_other_confidences_are_other_rows(wild, tmp_path):
    shutil.copytree(wild, tmp_path/'in')
    f = tmp_path/'in'/'train_machine_labels.csv'
    table,df = inclusive.table(tmp_path/'in'),pd.read_csv(f)
    df.assign(Confidence=(1.1-df.Confidence).clip(.1, .9).round(2)).to_csv(f, index=False)
    other = inclusive.table(tmp_path/'in')
    assert abs(table.y-other.y).max()>0 and rows_of_table(table)!=rows_of_table(other)
    assert rows_of_table(table)==rows_of_table(inclusive.table(wild))

def test_distillation_leaves_what_people_said(wild):
    table = inclusive.table(wild)
    p = np.full((len(table),len(table.vocab)), .9, np.float32)
    preds = Predictions(p, list(table.train.id), table, inclusive.competition, None)
    soft,said = distil(table, preds).soft.toarray(),table.mask.toarray().astype(bool)
    y = table.y.toarray()
    assert said.any() and (soft[said]==y[said]).all() and np.allclose(soft[~said], np.maximum(y, .63)[~said])

def test_decay_goes_through_the_switch():
    to = inclusive.softf2.stages[1]['schedule'].keywords['to']
    opt = to([torch.nn.Parameter(torch.ones(2, 2))], lr=.1)
    assert any(o['wd']==1e-4 for o in opt.hypers)
