"Benchmarks that train nothing: import, loader, memory of predicting, search for thresholds"
import subprocess, sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
import numpy as np, torch
from recipes import imet
from recipes.data.augment import pipeline
from recipes.data.pictures import decode
from recipes.infer.search import best_threshold
from result import Row
from scipy.sparse import random as random_sparse

def seconds(f, *args):
    "How long a call takes"
    began = perf_counter()
    f(*args)
    return perf_counter()-began

def python(*args):
    "What a fresh interpreter prints"
    return subprocess.run([sys.executable, *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout

def importing(path, seeds=0, epochs=0):
    "`import recipes` in a fresh interpreter, less the interpreter's own start"
    pairs = [(seconds(python, '-c', 'import recipes'), seconds(python, '-c', '')) for _ in range(7)]
    ours,bare = (median(o) for o in zip(*pairs))
    return [Row('import recipes, s (other: bare python; ratio: difference)', ours, bare, median(a-b for a,b in pairs), '<=0.3')]

def bare_pass(paths, pipe, bs):
    "Decode, augment and stack, one picture after another"
    for i in range(0, len(paths)-bs+1, bs): np.stack([pipe(decode(o)) for o in paths[i:i+bs]])

@contextmanager
def one_thread():
    "PyTorch on one core, as the bare loop is"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(before)

@one_thread()
def loading(path, seeds=0, epochs=0, times=7):
    "Our loader on one core, without the cache, against a bare loop over the same pictures"
    dl = imet.dls(path, size=64, bs=64, cache=False, resize=()).train.new(num_workers=0, device=torch.device('cpu'))
    items = dl.dataset
    paths,pipe = [items.pictures.paths[o] for o in items.rows],pipeline(*items.tfms, size=items.size)
    n = len(dl)*dl.bs
    def loader(): return sum(len(b[0]) for b in dl)
    assert loader()==n
    pairs = [(n/seconds(bare_pass, paths[:n], pipe, dl.bs), n/seconds(loader)) for _ in range(times)]
    bare,ours = (median(o) for o in zip(*pairs))
    return [Row('loader, images/s (other: bare decode+augment)', ours, bare, median(b/a for a,b in pairs), '>=0.85')]

def memory(path, seeds=0, epochs=0, n=40_000, c=1_103):
    "Peak memory of predicting, beyond what the process held before"
    extra,array = int(python(Path(__file__).with_name('memory.py'), n, c)),n*c*4
    return [Row(f'memory of predicting {n:,} x {c:,}, MB (other: the array)', extra/1e6, array/1e6, extra/array, '<=1.3')]

def thresholds(path, seeds=0, epochs=0, n=20_000, c=1_103):
    "One threshold for all classes, of 199 tried, against one sort of the same numbers"
    p = np.random.default_rng(0).random((n,c), np.float32)**16
    y = random_sparse(n, c, 3/c, format='csr', dtype=np.float32, random_state=0)
    y.data[:] = 1
    ours,sort = seconds(best_threshold, p, y),seconds(np.sort, p, None)
    return [Row(f'threshold search on {n:,} x {c:,}, s (other: one np.sort of it)', ours, sort, ours/sort)]
