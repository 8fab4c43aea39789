"Pairs over stages and rounds: one course of noise, pictures of pseudo labels, copies kept out, a gallery that is not of older weights"
import random
import numpy as np, pandas as pd, pytest
from callbacks.checkpoint import load_weights
from functools import partial
from types import SimpleNamespace
from recipes import whale
from recipes.data.duplicates import find_copies
from recipes.data.fixtures import sample
from recipes.data.noise import short_noise
from recipes.data.pairs import other_pairs, round_others
from recipes.data.same_ids import without_copies
from recipes.data.twins import twin_rows
from recipes.infer.mining import Gallery, Pairs
from recipes.infer.tta import class_scores
from recipes.recipe.build import split
from recipes.recipe.rows import read_rows, save_rows
from recipes.recipe.rounds import with_test
from recipes.recipe.unknown import pseudo_ids
from recipes.whale_pairs import OnMean, fifth_stages, kernel2_augment, tenth_metric, tenth_pair, tenth_stages

tiny = dict(arch='test_resnet', pretrained=False, size=(32,64), resize=(), epochs=2, bs=16, lr=3e-3, precision='fp32', stages=(), folds=whale.house.folds)

@pytest.fixture(scope='module')
def path(): return sample('whale', 148)

class Watch(Gallery):
    "Notes what is trained on and what is compared with"
    order = 40
    def before_batch(self):
        if self.training: self.taken |= set(self.learn.dls.train.order(None))
    def before_fit(self): self.taken = set()
    def before_train(self): pass
    def before_validate(self): Watch.last = self.taken,self.places,len(self.model.head.gallery),len(self.look()[0])

@pytest.mark.parametrize('recipe', [tenth_pair,tenth_metric], ids=lambda o: o.name)
def test_pseudo_rows_are_trained_on_and_not_compared_with(path, recipe):
    first = whale.train(path, recipe=recipe.but(**tiny))
    prior = first.run.valid
    prior.runs = [first.run]
    least = float(np.median(whale.predict(first.run).p.max(1)))
    cbs = partial(watched, cbs=recipe.cbs)
    learn = whale.train(path, recipe=recipe.but(**tiny, data=partial(pseudo_ids, least=least), cbs=cbs), prior=prior)
    more = learn.run.trained_on
    n = int((more.train.source=='pseudo').sum())
    taken,places,compared,looked = Watch.last
    items = learn.dls.train.dataset
    pseudo = {i for i,r in enumerate(items.rows) if items.ids[r] in set(learn.table.test.id)}
    assert n>5 and len(pseudo)==n and taken & pseudo
    assert looked==len(places)==compared+n

def watched(cbs): return [*cbs(), Watch()]

def test_fifth_goes_through_its_rounds(path):
    "As written, but for sizes; the second round has pseudo labels"
    small = {k:v for k,v in tiny.items() if k not in ('folds','stages')} | dict(stages=(dict(epochs=1),dict(epochs=1)), run_folds=0)
    rounds = dict(),dict(data=partial(pseudo_ids, least=.3), seed=43)
    oof = whale.cross_validate(path, recipe=whale.fifth.but(**small, rounds=rounds))
    more = oof.runs[0].trained_on
    assert (more.train.source=='pseudo').any() and not set(oof.ids) & set(more.train.id[more.train.source=='pseudo'])

def test_a_course_over_stages():
    "The noise of a stage goes on where the one before ended"
    for recipe,stages,of in ((whale.fifth,fifth_stages,80),(tenth_pair,tenth_stages,80)):
        assert recipe.stages==stages
        ks = []
        for step in recipe.steps():
            pairs = next(o for o in step.cbs() if isinstance(o, Pairs))
            ks += [pairs.k(e, step.epochs) for e in range(step.epochs)]
        assert len(ks)==of and ks==sorted(ks, reverse=True) and ks[0]==1000 and ks[-1]==.25
        np.testing.assert_allclose(ks, [short_noise(e, of) for e in range(of)], rtol=1e-9)

def test_luck_is_another_in_each_stage():
    def draws(stage):
        g = Gallery()
        g.learn = SimpleNamespace(recipe=SimpleNamespace(seed=1), checkpoint=SimpleNamespace(stage=stage))
        return [g.luck(e).random() for e in range(3)]
    assert draws(0)==draws(0) and len({*draws(0), *draws(1)})==6

