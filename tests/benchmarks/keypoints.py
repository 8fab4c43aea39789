"Keypoints: pairs of pictures a second a core, and what they would be with OpenCV's matcher"
from statistics import median
from time import process_time
import cv2, numpy as np
from threadpoolctl import threadpool_limits
from recipes.data.augment import none, squish
from recipes.data.boxes import boxed
from recipes.data.identities import read_identities
from recipes.data.loaders import Files, Items
from recipes.infer.keypoints import Keypoints, cores, rooted
from recipes.infer.matching import match_pairs, one_each, projected
from result import Row

def seconds(f, *args):
    "Seconds of a core that a call takes, in all threads: another process beside it does not count"
    began = process_time()
    f(*args)
    return process_time()-began

def by_opencv(one, two):
    "A pair as `compared` has it, with `BFMatcher`"
    if len(one[0])<1 or len(two[0])<2: return
    found = cv2.BFMatcher(cv2.NORM_L2).knnMatch(one[1], two[1], k=2)
    good = sorted((a.distance/b.distance,a.queryIdx,a.trainIdx) for a,b in found if a.distance**2<.64*b.distance**2)
    if len(good)<=9: return
    _,i,j = zip(*good)
    projected(*one_each(one[0][list(i)], two[0][list(j)]))

def keypoints(path, seeds=0, epochs=0, n=80, k=500, times=5):
    "Pairs of `n` training pictures by one thread, then by as many as cores; pictures a second for finding keypoints"
    frame = read_identities(path).train[:n]
    keys = Keypoints(Items(boxed(Files(list(frame.path)), frame), list(frame.id), list(range(n)), (squish,none), (32,32)))
    find,again = seconds(keys.fill),seconds(keys.fill)
    found = list(keys)
    units,pairs = [(xy,rooted(d)) for xy,d in found],np.divmod(np.arange(n*n), n)
    few = tuple(o[:k] for o in pairs)
    def plain():
        with threadpool_limits(1, 'blas'):
            for i,j in zip(*few): by_opencv(units[i], units[j])
    def ours_by(workers): return n*n/seconds(match_pairs, found, found, pairs, workers)
    each = [(ours_by(1), ours_by(cores()), k/seconds(plain)) for _ in range(times)]
    ours,threads,other = (median(o) for o in zip(*each))
    many = np.mean([len(xy) for xy,_ in found])
    return [Row(f'{many:.0f} keypoints a picture, pictures/s a core (other: read again)', n/find, n/again, again/find, '<=0.5'),
        Row('pairs/s a core (other: BFMatcher)', ours, other, median(a/c for a,_,c in each), '>=1'),
        Row(f'pairs/s a core, {cores()} threads (other: one)', threads, ours, median(b/a for a,b,_ in each), '>=0.8')]
