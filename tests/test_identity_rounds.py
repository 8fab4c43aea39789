"Rounds of identities: what they learn from, what they never touch, and the same rows after a stop"
import numpy as np, pytest, torch
from dataclasses import replace
from functools import partial
from recipes import whale
from recipes.data.fixtures import sample
from recipes.data.same_ids import merge_ids
from recipes.data.twins import twin_rows
from recipes.losses.margin import CosFaceLoss
from recipes.losses.open import OpenLoss
from recipes.recipe.build import dls_of, split
from recipes.recipe.fitting import rows_of
from recipes.recipe.folder import make_run
from recipes.recipe.task import train
from recipes.recipe.unknown import distil_unknown, opinions, pseudo_ids, soft_labels

open_loss = partial(OpenLoss, loss=partial(CosFaceLoss, m=.2, s=16.))
small = whale.house.but(arch='test_resnet', pretrained=False, size=(32,64), resize=(), epochs=1, bs=16, lr=1e-3, precision='fp32',
    twins=False, loss=open_loss, sampler=None, tta=whale.house.tta[:1])

@pytest.fixture(scope='module')
def path(): return sample('whale', 148)

def test_opinions():
    "Against a softmax of whole rows, when all classes are kept; the greatest few else"
    p = np.random.RandomState(0).randn(5, 9)
    whole = torch.softmax(torch.tensor(3*p), 1).numpy()
    np.testing.assert_allclose(opinions(p, 3., 50).toarray(), whole, atol=1e-5)
    sure = opinions(np.array([[1.,.1,0]]), 100.).toarray()
    assert 1-2e-5<sure.max()<1-1e-6 and sure.sum()==pytest.approx(1)   # `OpenLoss` takes what is 1 for a label
    few = opinions(p, 3., 2).toarray()
    assert ((few>0).sum(1)==2).all() and (few.argmax(1)==p.argmax(1)).all() and np.allclose(few.sum(1), 1)

def test_soft_twins(path):
    "Mirrored rows teach mirrored classes"
    table = whale.table(path)
    n,new = len(table.vocab),table.y==len(table.vocab)
    soft = soft_labels(table, opinions(np.random.RandomState(0).rand(new.sum(), n)))
    both = twin_rows(replace(table, soft=soft)).soft
    assert both.shape==(2*len(table),2*n)
    assert (both[:len(table),:n]!=soft).nnz==0 and (both[len(table):,n:]!=soft).nnz==0 and both.nnz==2*soft.nnz

def test_distilled(path):
    "Two rounds: the second learns soft targets for the unknown, and holds out the very rows of the first"
    recipe = small.but(rounds=(dict(),dict(data=partial(distil_unknown, scale=16.))))
    oof = whale.cross_validate(path, recipe=recipe)
    folder,run = oof.runs[0].path.parent.parent,oof.runs[0]
    assert sorted(o.name for o in folder.glob('round[0-9]'))==['round0','round1']
    table,more = run.table,run.trained_on
    rows,held = split(run.recipe, table, 0, more)
    assert np.array_equal(held, oof.rows) and not set(more.train.id.iloc[rows]) & set(table.train.id.iloc[held])
    new,top = table.y==len(table.vocab),more.soft.max(1).toarray().ravel()
    assert (top[~new]==1).all() and (top[new]<1).all()
    x,y = dls_of(run.recipe, table, 0, more).train.one_batch()
    assert y.shape==(16,len(table.vocab)) and torch.allclose(y.sum(1).cpu(), torch.ones(16))

def test_pseudo(path):
    "Sure test pictures are trained on and searched, never scored; a reopened run has the same gallery"
    first = whale.train(path, recipe=small)
    prior = first.run.valid
    prior.runs = [first.run]
    least = float(np.median(whale.predict(first.run).p.max(1)))
    learn = train(small.but(data=partial(pseudo_ids, least=least)), path, prior=prior)
    run,more = learn.run,learn.run.trained_on
    n = (more.train.source=='pseudo').sum()
    assert .3<n/len(run.table.test)<.7 and set(more.train.id[more.train.source=='pseudo'])<=set(run.table.test.id)
    assert np.array_equal(run.valid.rows, prior.rows) and len(learn.dls.train.dataset)==len(first.dls.train.dataset)+n
    np.testing.assert_allclose(whale.predict(run).p, whale.predict(learn).p, atol=1e-5)

def test_resumed_rows(path):
    "Rows are made once: a run that goes on has them, whatever its recipe would make by then"
    run = make_run(small.but(data=merge_ids), whale.table(path), 0)
    first = rows_of(run)
    assert not np.array_equal(first.y, run.table.y)
    run.recipe = run.recipe.but(data=partial(pseudo_ids, least=2.))
    assert np.array_equal(rows_of(run).y, first.y)
