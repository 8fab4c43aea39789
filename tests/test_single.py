"One label a picture: both forms give the same table, and whatever is wrong with the files is said in one message"
import hashlib, shutil, warnings
import cv2, numpy as np, pandas as pd, pytest
from pathlib import Path
from recipes.data import fixtures
from recipes.data.checks import BadInput
from recipes.data.draw_animals import LIMBS, SHARES, animal_labels, animal_picture, draw_animal, inside
from recipes.data.fixtures import sample
from recipes.data.folds import assign_folds, fold_rows, stratified_folds
from recipes.data.single import deal_folds, name_of, picture_names, read_single, write_single
from recipes.data.table import Table

def rows(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    at = tmp_path_factory.mktemp('drawn')
    draw_animal(at, 60, n_test=10)
    return at

@pytest.fixture
def files(drawn, tmp_path): return shutil.copytree(drawn, tmp_path/'animal')

@pytest.fixture
def folders(drawn, tmp_path):
    "The same pictures as a folder a class"
    at = tmp_path/'folders'
    shutil.copytree(drawn/'test', at/'test')
    for id,label in rows(drawn/'train.csv').values:
        (at/'train'/label).mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn/'train'/id, at/'train'/label/id)
    return at

def edit(f, **cells):
    "Change fields of a CSV file: column -> {row: value}"
    df = rows(f)
    for col,new in cells.items():
        for i,v in new.items(): df.loc[i, col] = v
    df.to_csv(f, index=False)
    return df

def refused(files, **kwargs):
    with pytest.raises(BadInput) as e: read_single(files, **kwargs)
    return str(e.value),{o.kind:o for o in e.value.problems}

# --- what is read

def test_csv(files):
    t,df = read_single(files),rows(files/'train.csv')
    assert t.train.id.tolist()==df.image_id.tolist() and [t.vocab[i] for i in t.y]==df.label.tolist()
    assert t.vocab==sorted(SHARES) and t.test.id.tolist()==rows(files/'sample_submission.csv').image_id.tolist()
    assert t.train.path.tolist()==[str(files/'train'/o) for o in df.image_id]
    hw = [cv2.imread(o).shape[:2] for o in t.train.path]
    assert t.train[['height','width']].values.tolist()==[list(o) for o in hw]

def test_folders_are_the_same(files, folders):
    a,b = read_single(files),read_single(folders)
    key = lambda t: sorted((Path(o).name,t.vocab[y]) for o,y in zip(t.train.path, t.y))
    assert key(a)==key(b) and a.vocab==b.vocab and sorted(a.test.id)==b.test.id.tolist()
    assert b.sample is None and not b.train.id.duplicated().any() and all('/' in o for o in b.train.id)

def test_folders_same_names(folders):
    "A `1.png` in each class is no duplicate"
    for d in (folders/'train').iterdir(): next(iter(d.iterdir())).rename(d/'1.png')
    t = read_single(folders)
    assert sum(Path(o).name=='1.png' for o in t.train.path)==6 and len(t)==60

def test_other_columns(files):
    "Names of columns are told, and more columns do no harm"
    for o in 'train.csv','sample_submission.csv':
        df = rows(files/o).rename(columns=dict(image_id='file', label='species'))
        df.assign(fold='1')[['species','fold','file']].to_csv(files/o, index=False)
    t = read_single(files, id='file', label='species')
    assert len(t)==60 and list(t.sample)==['file','species']
    out = write_single(t.test.id, [0]*10, t)
    assert list(out)==['file','species'] and set(out.species)=={'bear'} and out.file.tolist()==t.test.id.tolist()

def test_ids_without_ending(files):
    for o in 'train.csv','sample_submission.csv':
        df = rows(files/o)
        df.assign(image_id=df.image_id.str[:-4]).to_csv(files/o, index=False)
    t = read_single(files)
    assert all(o.endswith('.png') for o in t.train.path) and not any(o.endswith('.png') for o in t.train.id)
    assert write_single(t.test.id, [0]*10, t).image_id.tolist()==rows(files/'sample_submission.csv').image_id.tolist()

def test_mixed_endings(files):
    "Some ids with and some without; endings in capitals; a dot in the name"
    ids = rows(files/'train.csv').image_id
    new = {0:ids[0][:-4],1:'b.c',2:'big.PNG'}
    (files/'train'/ids[1]).rename(files/'train'/'b.c.png')
    (files/'train'/ids[2]).rename(files/'train'/'big.PNG')
    edit(files/'train.csv', image_id=new)
    assert [Path(o).name for o in read_single(files).train.path[:3]]==[ids[0],'b.c.png','big.PNG']

def test_shadows(files, folders):
    "Names that begin with a dot and other files are no pictures"
    for at in files/'train',folders/'train'/'bear':
        (at/'._x.png').write_bytes(b'mac')
        (at/'Thumbs.db').write_bytes(b'windows')
    assert len(read_single(files))==len(read_single(folders))==60

