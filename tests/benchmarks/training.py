"Training against plain fastai, and against a bare PyTorch loop on data already in memory"
import shutil
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import NamedTuple
import numpy as np, pandas as pd, torch
from callbacks.precision import autocast_dtype, channels_last, model_channels_last
from fastai.callback.core import Callback
from fastai.learner import defaults
from fastai.torch_core import default_device, set_seed
from plain import answers, faster, fit_plain, plain_learner, plain_oof, plain_test
from callbacks.resize import hw
from recipes.infer.tta import as_is
from recipes.ranking import map5
from recipes.recipe.build import model_of, split, target_of
from recipes.whale import house
from result import Row

class Setup(NamedTuple):
    "What both sides have in common"
    arch:str # A timm name
    size:int # Side, or height and width, pixels
    bs:int # Pictures in a batch
    epochs:int # Times through the data
    seeds:int # How often
    bar:str='' # How many times as many images/s as plain fastai
    lr:float=None # Learning rate; looked for by both where None
    task:str='imet' # Whose house recipe
    quicker:str='' # How many times as fast the whole fit
    test:bool=False # Score the test set too, where its answers are there?
    metric:str='F2' # What the score is called
    same_time:bool=False # Does plain fastai get as many epochs as fit into our time?
    fields:dict={} # Fields of our recipe that stay as they are

    @property
    def verbs(self):
        "The task's module"
        return import_module(f'recipes.{self.task}')

class Done(NamedTuple):
    "What a training gave"
    rate:float # Images/s of the training epochs
    secs:float # From the table to predictions of the held-out rows
    score:float # Of these; thresholds found on one half and used on the other
    test:float=None # Of the test set

def _synced():
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return perf_counter()

class Clock(Callback):
    "Pictures and seconds of the training epochs of the last fit"
    order = -100
    def before_fit(self): self.epochs = []
    def before_train(self): self.n,self.began = 0,_synced()
    def after_batch(self): self.n += len(self.learn.xb[0])*self.training
    def after_train(self): self.epochs.append((self.n,_synced()-self.began))

    @property
    def rate(self):
        "Images/s; the first epoch warms up"
        n,secs = map(sum, zip(*(self.epochs[1:] or self.epochs)))
        return n/secs

@contextmanager
def clocked():
    "Every `Learner` made in here runs this clock"
    clock,before = Clock(),defaults.callbacks
    defaults.callbacks = [*before, clock]
    try: yield clock
    finally: defaults.callbacks = before

def recipe_of(setup, seed):
    "Our side as a recipe"
    kw = dict(arch=setup.arch, size=setup.size, bs=setup.bs, epochs=setup.epochs, seed=seed, lr=setup.lr or setup.verbs.house.lr)
    return setup.verbs.house.but(**dict(pretrained=False, resize=(), tta=(as_is,))|kw|setup.fields)

def ours(path, setup, seed):
    "Our training"
    with clocked() as clock:
        began = perf_counter()
        learn = setup.verbs.train(path, recipe=recipe_of(setup, seed))
        secs = perf_counter()-began
        done = Done(clock.rate, secs, learn.run.valid.score())
    if has_answers(learn.table, setup):
        labels = setup.verbs.predict(learn).decide()
        done = done._replace(test=learn.recipe.competition.metric(answers(learn.table), labels))
    shutil.rmtree(learn.run.path.parent)
    return done

def has_answers(table, setup): return setup.test and (table.path/'answers.csv').exists()

def plain(table, setup, seed, workers):
    "Plain fastai's training, on the same rows"
    recipe = recipe_of(setup, seed)
    with clocked() as clock:
        began = perf_counter()
        set_seed(seed)
        learn = plain_learner(table, split(recipe, table, 0)[1], setup, workers, recipe.competition.watch)
        fit_plain(learn, setup)
        rate = clock.rate   # `get_preds` begins a fit
        with learn.no_bar(): p = learn.get_preds(dl=learn.dls.valid)[0].numpy()
        secs = perf_counter()-began
    oof = plain_oof(p, learn, recipe, table)
    test = plain_test(learn, recipe, table, oof.values) if has_answers(table, setup) else None
    return Done(rate, secs, oof.score(), test)

def bare_step(table, setup):
    "One step of a bare loop, as a function"
    device,recipe = default_device(),recipe_of(setup, 0)
    dtype,model = autocast_dtype('auto', device),model_of(recipe, table).to(device).train()
    model_channels_last(model)
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    x = channels_last(torch.randn(setup.bs, 3, *hw(setup.size), device=device))
    y = (torch.rand(setup.bs, target_of(recipe, table).n_out(table), device=device)<.01).float()
    def step():
        with torch.autocast(device.type, dtype, enabled=dtype!=torch.float32): raw = model(x)
        torch.nn.functional.binary_cross_entropy_with_logits(raw.float(), y).backward()
        opt.step()
        opt.zero_grad()
    return step

def bare(table, setup, secs=5):
    "Images/s of forward, loss, backward and step on a batch in memory"
    step,n = bare_step(table, setup),0
    for _ in range(5): step()
    began = _synced()
    while perf_counter()-began<secs:
        for _ in range(5): step()
        n += 5*setup.bs
        _synced()   # a GPU would be handed steps far ahead of doing them
    return n/(_synced()-began)

