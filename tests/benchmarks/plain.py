"The other side: fastai as its tutorials use it, given its best chance"
import os
import numpy as np, torch
from fastai.callback.schedule import valley   # its module gives `Learner` `lr_find` and `fit_one_cycle`
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.block import DataBlock, MultiCategoryBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.losses import BCEWithLogitsLossFlat
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from recipes.data.settings import setting
from recipes.infer.predictions import Predictions
from recipes.metrics import EpochMetric, f2_best

def plain_dls(table, held, setup, workers):
    "`DataLoaders` of a `DataBlock`"
    vocab = np.array(table.vocab, dtype=object)
    def labels(row): return list(vocab[table.y[row].indices])
    block = DataBlock((ImageBlock,MultiCategoryBlock(vocab=table.vocab)), get_x=lambda i: table.train.path.iloc[i],
        get_y=labels, splitter=IndexSplitter(held), item_tfms=Resize(setup.size),
        batch_tfms=[*aug_transforms(),Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(range(len(table.train)), bs=setup.bs, num_workers=workers, path='.')

def plain_learner(table, held, setup, workers):
    "`vision_learner`, watched by the same metric as ours; fp16 where there is a GPU"
    dls = plain_dls(table, held, setup, workers)
    metric = EpochMetric(f2_best)
    learn = vision_learner(dls, setup.arch, pretrained=False, loss_func=BCEWithLogitsLossFlat(), metrics=metric)
    return learn.to_fp16() if torch.cuda.is_available() else learn

def fit_plain(learn, setup):
    "`lr_find` and `fit_one_cycle`, ending with the weights of the best epoch, as ours does"
    with learn.no_bar(), learn.no_logging():
        lr = setup.lr or float(np.clip(learn.lr_find(suggest_funcs=valley, show_plot=False).valley, 1e-3, 1e-2))
        learn.fit_one_cycle(setup.epochs, lr, cbs=SaveModelCallback('f2_best'))

def plain_score(p, learn, recipe, table):
    "F2 of held-out scores, thresholds found as ours are"
    rows = np.array([int(o) for o in learn.dls.valid.items])
    kw = dict(table=table, competition=recipe.competition, rule=recipe.rule, tune=recipe.tune)
    return Predictions(p, list(table.train.id.iloc[rows]), rows=rows, folds=np.zeros(len(rows), int), **kw).score()

def probe(table, held, setup, workers, clock):
    "Images/s of part of an epoch, after another that warms up"
    learn = plain_learner(table, held, setup, workers)
    share = min(1, max(.2, 8/len(learn.dls.train)))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=ShortEpochCallback(share))
    print(f'plain fastai with {workers} workers: {clock.rate:.0f} images/s', flush=True)
    return clock.rate

def faster(table, held, setup, clock):
    "The number of loading processes that suits plain fastai better"
    counts = (setting('workers'),os.cpu_count()) if torch.cuda.is_available() else (0,2)
    return max(counts, key=lambda o: probe(table, held, setup, o, clock))
