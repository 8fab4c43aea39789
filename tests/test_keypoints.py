"Keypoints, matches and homographies against slow loops and OpenCV's own; what is kept on disk"
import os
import cv2, numpy as np, pandas as pd, pytest
from functools import partial
from PIL import Image
from recipes.data.augment import none, squish
from recipes.data.boxes import boxed
from recipes.data.cache import PictureCache
from recipes.data.loaders import Arrays, Files, Items
from recipes.data.pictures import BadPicture
from recipes.data.rle import Masked, rle_encode
from recipes.infer import keypoints as module
from recipes.infer.keypoints import Keypoints, believed, made_of, rooted, sift
from recipes.infer.matching import compared, judge, judged, match_pairs, numbers, one_each, projected, ratio_matches, training_pairs
from recipes.infer.words import visual_words, vlad, word_vectors

def skin(seed, h=150, w=240):
    "Marks of several sizes"
    rng = np.random.default_rng(seed)
    parts = [cv2.resize(rng.normal(size=(h//s,w//s)).astype(np.float32), (w,h), interpolation=cv2.INTER_CUBIC) for s in (6,12,30)]
    return np.clip(110+22*sum(parts), 0, 255).astype(np.uint8)[...,None].repeat(3, 2)

def warped(im, seed, by=.08):
    "The picture from another place, darker and with noise"
    rng = np.random.default_rng(seed)
    h,w = im.shape[:2]
    corners = np.float32([[0,0],[w,0],[w,h],[0,h]])
    H = cv2.getPerspectiveTransform(corners, corners+(rng.uniform(-by, by, (4,2))*[w,h]).astype(np.float32))
    out = cv2.warpPerspective(im, H, (w,h), borderMode=cv2.BORDER_REFLECT_101)
    return np.clip(out*.7+rng.normal(0, 3, out.shape), 0, 255).astype(np.uint8)

def units(im, **kw):
    xy,d = sift(im, **kw)
    return xy,rooted(d)

def items(pics): return Items(pics, [str(i) for i in range(len(pics))], list(range(len(pics))), (squish,none), (32,32))

# --- descriptors and matches

def test_rooted_is_the_slow_loop():
    d = sift(skin(0))[1][:50]
    slow = [[(v/sum(map(int, row)))**.5 for v in map(int, row)] for row in d]
    np.testing.assert_allclose(rooted(d), slow, atol=1e-6)
    assert (rooted(np.zeros((2,128), np.uint8))==0).all()

def test_bytes_are_what_opencv_gives():
    "Nothing is lost by keeping bytes"
    gray = module.equalised(skin(0))
    _,d = cv2.SIFT_create().detectAndCompute(gray, None)
    kept = {tuple(o) for o in sift(skin(0), sides=(1,1024))[1]}
    assert (d==d.astype(np.uint8)).all() and len(kept)>50 and kept<={tuple(o) for o in d.astype(np.uint8)}

@pytest.mark.parametrize('other', (0,1))
def test_ratio_is_bfmatchers(other):
    a,b = units(skin(0))[1],units(warped(skin(other), 5))[1]
    pairs = cv2.BFMatcher(cv2.NORM_L2).knnMatch(a, b, k=2)
    want = {(m.queryIdx,m.trainIdx) for m,n in pairs if m.distance**2<.64*n.distance**2}
    close = {m.queryIdx for m,n in pairs if abs(m.distance**2-.64*n.distance**2)<1e-5}
    i,j = ratio_matches(a, b)
    got = set(zip(i.tolist(), j.tolist()))
    assert len(want)>(30 if other==0 else 0) and {o[0] for o in got^want}<=close
    near = {m.queryIdx:m.distance/n.distance for m,n in pairs}
    assert (np.diff([near[o] for o in i.tolist()])>-1e-3).all()   # the clearest first

def test_ratio_leaves_its_input_alone():
    a,b = units(skin(0))[1],units(skin(1))[1]
    was = a.copy(),b.copy()
    ratio_matches(a, b)
    assert (a==was[0]).all() and (b==was[1]).all()

def test_one_each_keeps_the_clearest():
    rng = np.random.default_rng(0)
    a,b = rng.integers(0, 9, (60,2)).astype(np.float32),rng.integers(0, 9, (60,2)).astype(np.float32)
    x,y = one_each(a, b)
    for o in x,y: assert len(np.unique(o, axis=0))==len(o)
    assert (x[0]==a[0]).all() and (y[0]==b[0]).all()
    at = [next(i for i in range(60) if (a[i]==p).all() and (b[i]==q).all()) for p,q in zip(x, y)]
    assert at==sorted(at)

# --- one projection

@pytest.mark.parametrize('seed', range(4))
def test_warped_copy_verifies_and_others_do_not(seed):
    one,two,other = units(skin(seed)),units(warped(skin(seed), seed)),units(skin(seed+50))
    m = compared(one, two)
    assert len(m.a)>20 and len(compared(one, other).a)<10
    back = cv2.perspectiveTransform(m.a[None], m.H)[0]
    assert np.linalg.norm(back-m.b, axis=1).max()<9

def test_inliers_are_found_among_wrong_matches():
    rng = np.random.default_rng(0)
    a,b = rng.uniform(0, 300, (2,60,2)).astype(np.float32)
    b[::2] = a[::2]*[1.1,.9]+[20,-5]
    m = projected(a, b)
    assert 28<=len(m.a)<=36 and set(map(tuple, m.a))>={tuple(o) for o in a[::2]}

def test_more_than_nine():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 300, (10,2)).astype(np.float32)
    assert len(projected(a, a+5).a)==10 and projected(a[:9], a[:9]+5).H is None

@pytest.mark.parametrize('a', (np.zeros((30,2)), np.stack([np.arange(30),np.arange(30)], 1), np.full((30,2), np.nan)), ids=('point','line','nan'))
def test_degenerate(a):
    "Points on each other or in a line: an answer, whatever it is, with finite numbers"
    m = projected(a.astype(np.float32), a.astype(np.float32))
    assert np.isfinite(numbers(m.H)).all() and len(m.a)==len(m.b)<=30

def test_same_input_same_answer():
    one,two = units(skin(0)),units(warped(skin(0), 3, .2))
    first = compared(one, two)
    for i in range(5):
        cv2.setRNGSeed(i)
        np.random.seed(i)
        compared(units(skin(i+9)), one)
        again = compared(one, two)
        assert (again.H==first.H).all() and (again.a==first.a).all()

# --- pictures without anything

def test_no_keypoints():
    flat = np.full((60,90,3), 128, np.uint8)
    keys = Keypoints(items([flat,skin(0),skin(0)]))
    assert [len(keys[0][0]),keys[0][1].shape]==[0,(0,128)]
    n,h = match_pairs(keys, keys, np.divmod(np.arange(9), 3))
    assert (n.reshape(3, 3)[0]==0).all() and (n.reshape(3, 3)[:,0]==0).all() and n[5]>20
    v = word_vectors(keys, visual_words(keys))
    assert (v[0]==0).all() and abs(v[1]@v[2]-1)<1e-5

@pytest.mark.parametrize('side', (1,3,15))
def test_tiny_picture(side): assert len(sift(skin(0, 150, 240)[:side,:side])[0])<20

def test_masks():
    im = np.dstack([skin(0, 300, 480),np.zeros((300,480), np.uint8)])
    assert believed(im).shape[2]==3 and (sift(im)[0]==sift(skin(0, 300, 480))[0]).all()
    im[:25,:40,3] = 255   # a thousand pixels
    assert believed(im) is im and (sift(im)[0]<=(40,25)).all()
    im[0,0,3] = 0
    assert believed(im).shape[2]==3

def test_gray_and_sizes():
    gray = skin(0)[...,:1]
    assert (sift(gray)[0]==sift(gray.repeat(3, 2))[0]).all()
    xy = sift(skin(0, 600, 960), sides=(100,240))[0]
    assert xy.max()<240 and len(xy)>20
    small = cv2.resize(skin(0), (60,38))
    assert 240<sift(small)[0].max()+30 and len(sift(small)[0])>2*len(sift(small, sides=(1,1024))[0])

# --- on disk

@pytest.fixture
def files(tmp_path):
    paths = [str(tmp_path/f'{i}.png') for i in range(3)]
    for i,p in enumerate(paths): Image.fromarray(skin(i)).save(p)
    return paths

def test_kept_and_read_again(files, monkeypatch):
    first = [*Keypoints(items(Files(files)))]
    monkeypatch.setattr(Keypoints, 'find', None)
    again = Keypoints(items(Files(files))).fill()
    for a,b in zip(first, again): assert (a[0]==b[0]).all() and (a[1]==b[1]).all()

def test_changed_file_or_setting_is_another(files):
    keys = Keypoints(items(Files(files)))
    old = keys.path(0)
    assert old==Keypoints(items(Files(files))).path(0)!=keys.path(1)
    assert Keypoints(items(Files(files)), partial(sift, most=9)).path(0)!=old!=Keypoints(items(Files(files, 1))).path(0)
    os.utime(files[0], ns=(1,1))
    assert keys.path(0)!=old

def test_spoilt_file_is_made_again(files):
    keys = Keypoints(items(Files(files)))
    want = keys[0]
    for junk in b'',b'junk',keys.path(0).read_bytes()[:300]:
        keys.path(0).write_bytes(junk)
        assert (keys[0][0]==want[0]).all()
    assert not list(keys.folder.rglob('.*'))

def test_no_room(files, tmp_path):
    (tmp_path/'full').write_text('a file where the folder would be')
    with pytest.warns(UserWarning, match='keypoints are not kept'): keys = [*Keypoints(items(Files(files)), folder=tmp_path/'full')]
    assert [len(o[0]) for o in keys]==[len(o[0]) for o in Keypoints(items(Files(files)))]

def test_unreadable_is_named(files):
    os.remove(files[1])
    with pytest.raises(BadPicture, match='id 1: .*missing'): Keypoints(items(Files(files))).fill()

def test_every_source_has_its_own_name(files, tmp_path):
    "Boxes, masks, turns, arrays and caches; a source of one's own by its pixels"
    frame = pd.DataFrame(dict(x0=[0,0], y0=0, x1=100, y1=[90,80], width=240, height=150, turned=[False,True]))
    np.save(tmp_path/'a.npy', np.stack([skin(o)[...,0] for o in range(2)]))
    src = Files(files[:2])
    text = rle_encode(np.ones((192,384)))
    all_ = [src, Masked(src, ['','']), Masked(src, [text,text]), boxed(src, frame), boxed(src, frame, margin=.1), boxed(src, frame[['width','height']]),
        boxed(Masked(src, ['','']), frame), Arrays([tmp_path/'a.npy']*2, [0,1]), PictureCache.build(files[:2], tmp_path/'cache'), [skin(0),skin(1)]]
    names = [Keypoints(items(o)).path(i).name for o in all_ for i in range(2)]
    assert len(set(names))==2*len(all_) and names==[Keypoints(items(o)).path(i).name for o in all_ for i in range(2)]
    assert made_of([skin(0)], 0)!=made_of([skin(1)], 0)
    for o in all_: Keypoints(items(o)).fill()

def test_few_are_kept(files):
    keys = Keypoints(items(Files(files)), partial(sift, most=25)).fill()
    assert all(len(xy)==25 for xy,_ in keys) and keys.path(0).stat().st_size<25*136+200

# --- pairs

@pytest.fixture
def keys(): return Keypoints(items([o for i in range(5) for o in (skin(i),warped(skin(i), i))])).fill()

def test_pairs_in_any_order_and_by_any_number_of_threads(keys):
    q,g = np.divmod(np.arange(100), 10)
    n,h = match_pairs(keys, keys, (q,g), 1)
    slow = [compared(*((xy,rooted(d)) for xy,d in (keys[i],keys[j]))) for i,j in zip(q, g)]
    assert n.tolist()==[len(o.a) for o in slow] and (h==[numbers(o.H) for o in slow]).all()
    order = np.random.default_rng(0).permutation(100)
    for workers in 1,4:
        m,k = match_pairs(keys, keys, (q[order],g[order]), workers)
        assert (m==n[order]).all() and (k==h[order]).all()

def test_an_error_is_not_lost(keys):
    with pytest.raises(IndexError): match_pairs(keys, keys, ([0,0],[1,99]))

# --- the judge

def test_training_pairs():
    y = np.array([0,0,0,1,1,2,3,3,9,9])
    (a,b),same = training_pairs(y, 4, 500)
    assert ((y[a]==y[b])==same).all() and (y[a]<4).all() and (y[b]<4).all() and (a!=b).all()
    assert len({frozenset(o) for o in zip(a[same], b[same])})==same.sum()==5
    assert len({frozenset(o) for o in zip(a[~same], b[~same])})==28-5
    assert (training_pairs(y, 4, 500)[0]==np.stack([a,b])).all() and (~same).sum()==23

@pytest.mark.parametrize('y', ([],[5,5],[0],[0]*6,[0,1,2]), ids=('none','unknown','one','one id','singles'))
def test_nothing_to_learn_from(keys, y):
    (a,b),same = training_pairs(y, 3, 10)
    assert len(a)==len(b)==len(same) and judge(keys, y, 3, 10) is None

def test_judge(monkeypatch):
    "Homographies of cameras against those of wrong matches, which it has not seen"
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    box = np.float32([[0,0],[240,0],[240,150],[0,150]])
    real = [cv2.getPerspectiveTransform(box, box+rng.uniform(-25, 25, (4,2)).astype(np.float32)) for _ in range(300)]
    wrong = [cv2.getPerspectiveTransform(box, rng.uniform(0, 240, (4,2)).astype(np.float32)) for _ in range(300)]
    y = np.repeat(np.arange(100), 3)
    def match(one, two, pairs):
        same = y[pairs[0]]==y[pairs[1]]
        return np.full(len(same), 12),np.stack([numbers((real if s else wrong)[i]) for s,i in zip(same, pairs[0])])
    monkeypatch.setattr('recipes.infer.matching.match_pairs', match)
    by = judge(None, y[:150], 100, 200)
    h = np.stack([numbers(o) for o in (*real[150:],*wrong[150:])])
    p = by.predict_proba(h)[:,1]
    assert roc_auc_score(np.arange(300)<150, p)>.9
    np.testing.assert_allclose(judged(np.full(300, 30), h, by), 30*p, rtol=1e-5)
    assert judged(np.array([3,0]), h[:2]).tolist()==[3,0]==judged(np.array([3,0]), h[:2], None).tolist() and judged(np.array([0,0]), h[:2], by).max()==0

# --- words

def test_vlad_is_the_slow_loop():
    d = units(skin(0))[1]
    words = visual_words([sift(skin(i)) for i in range(3)], 8)
    assert words.shape==(8,128) and (words==visual_words([sift(skin(i)) for i in range(3)], 8)).all()
    slow = np.zeros((8,128))
    for v in d:
        i = min(range(8), key=lambda o: ((v-words[o])**2).sum())
        slow[i] += v-words[i]
    slow /= np.maximum(np.linalg.norm(slow, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(vlad(d, words), slow.ravel()/np.linalg.norm(slow), atol=1e-4)

def test_words_choose():
    keys = Keypoints(items([skin(i) for i in range(20)]+[warped(skin(i), i) for i in range(20)])).fill()
    v = word_vectors(keys, visual_words(keys))
    assert ((v[20:]@v[:20].T).argsort(1)[:,-3:]==np.arange(20)[:,None]).any(1).mean()>.9
