"Progressive resizing and random sizes: what the loaders, the model, the schedule and an interrupt see"
import pickle, random
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder, combined_cos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from callbacks.finder import unchanged
from callbacks.mix import CutMix
from callbacks.resize import MultiScale, ProgressiveResize, check_schedule, resize_batch, scheduled

class Pictures:
    "Pictures made at the size asked for"
    def __init__(self, n, size=(32,32)): self.n,self.size = n,size
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((3,*self.size), i/self.n),torch.tensor(i%3)

class Sized(DataLoader):
    "A loader that loads other sizes on demand"
    def resize(self, size): self.dataset.size = size

class Model(nn.Module):
    "Counts the shapes it sees, training and not"
    def __init__(self):
        super().__init__()
        self.body,self.seen = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)),[]
    def forward(self, x):
        self.seen.append((self.training, len(x), *x.shape[-2:]))
        return self.body(x)
    def sides(self, training=None): return [o[2:] for o in self.seen if training in (None,o[0])]

class Interrupt(Callback):
    "A person presses Ctrl-C in the second batch of an epoch"
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and self.epoch==self.at and self.iter==1: raise KeyboardInterrupt

def learner(*cbs, cls=Sized, n=32, n_valid=16, bs=8, **kwargs):
    dls = DataLoaders(*(cls(Pictures(o), bs=bs, shuffle=i==0, num_workers=0, **kwargs) for i,o in enumerate((n,n_valid))))
    dls.device = torch.device('cpu')
    learn = Learner(dls, Model(), loss_func=nn.CrossEntropyLoss(), cbs=list(cbs), default_cbs=True)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
    learn.logger = lambda *args: None
    return learn

three = ((0,16),(.5,(24,20)),(.75,32))
four = [(16,16),(16,16),(24,20),(32,32)]   # its four epochs

@pytest.mark.parametrize('n,want', [(4,[16,16,24,32]), (1,[16]), (2,[16,24]), (10,[16]*5+[24]*3+[32]*2)])
def test_scheduled(n, want): assert [scheduled(three, o/n)[0][0] for o in range(n)]==want

