"Search among embeddings as large as the whale competition's, against the bare matrix product"
import numpy as np
from recipes.infer.gallery import id_scores, nearest
from recipes.ranking import best_ids
from result import Row
from small import seconds
from statistics import median

def vectors(n, d, seed):
    "Random unit vectors"
    v = np.random.default_rng(seed).standard_normal((n, d), np.float32)
    return v/np.linalg.norm(v, axis=1, keepdims=True)

def bare(queries, gallery, step=661):
    "The product alone, without a look at what it gives"
    for i in range(0, len(queries), step): queries[i:i+step]@gallery.T

def retrieval(path, seeds=0, epochs=0, n=7_960, m=25_361, ids=5_004, d=512, times=5):
    "Five nearest pictures, and five best ids, of every query"
    queries,gallery = vectors(n, d, 0),vectors(m, d, 1)
    y = np.random.default_rng(2).integers(0, ids, m)
    sides = dict(pictures=lambda: nearest(queries, gallery, 5), ids=lambda: best_ids(id_scores(queries, gallery, y, ids)))
    secs = [(seconds(bare, queries, gallery), *(seconds(f) for f in sides.values())) for _ in range(times)]
    alone,*ours = (median(o) for o in zip(*secs))
    ratios = [median(o[i]/o[0] for o in secs) for i in (1,2)]
    what = f'top 5 {{}} of {n:,} among {m:,} x {d}, s (other: bare product)'
    return [Row(what.format(k), s, alone, r, bar) for k,s,r,bar in zip(sides, ours, ratios, ('<=1.5','<=2'))]
