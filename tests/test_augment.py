"Crops against torchvision, erasing against its definition, and who draws which random numbers"
import pickle, random
from collections import Counter
import cv2, numpy as np, pytest, torch
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info
from torchvision.transforms.v2 import CenterCrop, RandomCrop
from recipes.data import augment
from recipes.data.augment import CropBox, Erase, Seeded, alb, at_most, crop_if_needed, erase_box, flip_only, light, none
from recipes.data.augment import pipeline, random_crop_pad, random_resized_crop, same_shape, squish, yk, yk_fill
from recipes.data.pictures import resized

crops = [squish,random_resized_crop,random_crop_pad,crop_if_needed]

def ramp(h, w):
    "A picture whose pixels say where they are, from 1 so that padding is known"
    y,x = np.mgrid[1:h+1,1:w+1]
    return np.dstack([y,x,y*0+200]).astype(np.uint8)

@pytest.mark.parametrize('crop', crops)
@pytest.mark.parametrize('aug', [none,flip_only,light,yk])
@pytest.mark.parametrize('hw', [(1,1),(1,90),(20,90),(90,20),(200,300)])
@pytest.mark.parametrize('c', [1,3])
def test_every_shape(crop, aug, hw, c):
    x = np.random.default_rng(0).integers(0, 256, (*hw,c), dtype=np.uint8)
    before = x.copy()
    x.flags.writeable = False   # as the cache gives it
    for train in (False,True):
        p = pipeline(crop, aug, (24,40), train)
        for _ in range(5): assert p(x).shape==(24,40,c) and p(x).dtype==np.uint8
        if not train: assert (p(x)==p(x)).all()
    assert (x==before).all()

# torchvision's crop, offset by offset

def offsets(draw, n=4000):
    "How often each corner of the box occurs, in the picture's own coordinates"
    def corner(o):
        y,x = np.argwhere(o[...,2]==200)[0]
        return int(o[y,x,0])-y,int(o[y,x,1])-x
    return Counter(corner(draw()) for _ in range(n))

@pytest.mark.parametrize('hw,size,n', [((60,40),(50,50),11*11),((40,40),(50,44),11*5),((60,55),(50,50),11*6),((50,60),(50,60),1)])
def test_crop_pad_is_torchvisions(hw, size, n):
    x = ramp(*hw)
    torch.manual_seed(0)
    theirs_crop = RandomCrop(size, pad_if_needed=True)
    theirs = offsets(lambda: theirs_crop(torch.tensor(x).permute(2,0,1)).permute(1,2,0).numpy())
    p = pipeline(random_crop_pad, none, size)
    p.reseed(0)
    ours = offsets(lambda: p(x))
    assert set(ours)==set(theirs) and len(ours)==n
    far = sum((ours[k]-theirs[k])**2/(ours[k]+theirs[k]) for k in ours)   # chi squared of two samples, n-1 degrees
    assert far<n-1+5*(2*n)**.5

def test_300_wide_lands_at_any_of_21_offsets():
    p = pipeline(random_crop_pad, none, (320,320))
    p.reseed(0)
    x = np.full((320,300,3), 200, np.uint8)
    assert set(int((p(x)[0,:,0]==200).argmax()) for _ in range(400))==set(range(21))

def test_crop_pad_in_validation():
    x = ramp(60, 40)
    p = pipeline(random_crop_pad, yk, (50,50), train=False)
    assert (p(x)==CenterCrop((50,50))(torch.tensor(x).permute(2,0,1)).permute(1,2,0).numpy()).all()
    p = Seeded(random_crop_pad((50,30), False, test_random=True))
    p.reseed(0)
    seen = [p(x) for _ in range(300)]
    flips = np.mean([o[25,10,1]>o[25,20,1] for o in seen])
    assert .4<flips<.6 and len({o.tobytes() for o in seen})>100
    assert not any((o==yk_fill).all(-1).any() for o in seen)

# the winners' crop

