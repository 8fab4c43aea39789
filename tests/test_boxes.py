"Crops are where the box is, in the shape asked for, whatever the source decodes at"
import numpy as np, pandas as pd, pytest
from PIL import Image
from recipes.data.augment import none, squish
from recipes.data.boxes import Boxed, box_scale, boxed, crop_box, fit_box, larger
from recipes.data.loaders import Files, Items

H,W = 60,100
rng = np.random.RandomState(0)
yx = np.stack([*np.mgrid[:H,:W],np.zeros((H,W))], 2).astype(np.uint8)   # a pixel says where it is

def where(im): return (*im[0,0,:2][::-1].tolist(),*(im[-1,-1,:2][::-1]+1).tolist())   # x0, y0, x1, y1

def slow_fit(x0, y0, x1, y1, margin, aspect, scale):
    "The same by cases"
    w,h = x1-x0,y1-y0
    x0,x1,y0,y1 = x0-margin*w,x1+margin*w,y0-margin*h,y1+margin*h
    w,h = x1-x0,y1-y0
    if aspect and w/h<aspect: x0,x1 = x0-(aspect*h-w)/2,x1+(aspect*h-w)/2
    if aspect and w/h>aspect: y0,y1 = y0-(w/aspect-h)/2,y1+(w/aspect-h)/2
    cx,cy,w,h = (x0+x1)/2,(y0+y1)/2,(x1-x0)*scale,(y1-y0)*scale
    return cx-w/2,cy-h/2,cx+w/2,cy+h/2

def test_fit_box():
    for _ in range(200):
        a,b = np.sort(rng.uniform(0, 100, (2,2)), 0)
        margin,aspect,scale = rng.choice([0,.05,.15]),rng.choice([None,1.,2.15]),rng.choice([1.,1.3])
        box = np.array([*a,*b])
        assert np.allclose(fit_box(box, margin, aspect, scale), slow_fit(*box, margin, aspect, scale))

def test_widened_never_cut():
    "All of the box is in the wider one, which has the shape"
    for box in [10.,10,90,20],[10.,10,12,50]:
        l,u,r,d = fit_box(np.array(box), .05, 2.15)
        assert (r-l)/(d-u)==pytest.approx(2.15) and l<box[0] and u<box[1] and r>box[2] and d>box[3]

@pytest.mark.parametrize('box', [(10,5,50,40),(-10,-5,50,40),(80,50,120,90),(-5,-5,200,200),(10.4,5.4,50.4,40.4)])
def test_clipped(box):
    b = np.round(box).astype(int)
    assert where(crop_box(yx, np.array(box)))==(max(0, b[0]),max(0, b[1]),min(W, b[2]),min(H, b[3]))

@pytest.mark.parametrize('box', [(-10,-5,50,40),(80,50,120,90),(-5,-5,200,200),(-40,10,-30,20),(10,70,20,90),(20,20,20,20)])
def test_padded(box):
    "The size is the box's; what is not picture is the mean"
    im = rng.randint(0, 256, (H,W,3)).astype(np.uint8)
    l,u,r,d = box
    out = crop_box(im, np.array(box), True)
    if l>=W or u>=H or r<=0 or d<=0 or r==l: return   # nothing of the picture: any part of it will do
    assert out.shape==(d-u,r-l,3)
    mean = im.mean((0,1)).round()
    for y,x in rng.randint(0, [d-u,r-l], (200,2)):
        inside = 0<=y+u<H and 0<=x+l<W
        assert (out[y,x]==(im[y+u,x+l] if inside else mean)).all()

@pytest.mark.parametrize('box', [(-40,10,-30,20),(10,70,20,90),(20,20,20,20),(99.6,0,100,60)])
@pytest.mark.parametrize('pad', [False,True])
def test_never_empty(box, pad): assert crop_box(yx, np.array(box), pad).size>0

def test_boxed_at_reduced_size(tmp_path):
    "A source that decodes large JPEGs smaller shows the same part"
    y,x = np.mgrid[:800,:1200]
    im = np.stack([x*255//1200,y*255//800,0*x], 2).astype(np.uint8)
    f = tmp_path/'a.jpg'
    Image.fromarray(im).save(f, quality=98)
    boxes,sizes = [[300,200,900,600]],[[1200,800]]
    full,small = (Boxed(Files([f], least=o), boxes, sizes, margin=.05)[0] for o in (None,(90,90)))
    assert full.shape==(440,660,3) and abs(np.array(small.shape)-[55,82.5,3]).max()<=1
    for o in full,small:
        assert abs(o[0,0,:2].astype(int)-[270*255//1200,180*255//800]).max()<=4
        assert abs(o[-1,-1,:2].astype(int)-[930*255//1200,620*255//800]).max()<=4

def frame(**cols):
    return pd.DataFrame(dict(id=list('abc'), width=W, height=H, x0=[10.,20,30], y0=[5.,6,7], x1=[50.,60,70], y1=[40.,41,42])|cols)

def test_frame_says_it_all():
    "Upside-down and mirrored rows; without boxes the whole picture"
    df = frame(turned=[False,True,False], mirrored=[False,True,True])
    src = boxed([yx]*3, df, margin=0)
    a = [yx[int(o.y0):int(o.y1),int(o.x0):int(o.x1)] for o in df.itertuples()]
    assert (src[0]==a[0]).all() and (src[1]==a[1][::-1]).all() and (src[2]==a[2][:,::-1]).all()
    assert (boxed([yx]*3, df.drop(columns='mirrored'), margin=0)[1]==a[1][::-1,::-1]).all()
    bare = df[['id','width','height','turned']]
    assert (boxed([yx]*3, bare)[0]==yx).all() and (boxed([yx]*3, bare)[1]==yx[::-1,::-1]).all() and len(src)==3
    assert boxed([yx]*3, bare, margin=.3, aspect=3, pad=True)[0].shape[:2]==(H,3*H)   # its shape is kept, without a margin
    assert all(o.flags['C_CONTIGUOUS'] for o in src)

def test_mirror_after_crop_is_crop_after_mirror():
    "So boxes and landmarks need not be mirrored"
    df = frame(mirrored=True)
    flipped = df.assign(x0=W-df.x1, x1=W-df.x0, mirrored=False)
    for kw in dict(margin=.1),dict(aspect=2.15, pad=True),dict(scale=1.5):
        for a,b in zip(boxed([yx]*3, df, **kw), boxed([yx[:,::-1]]*3, flipped, **kw)):
            assert abs(a.shape[1]-b.shape[1])<=1 and (a[0,0]==b[0,0]).all()

def test_views():
    "Test-time scales make boxes larger by their factor and leave the rest of the recipe"
    items = Items(boxed([yx]*3, frame(), margin=.1, aspect=1.5, pad=True), list('abc'), range(3), (squish,none), (24,48))
    big = larger(items)
    assert big.pictures.scale==1.15 and items.pictures.scale==1 and box_scale(big, 2).pictures.scale==2.3
    a,b = items.pictures[1].shape,box_scale(items, 1.5).pictures[1].shape
    assert b[0]==pytest.approx(a[0]*1.5, abs=2) and b[1]==pytest.approx(a[1]*1.5, abs=2) and big[0][0].shape==(24,48,3)
    assert (big.but(mirror=True)[0][0]==big[0][0][:,::-1]).all()
