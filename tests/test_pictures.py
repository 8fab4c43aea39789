"Pictures of every odd kind against Pillow or known pixels; headers, and what is remembered of them"
import io, os
import cv2, numpy as np, pytest
from PIL import Image, ImageOps
import recipes.data.pictures as pictures
from recipes.data.pictures import BadPicture, decode, decode_bytes, jpeg_size, resized, scan, shrink_by

def smooth(h, w, c=3):
    rng = np.random.default_rng(h*w)
    return cv2.resize(rng.integers(0, 256, (6,8,c), dtype=np.uint8), (w,h), interpolation=cv2.INTER_LINEAR)

@pytest.fixture
def im(): return Image.fromarray(smooth(48, 64))

def stored(im, fmt='PNG', **kw):
    f = io.BytesIO()
    im.save(f, fmt, **kw)
    return f.getvalue()

def pil(b, mode='RGB'): return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(b))).convert(mode))
def apart(a, b): return np.abs(a.astype(int)-b.astype(int)).max()
def on_white(rgba):
    a = rgba[...,3:]/255
    return rgba[...,:3]*a + 255*(1-a)

@pytest.mark.parametrize('fmt', ['PNG','JPEG','BMP','GIF','WEBP','TIFF'])
def test_formats(im, fmt):
    b = stored(im, fmt)
    assert apart(decode_bytes(b), pil(b))==0

@pytest.mark.parametrize('mode', ['1','L','P'])
@pytest.mark.parametrize('channels', [1,3])
def test_plain_modes(im, mode, channels):
    b = stored(im.convert(mode))
    x = decode_bytes(b, channels=channels)
    assert x.shape==(48,64,channels) and x.dtype==np.uint8
    assert apart(x, pil(b, 'RGB' if channels==3 else 'L').reshape(x.shape))<=1

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('fmt', ['PNG','JPEG','WEBP'])
def test_exif_turn(im, orientation, fmt, tmp_path):
    exif = Image.Exif()
    exif[0x112] = orientation
    b = stored(im, fmt, exif=exif)
    assert apart(decode_bytes(b), pil(b))==0
    assert decode_bytes(b).shape==((64,48,3) if orientation>4 else (48,64,3))
    (tmp_path/'a').write_bytes(b)
    row = scan([tmp_path/'a']).iloc[0]
    assert (row.height,row.width)==decode_bytes(b).shape[:2]

def test_alpha_on_white(im):
    rgba = np.dstack([np.asarray(im),np.linspace(0, 255, 64*48).reshape(48,64).astype(np.uint8)])
    for fmt in ('PNG','TIFF'): assert apart(decode_bytes(stored(Image.fromarray(rgba), fmt)), np.round(on_white(rgba)))<=1
    la = rgba[...,[0,3]]
    want = np.round(on_white(rgba[...,[0,0,0,3]]))
    assert apart(decode_bytes(stored(Image.fromarray(la, 'LA'))), want)<=1
    assert apart(decode_bytes(stored(Image.fromarray(la, 'LA')), channels=1), want[...,:1])<=1

def test_transparent_colours(im):
    p = im.quantize(8)
    x = decode_bytes(stored(p, transparency=3))
    hole = np.asarray(p)==3
    assert hole.any() and (x[hole]==255).all() and apart(x[~hole], np.asarray(p.convert('RGB'))[~hole])==0
    alphas = bytes([0,128]+[255]*6)   # a palette may hold an opacity for each colour
    x,rgb = decode_bytes(stored(p, transparency=alphas)),np.asarray(p.convert('RGB'))
    half = np.asarray(p)==1
    assert (x[np.asarray(p)==0]==255).all() and apart(x[half], np.round(rgb[half]*(128/255)+127))<=1
    key = tuple(np.asarray(im)[0,0].tolist())
    assert (decode_bytes(stored(im, transparency=key))[0,0]==255).all()

@pytest.mark.parametrize('fmt', ['.png','.tiff'])
@pytest.mark.parametrize('c', [1,3])
def test_16_bits_are_scaled(fmt, c, tmp_path):
    x = np.linspace(0, 65535, 48*64*c).reshape(48, 64, c).astype(np.uint16)
    b = cv2.imencode(fmt, x[...,::-1])[1].tobytes()
    assert apart(decode_bytes(b), np.broadcast_to(np.round(x/257), (48,64,3)))<=1
    (tmp_path/'a').write_bytes(b)
    row = scan([tmp_path/'a']).iloc[0]
    assert row.problem is None and (row.bits==16 or fmt=='.tiff')

