"Staged freezing: what moves and when, momentum, batchnorm, the user's own freezing, interrupts and resuming"
import pickle
from functools import partial
import pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import params, set_seed
from fastcore.basics import noop
from callbacks.freeze import Freeze, frozen, frozen_to
from callbacks.optim import adamw

def split(m): return [params(o) for o in m]

class Watch(Callback):
    "Which groups moved in each epoch"
    order = 80
    def __init__(self): self.moved = []
    def before_train(self): self.old = self.weights()
    def weights(self): return [torch.cat([p.detach().flatten() for n,p in o.named_parameters() if 'bn' not in n]) for o in self.model]
    def after_train(self): self.moved.append([not torch.equal(a, b) for a,b in zip(self.old, self.weights())])

class Interrupt(Callback):
    "A person presses Ctrl-C in the second batch"
    def before_batch(self):
        if self.training and self.iter==1: raise KeyboardInterrupt

class Block(nn.Module):
    "Convolution and batchnorm"
    def __init__(self, a, b):
        super().__init__()
        self.conv,self.bn = nn.Conv2d(a, b, 3, padding=1),nn.BatchNorm2d(b)
    def forward(self, x): return self.bn(self.conv(x)).relu()

class Head(nn.Module):
    "Pooling and a linear layer"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 3)
    def forward(self, x): return self.lin(x.mean((2,3)))

opts = dict(fastai=Adam, torch=partial(OptimWrapper, opt=torch.optim.AdamW), ours=adamw)

def learner(*cbs, cls=Learner, splitter=split, **kwargs):
    set_seed(0)
    items = [(torch.rand(3,8,8), torch.tensor(i%3)) for i in range(16)]
    dls = DataLoaders.from_dsets(items, items[:8], bs=8, shuffle=False, num_workers=0, device='cpu')
    learn = cls(dls, nn.Sequential(Block(3, 4), Block(4, 6), Head()), loss_func=nn.CrossEntropyLoss(),
        splitter=splitter, cbs=list(cbs), **kwargs)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
    learn.logger = noop
    return learn

def flags(learn): return [o.requires_grad for o in learn.model.parameters()]

@pytest.mark.parametrize('opt', opts.values(), ids=opts)
@pytest.mark.parametrize('kw,want', [
    (dict(), ['001','111','111']), (dict(until=2), ['001','001','111']), (dict(until=0), ['111']*3),
    (dict(until=None), ['001']*3), (dict(until=None, groups=2), ['011']*3), (dict(until=1, groups=2), ['011','111','111'])])
def test_groups_move_when_they_should(opt, kw, want):
    watch = Watch()
    learn = learner(Freeze(**kw), watch, opt_func=opt)
    learn.fit(3, wd=.1)
    assert [''.join(str(int(x)) for x in o) for o in watch.moved]==want
    assert all(flags(learn)) and learn.opt.frozen_idx==0

def test_share_of_a_shorter_fit():
    "Three of six epochs are the first half of any fit"
    for n,want in ((2,['001','111']),(3,['001','001','111']),(6,['001']*3+['111']*3)):
        watch = Watch()
        learner(Freeze(3, of=6), watch).fit(n)
        assert [''.join(str(int(x)) for x in o) for o in watch.moved]==want

@pytest.mark.parametrize('opt', opts.values(), ids=opts)
def test_second_fit_moves_no_frozen_weight(opt):
    "Momentum and weight decay of earlier training must not move it"
    watch = Watch()
    learn = learner(watch, opt_func=opt)
    learn.fit(1, wd=.1)
    learn.fit(2, wd=.1, cbs=Freeze())
    assert watch.moved==[[True]*3, [False,False,True], [True]*3]

@pytest.mark.parametrize('train_bn', [True, False])
def test_same_as_fastai_in_two_steps(train_bn):
    "`learn.freeze()` and an epoch, `opt.unfreeze()` and another"
    ours,ref = (learner(*o, train_bn=train_bn, opt_func=partial(Adam, mom=.9)) for o in ([Freeze()], []))
    class Thaw(Callback):
        "Thaws between the epochs, by hand"
        def before_train(self):
            if self.epoch==1: self.opt.freeze_to(0)
    ref.freeze()
    set_seed(1)
    ref.fit(2, cbs=Thaw())
    set_seed(1)
    ours.fit(2)
    for a,b in zip(ours.model.state_dict().values(), ref.model.state_dict().values()): assert torch.equal(a, b)

@pytest.mark.parametrize('train_bn', [True, False])
def test_batchnorm_of_the_body(train_bn):
    learn = learner(Freeze(until=None), train_bn=train_bn)
    old = {k:v.clone() for k,v in learn.model.state_dict().items()}
    learn.fit(1)
    new = learn.model.state_dict()
    assert torch.equal(old['0.bn.weight'], new['0.bn.weight'])!=train_bn
    assert torch.equal(old['0.conv.weight'], new['0.conv.weight'])