def test_crop_if_needed():
    x = ramp(90, 200)
    valid = pipeline(crop_if_needed, none, (32,32), False)
    assert (valid(x)==resized(x[13:77,68:132], (32,32))).all()
    boxes = [CropBox((64,64))(image=x)['image'] for _ in range(500)]
    assert {o.shape for o in boxes}=={(64,64,3)}
    assert {int(o[0,0,0]) for o in boxes}==set(range(1, 28)) and len({int(o[0,0,1]) for o in boxes})>100
    assert (pipeline(crop_if_needed, none, (50,150), True)(x)==resized(x, (50,150))).all(), 'nothing to cut'
    p = Seeded(crop_if_needed((32,32), True, factor=4))
    assert len({p(x).tobytes() for _ in range(20)})>5

def test_valid_of_random_resized_crop():
    x = ramp(90, 200)
    assert (pipeline(random_resized_crop, none, (30,30), False)(x)==resized(x[:,55:145], (30,30))).all()
    assert (Seeded(random_resized_crop((30,30), False, valid='squish'))(x)==resized(x, (30,30))).all()
    assert same_shape((90,200), (30,60))==(90,180) and at_most((90,200), (100,100))==(90,100)

def test_random_resized_crop_areas():
    x = ramp(200, 250)
    box, = random_resized_crop((20,20))
    area,ratio = [],[]
    for _ in range(1000):
        box(image=x)
        x1,y1,x2,y2 = box.params['crop_coords']
        area.append((x2-x1)*(y2-y1)/50000), ratio.append((x2-x1)/(y2-y1))
    assert .39<min(area)<.45 and .9<max(area)<=1 and .74<min(ratio)<.8 and 1.25<max(ratio)<1.35
    got = box(image=x)['image'].astype(int)
    x1,y1,x2,y2 = box.params['crop_coords']
    want = np.asarray(Image.fromarray(x[y1:y2,x1:x2]).resize((20,20), Image.BILINEAR)).astype(int)
    assert np.abs(got-want).max()<=3

@pytest.mark.parametrize('crop', crops)
def test_points_and_masks_come_along(crop):
    x = np.zeros((120,160,3), np.uint8)
    cv2.circle(x, (80,60), 6, (255,255,255), -1)
    p = pipeline(crop, flip_only, (96,96), keypoint_params=alb.KeypointParams('xy', remove_invisible=False))
    for _ in range(20):
        o = p(x, mask=x[...,0], keypoints=np.array([[80.,60.]]))
        if (o['image']>128).sum()<3*60: continue   # cut off
        white = np.argwhere(o['image'][...,0]>128).mean(0)
        assert np.abs(o['keypoints'][0]-white[::-1]).max()<2
        assert np.abs(np.argwhere(o['mask']>128).mean(0)-white).max()<2

# erasing

def theirs(h, w, rng):
    "Zhong's loop in YK's words: aspect from `r1` to `1/r1`, uniform"
    while True:
        target,aspect = rng.uniform(.02, .4)*h*w,rng.uniform(.3, 1/.3)
        eh,ew = int(round((target*aspect)**.5)),int(round((target/aspect)**.5))
        if ew<w and eh<h: return eh,ew

def test_erase_box_distribution():
    ours = np.array([(b[1]-b[0],b[3]-b[2]) for b in (erase_box((60,90), random.Random(i)) for i in range(4000))])
    rng = np.random.default_rng(0)
    want = np.array([theirs(60, 90, rng) for _ in range(4000)])
    for f in (lambda o: o.prod(1), lambda o: o[:,0]/o[:,1], lambda o: o[:,0]):
        a,b = np.sort(f(ours)),np.sort(f(want))
        grid = np.linspace(min(a[0], b[0]), max(a[-1], b[-1]), 200)
        assert np.abs(np.searchsorted(a, grid)-np.searchsorted(b, grid)).max()/4000<.045   # Kolmogorov and Smirnov

