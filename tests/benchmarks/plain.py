"The other side: fastai as its tutorials use it, given its best chance"
import os
from typing import NamedTuple
import numpy as np, pandas as pd, torch
from fastai.callback.schedule import valley   # its module gives `Learner` `lr_find` and `fit_one_cycle`
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from functools import partial
from callbacks.resize import hw
from recipes.data.graphemes import HEADS
from recipes.data.loaders import Arrays
from recipes.data.settings import setting
from recipes.infer.predictions import Predictions
from recipes.metrics import EpochMetric
from torch.nn.functional import cross_entropy

class Side(NamedTuple):
    "What a task asks of a `DataBlock` and of a `vision_learner`"
    blocks:tuple # One for each label
    get_y:list # `get_y(row)`, likewise
    loss:object # What is minimised
    n_out:int # Outputs
    resize:Resize # To the side of a batch
    flip:bool=True # Mirror pictures?

def imet_side(table, size):
    "Many labels"
    vocab = np.array(table.vocab, dtype=object)
    def labels(row): return list(vocab[table.y[row].indices])
    return Side((MultiCategoryBlock(vocab=table.vocab),), [labels], BCEWithLogitsLossFlat(), len(vocab), Resize(size))

def bengali_side(table, size):
    "Three labels, the first one's loss twice; squished, as a crop would cut graphemes off"
    sizes = [len(o) for o in table.vocab]
    def loss(raw, *ys): return sum(w*cross_entropy(o, y) for w,o,y in zip((2,1,1), raw.split(sizes, 1), ys))
    get_y = [lambda row, j=j, v=v: v[table.y[row,j]] for j,v in enumerate(table.vocab)]
    blocks = tuple(CategoryBlock(vocab=o, sort=False) for o in table.vocab)
    return Side(blocks, get_y, loss, sum(sizes), Resize(size, 'squish'), flip=False)

def animal_side(table, size):
    "One label"
    blocks,get_y = (CategoryBlock(vocab=table.vocab),),[lambda row: table.vocab[table.y[row]]]
    return Side(blocks, get_y, CrossEntropyLossFlat(), len(table.vocab), Resize(size))

def whale_side(table, size):
    "One id, nobody known as one more class; squished, and not mirrored, as flukes are not alike on both sides"
    vocab = [*table.vocab,'new_whale']
    blocks,get_y = (CategoryBlock(vocab=vocab, sort=False),),[lambda row: vocab[table.y[row]]]
    return Side(blocks, get_y, CrossEntropyLossFlat(), len(vocab), Resize(hw(size), 'squish'), flip=False)

SIDES = dict(imet=imet_side, bengali=bengali_side, animal=animal_side, whale=whale_side)

def ids_of(p, table):
    "Scores of the classes that a rule wants: of ids, without nobody known"
    return p[:,:len(table.vocab)] if not table.is_multi else p

def seen(y, p, watch, table):
    "`watch` on those scores"
    return watch(y, ids_of(p, table), table=table)

def pictures(table):
    "Training pictures, then those of the test set: files, or arrays"
    df = pd.concat([table.train, table.test], ignore_index=True)
    return Arrays(list(df.path), list(df.row), 3) if 'row' in df else list(df.path)

def plain_dls(table, held, setup, workers):
    "`DataLoaders` of a `DataBlock`; its items are rows"
    side,ims = SIDES[setup.task](table, setup.size),pictures(table)
    block = DataBlock((ImageBlock,*side.blocks), n_inp=1, get_x=lambda i: ims[i], get_y=side.get_y, splitter=IndexSplitter(held),
        item_tfms=side.resize, batch_tfms=[*aug_transforms(do_flip=side.flip),Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(range(len(table.train)), bs=setup.bs, num_workers=workers, path='.')

def plain_learner(table, held, setup, workers, watch):
    "`vision_learner`, watched by the same metric as ours; fp16 where there is a GPU"
    dls,side = plain_dls(table, held, setup, workers),SIDES[setup.task](table, setup.size)
    kw = dict(n_out=side.n_out, loss_func=side.loss, metrics=EpochMetric(partial(seen, watch=watch, table=table), watch.__name__))
    learn = vision_learner(dls, setup.arch, pretrained=False, **kw)
    return learn.to_fp16() if torch.cuda.is_available() else learn

def fit_plain(learn, setup):
    "`lr_find` and `fit_one_cycle`, ending with the weights of the best epoch, as ours does"
    with learn.no_bar(), learn.no_logging():
        lr = setup.lr or float(np.clip(learn.lr_find(suggest_funcs=valley, show_plot=False).valley, 1e-3, 1e-2))
        learn.fit_one_cycle(setup.epochs, lr, cbs=SaveModelCallback(learn.metrics[0].name))

def plain_oof(p, learn, recipe, table):
    "Held-out scores, whose rule's values are found as ours are"
    rows = np.array([int(o) for o in learn.dls.valid.items])
    kw = dict(table=table, competition=recipe.competition, rule=recipe.rule, tune=recipe.tune)
    return Predictions(ids_of(p, table), list(table.train.id.iloc[rows]), rows=rows, folds=np.zeros(len(rows), int), **kw)

def answers(table):
    "Class indices of the test pictures, where the folder says what they are"
    df = pd.read_csv(table.path/'answers.csv', dtype=str, keep_default_na=False)
    df = df.set_index(df.columns[0]).loc[table.test.id]
    if 'Id' in df: return np.where(df.Id=='new_whale', len(table.vocab), pd.Index(table.vocab).get_indexer(df.Id))
    heads = zip(HEADS, table.vocab) if table.is_multi else [('label', table.vocab)]
    y = np.stack([pd.Index(v).get_indexer(df[k]) for k,v in heads], 1)
    return y if table.is_multi else y[:,0]

def plain_test(learn, recipe, table, values):
    "The metric on the test set, decided as ours is, with values found on held-out rows"
    n,m = len(table.train),len(table.test)
    with learn.no_bar(): p = learn.get_preds(dl=learn.dls.test_dl(range(n, n+m)))[0].numpy()
    return recipe.competition.metric(answers(table), recipe.rule(ids_of(p, table), table, **values))

def probe(table, held, setup, workers, watch, clock):
    "Images/s of part of an epoch, after another that warms up"
    learn = plain_learner(table, held, setup, workers, watch)
    share = min(1, max(.2, 8/len(learn.dls.train)))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=ShortEpochCallback(share))
    print(f'plain fastai with {workers} workers: {clock.rate:.0f} images/s', flush=True)
    return clock.rate

def faster(table, held, setup, watch, clock):
    "The number of loading processes that suits plain fastai better, and its images/s with them"
    counts = (setting('workers'),os.cpu_count()) if torch.cuda.is_available() else (0,2)
    rates = {o:probe(table, held, setup, o, watch, clock) for o in counts}
    return max(rates.items(), key=lambda o: o[1])
