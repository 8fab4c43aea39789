"Slices and calibration, against scikit-learn and slow loops; a slice that was made worse is named, and none where there is none"
import cv2, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from recipes import animal, bengali, imet, whale
from recipes.data.fixtures import sample
from recipes.infer.predictions import Predictions
from recipes.look.calibration import bin_sums, brier, calibration_table, ece, event_sums, plot_reliability, reliability
from recipes.look.chances import chances_of, softmax_at
from recipes.look.slices import picture_traits, plot_slices, quantile_bins, shuffled_p, slice_scores, traits_of, training_counts, worst_slice
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

def made_up(task, p, table, **kw): return Predictions(p.astype(np.float32), list(table.train.id), table, task.competition, task.house.rule,
    task.house.tune, rows=np.arange(len(table)), folds=np.arange(len(table))%2, **kw)

def animals(noise, n=300, seed=0):
    table,rng = animal.table(sample('animal', n)),np.random.default_rng(seed)
    k = len(table.vocab)
    return made_up(animal, softmax_at(3*np.eye(k)[table.y]+noise(table)[:,None]*rng.normal(size=(len(table),k)), 1), table)

def test_curve():
    "scikit-learn's curve, chances on edges and of 0 and 1 among them"
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(2000)**2, np.linspace(0, 1, 11), [0,1]])
    hit = rng.random(len(p))<p
    for bins in (5,10,15):
        share,chance = calibration_curve(hit, p, n_bins=bins)
        df = reliability(bin_sums(p, hit, bins))
        assert np.allclose(df.share, share) and np.allclose(df.chance, chance)
        n = np.histogram(p, np.linspace(0, 1, bins+1))[0]
        assert df.n.sum()==len(p) and abs(df.n.to_numpy()-n[n>0]).max()<=3   # edges fall to the lower bin
        assert np.isclose(ece(bin_sums(p, hit, bins)), (df.n*abs(df.share-df.chance)).sum()/len(p))
        assert np.isclose(brier(bin_sums(p, hit, bins)), brier_score_loss(hit, p))

def test_sums_add_up():
    "Blocks give what the whole gives; many labels by group"
    table = imet.table(sample('imet', 120))
    o = made_up(imet, np.random.default_rng(0).random(table.y.shape), table)
    sums,y = event_sums(o, 10),table.y.toarray()
    for k,cols in table.groups.items(): assert np.allclose(sums[k], bin_sums(o.p[:,cols].ravel(), y[:,cols].ravel(), 10))
    df = calibration_table(o)
    assert df.events.sum()==o.p.size and np.isclose(df.brier['tag'], ((o.p-y)[:,table.groups['tag']]**2).mean(), rtol=1e-5)
    assert len(plot_reliability(o).axes)==2
    plt.close('all')

def test_top():
    "One label: the likeliest class's chance against its being right; heads each; identities through a softmax"
    o = animals(lambda t: np.ones(len(t)))
    df = calibration_table(o)
    assert np.isclose(df.chance.iloc[0], o.p.max(1).mean(), rtol=1e-4) and np.isclose(df.share.iloc[0], (o.p.argmax(1)==o.y).mean())
    table = bengali.table(sample('bengali', 120))
    heads = made_up(bengali, np.concatenate([softmax_at(np.random.default_rng(0).normal(size=(120,len(v))), 1) for v in table.vocab], 1), table)
    assert list(calibration_table(heads).index)==list(bengali.competition.target.heads)
    table = whale.table(sample('whale', 120))
    cos = np.random.default_rng(0).random((len(table),len(table.vocab)))*2-1
    ids = made_up(whale, cos, table)
    assert np.isclose(calibration_table(ids).chance['identity'], chances_of(ids).max(1).mean(), rtol=1e-4)
    with pytest.raises(ValueError, match='are no probabilities'): calibration_table(made_up(animal, o.p*2-1, o.table))

