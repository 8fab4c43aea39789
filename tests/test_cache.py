"The picture cache: right pixels, a new one for new files, nothing half-usable, and no training stopped by it"
import multiprocessing, os, pickle, signal, threading, time
import cv2, numpy as np, pandas as pd, pytest, torch
from torch.utils.data import DataLoader
import recipes.data.cache as cache_module
from recipes.data.cache import PictureCache, affordable, ahead, cache_key, nbytes_needed
from recipes.data.pictures import BadPicture, decode, resized, scan

@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(30):
        img = rng.integers(0, 256, (rng.integers(1, 60),rng.integers(1, 60),3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path/f'{i:02}.{"jpg" if i%3 else "png"}'), img)
    return sorted(tmp_path.iterdir())

@pytest.fixture
def folder(tmp_path): return tmp_path/'deep'/'cache'

@pytest.mark.parametrize('side', [None,(24,16)])
def test_pixels(paths, folder, side):
    cache = PictureCache.build(paths, folder, side)
    assert len(cache)==30 and len(cache.bad)==0
    for i in np.random.default_rng(0).permutation(30):
        want = decode(paths[i]) if side is None else resized(decode(paths[i], least=side), side)
        assert (cache[i]==want).all() and cache[i].dtype==np.uint8
    assert (cache[-1]==cache[29]).all() and not cache[3].flags.writeable
    assert (cache.folder/'pixels.bin').stat().st_size==nbytes_needed(scan(paths), side)+1

def test_big_jpeg_is_decoded_smaller(tmp_path, folder):
    img = cv2.resize(np.random.default_rng(0).integers(0, 256, (8,8,3), dtype=np.uint8), (800,600))
    cv2.imwrite(str(tmp_path/'a.jpg'), img)
    got = PictureCache.build([tmp_path/'a.jpg'], folder, (64,64))[0].astype(int)
    assert np.abs(got-resized(decode(tmp_path/'a.jpg'), (64,64))).mean()<2

def test_there_already(paths, folder, monkeypatch):
    first = PictureCache.build(paths, folder, (8,8))
    monkeypatch.setattr(cache_module, 'decode', None)
    again = PictureCache.build(paths, folder, (8,8), nbytes=10**18)   # no room is needed for one that is there
    assert again.folder==first.folder and (again[5]==first[5]).all()

def test_key(paths, folder):
    keys = [cache_key(paths),cache_key(paths, (8,8)),cache_key(paths, (8,9)),cache_key(paths[1:]),cache_key(paths[::-1])]
    os.utime(paths[0], ns=(1,1))
    keys.append(cache_key(paths))
    paths[0].write_bytes(paths[0].read_bytes()+b'0')
    os.utime(paths[0], ns=(1,1))
    keys.append(cache_key(paths))
    paths[0].unlink()
    keys.append(cache_key(paths))
    assert len(set(keys))==8 and cache_key(paths, [8,8])==cache_key(paths, (8,8))

def test_pickles_without_pixels(paths, folder):
    cache = PictureCache.build(paths, folder)
    b = pickle.dumps(cache)
    assert len(b)<500 and (pickle.loads(b)[7]==cache[7]).all()

class Rows:
    def __init__(self, cache): self.cache = cache
    def __len__(self): return len(self.cache)
    def __getitem__(self, i): return torch.tensor(self.cache[i])

def test_in_workers(paths, folder):
    cache = PictureCache.build(paths, folder, (8,8))
    dl = DataLoader(Rows(cache), batch_size=5, num_workers=2)
    assert (torch.cat(list(dl)).numpy()==np.stack([cache[i] for i in range(30)])).all()

def test_bad_pictures(paths, folder):
    paths[4].write_bytes(b'')
    paths[7].write_bytes(paths[7].read_bytes()[:-40])
    paths[9].unlink()
    with pytest.raises(BadPicture, match='3 of 30.*id4 .*empty file.*id7 .*id9 .*missing'):
        PictureCache.build(paths, folder, ids=[f'id{i}' for i in range(30)])
    with pytest.warns(UserWarning, match='3 of 30.*left out'): cache = PictureCache.build(paths, folder, skip_bad=True)
    assert cache.bad.tolist()==[4,7,9] and (cache[10]==decode(paths[10])).all()
    with pytest.raises(BadPicture): cache[7]
    with pytest.raises(BadPicture, match='3 of 30'): PictureCache.build(paths, folder)

def test_all_bad(tmp_path, folder):
    with pytest.warns(UserWarning, match='1 of 1'): assert len(PictureCache.build([tmp_path/'no'], folder, skip_bad=True))==1

def leftovers(folder): return [o.name for o in folder.iterdir()]

@pytest.mark.parametrize('error', [KeyboardInterrupt,MemoryError])
def test_interrupt_leaves_nothing(paths, folder, monkeypatch, error):
    def stop(*args): raise error
    monkeypatch.setattr(cache_module, 'resized', stop)
    with pytest.raises(error): PictureCache.build(paths, folder, (8,8))
    assert leftovers(folder)==[]

def test_full_disk(paths, folder, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(cache_module.np, 'save', full)
    with pytest.warns(UserWarning, match='no picture cache.*No space left'): assert PictureCache.build(paths, folder) is None
    assert leftovers(folder)==[]

def test_no_folder(paths):
    with pytest.warns(UserWarning, match='no picture cache'): assert PictureCache.build(paths, paths[0]/'in a file') is None

def test_not_affordable(paths, folder):
    with pytest.warns(UserWarning, match='too much'): assert PictureCache.build(paths, folder, nbytes=10**18) is None
    assert not folder.exists() and affordable(1, folder) and not affordable(10**18, folder)

def _build_slowly(paths, folder):
    def slow(*args):
        time.sleep(.1)
        return resized(*args)
    cache_module.resized = slow
    PictureCache.build(paths, folder, (8,8), workers=1)

def test_killed(paths, folder):
    p = multiprocessing.get_context('fork').Process(target=_build_slowly, args=(paths, folder))
    p.start()
    while not (folder.exists() and list(folder.glob('*.part/*/pixels.bin'))): time.sleep(.01)
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    part, = leftovers(folder)
    assert part.endswith('.part')
    cache = PictureCache.build(paths, folder, (8,8))
    assert (cache[29]==resized(decode(paths[29], (8,8)), (8,8))).all() and part in leftovers(folder), 'may be in use'
    for o in [*(folder/part).rglob('*'),folder/part]: os.utime(o, (1,1))
    PictureCache.build(paths, folder, (9,9))
    assert part not in leftovers(folder)

def test_two_at_once(paths, folder):
    got = []
    ts = [threading.Thread(target=lambda: got.append(PictureCache.build(paths, folder))) for _ in range(3)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert len(got)==3 and all((o[11]==decode(paths[11])).all() for o in got) and len(leftovers(folder))==1

def test_ahead_is_bounded():
    out,most = 0,0
    lock = threading.Lock()
    def one(o):
        nonlocal out,most
        with lock: out,most = out+1,max(most, out+1)
        return o
    for i,o in enumerate(ahead(one, range(200), workers=2)):
        assert i==o
        with lock: out -= 1
    assert most<=8*2+2

def test_nbytes_needed():
    seen = pd.DataFrame(dict(width=[10,20,7], height=[3,4,0], problem=[None,None,'missing']))
    assert nbytes_needed(seen)==3*(30+80) and nbytes_needed(seen, (5,6))==3*2*30