def test_16_bits_with_alpha():
    x = np.full((5,6,4), 40000, np.uint16)
    x[...,3] = 0
    assert (decode_bytes(cv2.imencode('.png', x)[1].tobytes())==255).all()

def test_floats_are_refused(tmp_path):
    Image.fromarray(np.ones((4,5), np.float32)).save(tmp_path/'a.tiff')
    with pytest.raises(BadPicture, match='a.tiff.*no agreed white'): decode(tmp_path/'a.tiff')
    assert 'no agreed white' in scan([tmp_path/'a.tiff']).problem[0]

def test_cmyk_is_not_inverted(im):
    b = stored(im.convert('CMYK'), 'JPEG', quality=95)
    assert b'Adobe' in b
    assert apart(decode_bytes(b), pil(b))<=2
    assert np.abs(decode_bytes(b).astype(int)-np.asarray(im)).mean()<6
    assert apart(decode_bytes(b, channels=1), pil(b, 'L')[...,None])<=3

@pytest.mark.parametrize('hw', [(1,1),(40,1),(1,40)])
@pytest.mark.parametrize('fmt', ['PNG','JPEG'])
def test_thin(im, hw, fmt):
    b = stored(im.crop((0,0,hw[1],hw[0])), fmt)
    assert decode_bytes(b, least=(8,8)).shape==(*hw,3) and apart(decode_bytes(b), pil(b))==0

def test_pixels_can_be_written(im):
    for b in (stored(im), stored(im.convert('RGBA'))): decode_bytes(b)[0,0] = 0

