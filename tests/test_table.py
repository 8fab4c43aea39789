"Files of a competition: everything that is wrong with them is said at once, and what is right is read right"
import time
from pathlib import Path
import cv2, numpy as np, pandas as pd, pytest
from scipy import sparse
from sklearn.preprocessing import MultiLabelBinarizer
from recipes.data.checks import BadInput, Problems
from recipes.data.fixtures import draw_imet
from recipes.data.table import Table, labels_to_csr

def _read(d):
    "A reader as the tasks have them"
    p = Problems('imet')
    p.need_files(d, ['train.csv','labels.csv','sample_submission.csv','train','test'])
    train,labels,sample = (p.read_csv(d/f'{o}.csv', c) for o,c in dict(
        train=['id','attribute_ids'], labels=['attribute_id','attribute_name'], sample_submission=['id','attribute_ids']).items())
    for df,o in (train,'train.csv'),(sample,'sample_submission.csv'): p.check_ids(df.id, o)
    p.check_apart(train.id, sample.id)
    p.check_same([o.stem for o in (d/'test').glob('*.png')], 'test/', sample.id)
    y = labels_to_csr(train.attribute_ids, labels.attribute_id.tolist(), p)
    p.check_pictures([d/'train'/f'{o}.png' for o in train.id], train.id, 'train.csv')
    p.stop()
    return Table(train, sample[['id']], y, labels.attribute_id.tolist(), labels.attribute_name.tolist(), path=d).say_empty()

@pytest.fixture
def folder(tmp_path):
    draw_imet(tmp_path, 40, n_test=10)
    return tmp_path

def _kinds(d):
    with pytest.raises(BadInput) as e: _read(d)
    return {o.kind:o for o in e.value.problems},str(e.value)

def test_good(folder):
    "What is drawn is read, without a complaint"
    table = _read(folder)
    assert len(table)==40 and table.y.shape==(40,30) and table.said==[]
    assert table.y.dtype==np.float32 and sparse.issparse(table.y)

def test_all_at_once(folder):
    "Everything that is wrong is in one message, with counts and examples"
    df = pd.read_csv(folder/'train.csv', dtype=str)
    sample = pd.read_csv(folder/'sample_submission.csv', dtype=str)
    ids = df.id.tolist()
    (folder/'train'/f'{ids[0]}.png').unlink()
    (folder/'train'/f'{ids[1]}.png').write_bytes(b'')
    (folder/'train'/f'{ids[2]}.png').write_text('no picture')
    df.loc[3,'attribute_ids'],df.loc[4,'attribute_ids'],df.loc[5,'attribute_ids'] = '1 99','','nan'
    extra = pd.DataFrame(dict(id=[ids[6],'','../x','../x',sample.id[0]], attribute_ids='1'))
    pd.concat([df,extra]).to_csv(folder/'train.csv', index=False)
    sample.iloc[1:].to_csv(folder/'sample_submission.csv', index=False)
    probs,msg = _kinds(folder)
    n = {k:len(o.examples) for k,o in probs.items()}
    assert n['unknown_label']==2 and probs['unknown_label'].examples==['99','nan']
    assert n['no_label']==1 and n['no_id']==1 and n['same_id']==2 and n['id_leaves']==2
    assert n['bad_picture']==2 and ids[0] in probs['no_picture'].examples
    assert probs['not_asked'].examples==[sample.id[0]] and 'not_there' not in n
    assert f'test/: 1 id not in sample_submission.csv ({sample.id[0]})' in msg
    assert 'train.csv: 1 row without a label (row 5): label them or drop the rows' in msg
    assert f'{ids[1]}.png: ' in msg and msg.startswith('imet: ')

def test_missing_picture(folder):
    "The message says where, how many, which, and what to do"
    ids = pd.read_csv(folder/'train.csv').id.tolist()
    for o in ids[:4]: (folder/'train'/f'{o}.png').unlink()
    first = ', '.join(ids[:3])
    assert f'train.csv: 4 ids without a picture in train/ (first: {first}): put them there or drop the rows' in _kinds(folder)[1]

