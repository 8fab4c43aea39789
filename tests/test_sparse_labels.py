"Label files against a slow loop over their rows, in parts of any size, and whatever is wrong with them in one line each"
import csv
import numpy as np, pandas as pd, pytest
from recipes.data import label_files, sparse_labels
from recipes.data.label_files import label_parts
from recipes.data.sparse_labels import Problems, label_strings, merge_labels
from scipy import sparse

CODES = ['/m/a','/m/b','/m/c','/m/d','/m/spare']   # four classes and one that is none

def write(f, rows, source='v'):
    with open(f, 'w', newline='') as o: csv.writer(o).writerows([('ImageID','Source','LabelName','Confidence'), *((i,source,l,c) for i,l,c in rows)])

def rows(rng, n, pictures, conf): return [(f'{rng.integers(pictures):04x}', CODES[rng.integers(5)], rng.choice(conf)) for _ in range(n)]

@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path/'human.csv', rows(rng, 300, 60, ['0','1']))
    write(tmp_path/'machine.csv', rows(rng, 900, 80, ['0.5','0.62','0.7','1.0','1','0']), 'm')
    return tmp_path

def read(at, codes=CODES, n=4):
    problems = Problems('test')
    return problems.read_sparse(at/'human.csv', at/'machine.csv', pd.Index(codes), n),problems

def slow(at, n=4):
    "Row by row: ids, truth and mask as dicts"
    ids,people,machines = [],{},{}
    for name,into in ('human',people),('machine',machines):
        for r in csv.DictReader(open(at/f'{name}.csv')):
            if r['ImageID'] not in ids: ids.append(r['ImageID'])
            if (c := CODES.index(r['LabelName']))>=n: continue
            key = r['ImageID'],c
            into[key] = max(into.get(key, 0), float(r['Confidence']))
    return ids,machines|people,people

def test_slow_loop(files):
    labels,problems = read(files)
    ids,truth,people = slow(files)
    y,mask = np.zeros((len(ids),4), np.float32),np.zeros((len(ids),4), bool)
    for (i,c),v in truth.items(): y[ids.index(i),c] = v
    for i,c in people: mask[ids.index(i),c] = True
    assert labels.ids==ids and not problems.found
    assert (labels.y.toarray()==y).all() and (labels.mask.toarray()==mask).all()
    assert labels.y.dtype==np.float32 and labels.mask.dtype==bool
    assert labels.y.data.all() and labels.y.has_canonical_format and set(labels.y.data)=={*np.float32([.5,.62,.7,1])}

@pytest.mark.parametrize('size', [100,1000])
def test_parts(files, monkeypatch, size):
    "The size of a part does not matter, and pictures go on from one to the next"
    whole,_ = read(files)
    monkeypatch.setattr(label_files, 'label_parts', lambda f: label_parts(f, size))
    assert len(list(label_files.label_parts(files/'machine.csv')))>5
    monkeypatch.setattr(sparse_labels, 'setting', lambda _: files/'other')
    parts,_ = read(files)
    assert parts.ids==whole.ids and (parts.y!=whole.y).nnz==0 and (parts.mask!=whole.mask).nnz==0

def test_spare_is_said(files):
    _,problems = read(files)
    n = [sum(r['LabelName']=='/m/spare' for r in csv.DictReader(open(files/f'{o}.csv'))) for o in ('human','machine')]
    assert problems.said==[f'{o}.csv: {k} of {m} rows have a label that is no class: left out' for o,k,m in zip(('human','machine'), n, (300,900))]

def test_kept(files, monkeypatch):
    "The second time nothing is read; a file that changed is"
    first,p = read(files)
    monkeypatch.setattr(label_files, 'label_parts', lambda f: 1/0)
    again,q = read(files)
    assert again.ids==first.ids and all(type(o) is str for o in again.ids) and p.said==q.said
    assert (again.y!=first.y).nnz==0 and (again.mask!=first.mask).nnz==0 and again.y.dtype==np.float32 and again.mask.dtype==bool
    write(files/'human.csv', [('0001','/m/a','1')])
    with pytest.raises(ZeroDivisionError): read(files)

def test_other_classes(files):
    "The number of classes is part of the key"
    assert read(files)[0].y.shape[1]==4 and read(files, n=5)[0].y.shape[1]==5

def problems_of(at):
    _,p = read(at)
    return {(o.where,o.kind):o for o in p.found},p

