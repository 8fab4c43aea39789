"A process that predicts `rows x classes` with a stub of a model, and prints the bytes it took beyond those before"
import re, sys
import numpy as np, psutil, torch
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from recipes.data.augment import flip_only, squish
from recipes.data.loaders import Items, make_dls
from recipes.data.targets import MultiLabel
from recipes.infer.tta import class_scores
from pathlib import Path
from torch import nn
from types import SimpleNamespace

class Stub(nn.Module):
    "Scores from the mean colour"
    def __init__(self, c):
        super().__init__()
        self.lin = nn.Linear(3, c)
    def forward(self, x): return self.lin(x.mean((2,3)))

def items(n):
    "One small picture, `n` times"
    pic = np.random.default_rng(0).integers(0, 255, (8,8,3), dtype=np.uint8)
    return Items([pic]*n, range(n), list(range(n)), (squish,flip_only), (8,8))

def stub_learner(n, c):
    "A learner that can predict `n x c`"
    kw = dict(device='cpu', target=MultiLabel(), stats=((0.,)*3,(1.,)*3))
    learn = Learner(make_dls((items(128),items(n)), 64, (None,None), **kw), Stub(c), BCEWithLogitsLossFlat())
    learn.target,learn.table = MultiLabel(),SimpleNamespace(vocab=range(c))
    learn.read_out = lambda raw,mirrored=False: learn.target.read_out(raw, learn.loss_func, mirrored)
    return learn

def peak():
    "The most this process has held, bytes; not `ru_maxrss`, which Linux lets a parent's size into"
    return 1024*int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])

def main(n, c):
    "Warm up, measure"
    learn = stub_learner(n, c)
    class_scores(learn, learn.dls.train)
    before = psutil.Process().memory_info().rss
    p = class_scores(learn, learn.dls.valid)
    assert p.shape==(n,c) and p[-1].all()
    print(peak()-before)

if __name__=='__main__':
    torch.manual_seed(0)
    main(*map(int, sys.argv[1:]))