@pytest.mark.parametrize('n', [1, 2])
def test_the_users_freeze_comes_back(n):
    watch = Watch()
    learn = learner(watch)
    learn.freeze_to(n)
    before = frozen(learn.opt)
    learn.fit(2, cbs=Freeze())
    assert watch.moved==[[False,False,True],[True]*3] and frozen(learn.opt)==before
    learn.fit(1)
    assert watch.moved[2]==[i>=n for i in range(3)]
    learn.unfreeze()
    learn.fit(1)
    assert watch.moved[3]==[True]*3

def test_parameters_frozen_by_hand_come_back():
    learn = learner(Freeze())
    learn.create_opt()
    learn.model[1].conv.bias.requires_grad_(False)
    before = flags(learn)
    learn.fit(2)
    assert flags(learn)==before

@pytest.mark.parametrize('own', [True, False])
def test_interrupt(own):
    "Nothing is left frozen, whether the callback is the fit's or the `Learner`'s"
    watch,cb = Watch(),Freeze(until=None)
    learn = learner(watch, *([cb] if own else []))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[Interrupt()]+([] if own else [cb]))
    if own: learn.validate()
    assert all(flags(learn)) and learn.opt.frozen_idx==0
    learn.fit(1)
    assert watch.moved[-1]==([False,False,True] if own else [True]*3)

def test_interrupt_then_another_fit():
    learn = learner(Freeze())
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Interrupt())
    assert not all(flags(learn))
    learn.fit(1)
    assert all(flags(learn))

def test_interrupt_then_a_new_optimizer():
    learn = learner(Freeze(until=None))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Interrupt())
    learn.fit(1, reset_opt=True)
    assert all(flags(learn))

def test_interrupt_then_the_users_word_holds():
    learn = learner(Freeze(until=None))
    learn.freeze_to(1)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Interrupt())
    learn.unfreeze()
    learn.fit(1)
    assert all(flags(learn))

def test_interrupt_then_the_users_word_outlives_a_validation():
    learn = learner(Freeze(until=None))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Interrupt())
    learn.freeze_to(1)
    before = frozen(learn.opt)
    learn.validate()
    assert frozen(learn.opt)==before

def test_taken_off():
    learn,cb = learner(),Freeze(until=None)
    learn.add_cb(cb)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Interrupt())
    learn.remove_cb(cb)
    assert all(flags(learn)) and cb.learn is None

def test_lr_find_sees_the_last_stage(tmp_path):
    watch = Watch()
    learn = learner(Freeze(2), watch)
    learn.path = tmp_path
    learn.fit(6, cbs=LRFinder(num_it=10, stop_div=False))
    assert watch.moved[0]==[True]*3 and all(flags(learn))

class Late(Learner):
    "Begins at `first`, with the optimizer and weights of that time"
    first = 0
    def _do_fit(self):
        for self.epoch in range(self.first, self.n_epoch): self._with_events(self._do_epoch, 'epoch', Exception)

@pytest.mark.parametrize('first', [1, 2, 3])
def test_resume(first):
    class Keep(Callback):
        "A checkpoint"
        order = 90
        def after_epoch(self):
            if self.epoch!=first-1: return
            self.kept = pickle.dumps((self.model.state_dict(), self.opt.state_dict()))
    keep = Keep()
    whole = learner(Freeze(2), keep)
    whole.fit(4)
    class Load(Callback):
        "Puts the checkpoint back"
        def before_fit(self):
            model,opt = pickle.loads(keep.kept)
            self.model.load_state_dict(model)
            self.opt.load_state_dict(opt)
    late = learner(Freeze(2), Load(), cls=Late)
    late.first = first
    late.fit(4)
    for a,b in zip(whole.model.state_dict().values(), late.model.state_dict().values()): assert torch.equal(a, b)

def test_one_group_is_said():
    with pytest.warns(UserWarning, match='1 of 1 parameter groups'): learner(Freeze(), splitter=params).fit(1)

def test_validation_alone_freezes_nothing():
    learn = learner(Freeze())
    learn.validate()
    learn.get_preds()
    assert learn.opt is None and all(flags(learn))

def test_frozen_to():
    assert [frozen_to(e, 2, 1, 3) for e in range(4)]==[2,2,0,0]
    assert frozen_to(0, 1, 9, 3)==0 and frozen_to(100, None, 1, 2)==1

def test_pickles_with_its_learner():
    learn = pickle.loads(pickle.dumps(learner(Freeze(3, 2))))
    assert learn.cbs[-1].until==3
    learn.fit(1)
    assert all(flags(learn))
