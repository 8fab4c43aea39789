"Batches: every worker, pass and epoch draws its own crops, in a memory order and size that the model wants"
import cv2, numpy as np, pytest, torch
from fastai.callback.core import Callback
from recipes import imet
from recipes.data.augment import none, random_crop_pad, random_resized_crop
from recipes.data.fixtures import draw_imet
from recipes.data.loaders import Files, Items, PictureDL, make_dls
from recipes.data.pictures import BadPicture
from recipes.infer.tta import random_view
from recipes.recipe import fitting

n = 24
stats = (0.,0.,0.),(1/255.,)*3   # batches keep their pixels
crops = dict(pad=random_crop_pad, resized=random_resized_crop)
each = pytest.mark.parametrize('workers', [0,2])

class Plane:
    "The same picture for each row; a pixel says where it is"
    def __len__(self): return n
    def __getitem__(self, i): return np.stack([*np.mgrid[:200,:200], np.zeros((200,200))], -1).astype(np.uint8)

def loader(workers=0, crop=random_crop_pad, train=True, **kwargs):
    items = Items(Plane(), [f'id{i}' for i in range(n)], list(range(n)), (crop,none), (16,16), train)
    return PictureDL(items, bs=4, stats=stats, num_workers=workers, **kwargs)

def drawn(dl):
    "A pass: for each picture the pixel in its corner, which says where the crop is"
    return [tuple(o[:2,0,0].int().tolist()) for b in dl for o in b[0]]

@each
@pytest.mark.parametrize('crop', crops)
def test_draws_differ(workers, crop):
    "No two workers and no two passes draw the same (methods T16)"
    torch.manual_seed(0)
    dl = loader(workers, crops[crop])
    passes = [drawn(dl) for _ in range(3)]
    for o in passes: assert len(set(o))>.8*n
    same = sum(a==b for p,q in zip(passes, passes[1:]) for a,b in zip(p, q))
    assert same<3
    assert passes[0][:4]!=passes[0][4:8]   # the first batches of two workers

@each
def test_reproducible(workers):
    "torch's seed says what is drawn"
    def two(seed):
        torch.manual_seed(seed)
        dl = loader(workers)
        return drawn(dl)+drawn(dl)
    assert two(3)==two(3)!=two(4)

@each
def test_validation_is_fixed(workers):
    "Without training there is one crop, unless the recipe's test view is random"
    assert len(set(drawn(loader(workers, train=False))))==1
    dl = loader(workers, train=False)
    assert len(set(drawn(dl.new(random_view(dl.dataset)))))>.8*n

def test_memory():
    "uint8 to the device, channels last in memory, float after"
    seen = []
    class Spy(PictureDL):
        def after_batch(self, b):
            seen.append(b[0])
            return super().after_batch(b)
    x, = Spy(loader().dataset, bs=4, stats=((.5,.4,.3),(.2,.2,.1))).one_batch()
    assert seen[0].dtype==torch.uint8 and x.dtype==torch.float32 and x.shape==(4,3,16,16)
    for o in x,seen[0]: assert o.is_contiguous(memory_format=torch.channels_last)
    mean,std = (torch.tensor(o)[:,None,None] for o in ((.5,.4,.3),(.2,.2,.1)))
    assert torch.allclose(x, (seen[0].float()/255-mean)/std, atol=1e-5)

def test_truth_follows_shuffle():
    "A picture keeps its own label"
    class Grey(Plane):
        def __getitem__(self, i): return np.full((20,20,3), i, np.uint8)
    items = [Items(Grey(), list(range(n)), list(range(n)), (random_crop_pad,none), (16,16), o) for o in (True,False)]
    target = type('Row', (), dict(batch=lambda self, y, rows: (torch.tensor(y[rows]),)))()
    dls = make_dls(items, 5, (10*np.arange(n),)*2, target=target, stats=stats)
    got = [(int(x.amax()),int(y)) for b in dls.train for x,y in zip(*b)]
    assert len(got)==20 and len(set(got))==20 and all(y==10*x for x,y in got) and got!=sorted(got)
    assert [int(y) for b in dls.valid for y in b[1]]==list(range(0, 10*n, 10))

@each
def test_bad_picture(tmp_path, workers):
    "A picture that does not decode stops the pass with its id and path, from a worker too"
    for i in range(4): cv2.imwrite(str(tmp_path/f'{i}.png'), np.zeros((20,20,3), np.uint8))
    (tmp_path/'2.png').write_bytes(b'no picture')
    files = Files([str(tmp_path/f'{i}.png') for i in range(4)])
    items = Items(files, [f'id{i}' for i in range(4)], list(range(4)), (random_crop_pad,none), (16,16))
    with pytest.raises(BadPicture, match='id id2: .*2.png: not a picture'): list(PictureDL(items, bs=2, stats=stats, num_workers=workers))

class Sides(Callback):
    "Notes what the model is given"
    order = 50
    def __init__(self, seen): self.seen = seen
    def before_batch(self):
        what = 'find' if hasattr(self.learn, 'lr_finder') else 'train' if self.training else 'valid'
        self.seen.append((what, self.epoch, *self.x.shape[::2], self.x.shape[3]))

def test_resize_in_fit(tmp_path, monkeypatch):
    "`recipe.resize` changes side and batch size inside one fit; `lr_find` sees the first, the run's end the last"
    draw_imet(tmp_path/'imet', 40, n_test=8)
    seen,real = [],fitting.stage_cbs
    monkeypatch.setattr(fitting, 'stage_cbs', lambda step: [*real(step), Sides(seen)])
    kw = dict(arch='test_resnet', pretrained=False, size=(32,64), epochs=4, folds=4, precision='fp32')
    learn = imet.train(tmp_path/'imet', resize=((0,.5,10),(.5,.75,8),(.75,1.,4)), **kw)
    sides = {what:[{o[2:] for o in seen if o[:2]==(what,e)} for e in range(4)] for what in ('train','valid')}
    assert sides['train']==[{(10,16,32)},{(10,16,32)},{(8,24,48)},{(4,32,64)}]
    assert [{o[1:] for o in s} for s in sides['valid']]==[{o[1:] for o in s} for s in sides['train']]
    assert {o[2:] for o in seen if o[0]=='find'}=={(10,16,32)}
    assert learn.dls.valid.one_batch()[0].shape[2:]==(32,64)
    assert len([o for o in seen if o[:2]==('train',3)])>len([o for o in seen if o[:2]==('train',0)])
