"Decisions for many labels at iMet's size: seconds, and memory beyond the scores, each in a process of its own"
import sys
from time import perf_counter
import numpy as np, psutil
from memory import peak
from recipes.infer.each_class import class_thresholds
from recipes.infer.expected import most_expected, tune_expected
from result import Row
from scipy.sparse import csr_matrix, vstack
from small import python
from types import SimpleNamespace

def generated(n, c, seed=0):
    "Scores as a network gives them, labels drawn from them, and two groups of classes"
    rng = np.random.default_rng(seed)
    prior,p,rows = (-2.5-.9*np.log(np.arange(1, c+1)/5)).astype(np.float32),np.empty((n,c), np.float32),[]
    for i in range(0, n, 4096):
        z = 1.6*rng.standard_normal((min(4096, n-i),c), np.float32)+prior
        p[i:i+4096] = 1/(1+np.exp(-z))
        rows.append(csr_matrix(rng.random(z.shape, np.float32)<p[i:i+4096]))
    return p,vstack(rows, 'csr'),SimpleNamespace(groups=dict(culture=np.arange(c//3), tag=np.arange(c//3, c)))

WHAT = dict(classes=lambda p,y,table: class_thresholds(p, y, table), expected=lambda p,y,table: most_expected(p),
    calibrate=lambda p,y,table: tune_expected(p, y))

def main(what, n, c):
    "Seconds, bytes beyond those before, and those of the scores"
    p,y,table = generated(n, c)
    small = slice(0, 500)
    WHAT[what](p[small], y[small], table)   # warm
    before,began = psutil.Process().memory_info().rss,perf_counter()
    WHAT[what](p, y, table)
    print(perf_counter()-began, max(0, peak()-before), p.nbytes, y.nnz/n)

def timed(what, label, n, c, bar=60):
    "A row of seconds against the bar, and one of memory against the scores"
    t,extra,size,_ = map(float, python(__file__, what, n, c).split())
    return [Row(f'{label}, {n:,} x {c:,}, s (ratio: seconds)', t, bar, t, f'<={bar}'),
        Row(f'{label}, memory beyond the scores, MB (other: the scores)', extra/1e6, size/1e6, extra/size, '<=1')]

def classes(path, seeds=0, epochs=0, n=110_000, c=1_103):
    "A threshold for each class, found on all training rows of iMet"
    return timed('classes', 'a threshold a class', n, c)

def expected(path, seeds=0, epochs=0, n=40_000, c=1_103):
    "The set with the highest expected F2 for each test picture of iMet"
    return timed('expected', 'expected F2', n, c)

def calibrate(path, seeds=0, epochs=0, n=110_000, c=1_103):
    "Scale and shift of log-odds from all training rows of iMet"
    return timed('calibrate', 'log-odds', n, c)

if __name__=='__main__': main(sys.argv[1], *map(int, sys.argv[2:]))
