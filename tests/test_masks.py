"GridMask against the loop it comes from, holes of the right size, letters that are never mirrored, and seeds"
import pickle
import cv2, numpy as np, pytest, torch
from torch.utils.data import DataLoader
from recipes.data import masks
from recipes.data.augment import Seeded, none, pipeline, squish
from recipes.data.masks import GridMask, alb, animal_house, animal_stefano, argus, bengali_house, bengali_yk, cutout, grid_mask
from recipes.data.masks import morph, nearest_crop

augments = [cutout,morph,bengali_yk,argus,bengali_house,animal_stefano,animal_house]

def noise(h, w, c=3, low=1): return np.random.default_rng(0).integers(low, 256, (h,w,c), dtype=np.uint8)

@pytest.mark.parametrize('aug', augments)
@pytest.mark.parametrize('size', [(1,1),(5,3),(40,24),(137,236)])
@pytest.mark.parametrize('c', [1,3])
def test_every_shape(aug, size, c):
    x = noise(60, 100, c)
    before = x.copy()
    x.flags.writeable = False   # as the cache gives it
    p = pipeline(squish if min(size)<9 else nearest_crop, aug, size)
    p.reseed(0)
    for _ in range(8):
        o = p(x)
        assert o.shape==(*size,c) and o.dtype==np.uint8
    assert (x==before).all()

@pytest.mark.parametrize('aug', augments)
def test_seeds(aug):
    "Torch's seed says what is drawn, by every part; another seed draws others; a copy draws the same"
    x = noise(64, 96)
    def some(p, seed): return p.reseed(seed) or np.stack([p(x) for _ in range(16)])
    p = pipeline(squish, aug, (64,96))
    assert (some(p, 3)==some(p, 3)).all() and (some(p, 3)!=some(p, 4)).any()
    assert (some(pickle.loads(pickle.dumps(p)), 3)==some(p, 3)).all()
    o = some(p, 3)
    assert len({a.tobytes() for a in o})>3

@pytest.mark.parametrize('aug', [argus,bengali_house,animal_house])
def test_workers_differ(aug):
    "Two workers and two passes draw their own (methods T16)"
    class Set:
        def __init__(self): self.p = pipeline(squish, aug, (32,32))
        def __len__(self): return 16
        def __getitem__(self, i): return self.p(x)
    x = noise(32, 32)
    torch.manual_seed(0)
    dl = DataLoader(Set(), batch_size=8, num_workers=2)
    a,b = torch.cat(list(dl)),torch.cat(list(dl))
    assert not torch.equal(a[:8], a[8:]) and not torch.equal(a, b)

# --- GridMask

def loop_mask(h, w, n, mode):
    "The mask as the code in Bengali's entries fills it, square by square, without offset"
    gh,gw,m = h/n,w/n,np.ones((h,w), bool)
    for i in range(n):
        for j in range(n):
            m[int(i*gh):int(i*gh+gh/2),int(j*gw):int(j*gw+gw/2)] = False
            if mode==2: m[int(i*gh+gh/2):int(i*gh+gh),int(j*gw+gw/2):int(j*gw+gw)] = False
    return ~m if mode==1 else m

@pytest.mark.parametrize('n', [3,4,5,6,7])
@pytest.mark.parametrize('mode', [0,1,2])
def test_grid_is_the_loop(n, mode): assert (grid_mask((n*12,n*20), n, mode=mode)==loop_mask(n*12, n*20, n, mode)).all()

@pytest.mark.parametrize('mode,share', [(0,.75),(1,.25),(2,.5)])
@pytest.mark.parametrize('angle', [0,25,-40,90])
def test_share(mode, share, angle):
    "The share that stays is the same wherever the grid begins, and turned or not"
    rng = np.random.RandomState(0)
    got = np.mean([grid_mask((137,236), rng.randint(3, 8), rng.rand(2), angle, mode=mode).mean() for _ in range(60)])
    assert abs(got-share)<.02

def test_keep():
    for keep in .3,.6,.8:
        got = grid_mask((400,400), 4, keep=keep)
        assert abs(got.mean()-(1-(1-keep)**2))<.01

def test_offset_shifts(): assert (grid_mask((80,160), 4, (.25,.5))==np.roll(grid_mask((80,160), 4), (-5,-20), (0,1))).all()

def test_turned_by_90():
    "A turn by a right angle is a transposed grid"
    a,b = grid_mask((121,121), 5, angle=90),grid_mask((121,121), 5)
    same = max((np.roll(b.T[::s], i, 0)==a).mean() for i in range(25) for s in (1,-1))
    assert same>.95

def runs(line):
    "Lengths of the holes along a line, without those cut by its ends"
    edges = np.flatnonzero(np.diff(np.r_[1,line.astype(int),1]))
    return [b-a for a,b in zip(edges[::2], edges[1::2]) if a>0 and b<len(line)]

def test_transform_draws():
    "3 to 7 cells, all of them, begun anywhere; half of the pictures untouched; holes are exactly `fill`, the rest as it was"
    x,p = noise(210, 420),Seeded([GridMask((3,7), p=.5)])
    p.reseed(0)
    out = [p(x) for _ in range(200)]
    hit = [o for o in out if (o!=x).any()]
    assert abs(len(hit)-100)<5*50**.5
    holes = [(o==0).all(-1) for o in hit]
    assert all((o[~m]==x[~m]).all() for o,m in zip(hit, holes)) and abs(np.mean([m.mean() for m in holes])-.25)<.02
    widths = {round(420/2/np.median(w)) for m in holes if (w := runs(~m[m.any(1).argmax()]))}
    assert widths=={3,4,5,6,7}
    assert len({(m.any(1).argmax(),m.any(0).argmax()) for m in holes})>40