def said(o, setup):
    "A side in words"
    test = '' if o.test is None else f', test {o.test:.4f}'
    return f'{o.rate:.0f} images/s, {o.secs:.0f} s, {setup.metric} {o.score:.4f}{test}'

def compare(path, setup, score=True):
    "All sides in turn, a seed after another"
    table,recipe = setup.verbs.table(path),recipe_of(setup, 0)
    with clocked() as clock: workers,rate = faster(table, split(recipe, table, 0)[1], setup, recipe.competition.watch, clock)
    done = []
    for seed in range(setup.seeds):
        a = ours(path, setup, seed)
        epochs = round(a.secs*rate/len(split(recipe, table, 0)[0])) if setup.same_time else setup.epochs
        b,loop = plain(table, setup._replace(epochs=max(1, epochs)), seed, workers),bare(table, setup)
        done.append((a, b, loop))
        print(f'seed {seed}: ours {said(a, setup)}; plain {said(b, setup)}; bare loop {loop:.0f} images/s', flush=True)
    return rows_of(setup, *zip(*done), f'{workers} workers', score)

def rows_of(setup, a, b, loop, workers, score):
    "What three lists of results say"
    name = f'{setup.task} {setup.arch} {setup.size} px, batch {setup.bs}'
    def of(field, both, f=median): return f(getattr(o, field) for o in both)
    faster = median(o.rate/p.rate for o,p in zip(a, b))
    share = median(o.rate/p for o,p in zip(a, loop))
    quicker = median(p.secs/o.secs for o,p in zip(a, b))
    rows = [Row(f'{name}: training images/s (other: fastai, {workers})', of('rate', a), of('rate', b), faster, setup.bar),
        Row(f'{name}: training images/s (other: bare loop)', of('rate', a), median(loop), share),
        Row(f'{name}: whole fit, s (other: fastai)', of('secs', a), of('secs', b), quicker, setup.quicker)]
    def scores(field, what):
        x,y = of(field, a, mean),of(field, b, mean)
        return Row(f'{name}: {what}, mean of {len(a)} seeds, {setup.epochs} epochs (other: fastai)', x, y, x/y, '>=1')
    if score: rows.append(scores('score', setup.metric))
    if a[0].test is not None: rows.append(scores('test', f'{setup.metric} on the test set'))
    return rows

def _with(setup, seeds, epochs): return setup._replace(seeds=seeds or setup.seeds, epochs=epochs or setup.epochs)

def resnet18(path, seeds=0, epochs=0):
    "A small network on small pictures, where the loader decides"
    return compare(path, _with(Setup('resnet18', 64, 64, 8, 3, '>=2'), seeds, epochs))

def seresnext50(path, seeds=0, epochs=0):
    "The house network; one seed, unless told otherwise, as it is slow"
    return compare(path, _with(Setup('seresnext50_32x4d', 128, 32, 4, 1, '>=1.6'), seeds, epochs))

def _bars(task, metric): return dict(task=task, metric=metric, quicker='>=1', test=True)

def bengali(path, seeds=0, epochs=0):
    "Three labels a picture"
    return compare(path, _with(Setup('resnet18', 64, 64, 8, 3, **_bars('bengali', 'macro recall')), seeds, epochs))

def animal(path, seeds=0, epochs=0):
    "One label, with classes of very different size"
    return compare(path, _with(Setup('resnet18', 48, 64, 20, 3, **_bars('animal', 'accuracy')), seeds, epochs))

WHALE = dict(size=(64,128), resize=house.resize, tta=house.tta)

def whale(path, seeds=0, epochs=0):
    "Identities, against a classifier that is given as much time, and against answering that nobody is known"
    setup = Setup('resnet18', (64,128), 32, 40, 3, task='whale', metric='MAP@5', test=True, same_time=True, fields=WHALE)
    rows = compare(path, _with(setup, seeds, epochs))
    table = setup.verbs.table(path)
    if not has_answers(table, setup): return rows
    alone = map5(answers(table), np.full((len(table.test),1), len(table.vocab)))
    return [*rows,Row('whale: MAP@5 on the test set (other: new_whale alone)', rows[-1].ours, alone, rows[-1].ours/alone, '>=1')]

def repeated(path, to, times=20):
    "iMet's files with every training picture `times` times, as links"
    path,to = Path(path),Path(to)
    (to/'train').mkdir(parents=True)
    (to/'test').symlink_to(path/'test')
    for o in ('labels.csv','sample_submission.csv'): shutil.copy(path/o, to)
    df = pd.read_csv(path/'train.csv', dtype=str)
    for id in df.id:
        for i in range(times): (to/'train'/f'{id}r{i}.png').symlink_to(path/'train'/f'{id}.png')
    pd.concat([df.assign(id=df.id+f'r{i}') for i in range(times)]).to_csv(to/'train.csv', index=False)
    return to

def gpu(path, seeds=0, epochs=0):
    "A GPU kept busy: 224 pixels, rows repeated; F2 says nothing, as copies are on both sides of the split"
    if not torch.cuda.is_available(): return print('no GPU: left out') or []
    big = repeated(path, 'repeated')
    return compare(big, _with(Setup('resnet50', 224, 128, 3, 1, '>=1.3', 1e-3), seeds, epochs), score=False)