def test_thirds_and_tenths_start_on_time():
    for n in range(2, 60):
        for k in range(1, n): assert scheduled(((0,8),(k/n,16)), k/n)[0]==(16,16)
        assert scheduled(((0,8),(1/3,16)), (n//3)/n)[0]==((16,16) if n%3==0 else (8,8))

@pytest.mark.parametrize('bad', [((.1,8),), ((0,8),(.7,9),(.5,10)), ((0,8),(1,9)), ((0,8),(.5,9,4))])
def test_schedule_refused(bad):
    with pytest.raises(ValueError): ProgressiveResize(bad)

def test_schedule_from_json(): check_schedule([[0,[8,9]], [.5,16]])

def test_resize_batch_is_interpolation():
    x = torch.rand(2,3,32,48).contiguous(memory_format=torch.channels_last)
    y = resize_batch(x, (16,24))
    torch.testing.assert_close(y, F.interpolate(x, (16,24), mode='bilinear', antialias=True))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.mean(), x.mean(), atol=2e-3, rtol=0)
    stripes = torch.tensor([0.,1.]).repeat(32)[None,None,None].expand(1,1,64,64)
    assert (resize_batch(stripes, 21)-.5).abs()[...,2:-2].max()<.15   # no stripes left to alias

@pytest.mark.parametrize('cls', [Sized, DataLoader])
def test_every_batch_has_its_size(cls):
    learn = learner(ProgressiveResize(three), cls=cls)
    learn.fit(4)
    assert learn.model.sides(True)==[o for o in four for _ in range(4)]
    assert learn.model.sides(False)==[o for o in four for _ in range(2)]   # validation too

def test_loader_shrinks_not_the_batch():
    learn = learner(ProgressiveResize(three))
    raw = []
    class Raw(Callback):
        "Sizes as they leave the loader"
        order = -5
        def before_batch(self): raw.append(tuple(self.x.shape[-2:]))
    learn.fit(4, cbs=Raw())
    assert raw==learn.model.sides()

def test_workers_see_the_change():
    learn = learner(ProgressiveResize(((0,16,16),(.5,24,8))), n=16, n_valid=8)
    learn.dls.train.fake_l.num_workers = learn.dls.train.num_workers = 1
    learn.fit(2)
    assert [o[1:] for o in learn.model.seen if o[0]]==[(16,16,16),(8,24,24),(8,24,24)]

def test_one_cycle_stays_one_cycle():
    at = []
    class At(Callback):
        "Learning rate at each share of the training"
        order,run_valid = 70,False
        def before_batch(self): at.append((self.epoch, self.iter/self.n_iter, self.opt.hypers[0]['lr'], self.n_iter))
    learner(ProgressiveResize(((0,16,16),(.5,24,8),(.75,32,4)))).fit_one_cycle(8, .1, cbs=At())
    f = combined_cos(.25, .1/25, .1, .1/1e5)
    assert [n for e,i,_,n in at if i==0]==[2]*4+[4]*2+[8]*2
    for epoch,i,lr,_ in at: assert lr==pytest.approx(f((epoch+i)/8))

@pytest.mark.parametrize('cls', [Sized, DataLoader])
@pytest.mark.parametrize('then', ['validate','preds','train_preds','fit'])
def test_interrupt(cls, then):
    learn = learner(ProgressiveResize(((0,16,16),(.5,32,4))), cls=cls)
    with pytest.raises(KeyboardInterrupt): learn.fit(4, cbs=Interrupt(1))
    learn.model.seen.clear()
    if then=='fit':
        learn.fit(2)
        assert [o[1:] for o in learn.model.seen if o[0]]==[(16,16,16)]*2+[(4,32,32)]*8
        return
    if then=='validate': learn.validate()
    else: learn.get_preds(ds_idx=1 if then=='preds' else 0)
    assert set(learn.model.sides())=={(32,32)} and learn.dls.train.bs==4
    assert learn.dls.train.one_batch()[0].shape[-2:]==(32,32)

def test_interrupt_and_a_test_loader_of_its_own():
    learn = learner(ProgressiveResize(three))
    with pytest.raises(KeyboardInterrupt): learn.fit(4, cbs=Interrupt(1))
    learn.model.seen.clear()
    learn.get_preds(dl=Sized(Pictures(8, (16,16)), bs=4, num_workers=0))   # made while all was small
    assert set(learn.model.sides())=={(32,32)}

def test_prediction_at_another_size_is_the_users():
    learn = learner(ProgressiveResize(three))
    learn.fit(4)
    learn.model.seen.clear()
    learn.get_preds(dl=Sized(Pictures(8, (48,40)), bs=4, num_workers=0))
    assert set(learn.model.sides())=={(48,40)}

def test_predictions_in_the_middle_of_a_fit():
    learn = learner(ProgressiveResize(three))
    class Peek(Callback):
        "Predicts after each epoch, as a person's callback might"
        def after_train(self): self.learn.get_preds(cbs=[], inner=False)
    learn.fit(4, cbs=Peek())
    assert learn.model.sides(True)==[o for o in four for _ in range(4)]

def test_lr_find_sees_the_first_size(tmp_path):
    learn = learner(ProgressiveResize(((0,16,16),(.5,32,8))))
    learn.path = tmp_path
    learn.fit(6, cbs=LRFinder(num_it=10, stop_div=False))   # what `lr_find` runs: five epochs and more
    assert set(learn.model.sides(True))=={(16,16)}
    assert learn.dls.train.dataset.size==(32,32) and learn.dls.train.bs==8

def test_interrupted_lr_find():
    "Giving back the callbacks' attributes must not hide that the loaders are small"
    learn = learner(ProgressiveResize(((0,16,16),(.5,32,8))))
    with pytest.raises(KeyboardInterrupt), unchanged(learn): learn.fit(4, cbs=Interrupt(1))
    learn.model.seen.clear()
    learn.get_preds()
    assert set(learn.model.sides())=={(32,32)} and learn.dls.train.bs==8

def test_interrupt_when_given_to_fit():
    learn = learner()
    with pytest.raises(KeyboardInterrupt): learn.fit(4, cbs=[ProgressiveResize(((0,16,16),(.5,32,8))), Interrupt(1)])
    assert learn.dls.valid.dataset.size==(32,32) and learn.dls.train.bs==8

def test_resume_in_the_middle():
    "A loop that begins at epoch 2 sees what the whole fit saw there"
    class Late(Learner):
        "Begins at `first`"
        def _do_fit(self):
            for self.epoch in range(2, self.n_epoch): self._with_events(self._do_epoch, 'epoch', Exception)
    learn = learner(ProgressiveResize(((0,16,16),(.5,24,8),(.75,32,4))))
    learn.__class__ = Late
    learn.fit(4)
    assert [o[1:] for o in learn.model.seen if o[0]]==[(8,24,24)]*4+[(4,32,32)]*8

def test_own_batches_are_refused():
    learn = learner(ProgressiveResize(((0,16,16),)), bs=None)
    with pytest.raises(ValueError, match='leave it out'): learn.fit(1)

def test_quiet(capsys):
    learner(ProgressiveResize(three)).fit(4)
    assert not capsys.readouterr().out

def test_multiscale():
    random.seed(0)
    learn = learner(MultiScale((16,(24,20),1.), p=.8))
    learn.fit(30)
    n = {o: learn.model.sides(True).count(o)/120 for o in set(learn.model.sides(True))}
    assert set(n)=={(16,16),(24,20),(32,32)} and abs(n[16,16]-.8/3)<.12 and abs(n[32,32]-(.2+.8/3))<.12
    assert set(learn.model.sides(False))=={(32,32)}

def test_together_with_cutmix():
    "The box is cut after resizing, so that its share is exact at the size the model sees"
    shares = []
    class Pixels(Callback):
        "What is left of each picture: pictures are of one colour here"
        order,run_valid = 8,False
        def before_batch(self):
            n = self.x[0,0].numel()*self.cut_mix.lam
            shares.append((self.x.shape[-1], abs(n-round(n)), (self.x[:,0]*32).round().flatten(1).unique(dim=1).shape[1]))
    learner(ProgressiveResize(three), MultiScale((.5,)), CutMix(), cls=DataLoader).fit(4, cbs=Pixels())
    assert {o[0] for o in shares}=={8,10,16} and all(o[1]<1e-6 and o[2]<=2 for o in shares)

def test_pickles():
    cb = pickle.loads(pickle.dumps(ProgressiveResize(three)))
    assert cb.schedule==three and pickle.loads(pickle.dumps(MultiScale())).sizes==(.75,1.,1.25)