def test_erase():
    e = Seeded([Erase((10,20,30), p=1.)])
    x = np.full((50,60,3), 255, np.uint8)
    got = e(x)
    assert (x==255).all() and set(map(tuple, got.reshape(-1,3).tolist()))=={(255,255,255),(10,20,30)}
    assert set(e(x[...,:1]).ravel().tolist())=={20,255}
    half = Seeded([Erase((10,20,30))])
    half.reseed(0)
    assert .4<np.mean([(half(x)!=255).any() for _ in range(400)])<.6

def test_yk_fill_is_his_after_normalisation():
    mean,std = torch.tensor([.5949,.5611,.5185]),torch.tensor([.2900,.2844,.2811])
    his = torch.tensor([.4914,.4822,.4465])
    assert ((torch.tensor(yk_fill)/255-mean)/std-his).abs().max()<.5/255/.28+1e-4

def test_light_keeps_the_picture():
    p = pipeline(squish, light, (50,60))
    x = ramp(50, 60)
    assert {p(x).shape for _ in range(10)}=={(50,60,3)}
    assert max(np.abs(p(x)[...,2].astype(int)-200).max() for _ in range(50))<=55

# seeds (two workers and none)

class Items:
    def __init__(self, pipe): self.pipe,self.x = pipe,ramp(100, 100)
    def __len__(self): return 16
    def __getitem__(self, i):
        w = get_worker_info()
        return (w.id if w else -1),torch.tensor(self.pipe(self.x))

def a_pass(dl):
    "What each worker made, in its order"
    out = {}
    for w,xs in dl:
        for k,x in zip(w.tolist(), xs): out.setdefault(k, []).append(x.numpy().tobytes())
    return out

def passes(workers, seed, n=2):
    torch.manual_seed(seed)
    pipe = pipeline(random_resized_crop, light, (20,20))
    dl = DataLoader(Items(pipe), batch_size=4, num_workers=workers)
    def one():
        if not workers: pipe.reseed(int(torch.randint(2**31, (1,))))
        return a_pass(dl)
    return [one() for _ in range(n)]

@pytest.mark.parametrize('workers', [0,2])
def test_passes_and_workers_differ_and_repeat(workers):
    one,two = passes(workers, 1)
    drawn = [o for d in (one,two) for v in d.values() for o in v]
    assert len(one)==max(workers, 1) and len(set(drawn))==32
    assert passes(workers, 1)==[one,two]
    assert passes(workers, 2)[0]!=one

def test_persistent_workers_draw_on():
    torch.manual_seed(0)
    dl = DataLoader(Items(pipeline(random_resized_crop, none, (20,20))), 4, num_workers=2, persistent_workers=True)
    one,two = a_pass(dl),a_pass(dl)
    assert len({o for d in (one,two) for v in d.values() for o in v})==32

def test_without_our_loader():
    def draw(seed):
        torch.manual_seed(seed)
        return pipeline(random_resized_crop, none, (20,20))(ramp(90, 90)).tobytes()
    assert draw(1)==draw(1)!=draw(2)

def test_not_reseeded_for_each_picture():
    class Counting(Seeded):
        n = 0
        def reseed(self, seed):
            self.n += 1
            super().reseed(seed)
    p = Counting(random_resized_crop((20,20)))
    for _ in range(5): p(ramp(50, 50))
    assert p.n==1

def test_transforms_draw_independently():
    p = Seeded([alb.HorizontalFlip(p=.5),alb.VerticalFlip(p=.5),alb.OneOf([alb.RandomBrightnessContrast(p=1.),alb.NoOp()], p=.5)])
    p.reseed(3)
    x = np.zeros((2,2,1), np.uint8)
    x[0,0] = 100
    n = Counter(int(p(x).argmax()) for _ in range(1000))
    assert set(n)=={0,1,2,3} and min(n.values())>180

def test_pickles():
    p = pipeline(crop_if_needed, yk, (20,20))
    p.reseed(0)
    q = pickle.loads(pickle.dumps(p))
    assert (p(ramp(99, 99))==q(ramp(99, 99))).all()

def test_a_star_import_leaves_names_alone(): assert not {'A','alb','os'} & set(augment.__all__)
