"Benchmarks of pair mining: one assignment, and an epoch of as many pictures as the whale competition can pair, in blocks"
import re, sys
from pathlib import Path
from time import perf_counter
import numpy as np, torch
from recipes.data.pairs import epoch_others, other_pairs
from recipes.models.siamese import PairScorer
from result import Row
from small import python, seconds

def features(n, ids, d=16):
    "Features of pictures of ids, some alike"
    rng = np.random.default_rng(0)
    y = np.sort(np.concatenate([np.repeat(np.arange(ids), 2),rng.integers(ids, size=n-2*ids)]))
    v = rng.standard_normal((ids,d), dtype=np.float32)[y]+.7*rng.standard_normal((n,d), dtype=np.float32)
    return v/np.linalg.norm(v, axis=1, keepdims=True),y

def assignment(path, seeds=0, epochs=0, n=4_000):
    "The hardest pairs of one block"
    v,y = features(n, n//5)
    took = min(seconds(other_pairs, (1+v@v.T)/2, y, .5, np.random.default_rng(o)) for o in range(3))
    return [Row(f'assignment of {n:,} x {n:,}, s (other: the bar)', took, 3, took/3, '<=1')]

def kilobytes(what):
    "What this process holds (VmRSS), or has held at most (VmHWM)"
    return int(re.search(rf'{what}:\s+(\d+)', Path('/proc/self/status').read_text())[1])

def a_round(n=13_600, blocks=8):
    "Seconds, and peak memory in MB beyond what the process held before; run in a process of its own"
    v,y = features(n, 2_900)
    before = kilobytes('VmRSS')
    began = perf_counter()
    pairs = epoch_others(lambda rows: (1+v[rows]@v[rows].T)/2, y, .5, np.random.default_rng(0), blocks=blocks)
    took = perf_counter()-began
    assert (y[pairs[:,0]]!=y[pairs[:,1]]).all() and len(pairs)==n
    print(took, (kilobytes('VmHWM')-before)/1e3)

def mining(path, seeds=0, epochs=0):
    "Pairs of an epoch for 13,600 pictures in 8 blocks, from scores that are there"
    took,mb = map(float, python(Path(__file__)).split())
    return [Row('pairs of 13,600 pictures in 8 blocks, s (other: the bar)', took, 60, took/60, '<=1'),
        Row('its memory, MB (other: the bar)', mb, 2_000, mb/2_000, '<=1')]

def scoring(path, seeds=0, epochs=0, n=256):
    "Pairs of 512 features a second, without and with tiles"
    torch.manual_seed(0)
    scorer,a,b = PairScorer(512),torch.randn(n,512),torch.randn(n,512)
    with torch.no_grad(): whole,tiles = (min(seconds(scorer.grid, a, b, o) for _ in range(3)) for o in (2**28,None))
    return [Row('scorer, pairs/s (other: large tiles)', n*n/tiles, n*n/whole, whole/tiles)]

if __name__=='__main__': a_round(*map(int, sys.argv[1:]))