def test_missing_files(tmp_path):
    "An empty folder is one problem, not a cascade"
    probs,msg = _kinds(tmp_path)
    assert list(probs)==['missing_file'] and '5 files missing (first: train.csv, labels.csv, sample_submission.csv)' in msg

def test_missing_column(folder):
    "A missing column is said with those that are there, and without what would follow from it"
    pd.read_csv(folder/'labels.csv').rename(columns=dict(attribute_id='id')).to_csv(folder/'labels.csv', index=False)
    probs,msg = _kinds(folder)
    assert list(probs)==['missing_column']
    assert 'labels.csv: 1 column missing (attribute_id): it has id, attribute_name' in msg

def test_train_in_test(folder):
    sample = pd.read_csv(folder/'sample_submission.csv')
    train = pd.read_csv(folder/'train.csv')
    train.loc[0,'id'] = sample.id[0]
    train.to_csv(folder/'train.csv', index=False)
    probs,_ = _kinds(folder)
    assert probs['train_in_test'].examples==[sample.id[0]]

def test_empty_class(folder):
    "A class without a training picture is allowed and said"
    with (folder/'labels.csv').open('a') as f: f.write('30,tag::nothing\n')
    assert _read(folder).said==['class tag::nothing has no training picture']
    with (folder/'labels.csv').open('a') as f: f.write('31,a\n32,b\n33,c\n')
    assert _read(folder).said==['4 classes (tag::nothing, a, b, ...) have no training picture']

@pytest.mark.parametrize('id', ['../x','a/../../x','/etc/x','..\\x','C:\\x','~/x','..','a\x00b'])
def test_id_leaves(id):
    p = Problems('x')
    p.check_ids(pd.Series([id]), 'train.csv')
    assert [o.kind for o in p.found]==['id_leaves']

@pytest.mark.parametrize('id', ['a','a/b','a..b','NA','nan','007','..a','w_1.jpg','é'])
def test_id_stays(id):
    p = Problems('x')
    p.check_ids(pd.Series([id]), 'train.csv')
    assert not p.found

@pytest.mark.parametrize('ids', [['a',None],['a',float('nan')],['a',' ']])
def test_no_id(ids):
    p = Problems('x')
    p.check_ids(pd.Series(ids, dtype=object), 'train.csv')
    assert [(o.kind,o.examples) for o in p.found]==[('no_id',['row 2'])]

@pytest.mark.parametrize('data', [
    b'id,n\nNA,007\n1e5,\n', b'\xef\xbb\xbfid,n\r\nNA,007\r\n1e5,\r\n', b'id,n\nNA,007\n1e5\n', b'"id","n"\n"NA","007"\n"1e5",""'])
def test_read_csv(tmp_path, data):
    "Ids stay as they are; byte order mark, line ends, quotes and short rows do no harm"
    p,f = Problems('x'),tmp_path/'a.csv'
    f.write_bytes(data)
    df = p.read_csv(f, ['id','n'])
    assert not p.found and df.to_dict('list')==dict(id=['NA','1e5'], n=['007',''])

@pytest.mark.parametrize('data', [b'', b'id,n\n1,2,3\n', b'id,n\n1,2\n1,2,3\n', b'\x89PNG\r\n\x1a\n\x00\xff\xfe', b'id,n\n"1,2\n'])
def test_unreadable_csv(tmp_path, data):
    "A file that is no table is a problem, and gives an empty frame to go on with"
    p,f = Problems('x'),tmp_path/'a.csv'
    f.write_bytes(data)
    df = p.read_csv(f, ['id','n'])
    assert len(p.found)==1 and p.found[0].where=='a.csv' and len(df)==0 and list(df)==['id','n']

def test_read_csv_no_header(tmp_path):
    (tmp_path/'a.csv').write_text('x,/m/a /m/b\ny,\n')
    df = Problems('x').read_csv(tmp_path/'a.csv', ['id','labels'], header=False)
    assert df.to_dict('list')==dict(id=['x','y'], labels=['/m/a /m/b',''])