def test_traits(tmp_path):
    "Side, aspect and brightness of files; sizes from the headers where the frame has none"
    for i,(h,w,v) in enumerate([(40,80,10),(300,150,200)]):
        cv2.imwrite(str(tmp_path/f'{i}.png'), np.full((h,w,3), v, np.uint8))
        cv2.imwrite(str(tmp_path/f'{i}.jpg'), np.full((h,w,3), v, np.uint8))
    df = picture_traits(pd.DataFrame(dict(path=[str(tmp_path/o) for o in ('0.png','1.png','0.jpg','1.jpg')])))
    assert df.side.tolist()==[80,300]*2 and df.aspect.tolist()==[2,.5]*2 and np.allclose(df.brightness, [10,200]*2, atol=1.5)
    rows = picture_traits(bengali.table(sample('bengali', 120)).train[:3])
    assert (rows.side>0).all() and rows.brightness.between(0, 255).all()

def test_training_counts():
    "Counted by a slow loop, in the fold's training rows; of many labels the rarest"
    table = imet.table(sample('imet', 120))
    o = made_up(imet, table.y.toarray(), table)
    y = table.y.toarray()
    for i in range(0, 120, 17):
        n = y[o.folds!=o.folds[i]].sum(0)
        assert training_counts(o)[i]==n[y[i]>0].min()
    assert traits_of(o).labels.tolist()==y.sum(1).tolist()

def test_some_of_many():
    "Of many pictures some are looked at, and how common their classes are is counted in all"
    o = animals(lambda t: np.ones(len(t)))
    all_,some = slice_scores(o, n=20),slice_scores(o, n=20, most=100)
    assert all_.n.iloc[0]==300 and some.n.iloc[0]==100
    at = np.sort(np.random.default_rng(0).permutation(300)[:100])
    assert np.array_equal(traits_of(o, at).trained_on, training_counts(o)[at]) and traits_of(o, at).trained_on.min()>=training_counts(o).min()
    assert np.isclose(some.score.iloc[0], (o.labels[at]==o.y[at]).mean())

def test_bins():
    "Every picture in one bin at most, few values and missing ones too"
    for v in (np.arange(50.), np.repeat([1.,2,3], [30,15,5]), np.r_[np.zeros(90), np.arange(10)], np.r_[np.full(20, np.nan), np.arange(30)]):
        at = [*quantile_bins(v, 4, 5).values()]
        assert len(at)>1 and len(np.concatenate(at))==len(set(np.concatenate(at))) and all(len(o)>=5 for o in at)
        assert not np.isnan(v[np.concatenate(at)]).any()
    assert quantile_bins(np.full(9, np.nan))=={} and quantile_bins(np.ones(50))=={}

def test_shuffled():
    "False alarms among slices of nothing are as rare as alpha says"
    rng,alarms = np.random.default_rng(0),0
    for i in range(60):
        v = rng.random(120)
        groups = [o for _ in range(4) for o in np.array_split(rng.permutation(120), 4)]
        alarms += shuffled_p(lambda r: v[r].mean(), groups, 120, 60, i).min()<=.05
    assert alarms<=8

def test_worse_slice():
    "Dark pictures that were spoiled are named; where all are alike nothing is"
    o = animals(lambda t: np.where(picture_traits(t.train).brightness.rank(pct=True)<=.25, 8, .5))
    df = slice_scores(o, n=100)
    assert worst_slice(df).startswith('worst beyond chance: brightness')
    assert np.isclose(df.score[0], o.score()) and df.n[0]==len(o) and (df.low<=df.score).all() and (df.score<=df.high).all()
    one = df[df.trait=='brightness'].iloc[0]
    at = quantile_bins(picture_traits(o.table.train).brightness)[one.slice]
    assert np.isclose(one.score, (o.labels==o.y)[at].mean())
    assert worst_slice(slice_scores(animals(lambda t: np.full(len(t), 2.), seed=3), n=100)).startswith('no slice')
    assert len(plot_slices(df).axes)==df.trait[1:].nunique()
    plt.close('all')