def test_wrong_values(files):
    "Each value once, with how often and where first"
    write(files/'human.csv', [('0001','/m/a','1'), ('0002','/m/a','0.5'), ('0003','/m/x','1'), ('','/m/a','1'), ('0004','/m/x','0')])
    write(files/'machine.csv', [('0001','/m/a','1.5'), ('0002','/m/a','-0.1'), ('0003','/m/b','nan'), ('0004','/m/b','high'), ('0005','/m/b','1.5'), ('6','/m/b','')])
    got,p = problems_of(files)
    assert [str(o) for o in p.found]==[
        'human.csv: 1 id that is empty (\'\' (1 row, first 4)): fill them in or drop the rows',
        "human.csv: 1 label not in the vocab ('/m/x' (2 rows, first 3)): correct the rows or the vocab",
        "human.csv: 1 confidence not 0 or 1 ('0.5' (1 row, first 2)): correct them",
        "machine.csv: 5 confidences not from 0 to 1 (first: '1.5' (2 rows, first 1), '-0.1' (1 row, first 2), 'nan' (1 row, first 3)): correct them"]
    write(files/'human.csv', [('0001','/m/a','1')])
    assert read(files)[1].found   # what was wrong is not kept

def test_many_wrong(files):
    "A spoilt column of many rows is one short line"
    write(files/'human.csv', [(f'{i}','/m/a','yes') for i in range(20_000)])
    got,_ = problems_of(files)
    assert str(got['human.csv','no_number'])=="human.csv: 1 confidence not 0 or 1 ('yes' (20,000 rows, first 1)): correct them"

def test_broken_files(files):
    (files/'human.csv').write_text('ImageID,Source,LabelName\na,v,/m/a\n')
    (files/'machine.csv').write_text('ImageID,Source,LabelName,Confidence\na,v,/m/a,1\nb,v\n')
    got,_ = problems_of(files)
    assert got['human.csv','missing_column'].examples==['Confidence']
    assert 'got 2' in got['machine.csv','unreadable_file'].examples[0]
    (files/'human.csv').write_text('')
    assert ('human.csv','unreadable_file') in problems_of(files)[0]

def test_columns_in_any_order(files):
    "More columns, in another order, with a byte order mark and quotes"
    want,_ = read(files)
    for o in 'human','machine':
        df = pd.read_csv(files/f'{o}.csv', dtype=str).assign(IsOccluded='0')
        df[['Confidence','IsOccluded','LabelName','ImageID']].to_csv(files/f'{o}.csv', index=False, encoding='utf-8-sig', quoting=csv.QUOTE_ALL)
    got,p = read(files)
    assert not p.found and got.ids==want.ids and (got.y!=want.y).nnz==0

def test_no_rows(files):
    "Only one of the two files has rows, or neither"
    write(files/'human.csv', [])
    labels,p = read(files)
    assert not p.found and labels.mask.nnz==0 and labels.y.nnz>0
    write(files/'machine.csv', [])
    labels,p = read(files)
    assert labels.y.shape==(0,4) and not labels.ids

def entries(*rows): return tuple(np.array(o, t) for o,t in zip(zip(*rows) if rows else ((),(),()), ('i4','i4','f4')))

def test_people_win():
    "A no takes the machine's label away, a yes makes it certain; of people who disagree, yes"
    human = entries((0,0,0), (0,1,1), (1,2,0), (1,2,1), (2,2,0))
    machine = entries((0,0,.9), (0,1,.6), (0,2,.7), (0,2,.5), (1,0,0))
    y,mask = merge_labels(human, machine, (4,3))
    assert np.allclose(y.toarray(), [[0,1,.7],[0,0,1],[0,0,0],[0,0,0]])
    assert mask.toarray().astype(int).tolist()==[[1,1,0],[0,0,1],[0,0,1],[0,0,0]]

def test_large_keys():
    "Rows times classes beyond 32 bits"
    y,_ = merge_labels(entries((1_742_000,7177,1)), entries((1_742_000,7176,.5), (0,0,.25)), (1_743_042,7178))
    assert y[1_742_000,7177]==1 and y[1_742_000,7176]==.5 and y[0,0]==.25 and y.nnz==3

def test_label_strings():
    y = sparse.csr_matrix(np.array([[1,0,1],[0,0,0],[0,1,0]], bool))
    assert label_strings(y, ['a','b','c'])==['a c','','b']
    assert label_strings(y[:0], ['a','b','c'])==[]