def test_numbers():
    p = Problems('x')
    x = p.numbers(pd.Series(['1','-1','inf','','x','2.5'], name='x0'), 'boxes.csv', low=0, high=2)
    assert len(p.found[0].examples)==5 and x[0]==1
    assert str(p.found[0]).startswith("boxes.csv: 5 fields of x0 not a number from 0 to 2 (first: '-1' in row 2")

@pytest.mark.parametrize('mode', ['16 bit','alpha','one wide'])
def test_odd_pictures(tmp_path, mode):
    "Pictures that are odd but fine are no problem"
    img = {'16 bit':np.zeros((9,9), np.uint16), 'alpha':np.zeros((9,9,4), np.uint8), 'one wide':np.zeros((9,1,3), np.uint8)}[mode]
    cv2.imwrite(str(tmp_path/'a.png'), img)
    p = Problems('x')
    assert p.check_pictures([tmp_path/'a.png'], ['a'], 'train.csv').width.tolist()==[img.shape[1]] and not p.found

def test_no_pictures():
    p = Problems('x')
    assert len(p.check_pictures([], [], 'train.csv'))==0 and not p.found

@pytest.mark.parametrize('n', [1103,30])
def test_labels(n):
    "As scikit-learn has it, with columns in the order of the vocab (not of the strings)"
    rng = np.random.RandomState(0)
    rows = [rng.permutation(n)[:k].astype(str).tolist() for k in rng.randint(1, 6, 200)]
    vocab = [str(i) for i in range(n)]
    p = Problems('x')
    y = labels_to_csr(pd.Series([' '.join(o) for o in rows], index=range(5, 205)), vocab, p)
    assert (y.toarray()==MultiLabelBinarizer(classes=vocab).fit_transform(rows)).all()
    assert not p.found and y[0].indices.tolist()==sorted(map(int, rows[0]))

def test_labels_twice():
    "A label twice, odd spaces and rows without any"
    p = Problems('x')
    y = labels_to_csr(pd.Series([' b  a b ','','\ta']), ['a','b'], p, empty=True)
    assert y.toarray().tolist()==[[1,1],[0,0],[1,0]] and not p.found

def test_labels_fast():
    "As many rows as iMet has, in seconds"
    rng = np.random.RandomState(0)
    rows = pd.Series([' '.join(map(str, o)) for o in rng.randint(0, 1103, (110_000,3))])
    start = time.time()
    y = labels_to_csr(rows, [str(i) for i in range(1103)], Problems('x'))
    assert time.time()-start<10 and y.shape==(110_000,1103)

def _frame(n): return pd.DataFrame(dict(id=[f'{i:02}' for i in range(n)], path=[Path(f'{i}.png') for i in range(n)]))

def test_heads():
    "Several heads, and one with an index that is no class"
    heads = Table(_frame(3), _frame(1), np.array([[0,1],[0,0],[1,2]]), [['a','b'],['x','y','z']])
    assert heads.is_multi and heads.label_counts()['count'].tolist()==[2,1,1,1,1]
    whale = Table(_frame(4), _frame(1), np.array([0,2,1,2]), ['a','b'])
    assert not whale.is_multi and whale.label_counts()['count'].tolist()==[1,1] and '2 classes' in repr(whale)

def test_subset():
    "Rows, truth and mask stay together, and the table itself stays as it was"
    y = sparse.csr_matrix(np.eye(4, dtype=np.float32))
    table = Table(_frame(4), _frame(2), y, list('abcd'), mask=y.astype(bool), said=['x'])
    for keep in [3,1],np.array([3,1]):
        sub = table.subset(keep)
        assert sub.train.id.tolist()==['03','01'] and sub.train.index.tolist()==[0,1]
        assert sub.y.toarray().argmax(1).tolist()==[3,1] and sub.mask.toarray().argmax(1).tolist()==[3,1]
    assert len(table.subset([False,True,False,False]))==1 and len(table.subset([]))==0
    table.subset([0]).say_empty()
    assert len(table)==4 and table.said==['x']

def test_repr(folder):
    lines = repr(_read(folder)).split('\n')
    assert lines[0].endswith(': 40 train, 10 test, 30 classes') and len(lines)==3
