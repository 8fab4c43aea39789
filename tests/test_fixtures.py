"The drawn sample: the competition's format, the same on every machine, whole or not there"
import hashlib, re
import cv2, numpy as np, pandas as pd, pytest
from recipes.data import fixtures
from recipes.data.draw import SHAPES, colour, hex_ids, motif
from recipes.data.fixtures import draw_imet, imet_labels, imet_picture, sample

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('imet')
    draw_imet(d, 120)
    return d

def _csv(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

def test_format(folder):
    "Files, columns and names are the competition's"
    cols = {f.stem:list(_csv(f)) for f in folder.glob('*.csv')}
    assert cols.pop('labels')==['attribute_id','attribute_name']
    assert cols==dict.fromkeys(['train','sample_submission','answers','corrupted'], ['id','attribute_ids'])
    labels = _csv(folder/'labels.csv')
    assert labels.attribute_id.tolist()==[str(i) for i in range(30)]
    assert labels.attribute_name.str.startswith('culture::').sum()==10 and labels.attribute_name[10:].str.startswith('tag::').all()
    for name,csv in ('train','train.csv'),('test','sample_submission.csv'):
        assert {o.stem for o in (folder/name).iterdir()}==set(_csv(folder/csv).id)
    assert _csv(folder/'answers.csv').id.tolist()==_csv(folder/'sample_submission.csv').id.tolist()

def test_pictures(folder):
    "Shorter sides are in range, and some pictures are very long"
    hw = np.array([cv2.imread(str(f), cv2.IMREAD_UNCHANGED).shape for f in (folder/'train').iterdir()])
    assert (hw[:,2]==3).all()
    assert hw[:,:2].min(1).min()>=40 and hw[:,:2].min(1).max()<=64
    long = (hw[:,:2].max(1)/hw[:,:2].min(1))>=2.9
    assert .03<long.mean()<.25

def test_labels(folder):
    "One to five labels, mostly one culture, each class there, the first of each group commonest"
    for seed in range(3):
        rows = imet_labels(np.random.RandomState(seed), 1000)
        assert {len(o) for o in rows}=={1,2,3,4,5} and all(o==sorted(set(o)) for o in rows)
        n = np.bincount(sum(rows, []), minlength=30)
        assert n.min()>0 and n[0]==n[:10].max() and n[10]==n[10:].max() and n[0]>3*n[9]
        assert np.mean([sum(c<10 for c in o)==1 for o in rows])>.8

def test_corrupted(folder):
    "One training row in twenty is wrong, and the side file knows which"
    said,true = _csv(folder/'train.csv').set_index('id'),_csv(folder/'corrupted.csv').set_index('id')
    assert len(true)==6 and (said.attribute_ids[true.index]!=true.attribute_ids).all()

def _pixels(d):
    "A number that changes with any pixel, name or label"
    h = hashlib.sha256()
    for f in sorted(d.rglob('*.png')): h.update(f.stem.encode() + cv2.imread(str(f)).tobytes())
    for f in sorted(d.glob('*.csv')): h.update(f.read_bytes())
    return h.hexdigest()[:16]

def test_same_everywhere(folder, tmp_path):
    "The same pixels as when this was written; raise `VERSION` and this number when the drawing changes"
    assert fixtures.VERSION==1 and _pixels(folder)=='fa644af721dca57a'
    np.random.seed(5)
    draw_imet(tmp_path/'a', 120)
    assert _pixels(tmp_path/'a')==_pixels(folder)
    draw_imet(tmp_path/'b', 120, seed=1)
    assert _pixels(tmp_path/'b')!=_pixels(folder)

def test_motifs_differ():
    "Every two of sixty motifs differ, in shape or clearly in colour"
    def one(i):
        img = np.full((20,20,3), 128, np.uint8)
        motif(img, i, colour(i), 1, 1, side=16)
        return img.astype(int)
    imgs = [one(i) for i in range(60)]
    far = [abs(a-b).sum() for i,a in enumerate(imgs) for b in imgs[:i]]
    assert min(far)>2000 and len({o.tobytes() for o in imgs[:len(SHAPES)]})==10

def test_tags_all_drawn():
    "Each tag of a picture is on it, whatever its size"
    rng = np.random.RandomState(0)
    for size in range(40, 65):
        img = imet_picture(rng, [0,10,13,15,17], size=(size,size))
        for t in 0,3,5,7: assert (img==np.array(colour(t))).all(-1).sum()>10, (size,t)

def test_ids():
    ids = hex_ids(np.random.RandomState(0), 5000)
    assert len(set(ids))==5000 and all(re.fullmatch('[0-9a-f]{16}', o) for o in ids)

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(fixtures, 'setting', lambda key: tmp_path/key)
    return tmp_path/'cache/samples'

def test_sample_once(cache, capsys):
    "Drawn once, with one line; then found"
    a = sample('imet', 30)
    assert a==cache/'imet-30-v1' and capsys.readouterr().out.count('\n')==1
    stamp = (a/'train.csv').stat().st_mtime_ns
    assert sample('imet', 30)==a and (a/'train.csv').stat().st_mtime_ns==stamp and capsys.readouterr().out==''
    assert sample('imet', 31)!=a

def test_sample_broken_off(cache):
    "An interrupt leaves nothing behind"
    def draw(folder, n):
        (folder/'train.csv').write_text('id\n')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): sample('mine', 5, draw)
    assert list(cache.iterdir())==[]

def test_sample_two_at_once(cache):
    "Who comes second takes what the first has drawn"
    def draw(folder, n):
        (folder/'mine').touch()
        if not (cache/'birds-5-v1').exists(): sample('birds', 5, lambda d, n: (d/'first').touch())
    res = sample('birds', 5, draw)
    assert [o.name for o in res.iterdir()]==['first'] and [o.name for o in cache.iterdir()]==['birds-5-v1']