def test_labels_are_stripped(files):
    was = rows(files/'train.csv').label
    edit(files/'train.csv', label={0:f' {was[0]} '})
    assert read_single(files).vocab==sorted(SHARES)

# --- what is refused

def test_missing_files(files):
    (files/'sample_submission.csv').unlink()
    shutil.rmtree(files/'test')
    msg,found = refused(files)
    assert found['missing_file'].examples==['sample_submission.csv','test'] and msg.startswith('animal: 1 problem')

def test_nothing_there(tmp_path):
    _,found = refused(tmp_path)
    assert found['missing_file'].examples==['train.csv','sample_submission.csv','train','test']

def test_missing_column(files):
    rows(files/'train.csv').rename(columns=dict(label='species')).to_csv(files/'train.csv', index=False)
    msg,_ = refused(files, task='mine')
    assert 'mine: 1 problem' in msg and 'train.csv: 1 column missing (label): it has image_id, species' in msg

def test_everything_at_once(files):
    ids = rows(files/'train.csv').image_id
    edit(files/'train.csv', image_id={0:'none.png',1:ids[2]}, label={3:'',4:' ',5:'NaN'})
    edit(files/'sample_submission.csv', image_id={0:'gone.png'})
    (files/'train'/ids[7]).write_bytes(b'')
    (files/'train'/ids[8]).write_bytes((files/'train'/ids[8]).read_bytes()[:200])
    (files/'train'/ids[9]).write_text('no picture')
    msg,found = refused(files)
    assert set(found)=={'no_picture','same_id','no_label','bad_picture'} and 'animal: 5 problems' in msg
    assert 'train.csv: 1 id without a picture in train/ (none.png)' in msg
    assert 'sample_submission.csv: 1 id without a picture in test/ (gone.png)' in msg
    assert found['no_label'].examples==['row 4','row 5','row 6'] and found['same_id'].examples==[ids[2]]
    assert [o.split(':')[0] for o in found['bad_picture'].examples]==[ids[7],ids[8],ids[9]]
    assert f'train/: 3 pictures unreadable ({ids[7]}: empty file' in msg

@pytest.mark.parametrize('id', ['../train.csv','/etc/passwd','a/../../b.png','~/x.png'])
def test_id_leaves(files, id):
    edit(files/'train.csv', image_id={4:id})
    _,found = refused(files)
    assert found['id_leaves'].examples==[id]

def test_two_of_one(files):
    "One id for two pictures, and two ids for one"
    ids = rows(files/'train.csv').image_id
    shutil.copy(files/'train'/ids[0], files/'train'/f'{ids[0][:-4]}.jpg')
    edit(files/'train.csv', image_id={0:ids[0][:-4],1:ids[2][:-4]})
    _,found = refused(files)
    assert len(found['two_pictures'].examples)==1 and found['same_picture'].examples==[ids[2][:-4],ids[2]]

def test_no_rows(files):
    rows(files/'train.csv')[:0].to_csv(files/'train.csv', index=False)
    assert 'no_rows' in refused(files)[1]

def test_bad_folders(folders):
    "Unreadable pictures say their class; pictures outside a class and an empty test folder are noted"
    bear = next(iter((folders/'train'/'bear').iterdir()))
    bear.write_bytes(b'')
    shutil.move(next(iter((folders/'train'/'fox').iterdir())), folders/'train'/'loose.png')
    shutil.rmtree(folders/'test')
    (folders/'test').mkdir()
    msg,found = refused(folders)
    assert f'train/: 1 picture unreadable (bear/{bear.name}: empty file)' in msg
    assert found['no_label'].examples==['loose.png'] and found['no_rows'].examples==['test/']

def test_skip_bad(files):
    "Pictures that do not decode are left out and counted; a class that loses its only one stays in the vocab and is said"
    df = rows(files/'train.csv')
    gone = df.image_id[df.label=='snake']
    assert len(gone)==1
    (files/'train'/gone.iloc[0]).write_bytes(b'')
    t = read_single(files, skip_bad=True)
    assert len(t)==59 and t.vocab==sorted(SHARES) and 'snake' in ' '.join(t.said)
    assert any('1 of 60 pictures left out' in o for o in t.said) and any('no training picture' in o for o in t.said)

def test_empty_class(folders):
    (folders/'train'/'yak').mkdir()
    t = read_single(folders)
    assert t.vocab[-1]=='yak' and 'class yak has no training picture' in t.said

def test_few_are_said(files):
    said = ' '.join(read_single(files).said)
    assert '3 classes have fewer than 5 training pictures (snake 1, bird 2, deer 4)' in said

def test_names(): assert name_of(['a','a.png','b'], ['a.jpg','a.png','c.png'])==[['a.jpg','a.png'],['a.png'],[]]