def test_reduced_is_never_below_least():
    for h,w in ((400,512),(401,515),(1000,300)):
        b = stored(Image.fromarray(smooth(h, w)), 'JPEG')
        assert jpeg_size(b)==(h,w)
        for side in (20,37,64,128,150,200,300,600):
            x = decode_bytes(b, least=(side,side//2))
            assert all(a>=min(n, m) for a,n,m in zip(x.shape, (side,side//2), (h,w)))
            assert x.shape[0]<2*side+2 or x.shape[1]<side+2 or shrink_by(b, (side,side//2))==8 or x.shape[:2]==(h,w)

def test_reduced_looks_the_same():
    b = stored(Image.fromarray(smooth(400, 512)), 'JPEG')
    full = Image.fromarray(decode_bytes(b)).resize((128,100), Image.BOX)
    for c,mode in ((3,'RGB'),(1,'L')):
        x = decode_bytes(b, least=(100,128), channels=c)
        assert x.shape==(100,128,c) and np.abs(x.squeeze()-np.asarray(full.convert(mode)).astype(int)).mean()<2

def test_reduced_when_turned():
    exif = Image.Exif()
    exif[0x112] = 6
    x = decode_bytes(stored(Image.fromarray(smooth(400, 800)), 'JPEG', exif=exif), least=(390,190))
    assert x.shape[0]>=390 and x.shape[1]>=190

def test_progressive_and_odd_markers():
    im = Image.fromarray(smooth(90, 70))
    assert jpeg_size(stored(im, 'JPEG', progressive=True, comment=b'x'*300))==(90,70)
    for n in range(30): assert len(jpeg_size(stored(im, 'JPEG')[:n*10]))==2

@pytest.mark.parametrize('fmt,kw', [('JPEG',{}),('JPEG',dict(progressive=True)),('PNG',{})])
def test_truncated(im, fmt, kw, tmp_path):
    b = stored(im, fmt, **kw)
    for n in [3,20,*range(60, len(b)-30, 97)]:
        (tmp_path/'cut').write_bytes(b[:n])
        for least in (None,(10,10)):
            with pytest.raises(BadPicture, match='cut'): decode(tmp_path/'cut', least)
        assert scan([tmp_path/'cut']).problem[0]

@pytest.mark.parametrize('n', [0,1,7,8,9,24,25,26])
def test_stubs(im, n, tmp_path):
    (tmp_path/'a').write_bytes(stored(im)[:n])
    with pytest.raises(BadPicture): decode(tmp_path/'a')
    assert scan([tmp_path/'a']).problem[0]

def test_rubbish_behind_the_end_is_fine(im, tmp_path):
    (tmp_path/'a').write_bytes(stored(im, 'JPEG')+b'\0'*500)
    assert scan([tmp_path/'a']).problem[0] is None
    assert decode(tmp_path/'a').shape==(48,64,3)

def test_spoilt_inside(im, tmp_path):
    b = bytearray(stored(im))
    b[len(b)//2] ^= 255
    (tmp_path/'a.png').write_bytes(b)
    with pytest.raises(BadPicture, match='a.png'): decode(tmp_path/'a.png')

def test_scan_names_problems(im, tmp_path):
    (tmp_path/'empty').touch()
    (tmp_path/'text').write_text('hello')
    (tmp_path/'folder').mkdir()
    (tmp_path/'good').write_bytes(stored(im.convert('L'), 'JPEG'))
    d = scan([tmp_path/o for o in ('empty','text','folder','gone','good')])
    assert d.problem.tolist()[:2]==['empty file','not a picture'] and d.problem[3]=='missing'
    assert 'directory' in d.problem[2] and d.problem[4] is None
    assert d.loc[4, ['width','height','mode','format','bits']].tolist()==[64,48,'L','JPEG',8]

def test_scan_remembers(im, tmp_path, monkeypatch):
    files = [tmp_path/o for o in ('a.png','b, "c".png','NA','ö.png')]
    for f in files: f.write_bytes(stored(im))
    memory = tmp_path/'deep'/'seen.csv'
    first = scan(files, memory)
    seen,header = [],pictures._header
    monkeypatch.setattr(pictures, '_header', lambda p: seen.append(p) or header(p))
    assert scan(files[::-1]+files[:1], memory).path.tolist()==[str(o) for o in files[::-1]+files[:1]] and not seen
    assert scan(files, memory).equals(first) and not seen
    files[0].write_bytes(stored(im.crop((0,0,9,8))))
    new = scan([*files,tmp_path/'gone'], memory)
    assert seen==[str(files[0]),str(tmp_path/'gone')] and new.width[0]==9 and new.problem[4]=='missing'
    scan(files[1:2], memory)
    seen.clear()
    assert scan(files, memory).width[0]==9 and not seen, 'a scan of some files forgot the others'
    assert sorted(o.name for o in memory.parent.iterdir())==['seen.csv']

def test_changed_in_the_same_size(im, tmp_path):
    f = tmp_path/'a'
    f.write_bytes(stored(im))
    scan([f], tmp_path/'m')
    n = f.stat().st_size
    f.write_bytes(b'x'*n)
    os.utime(f, ns=(1,1))
    assert scan([f], tmp_path/'m').problem[0]=='not a picture'

@pytest.mark.parametrize('text', ['','rubbish\n1,2','path,bytes,mtime,width\na,b,c,d\n','\0\1\2'])
def test_spoilt_memory_is_read_anew(im, tmp_path, text):
    (tmp_path/'a').write_bytes(stored(im))
    (tmp_path/'m').write_text(text)
    assert scan([tmp_path/'a'], tmp_path/'m').width[0]==64
    assert scan([tmp_path/'a'], tmp_path/'m').width[0]==64

def test_no_place_to_remember(im, tmp_path):
    (tmp_path/'a').write_bytes(stored(im))
    with pytest.warns(UserWarning, match='cannot remember'): d = scan([tmp_path/'a'], tmp_path/'a'/'m')
    assert d.width[0]==64

def test_resized_against_box_filter():
    for hw,size in (((512,256),(64,64)),((300,301),(64,50)),((40,640),(64,64)),((1,1),(9,9)),((275,275),(224,224))):
        x = smooth(*hw)
        want = np.asarray(Image.fromarray(x).resize(size[::-1], Image.BILINEAR)).astype(int)
        assert resized(x, size).shape==(*size,3) and np.abs(resized(x, size)-want).mean()<3
    noise = np.random.default_rng(0).integers(0, 256, (512,512,3), dtype=np.uint8)
    assert resized(noise, (32,32)).std()<12 < cv2.resize(noise, (32,32)).std()

def test_opencv_has_no_threads(): assert cv2.getNumThreads()<=1