def test_transform_options():
    x = noise(64, 64)
    p = Seeded([GridMask((4,4), mode=1, rotate=30, fill=77, p=1)])
    p.reseed(0)
    o = p(x)
    m = (o==77).all(-1)
    assert .6<m.mean()<.9 and (o[~m]==x[~m]).all()

def test_mask_stays():
    "A mask that comes along is not painted"
    x = noise(32, 32)
    res = Seeded([GridMask(p=1)])(x, mask=np.ones((32,32), np.uint8))
    assert (res['mask']==1).all() and (res['image']==0).any()

# --- cutout and strokes

@pytest.mark.parametrize('size', [(64,64),(137,236),(30,200),(3,3)])
def test_cutout(size):
    "One square of a quarter of the shorter side, everywhere, for half of the pictures"
    p,x = Seeded(cutout(size)),noise(*size, 1)
    p.reseed(0)
    masks = [m for _ in range(200) if (m := (p(x)!=x)[...,0]).any()]
    k = max(1, round(min(size)/4))
    assert abs(len(masks)-100)<5*50**.5 and all(m.any(1).sum()==k and m.any(0).sum()==k and m.sum()==k*k for m in masks)
    assert min(m.any(1).argmax() for m in masks)<.2*size[0]+1 and max(m.any(1).argmax() for m in masks)>=.6*(size[0]-k)-1

def test_cutout_holes():
    p = Seeded(cutout((100,100), holes=3, side=.1, p=1))
    p.reseed(0)
    n = [cv2.connectedComponents((p(noise(100, 100, 1))==0)[...,0].astype(np.uint8))[0]-1 for _ in range(30)]
    assert max(n)==3 and np.mean(n)>2.2

def test_morph():
    "Half of the time nothing, else thicker or thinner by one or two pixels, equally often"
    x = np.zeros((60,60,1), np.uint8)
    x[20:40,20:40] = 255
    p = Seeded(morph((60,60)))
    p.reseed(0)
    sides = np.array([(p(x)>0).any((1,2)).sum()-20 for _ in range(600)])
    n = {k:(sides==k).sum() for k in np.unique(sides)}
    assert set(n)=={-2,-1,0,1,2}
    assert abs((sides>0).sum()-150)<5*113**.5 and abs((sides<0).sum()-150)<5*113**.5

# --- crops and whole augmentations

def test_nearest_crop():
    "256 by nearest neighbour, then 224: in the middle, or at any of 33 offsets"
    x = noise(137, 236)
    full = cv2.resize(x, (256,256), interpolation=cv2.INTER_NEAREST)
    assert (pipeline(nearest_crop, none, (224,224), False)(x)==full[16:240,16:240]).all()
    ramp = np.dstack([*np.mgrid[:256,:256]]+[np.zeros((256,256))]).astype(np.uint8)
    p = pipeline(nearest_crop, none, (224,224))
    p.reseed(0)
    at = np.array([p(ramp)[0,0,:2] for _ in range(600)])
    assert set(at[:,0])==set(at[:,1])==set(range(33)) and abs(np.corrcoef(at.T)[0,1])<.2

def test_nearest_crop_sizes():
    x = noise(137, 236, low=0)
    assert [o.get_transform_init_args()['height'] for o in nearest_crop((64,96), False)]==[73,64]
    assert nearest_crop((224,224), resize=300)[0].height==300
    assert set(pipeline(nearest_crop, none, (64,96))(x).ravel())<=set(x.ravel())

def sees_mirror(aug):
    "How many of 200 draws look more like the mirrored picture than like the picture"
    x = np.zeros((120,120,3), np.uint8)
    x[10:60,8:50],x[80:100,10:30] = 255,160
    p = pipeline(squish, aug, (120,120))
    p.reseed(0)
    def far(a, b): return abs(cv2.blur(a, (15,15)).astype(int)-cv2.blur(b, (15,15))).mean()
    return sum(far(o, x[:,::-1])<far(o, x) for o in (p(x) for _ in range(200)))

@pytest.mark.parametrize('aug', [bengali_yk,argus,bengali_house])
def test_letters_are_not_mirrored(aug): assert sees_mirror(aug)==0

@pytest.mark.parametrize('aug', [animal_stefano,animal_house])
def test_animals_are_mirrored(aug): assert abs(sees_mirror(aug)-100)<5*50**.5

def test_yk_turns():
    "Half of the pictures, by at most 10 degrees"
    x = np.zeros((200,200,1), np.uint8)
    x[98:102,20:180] = 255
    p = Seeded(bengali_yk((200,200)))
    p.reseed(0)
    def angle(o):
        y,x = np.nonzero(o[...,0]>127)
        return np.degrees(np.arctan(np.polyfit(x, y, 1)[0]))
    a = np.array([angle(p(x)) for _ in range(300)])
    assert abs((abs(a)<.05).sum()-150)<5*75**.5 and 9<abs(a).max()<10.1 and abs(a.mean())<1.5

def test_small_letters_keep_their_strokes():
    "No erosion below 100 pixels, where it would rub thin strokes out"
    kinds = lambda size: [type(o) for t in bengali_house(size) for o in getattr(t, 'transforms', [t])]
    assert alb.Morphological in kinds((137,236)) and alb.Morphological not in kinds((64,64))

def test_repr():
    "albumentations prints a transform by its arguments"
    assert 'n=(3, 7)' in repr(GridMask()) and 'mode=2' in repr(masks.GridMask(mode=2))
