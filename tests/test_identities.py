"Whale files: the format, the table, and everything wrong with them in one message"
import shutil
import cv2, numpy as np, pandas as pd, pytest, torch
from recipes.data import fixtures
from recipes.data.augment import none, squish
from recipes.data.boxes import boxed
from recipes.data.checks import BadInput
from recipes.data.draw_whales import draw_fluke, draw_whale, fluke_picture, on_fluke
from recipes.data.fixtures import sample
from recipes.data.groups import identity_items
from recipes.data.identities import BOX, clip_boxes, read_identities, whales, write_identities
from recipes.data.loaders import Files, Items
from recipes.data.rle import RLE_SIZE, DropMask, Masked, rle_decode, rle_encode
from recipes.data.same_ids import merge_ids
from recipes.data.table import Table
from recipes.data.targets import Identity
from recipes.data.twins import either_side, twin_rows

def rows(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    at = tmp_path_factory.mktemp('whale')
    draw_whale(at, 80, n_test=10)
    return at

@pytest.fixture
def files(drawn, tmp_path): return shutil.copytree(drawn, tmp_path/'whale')

@pytest.fixture(scope='module')
def table(drawn): return read_identities(drawn)

def edit(f, **cells):
    "Change fields of a CSV file: column -> {row: value}"
    df = rows(f)
    for col,new in cells.items():
        for i,v in new.items(): df.loc[i, col] = v
    df.to_csv(f, index=False)
    return df

def kinds(at, **kw):
    "What is wrong with the files: kind -> (where, examples)"
    with pytest.raises(BadInput) as e: read_identities(at, **kw)
    return {o.kind:(o.where,o.examples) for o in e.value.problems}

def test_sample(drawn, table):
    "The fixture is the competition's format, with the faults that are asked of it"
    assert {o.name for o in drawn.iterdir()} == {'train','test','train.csv','sample_submission.csv','answers.csv','bounding_boxes.csv',
        'masks.csv','landmarks.csv','duplicate_ids.csv','rotate.txt'}
    assert list(rows(drawn/'train.csv'))==['Image','Id'] and list(rows(drawn/'bounding_boxes.csv'))==['Image',*BOX]
    assert rows(drawn/'sample_submission.csv').Id.str.split().str.len().eq(5).all()
    n = np.bincount(table.y, minlength=len(table.vocab)+1)
    assert (n[:-1]==1).sum()>=5 and (n[:-1]>1).sum()>=15 and n[-1]>15 and n.min()>0
    hw = np.array([cv2.imread(o).shape[:2] for o in table.train.path])
    assert hw.min()>=64 and hw.max()<=160 and (table.train[['height','width']].to_numpy()==hw).all()

def test_sample_again(drawn, tmp_path):
    "The same seed draws the same files; another, others; and the sample is known by its task's name"
    draw_whale(tmp_path/'a', 80, n_test=10)
    draw_whale(tmp_path/'b', 80, n_test=10, seed=1)
    for o in drawn.rglob('*'):
        if o.is_file(): assert o.read_bytes()==(tmp_path/'a'/o.relative_to(drawn)).read_bytes()
    assert rows(drawn/'train.csv').Id.tolist()!=rows(tmp_path/'b'/'train.csv').Id.tolist()
    assert fixtures.DRAW['whale'] is draw_whale and (sample('whale', 80)/'masks.csv').is_file()

def test_flukes_are_not_symmetric():
    "A mirrored whale is another whale, by its spots alone too"
    y,x = np.mgrid[-.6:.7:60j,-1:1:101j]
    for s in range(50):
        one = on_fluke(draw_fluke(np.random.RandomState(s)), x, y)
        both = (one>0)&(one[:,::-1]>0)
        assert (one!=one[:,::-1])[both].mean()>.03

def test_marks_lie_on_the_fluke():
    "Landmarks, box and mask speak of the same place"
    for s in range(20):
        rng = np.random.RandomState(s)
        img,what,marks = fluke_picture(rng, draw_fluke(rng))
        x,y = marks[[1,3]].round().astype(int).T   # notch and base are never at the picture's edge
        near = np.stack([(what[b-3:b+4,a-3:a+4]>0).any() for a,b in zip(x, y)])
        assert near.all() and marks[0,0]<marks[1,0]<marks[2,0] and (what>0).sum()>200

def test_table(drawn, table):
    "Labels, unknowns and side files against a slow reading"
    train,boxes = rows(drawn/'train.csv'),rows(drawn/'bounding_boxes.csv').set_index('Image')
    assert table.vocab==sorted(set(train.Id)-{'new_whale'})
    assert [[*table.vocab,'new_whale'][o] for o in table.y]==train.Id.tolist()
    for df in table.train,table.test:
        for i in range(0, len(df), 7): assert df.loc[i, list(BOX)].tolist()==[float(o) for o in boxes.loc[df.id[i], list(BOX)]]
    assert table.train.id[table.train.turned].tolist()==[(drawn/'rotate.txt').read_text().strip()]
    mask = rows(drawn/'masks.csv').set_index('Image').rle_mask
    assert table.train['mask'].tolist()==mask[train.Image].tolist()
    assert any('new_whale' in o for o in table.said)

def test_boxes_hold_the_mask(table):
    "Where the mask is, the box is"
    for o in table.train.iloc[:15].itertuples():
        m = cv2.resize(rle_decode(o.mask).astype(np.uint8)*255, (o.width,o.height))>127
        y,x = np.nonzero(m)
        assert abs(np.array([x.min(),y.min(),x.max()+1,y.max()+1])-[o.x0,o.y0,o.x1,o.y1]).max()<=3

def test_plain_files(files):
    "Nothing but train, test and their lists: no boxes, no names of groups"
    for o in 'bounding_boxes.csv','masks.csv','landmarks.csv','duplicate_ids.csv','rotate.txt': (files/o).unlink()
    t = read_identities(files)
    assert list(t.train)==['id','path','width','height'] and t.names==t.vocab
    for df,file in (rows(files/'train.csv'),'train.csv'),(rows(files/'sample_submission.csv'),'sample_submission.csv'):
        df.rename(columns=dict(Image='file', Id='who')).replace('new_whale', 'nobody').to_csv(files/file, index=False)
    again = read_identities(files, id='file', label='who', unknown='nobody')
    assert (again.y==t.y).all() and again.vocab==t.vocab and list(write_identities(['a'], [[0]], again))==['file','who']

def test_missing_and_wide_boxes(files):
    "A picture without a box is its own box; a box beyond the picture is clipped"
    f = files/'bounding_boxes.csv'
    df = edit(f, x0={1:'-12.5'}, x1={1:'999'})
    df.drop(index=0).to_csv(f, index=False)
    edit(f, x0={0:'-12.5'}, x1={0:'999'})
    t = read_identities(files)
    both = pd.concat([t.train,t.test]).set_index('id')
    a,b = both.loc[df.Image[0]],both.loc[df.Image[1]]
    assert a[list(BOX)].tolist()==[0,0,a.width,a.height] and (b.x0,b.x1)==(0,b.width)
    assert any('bounding_boxes.csv: nothing for 1 of 90' in o for o in t.said)
    assert (clip_boxes(np.array([[-1.,-2,5,6]]), [4], [9])==[[0,0,4,6]]).all()

def test_all_at_once(files):
    "Faults in every file are in one message"
    train = edit(files/'train.csv', Id={0:'', 1:'w_1 w_2'}, Image={2:'gone.jpg'})
    edit(files/'train.csv', Image={4:train.Image[5]})
    edit(files/'bounding_boxes.csv', x0={0:'500', 1:'wide'})
    edit(files/'masks.csv', rle_mask={3:'5', 4:'73728 2'})
    edit(files/'landmarks.csv', left_x={6:'?'})
    edit(files/'duplicate_ids.csv', SubId={0:'w_nobody w_noone'})
    edit(files/'sample_submission.csv', Image={0:train.Image[9]})
    (files/'train'/train.Image[7]).write_bytes(b'')
    found = kinds(files)
    assert set(found)=={'no_label','two_labels','no_picture','same_id','train_in_test','empty_box','no_number','bad_mask','unknown_label','bad_picture'}
    assert found['two_labels']==('train.csv',['w_1 w_2']) and found['unknown_label'][1]==['w_nobody','w_noone']
    assert len(found['bad_mask'][1])==2

@pytest.mark.parametrize('spoil,kind', [
    (lambda at: (at/'train.csv').unlink(), 'missing_file'),
    (lambda at: edit(at/'train.csv', Image={0:'../x.jpg'}), 'id_leaves'),
    (lambda at: rows(at/'train.csv').assign(Id='new_whale').to_csv(at/'train.csv', index=False), 'no_ids'),
    (lambda at: rows(at/'bounding_boxes.csv').drop(columns='y1').to_csv(at/'bounding_boxes.csv', index=False), 'missing_column'),
    (lambda at: rows(at/'bounding_boxes.csv').assign(Image=lambda d: 'x'+d.Image).to_csv(at/'bounding_boxes.csv', index=False), 'no_match'),
    (lambda at: rows(at/'landmarks.csv').drop(columns='left_y').to_csv(at/'landmarks.csv', index=False), 'bad_column'),
    (lambda at: pd.concat([rows(at/'duplicate_ids.csv')]*2).to_csv(at/'duplicate_ids.csv', index=False), 'same_id'),
    (lambda at: pd.concat([rows(at/'masks.csv')]*2).to_csv(at/'masks.csv', index=False), 'same_id')])
def test_faults(files, spoil, kind):
    spoil(files)
    assert kind in kinds(files)

def test_skip_bad(files):
    "A picture that does not decode is left out with its box, and that is said"
    train = rows(files/'train.csv')
    (files/'train'/train.Image[7]).write_bytes(b'nothing')
    assert set(kinds(files))=={'bad_picture'}
    t = read_identities(files, skip_bad=True)
    assert len(t)==len(train)-1 and train.Image[7] not in set(t.train.id) and any('left out' in o for o in t.said)

def test_same_whale(drawn, table):
    "Ids of one whale have one name, are taught as one, and are written together"
    a,b = (table.vocab.index(o) for o in rows(drawn/'duplicate_ids.csv').SubId[0].split())
    lo,hi = sorted([a,b])
    assert whales(table)[hi]==lo and (np.delete(whales(table), hi)==np.delete(np.arange(len(table.vocab)), hi)).all()
    y = merge_ids(table).y
    assert not (y==hi).any() and (y==lo).sum()==np.isin(table.y, [a,b]).sum() and (y[table.y==len(table.vocab)]==len(table.vocab)).all()

def test_write(table):
    "Five labels in the order of the sample submission"
    c = len(table.vocab)
    labels = np.array([[c,0,1,2,3],[4,3,2,1,c]])
    df = write_identities(table.test.id[:2], labels, table)
    assert list(df)==['Image','Id'] and df.Image.tolist()==table.test.id[:2].tolist()
    assert df.Id[1].split()==[table.vocab[i] for i in (4,3,2,1)]+['new_whale']

def test_rle():
    "Columns first, from 1, as a slow loop has it"
    rng = np.random.RandomState(0)
    for hw in (5,7),(1,9),RLE_SIZE:
        m = rng.rand(*hw)>.6
        text = rle_encode(m)
        slow = np.zeros(m.size, bool)
        for a,n in zip(*[iter(map(int, text.split()))]*2): slow[a-1:a-1+n] = True
        assert (slow.reshape(hw[::-1]).T==m).all() and (rle_decode(text, hw)==m).all()
    assert rle_encode(np.ones((2,3)))=='1 6' and not rle_decode('', (2,3)).any()
    for bad in '0 3','5 3','3 0','1','a b': pytest.raises(ValueError, rle_decode, bad, (2,3))

def test_mask_channel(table):
    "The mask goes through crop, view and batch as a fourth channel"
    df = table.train.iloc[:4]
    src = boxed(Masked(Files(list(df.path)), df['mask']), df)
    items = Items(src, list(df.id), range(4), (squish,none), (32,64))
    im,_ = items[1]
    assert im.shape==(32,64,4) and .2<(im[...,3]>127).mean()<.9
    assert (items.but(mirror=True)[1][0]==im[:,::-1]).all()
    assert DropMask(p=1)(image=im)['image'][...,3].max()==0 and (DropMask(p=1)(image=im)['image'][...,:3]==im[...,:3]).all()

def test_twins(table):
    "Mirrored rows are mirrored crops of class k+C; the unknown have index 2C on both sides"
    n,c = len(table),len(table.vocab)
    t = twin_rows(table)
    src = boxed(Files(list(t.train.path)), t.train)
    for i in np.flatnonzero(table.train.turned)[0],3,8: assert (src[i+n]==src[i][:,::-1]).all()
    known = table.y<c
    assert (t.y[:n][known]==table.y[known]).all() and (t.y[n:][known]==table.y[known]+c).all()
    assert (t.y[:n][~known]==2*c).all() and (t.y[n:][~known]==2*c).all() and len(t.vocab)==len(t.names)==2*c
    assert (t.train.id[:n].values==t.train.id[n:].values).all() and t.test is table.test and t.said==table.said
    assert len(whales(t))==2*c and (whales(t)[:c]==whales(table)).all() and (whales(t)[c:]==whales(table)+c).all()

def test_twins_in_the_target(table):
    "A mirrored picture of twin k gives the same ids as a picture of k"
    target,c = Identity('new_whale', True).of(table),len(table.vocab)
    assert target.n_out(table)==2*c and target.n_classes(table)==c
    raw = torch.randn(3, 2*c)
    swapped = torch.cat([raw[:,c:],raw[:,:c]], 1)
    assert torch.equal(target.fold(raw), target.fold(swapped, True))
    y = twin_rows(table).y
    assert target.batch(y, [0,len(table)])[0].tolist()==[y[0],y[len(table)]]

def test_either_side(table):
    "Each picture once; sides by chance; rows without a twin among them are refused"
    from random import Random
    t,n,c = twin_rows(table),len(table),len(table.vocab)
    half = np.arange(0, n, 2)
    rows = np.concatenate([half,half+n])
    order = either_side(t, rows)
    got = rows[order(Random(0))]
    assert len(order)==len(half) and sorted(got%n)==half.tolist() and order(Random(5))==order(Random(5))
    side = [t.train.mirrored[rows[order(Random(s))]].mean() for s in range(20)]
    known = (table.y[half]<c).mean()
    assert abs(np.mean(side)-known/2)<.06 and not t.train.mirrored[got][t.y[got]==2*c].any()
    fours = either_side(t, rows, sampler=identity_items)
    y = t.y[rows[fours(Random(1))]].reshape(-1, 4)
    assert (y[:,0]%c==y[:,1]%c).all() and (y[:,0]%c!=y[:,2]%c).all() and (y[:,3]==2*c).all() and (y[:,0]!=y[:,1]).any()
    with pytest.raises(KeyError): either_side(t, half)

def test_any_image_id_set(tmp_path):
    "The same reader for other animals: PNG files, other names, one side file"
    for split,names in dict(train=['a.png','b.png','c.png'], test=['d.png']).items():
        (tmp_path/split).mkdir()
        for o in names: cv2.imwrite(str(tmp_path/split/o), np.full((20,30,3), 99, np.uint8))
    pd.DataFrame(dict(Image=['a.png','b.png','c.png'], Id=['rex','new_dog','rex'])).to_csv(tmp_path/'train.csv', index=False)
    pd.DataFrame(dict(Image=['d.png'], Id=['rex new_dog'])).to_csv(tmp_path/'sample_submission.csv', index=False)
    t = read_identities(tmp_path, unknown='new_dog', task='dogs')
    assert isinstance(t, Table) and t.vocab==['rex'] and t.y.tolist()==[0,1,0] and '1 train rows are new_dog' in t.said[0]
    assert write_identities(['d.png'], [[1,0]], t, 'new_dog').Id[0]=='new_dog rex'