def test_nested(tmp_path):
    for o in 'b.png','d/a.JPG','d/e/c.webp','d/x.txt':
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/o).touch()
    assert picture_names(tmp_path)==['b.png','d/a.JPG','d/e/c.webp']

# --- folds

def table_of(y, vocab=None):
    df = pd.DataFrame(dict(id=range(len(y))))
    return Table(df, df[:0], np.asarray(y), vocab or [str(i) for i in range(max(y)+1)])

@pytest.mark.parametrize('n', [2,3,5])
@pytest.mark.parametrize('seed', [0,1])
def test_deal_folds(n, seed):
    "No warning; every class is in the training rows of each fold; equal to one row; single rows are never held out"
    counts = [60,30,15,8,5,2,1,1]
    y = np.random.RandomState(7).permutation(np.repeat(np.arange(8), counts))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        folds = assign_folds(table_of(y), deal_folds, seed=seed)
    assert (folds[y>=6]==-1).all() and (folds[y<6]>=0).all()
    for k in range(3): assert set(y[fold_rows(folds, k)[0]])==set(range(8))
    folds = deal_folds(table_of(y), n, seed)
    per = np.array([np.bincount(folds[y==c], minlength=n) for c in range(6)])
    assert (per.max(1)-per.min(1)).max()<=1 and np.ptp(per.sum(0))<=1
    for k in range(n): assert set(y[folds!=k])==set(range(8))
    assert (folds==deal_folds(table_of(y), n, seed)).all() and (folds!=deal_folds(table_of(y), n, seed+5)).any()

def test_deal_folds_as_balanced_as_sklearn():
    y = np.random.RandomState(0).randint(0, 4, 203)
    per = [np.array([np.bincount(f[y==c]) for c in range(4)]) for f in (deal_folds(table_of(y), 3), stratified_folds(table_of(y), 3))]
    assert (np.sort(per[0], 1)==np.sort(per[1], 1)).all()

# --- the drawn animals

def pixels(d):
    "A number that changes with any pixel, name or label"
    h = hashlib.sha256()
    for f in sorted(d.rglob('*.png')): h.update(f.stem.encode() + cv2.imread(str(f)).tobytes())
    for f in sorted(d.glob('*.csv')): h.update(f.read_bytes())
    return h.hexdigest()[:16]

def test_same_everywhere(drawn, tmp_path):
    "The same pixels as when this was written; raise `VERSION` and this number when the drawing changes"
    assert pixels(drawn)=='fc6991754353b9b7'
    np.random.seed(5)
    draw_animal(tmp_path/'a', 60, n_test=10)
    assert pixels(tmp_path/'a')==pixels(drawn)
    draw_animal(tmp_path/'b', 60, n_test=10, seed=1)
    assert pixels(tmp_path/'b')!=pixels(drawn)

def test_proportions():
    rng = np.random.RandomState(0)
    assert pd.Series(animal_labels(rng, 120)).value_counts().to_dict()==SHARES
    for n in 1,4,6,7,30,250,1000: assert len(animal_labels(rng, n))==n
    for n in 6,30,1000: assert n<9 or set(animal_labels(rng, n))==set(SHARES)

def test_colour_tells_nothing():
    "Mean colours of two animals lie no further apart than chance puts them; their outlines do"
    rng = np.random.RandomState(0)
    mean = np.array([[animal_picture(rng, o).mean((0,1)) for _ in range(80)] for o in LIMBS])
    far = abs(mean.mean(1)[:,None]-mean.mean(1)).max()
    assert far<4.5*mean.std(1).max()*(2/80)**.5
    y,x = np.mgrid[-1:1:60j,-1:1:60j]
    masks = [inside(x, y, o) for o in LIMBS.values()]
    for i,a in enumerate(masks):
        for b in masks[:i]: assert (a&b).sum()/(a|b).sum()<.75

def test_inside_is_slow_loop():
    "A limb against the distance to many points of it"
    rng = np.random.RandomState(1)
    limb,p = rng.uniform(-.8, .8, (1,6)),rng.uniform(-1, 1, (300,2))
    limb[:,4:] = .3,.1
    t = np.linspace(0, 1, 2001)
    line = limb[0,:2]+t[:,None]*(limb[0,2:4]-limb[0,:2])
    d = np.hypot(*(p[:,None]-line).transpose(2, 0, 1))
    near = d.argmin(1)
    far = d.min(1)-(.3-.2*t[near])
    sure = abs(far)>1e-3
    assert (inside(p[:,0], p[:,1], limb)==(far<0))[sure].all() and sure.sum()>250

def test_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(fixtures, 'setting', lambda key: tmp_path/key)
    t = read_single(sample('animal', 60))
    assert len(t)==60 and len(t.test)==15 and not (t.path/'answers.csv').exists()
