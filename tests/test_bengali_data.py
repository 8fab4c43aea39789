"Bengali.AI's files: pixels as others read them, in little memory, whole or not there; what is refused and how it is said"
import shutil, signal, subprocess, sys
import cv2, numpy as np, pandas as pd, pyarrow, pytest
from functools import partial
from pathlib import Path
from pyarrow import parquet
from recipes.data import parquet as ours
from recipes.data.checks import BadInput, Problems
from recipes.data.draw_graphemes import HEADS, bengali_labels, bengali_picture, draw_bengali, write_strips
from recipes.data.folds import assign_folds, fold_rows, one_hot, stratified_folds
from recipes.data.graphemes import read_graphemes, write_graphemes
from recipes.data.loaders import Arrays
from recipes.data.parquet import fill_parquet, pixels_of
from recipes.data.settings import setting
from recipes.data.table import Table
from recipes.data.unseen import is_unseen, unseen_graphemes

SHAPE = 6,9   # small strips make small files

def rows(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

def noise(n, seed=0): return np.random.default_rng(seed).integers(0, 256, (n,*SHAPE), dtype=np.uint8)

def ids_of(n, a=0, split='Train'): return [f'{split}_{i}' for i in range(a, a+n)]

def convert(file, shape=SHAPE):
    "The array of a parquet file"
    problems = Problems('bengali')
    ids = problems.check_strips(file, shape)
    problems.stop()
    return np.load(pixels_of([file], ids, partial(fill_parquet, file=file), shape).path[0])

# --- pixels

def test_as_pandas(tmp_path):
    "Several row groups, columns in any order, an index that pandas wrote: what pandas reads, inverted"
    file,df = tmp_path/'a.parquet',pd.DataFrame(noise(50).reshape(50, -1)).rename(columns=str)
    df = df.sample(frac=1, axis=1, random_state=0)
    df.insert(7, 'image_id', ids_of(50))
    df.index = range(3, 53)
    df.index = df.index.astype('int64').rename('__index_level_0__')
    df.reset_index().to_parquet(file, row_group_size=16, index=False)
    assert parquet.ParquetFile(file).num_row_groups==4
    want = pd.read_parquet(file)[[str(i) for i in range(54)]].to_numpy().reshape(-1, *SHAPE)
    for size in 1,100,10**6:
        out = np.zeros((50,*SHAPE), np.uint8)
        fill_parquet(out, file, size)
        assert np.array_equal(out, 255-want)
    got = convert(file)
    assert got.dtype==np.uint8 and np.array_equal(got, 255-want) and np.array_equal(want, noise(50))

def test_once(tmp_path, monkeypatch):
    "The second time nothing is read; a changed file is converted again"
    file = tmp_path/'a.parquet'
    write_strips(file, ids_of(5), noise(5))
    convert(file)
    with monkeypatch.context() as m:
        m.setattr(ours, '_open', lambda f: 1/0)
        assert np.array_equal(convert(file), 255-noise(5))
        assert Problems('x').check_strips(file, SHAPE).tolist()==ids_of(5)
    write_strips(file, ids_of(6), noise(6, seed=1))
    assert np.array_equal(convert(file), 255-noise(6, seed=1))

def test_progress(tmp_path, capsys):
    assert list(ours._slowly(range(4), 'a.parquet', every=0))==[0,1,2,3]
    assert capsys.readouterr().out.split('\n')[1]=='a.parquet: 25% converted'
    list(ours._slowly(range(4), 'a.parquet'))
    assert capsys.readouterr().out==''

def test_no_room(tmp_path, monkeypatch):
    "A full disk is said before it is full"
    file = tmp_path/'a.parquet'
    write_strips(file, ids_of(5), noise(5))
    monkeypatch.setattr(shutil, 'disk_usage', lambda o: type('', (), dict(free=100)))
    with pytest.raises(OSError, match='make room, or give another folder as `cache` in settings.ini'): convert(file)

def test_pixels_missing(tmp_path):
    file = tmp_path/'a.parquet'
    cols = [pyarrow.array(ids_of(2)), *(pyarrow.array([1,None], pyarrow.uint8()) for _ in range(54))]
    parquet.write_table(pyarrow.table(cols, ['image_id', *map(str, range(54))]), file)
    with pytest.raises(BadInput, match='pixels missing in columns 0 to 53'): convert(file)

slow = '''import sys, time
from functools import partial
from recipes.data import parquet as ours
def wait(blocks, name):
    for i,o in enumerate(blocks):
        yield o
        print('block', flush=True)
        time.sleep(60)
ours._slowly = wait
file = sys.argv[1]
ours.pixels_of([file], [f'Train_{i}' for i in range(5)], partial(ours.fill_parquet, file=file), (6,9))'''

def test_killed(tmp_path):
    "A kill in the middle leaves nothing that looks whole; the next run converts anew"
    file = tmp_path/'a.parquet'
    write_strips(file, ids_of(5), noise(5))
    before = {o.name for o in (setting('cache')/'strips').glob('*')}
    with subprocess.Popen([sys.executable, '-c', slow, str(file)], stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline()=='block\n'   # one block is in the file
        p.send_signal(signal.SIGKILL)
    new = {o.name for o in (setting('cache')/'strips').glob('*')}-before
    assert len(new)==1 and new.pop().endswith('.part')
    assert np.array_equal(convert(file), 255-noise(5))

def test_interrupted(tmp_path):
    "Nor does an interrupt, which leaves nothing at all"
    def fill(out):
        out[0] = 1
        raise KeyboardInterrupt
    before = set((setting('cache')/'strips').glob('*'))
    (tmp_path/'a').touch()
    with pytest.raises(KeyboardInterrupt): pixels_of([tmp_path/'a'], ['x'], fill, SHAPE)
    assert set((setting('cache')/'strips').glob('*'))==before

def test_memory(tmp_path):
    "5,000 pictures of one row group, 162 MB: under 120 MB more than the process held"
    script,file = Path(__file__).parent/'benchmarks/parquet.py',tmp_path/'a.parquet'
    for o in ('write', file, '5000'),('convert', file):
        out = subprocess.run([sys.executable, script, *o], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert 1e6<float(out.split()[-2])<120e6, out

# --- reading

@pytest.fixture
def files(tmp_path):
    "Twelve small strips in two parquet files, six test strips"
    at = tmp_path/'bengali'
    draw_csv(at)
    for i in 0,1: write_strips(at/f'train_image_data_{i}.parquet', ids_of(6, 6*i), noise(12)[6*i:6*i+6])
    write_strips(at/'test_image_data_0.parquet', ids_of(6, split='Test'), noise(6, seed=1))
    return at

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    at = tmp_path_factory.mktemp('drawn')
    draw_bengali(at, 60, 12)
    return at

def draw_csv(at):
    "The CSV files of `files`"
    at.mkdir()
    y = np.array([[i%4,i%3,i%2] for i in range(12)])
    pd.DataFrame(dict(image_id=ids_of(12), **dict(zip(HEADS, y.T)), grapheme=[f'g{i%4}' for i in range(12)])).to_csv(at/'train.csv', index=False)
    cls = [(h,i,f'{h[0]}{i}') for h,k in zip(HEADS, (4,3,2)) for i in reversed(range(k))]
    pd.DataFrame(cls, columns=['component_type','label','component']).to_csv(at/'class_map.csv', index=False)
    asked = [(f'{i}_{h}',i,h) for i in ids_of(6, split='Test') for h in sorted(HEADS)]
    df = pd.DataFrame(asked, columns=['row_id','image_id','component'])
    df.to_csv(at/'test.csv', index=False)
    df[['row_id']].assign(target=0).to_csv(at/'sample_submission.csv', index=False)

def edit(f, **cells):
    "Change fields of a CSV file: column -> {row: value}"
    df = rows(f)
    for col,new in cells.items():
        for i,v in new.items(): df.loc[i, col] = v
    df.to_csv(f, index=False)

def read(files, **kwargs): return read_graphemes(files, shape=SHAPE, **kwargs)

def refused(files, **kwargs):
    with pytest.raises(BadInput) as e: read(files, **kwargs)
    return str(e.value),{o.kind:o for o in e.value.problems}

def pictures(df):
    "The pictures of a frame, in its order"
    pics = Arrays(list(df.path), list(df.row))
    return np.stack([pics[i][...,0] for i in range(len(pics))])

def same(table):
    "Whether ids, labels and pictures of `files` belong together"
    assert table.train.id.tolist()==ids_of(12) and table.test.id.tolist()==ids_of(6, split='Test')
    assert np.array_equal(pictures(table.train), 255-noise(12))
    assert np.array_equal(pictures(table.test), 255-noise(6, seed=1))
    assert np.array_equal(table.y, [[i%4,i%3,i%2] for i in range(12)])

def test_good(files):
    t = read(files)
    same(t)
    assert t.vocab==[['0','1','2','3'],['0','1','2'],['0','1']] and t.names[0]==['g0','g1','g2','g3'] and not t.said
    assert t.train.grapheme.tolist()==[f'g{i%4}' for i in range(12)]

def test_any_order(files):
    "Rows of train.csv in another order than the pictures keep theirs"
    rows(files/'train.csv').sample(frac=1, random_state=1).to_csv(files/'train.csv', index=False)
    t = read(files)
    for i,k in enumerate(int(o[6:]) for o in t.train.id):
        assert np.array_equal(pictures(t.train)[i], 255-noise(12)[k])
        assert t.y[i].tolist()==[k%4,k%3,k%2] and t.train.grapheme[i]==f'g{k%4}'

def to_pngs(files):
    for split,pics in ('train',noise(12)),('test',noise(6, seed=1)):
        (files/split).mkdir()
        for i,o in enumerate(pics): cv2.imwrite(str(files/split/f'{split.title()}_{i}.png'), o)
    for o in files.glob('*.parquet'): o.unlink()

def test_pngs(files):
    to_pngs(files)
    same(read(files))

def test_array(files):
    np.save(files/'train_images.npy', noise(12))
    np.save(files/'test_images.npy', noise(6, seed=1))
    for o in files.glob('*.parquet'): o.unlink()
    same(read(files))
    np.save(files/'train_images.npy', noise(11))
    np.save(files/'test_images.npy', noise(6).astype(np.float32))
    msg,found = refused(files)
    assert 'train_images.npy: 1 array not as needed (uint8 (11, 6, 9)): uint8 (12, 6, 9) is needed, in the order of the ids' in msg
    assert 'test_images.npy: 1 array not as needed (float32' in msg

def test_bad_pngs(files):
    "Missing, broken and of another size; the first two can be left out"
    to_pngs(files)
    (files/'train/Train_3.png').unlink()
    (files/'train/Train_5.png').write_bytes(b'no picture')
    t = read(files, skip_bad=True)
    left = [i for i in range(12) if i not in (3,5)]
    assert t.train.id.tolist()==[f'Train_{i}' for i in left] and '2 of 12 pictures left out' in t.said[0]
    assert np.array_equal(pictures(t.train), 255-noise(12)[left])
    assert t.train.grapheme.tolist()==[f'g{i%4}' for i in left] and t.y[3].tolist()==[0,1,0]
    cv2.imwrite(str(files/'train/Train_7.png'), np.zeros((9,6), np.uint8))
    msg,found = refused(files)
    assert found['no_picture'].examples==['Train_3'] and 'Train_5.png' in msg
    assert 'train/: 1 picture of another size (Train_7.png: 9 x 6): resize them to 6 x 9 (height x width)' in msg

# --- what is refused

def rewrite(file, **changes):
    "A parquet file with columns dropped (`None`) or changed"
    t = parquet.read_table(file)
    for k,v in changes.items():
        k = k.removeprefix('c')
        t = t.drop_columns([k]) if k in t.column_names else t
        t = t if v is None else t.append_column(k, pyarrow.array(v))
    parquet.write_table(t, file)

def test_no_id_column(files):
    rewrite(files/'train_image_data_1.parquet', image_id=None)
    msg,found = refused(files)
    assert 'train_image_data_1.parquet: 1 column missing (image_id): a picture of 6 x 9 is image_id and columns 0 to 53' in msg
    assert list(found)==['missing_column']   # its pictures are not said to be missing, too

def test_wrong_columns(files):
    rewrite(files/'train_image_data_0.parquet', c53=None, c7=[300]*6)
    rewrite(files/'test_image_data_0.parquet', c54=np.zeros(6, np.uint8))
    msg,found = refused(files)
    assert found['missing_column'].examples==['53'] and 'train_image_data_0.parquet: 1 column missing (53)' in msg
    assert found['extra_column'].examples==['54'] and 'test_image_data_0.parquet: 1 column too many (54)' in msg
    assert found['not_uint8'].examples==['7: int64'] and msg.startswith('bengali: 3 problems in the files')
    assert '1,032' not in msg and len(msg.splitlines())==4

def test_unreadable(files):
    f = files/'train_image_data_0.parquet'
    f.write_bytes(f.read_bytes()[:-100])
    msg,found = refused(files)
    assert list(found)==['unreadable_file'] and 'train_image_data_0.parquet: 1 file unreadable' in msg

def test_ids_apart(files):
    "Ids missing on either side; with `skip_bad` the rows without a picture are left out"
    edit(files/'train.csv', image_id={4:'Train_99'})
    msg,found = refused(files)
    assert found['no_picture'].examples==['Train_99'] and found['no_row'].examples==['Train_4']
    assert 'train.csv: 1 id without a picture in train_image_data_*.parquet (Train_99): unpack all files or drop the rows' in msg
    assert 'train_image_data_*.parquet: 1 id not in train.csv (Train_4)' in msg
    write_strips(files/'train_image_data_0.parquet', [*ids_of(4),'Train_5'], noise(12)[[0,1,2,3,5]])
    t = read(files, skip_bad=True)
    assert len(t)==11 and t.said==['train.csv: 1 of 12 pictures left out (first: Train_99)']
    assert np.array_equal(pictures(t.train)[4], 255-noise(12)[5]) and t.y[4].tolist()==[1,2,1]

def test_test_apart(files):
    "A test picture that is not asked for, one asked for that is not there, rows of one head missing"
    write_strips(files/'test_image_data_0.parquet', [*ids_of(5, split='Test'),'Test_9'], noise(6))
    edit(files/'test.csv', row_id={2:'Test_0_vowel'})
    rows(files/'sample_submission.csv')[:-1].to_csv(files/'sample_submission.csv', index=False)
    kinds = {(o.kind,o.where,*o.examples) for o in pytest.raises(BadInput, read, files).value.problems}
    v = 'Test_0_vowel_diacritic'
    assert kinds=={('no_picture','test.csv','Test_5'), ('no_row','test_image_data_*.parquet','Test_9'), ('no_row','test.csv',v),
        ('bad_row','test.csv','Test_0_vowel'), ('not_there','sample_submission.csv',v),
        ('not_asked','test.csv','Test_0_vowel','Test_5_vowel_diacritic')}

def test_same_ids(files):
    "Twice in train.csv, twice in the pictures, in train and test"
    edit(files/'train.csv', image_id={1:'Train_0', 2:'Test_0'})
    write_strips(files/'train_image_data_1.parquet', ['Train_3',*ids_of(5, 7)], noise(6))
    problems = pytest.raises(BadInput, read, files).value.problems
    twice = {o.where:o.examples for o in problems if o.kind=='same_id'}
    assert twice=={'train.csv':['Train_0'], 'train_image_data_*.parquet':['Train_3']}
    assert [o.examples for o in problems if o.kind=='train_in_test']==[['Test_0']]

def test_labels(files):
    edit(files/'train.csv', grapheme_root={2:'168'}, consonant_diacritic={3:'', 4:'x'})
    msg,found = refused(files)
    assert "train.csv: 1 label of grapheme_root not in class_map.csv ('168' in row 3): correct the rows or the class map" in msg
    assert found['unknown_label'].examples==["'' in row 4","'x' in row 5"]

def test_class_map(files):
    df = rows(files/'class_map.csv')
    df.loc[(df.component_type=='vowel_diacritic')&(df.label=='2'), 'label'] = '5'
    df[df.component_type!='consonant_diacritic'].to_csv(files/'class_map.csv', index=False)
    msg,found = refused(files)
    assert 'class_map.csv: 1 label of vowel_diacritic not one of 0 to 2, or there twice (5)' in msg
    assert found['no_class'].examples==['consonant_diacritic']

def test_missing(files):
    (files/'class_map.csv').unlink()
    msg,found = refused(files)
    assert found['missing_file'].examples==['class_map.csv']

def test_no_pictures(files):
    for o in files.glob('test*.parquet'): o.unlink()
    assert 'test_image_data_*.parquet, test_images.npy or folder test' in refused(files)[0]

# --- writing, the sample

def test_write():
    got = write_graphemes(['Test_0','Test_1'], np.array([[93,5,2],[167,10,6]]))
    assert got.row_id.tolist()==[f'Test_{i}_{h}' for i in (0,1) for h in ('consonant_diacritic','grapheme_root','vowel_diacritic')]
    assert got.target.tolist()==[2,93,5,6,167,10]

def test_drawn(drawn):
    "The sample is in the competition's format, answers and labels belong to its pictures"
    t,answers = read_graphemes(drawn),rows(drawn/'answers.csv')
    assert [len(o) for o in t.vocab]==[168,11,7] and t.y.shape==(60,3) and t.test.id.tolist()==answers.image_id.tolist()
    assert 'have no training picture' in t.said[0]
    got = write_graphemes(t.test.id, answers[list(HEADS)].astype(int).to_numpy())
    assert got.row_id.tolist()==t.sample.row_id.tolist()==rows(drawn/'test.csv').row_id.tolist()
    assert list(rows(drawn/'train.csv'))==list(answers)==['image_id',*HEADS,'grapheme']
    pics = np.load(t.train.path[0])
    assert pics.shape==(60,137,236) and np.median(pics)<12 and pics.max()>180   # ink is light on dark

def test_held_out():
    "Some graphemes are in the test set alone, but no class is"
    train,test = (bengali_labels(np.random.RandomState(0), 5000, o) for o in (False,True))
    new = set(map(tuple, test))-set(map(tuple, train))
    assert len(new)==15 and [len(np.unique(o)) for o in train.T]==[8,4,3]

def test_same_drawing(drawn, tmp_path):
    "The same bytes whatever the global generator says"
    np.random.seed(5)
    draw_bengali(tmp_path/'a', 60, 12)
    for o in drawn.glob('*'): assert (tmp_path/'a'/o.name).read_bytes()==o.read_bytes(), o.name

def test_parts_differ():
    "Two parts of a kind differ in far more pixels than two hands that write the same do after alignment"
    def one(*y):
        rng = np.random.RandomState(0)   # the same hand
        return bengali_picture(rng, *y)<128
    for h,n in enumerate((8,4,3)):
        pics = [one(*(i if k==h else 1 for k in range(3))) for i in range(n)]
        assert min((a^b).sum() for i,a in enumerate(pics) for b in pics[:i])>150

# --- folds

def made(n=600, sizes=(12,4,3), rare=True):
    rng = np.random.RandomState(0)
    y = np.stack([rng.randint(0, k-(rare and not i), n) for i,k in enumerate(sizes)], 1)
    if rare: y[0,0] = sizes[0]-1
    df = pd.DataFrame(dict(id=[str(i) for i in range(n)], path='', grapheme=['-'.join(map(str, o)) for o in y]))
    return Table(df, df[:0], y, [[str(i) for i in range(k)] for k in sizes])

def test_one_picture_five_folds():
    "A class with one picture breaks no split; where graphemes are held out it is always trained on"
    t = made()
    assert np.array_equal(np.unique(stratified_folds(t, 5)), range(5))
    folds = assign_folds(t, partial(unseen_graphemes, n=5, held=20))
    assert folds[0]==-1 and (folds==-1).sum()<5

@pytest.mark.parametrize('seed', range(4))
def test_unseen(seed):
    "Held graphemes are new to the training of their fold, and every class is in training in each"
    t = made()
    folds = assign_folds(t, partial(unseen_graphemes, n=5, held=20), seed=seed)
    y,n,held = one_hot(t).toarray(),[],set()
    for f in range(5):
        train,valid = fold_rows(folds, f)
        assert (y[train].sum(0)>0).all()
        new = set(t.train.grapheme[valid])-set(t.train.grapheme[train])
        assert np.array_equal(is_unseen(t, folds)[valid], t.train.grapheme[valid].isin(new))
        n,held = [*n,len(new)],held|new
    assert min(n)>=4 and len(held)>=20   # 20 in turn; a rare grapheme may be new by chance
    assert not np.array_equal(folds, assign_folds(t, partial(unseen_graphemes, n=5, held=20), seed=seed+9))
    assert np.array_equal(folds, assign_folds(t, partial(unseen_graphemes, n=5, held=20), seed=seed))

def test_unseen_impossible():
    t = made()
    with pytest.raises(ValueError, match=r'200 of \d+ graphemes can not be held out.*Give held=(\d+) or fewer') as e: unseen_graphemes(t)
    most = int(str(e.value).split('held=')[1].split()[0])
    folds = unseen_graphemes(t, held=most)
    assert all((one_hot(t)[folds!=f].sum(0)>0).all() for f in range(5))
    del t.train['grapheme']
    with pytest.raises(ValueError, match='no column grapheme'): unseen_graphemes(t)