def test_noise_is_drawn_once_a_round():
    "The second epoch takes the best of what the first one left, in the very same matrix"
    rng = np.random.default_rng(0)
    s,y = rng.random((40,40), dtype=np.float32),np.arange(40)//2
    got = round_others(lambda rows: s[np.ix_(rows, rows)], y, 1., np.random.default_rng(3), epochs=2)
    noisy = s+np.random.default_rng(3).random((40,40), dtype=np.float32)
    first = other_pairs(noisy, y, 0, None)
    second = other_pairs(noisy, y, 0, None, first)
    assert np.array_equal(got[0], first) and np.array_equal(got[1], second)

def test_kernel2_moves_every_picture_on_its_mean():
    move, = kernel2_augment(64)
    assert isinstance(move, OnMean) and move.p==1
    ims = np.random.default_rng(0).integers(150, 250, (40,64,64,1), dtype=np.uint8)
    out = [move(image=o)['image'] for o in ims]
    assert all(o.dtype==np.uint8 and o.shape==i.shape for o,i in zip(out, ims)) and sum((o==i).all() for o,i in zip(out, ims))==0
    flat = np.full((64,64,1), 200, np.uint8)
    assert all((move(image=flat)['image']==200).all() for _ in range(10))

def test_kernel2_bootstraps():
    assert len(whale.kernel2.rounds)==2
    first,second = whale.kernel2.rounds[1]['data'].keywords['steps']
    assert first is without_copies and second.keywords==dict(least=.999999, other=.99)

def test_one_candidate(monkeypatch):
    "Two ids above `other`: nobody is sure"
    p = np.array([[.97,.5,.1],[.97,.995,.1],[.2,.3,.1]], np.float32)
    table = whale.table(sample('whale', 60))
    monkeypatch.setattr('recipes.recipe.unknown.test_predictions', lambda runs: SimpleNamespace(p=p))
    def n(**kw): return int((pseudo_ids(table, SimpleNamespace(runs=[]), **kw).train.source=='pseudo').sum())
    assert n(least=.9)==2 and n(least=.9, other=.6)==1

def test_no_copy_of_a_held_out_picture_is_trained_on(tmp_path):
    table = whale.table(sample('whale', 300))
    group,_ = find_copies(table)
    at,more = pd.Index(table.train.id),without_copies(table)
    assert (np.bincount(group)>1).any() and len(more)<len(table)
    save_rows(tmp_path, more)
    again,left = read_rows(tmp_path, table),0
    for seed in range(20):
        train,held = split(whale.kernel2.but(seed=seed), table, 0, more)
        assert not set(group[at.get_indexer(more.train.id.iloc[train])]) & set(group[held])
        left += len(more)-len(train)
        assert np.array_equal(split(whale.kernel2.but(seed=seed), table, 0, again)[0], train)
    assert left
    test = np.flatnonzero(more.test.copies!='')
    assert len(test) and with_test(more, test, np.zeros(len(test), int)).train.copies.notna().all()

def test_unknown_pictures_are_never_mirrored():
    table = twin_rows(whale.table(sample('whale', 148)))
    rows = np.arange(len(table))
    for stage in whale.first.steps():
        order = list(stage.sampler(table, rows)(random.Random(0)))
        new = [i for i in order if table.y[i]>=len(table.vocab)]
        assert new and not table.train.mirrored.iloc[new].any() and table.train.mirrored.iloc[order].any()

def test_no_gallery_of_older_weights(path):
    "After a run its best weights are loaded; what `get_preds` and `validate` compare with is of those, not of the last epoch"
    learn = whale.train(path, recipe=tenth_metric.but(**tiny|dict(epochs=4, lr=2e-2)))
    assert learn.model.head.gallery is None
    with learn.no_bar(): raw = learn.get_preds(act=lambda o: o)[0]
    np.testing.assert_allclose(learn.read_out(raw).numpy(), learn.run.valid.p, atol=1e-4)
    again = learn.run.learner()
    with learn.no_bar(), again.no_bar(), learn.no_logging(), again.no_logging():
        assert learn.validate()==again.validate() and learn.model.head.gallery is None
        before = learn.validate()
        learn.fit(1, 1e-2)
        assert learn.validate()[0]!=before[0]
        load_weights(learn.model, learn.run.path/'model.safetensors')
        assert learn.validate()==before
    assert np.isfinite(class_scores(learn, learn.dls.valid)).all() and learn.model.head.gallery is None   # nor is one left by scoring
    np.testing.assert_allclose(whale.predict(again).p, whale.predict(learn.run).p, atol=1e-5)
