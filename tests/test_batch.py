"The largest batch: which sizes are tried, what a try costs, and that nothing is left of it"
import psutil, pytest, torch
from fastai.basics import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from callbacks import batch
from callbacks.batch import WithinBudget, doubled, largest_bs, rows_again, try_batch
from callbacks.mix import MixUp
from callbacks.optim import adamw

class Spy(nn.Module):
    "Notes the rows of each batch; runs out of memory from `limit` on"
    limit = 10**9
    def __init__(self):
        super().__init__()
        self.net,self.drop = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),nn.Dropout(.5)
        self.seen = []
    def forward(self, x):
        self.seen.append((len(x),self.training))
        if len(x)>=self.limit: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')
        return self.net(self.drop(x))

def learner(n=64, bs=8, **kwargs):
    set_seed(1)
    ds = [(torch.randn(3, 4, 4),torch.tensor(i%2)) for i in range(n)]
    dls = DataLoaders.from_dsets(ds, ds[:8], bs=bs, num_workers=0, device='cpu')
    return Learner(dls, Spy(), loss_func=CrossEntropyLossFlat(), opt_func=adamw, **kwargs)

def test_a_try_is_two_training_steps_of_that_size():
    learn = learner()
    try_batch(learn, 24)
    assert learn.model.seen==[(24,True)]*2

def weights_after(find):
    learn = learner()
    if find:
        with learn.added_cbs(MixUp()): assert largest_bs(learn, budget=1e3, most=32)==32
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    return learn.model.state_dict(),learn.recorder.losses

def test_the_training_that_follows_is_the_same():
    (a,x),(b,y) = weights_after(False),weights_after(True)
    assert all(torch.equal(a[o], b[o]) for o in a) and [float(o) for o in x]==[float(o) for o in y]

def test_out_of_memory_on_a_card():
    learn = learner()
    learn.model.limit = 64
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    assert doubled(lambda n: batch._on_card(learn, n))==32
    assert max(n for n,_ in learn.model.seen)==64
    learn.model.limit = 8
    assert not batch._on_card(learn, 8)
    after = learn.model.state_dict()
    assert all(torch.equal(before[o], after[o]) for o in before) and learn.opt is None and learn.dls.bs==8

def test_other_errors_are_not_taken_for_memory(monkeypatch):
    learn = learner()
    def fail(*args): raise RuntimeError('shapes do not match')
    monkeypatch.setattr(learn.model, 'forward', fail)
    with pytest.raises(RuntimeError, match='shapes'): batch._on_card(learn, 8)

def test_fewer_pictures_than_a_batch():
    learn = learner(n=5)
    assert len(learn.dls.train)==0
    try_batch(learn, 16)
    assert learn.model.seen==[(16,True)]*2

def test_what_is_likely_to_be_too_much_is_not_tried(monkeypatch):
    learn = learner()
    tried = []
    def peak(): return 2**30+(tried[-1] if tried else 0)*10*2**20
    fits = WithinBudget(learn, 4, peak)
    monkeypatch.setattr(batch, 'try_batch', lambda learn,n: tried.append(n))
    assert doubled(fits)==256
    assert tried==[8,16,32,64,128,256]

def test_rows_again():
    x,y,o = rows_again((torch.arange(3),torch.eye(3),'kept'), 7)
    assert x.tolist()==[0,1,2,0,1,2,0] and y.shape==(7,3) and o=='kept'
    assert rows_again((torch.arange(3),), 2)[0].tolist()==[0,1]

def test_real_memory_of_this_process():
    before = batch._peak()
    x = torch.ones(2**26+(before-psutil.Process().memory_info().rss)//4)   # what was freed since the peak does not count
    assert batch._peak()-before>2**27 and x[0]==1
