"Before the first day: what is planted in the files is found, counts are a slow loop's, hours are those of a slow step, and a broken pipeline is told from a good one"
import shutil, time
import numpy as np, pandas as pd, pytest, torch
from collections import Counter
from fastai.callback.core import Callback
from itertools import combinations
from PIL import Image
from scipy import sparse
from sklearn.metrics import roc_auc_score
from recipes import animal, bengali, imet, inclusive, whale
from recipes.data.checks import BadInput, Problems
from recipes.data.fixtures import sample
from recipes.data.table import Table
from recipes.look.audits import audit
from recipes.look.copied import copy_groups
from recipes.look.costs import Cost, cost
from recipes.look.openings import gently, to_open
from recipes.look.plainly import few_rows, plainest, share_right, undrop
from recipes.look.rates import nets_of, sizes_of
from recipes.look.sanity import overfit
from recipes.look.shifts import auc, shift, shift_of
from recipes.look.tails import label_pairs, tail, unlabelled
import timm

tiny = dict(arch='resnet18', size=32, precision='fp32', pretrained=False)

def pictures(path, split): return sorted((path/split).iterdir())

@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "iMet with a truncated picture on each side, one missing, one empty, a broken middle, an answer given away, a copy in another quality"
    path = tmp_path_factory.mktemp('planted')/'imet'
    shutil.copytree(sample('imet', 120), path)
    train,test = pictures(path, 'train'),pictures(path, 'test')
    train[0].write_bytes(train[0].read_bytes()[:150])
    train[1].unlink()
    test[0].write_bytes(b'')
    b = bytearray(test[1].read_bytes())
    b[60:len(b)//2] = bytes(len(b)//2-60)   # header and end are fine
    test[1].write_bytes(b)
    shutil.copy(train[5], test[5])
    Image.open(train[6]).convert('RGB').point(lambda o: o*.8+20).save(test[6])
    im = Image.open(train[7])
    im.resize((im.width*2,im.height*2), Image.BICUBIC).save(train[8])
    return path

@pytest.fixture(scope='module')
def found(planted): return audit(imet.house, planted)

def test_unreadable(planted, found):
    "Each bad picture is named with a reason, and nothing is raised; training still refuses"
    train,test = pictures(planted, 'train'),pictures(planted, 'test')
    said = dict(zip(found.bad.id.str.removesuffix('.png'), found.bad.why))
    gone = sorted({o.stem for o in pictures(sample('imet', 120), 'train')}-{o.stem for o in train})
    assert set(said)=={train[0].stem,gone[0],test[0].stem,test[1].stem}
    assert said[gone[0]]=='missing' and 'empty' in said[test[0].stem] and all(said.values())
    assert len(found.table)==118 and len(found.table.test)==30 and '4: ' in found.lines()['unreadable']
    with pytest.raises(BadInput, match='unreadable'): imet.table(planted)

def test_readers_raise_again(planted, tmp_path):
    "Gentleness ends with its block, and does not reach what nobody can do without"
    with pytest.raises(ZeroDivisionError), gently(): 1/0
    with pytest.raises(BadInput, match='unreadable'): imet.table(planted)
    with pytest.raises(BadInput, match='missing'): audit(imet.house, tmp_path)
    assert Problems.stop.__name__=='stop'

def test_copies(planted, found):
    "The same file, another light and another size are copies, and nothing else is"
    pytest.importorskip('imagehash')
    train,test = [o.stem for o in pictures(planted, 'train')],[o.stem for o in pictures(planted, 'test')]
    pairs = {frozenset(o.id) for _,o in found.twins.groupby('group')}
    assert pairs=={frozenset(o) for o in ([train[4],test[5]],[train[5],test[6]],[train[6],train[7]])}

def test_copies_by_hand():
    "Equal hashes of unlike pictures are none; a chain of near ones is one group"
    rng = np.random.default_rng(0)
    a,b = rng.integers(0, 256, (2,48,48,3)).astype(np.uint8)
    group = copy_groups(np.array([7,7,6,0,2**50-1], np.uint64), np.stack([a,b,a//2+9,a,a]))
    assert group[0]==group[2]==group[3]!=group[1] and group[4]!=group[0]

def test_pages(found):
    "As text, as a table and as pictures"
    import matplotlib.pyplot as plt
    assert 'unreadable' in repr(found) and found._repr_html_().count('<tr>')==len(found.lines())
    assert len(found.plot().axes)==3 and len(found.show(4).axes)==4 and len(found.show_odd().axes)==12
    plt.close('all')

@pytest.mark.parametrize('task,n', [(imet,120),(animal,120),(bengali,120),(whale,100),(inclusive,120)], ids=lambda o: getattr(o, '__name__', o))
def test_every_task(task, n, monkeypatch):
    "All kinds of tables; never more pictures than asked for, the same ones again with the same seed"
    path = task.house.competition.sample(n) if task is inclusive else sample(task.__name__.split('.')[1], n)
    a = audit(task.house, path, most=60)
    assert len(a.opened)==60 and len(a.seen)==len(a.table)+len(a.table.test) and not len(a.bad)
    assert to_open(a.seen, 60, 0).id.tolist()==a.opened.looks.id.tolist()!=to_open(a.seen, 60, 1).id.tolist()
    assert {'pictures','sizes','labels','formats'}<=set(a.lines()) and a.tail.classes.sum()==len(a.table.label_counts())

def test_sizes(planted, found):
    "Widths, heights and bytes are what Pillow and the disk say"
    for o in found.good.sample(10, random_state=0).itertuples():
        with Image.open(o.path) as im: assert (o.width,o.height)==im.size and o.mode==im.mode
    assert found.good.bytes.sum()==sum(len(open(o, 'rb').read()) for o in found.good.path)

# --- labels

def frame(n): return pd.DataFrame(dict(id=[f'{i}' for i in range(n)], path=''))

def test_tail_and_pairs():
    "As a slow loop counts"
    rng = np.random.default_rng(0)
    rows = [sorted({int(o) for o in rng.zipf(1.6, rng.integers(0, 5)) if o<30}) for _ in range(300)]
    y = sparse.lil_matrix((300,30), dtype=np.float32)
    for i,r in enumerate(rows): y[i,r] = 1
    t = Table(frame(300), frame(0), y.tocsr(), [f'c{i}' for i in range(30)])
    n = Counter(o for r in rows for o in r)
    o = tail(t).iloc[0]
    assert (o['empty'],o.single,o.few,o.most)==(30-len(n),sum(v==1 for v in n.values()),sum(1<v<5 for v in n.values()),max(n.values()))
    top = sorted(n.values(), reverse=True)
    assert o.half==next(k for k in range(1, 31) if sum(top[:k])>=sum(top)/2)
    both = Counter(p for r in rows for p in combinations(r, 2))
    df = label_pairs(t, top=1000)
    assert {(int(a[1:]),int(b[1:])):k for a,b,k in zip(df.a, df.b, df.together)}=={
        p:k for p,k in both.items() if k>1 and k*300>n[p[0]]*n[p[1]]}
    for r in df.itertuples(): assert r.lift==pytest.approx(r.together*300/(n[int(r.a[1:])]*n[int(r.b[1:])]))
    assert list(unlabelled(t))==[i for i,r in enumerate(rows) if not r]

def test_heads():
    "Classes of two heads that come together; a row without one of them is unlabelled"
    y = np.array([[0,1]]*8+[[1,0]]*8+[[1,1],[-1,0]])
    t = Table(frame(18), frame(0), y, [['a','b'],['x','y']])
    df = label_pairs(t)
    assert [(o.a,o.b,o.together) for o in df.itertuples()]==[('0:a','1:y',8),('0:b','1:x',8)] and list(unlabelled(t))==[17]

# --- train against test

def test_auc():
    rng = np.random.default_rng(0)
    a,b = rng.integers(0, 9, 50),rng.integers(2, 11, 30)
    assert auc(a, b)==pytest.approx(roc_auc_score([0]*50+[1]*30, [*a,*b]))

def test_no_difference():
    "Of ten unshifted pairs of sets the intervals hold .5, but for a few"
    seen = [shift_of(pd.DataFrame(np.random.default_rng(i).normal(size=(150,4))).assign(set=['train']*100+['test']*50), draws=100)
        for i in range(6)]
    assert sum(o.low<=.5<=o.high for o in seen)>=4 and abs(np.mean([o.auc for o in seen])-.5)<.08

def test_shifted(tmp_path):
    "A test set that is darker is told apart, by its brightness; drawn from the same hand it is not"
    path = tmp_path/'animal'
    shutil.copytree(sample('animal', 120), path)
    plain = shift(animal.house, path)
    assert plain.low<=.5 and 'no difference' in repr(plain)
    for f in pictures(path, 'test'):
        im = Image.open(f)
        im.point(lambda o: o*.4).save(f)
    dark = shift(animal.house, path)
    assert dark.low>.95 and 'clear difference' in repr(dark)
    assert {'brightness','contrast','bytes','sharpness','colourfulness',*(f'{c} {s}' for c in ('red','green','blue') for s in ('mean','std'))}>=set(dark.telling)
    assert (dark.features.alone[['brightness','red mean']]<.2).all()

def test_too_few():
    with pytest.raises(ValueError, match='10 of each'): shift_of(pd.DataFrame(dict(a=range(20), set=['train']*15+['test']*5)))

# --- hours

class Slow(Callback):
    "A training step that takes a known time"
    run_valid = False
    def before_batch(self): time.sleep(.1)

def slow(): return [Slow()]

def test_hours():
    "A step of known time gives the hours; random generators are where they were; nothing is written"
    torch.manual_seed(0)
    before = torch.get_rng_state()
    o = cost(animal.house, sample('animal', 120), secs=4, arch='test_resnet', size=24, bs=16, epochs=6, resize=(), lr=1e-3, cbs=slow, precision='fp32')
    assert torch.equal(torch.get_rng_state(), before)
    r,held = o.parts.iloc[0],24
    assert .1<=16/r.train<2 and r.epoch==96
    assert 3600*o.fold==pytest.approx(6*(96/r.train+held/r.predict)+2*held/r.predict) and 3600*o.fold>=.1*6*6
    assert o.folds==5 and o.fits and o.memory>.05
    assert o.hours==pytest.approx(5*o.fold+o.predict) and 0<o.predict<.01

def test_counted():
    "Every network of every round; every epoch at its size"
    assert [k for k,_ in nets_of(imet.first)][0]=='round 1 part 1' and len(nets_of(imet.first))==12
    assert sizes_of(imet.house)=={(192,192):5,(256,256):4,(320,320):3}
    assert sizes_of(animal.house.but(epochs=0))=={}

def test_advice():
    "What is advised fits"
    o = Cost(imet.house, pd.DataFrame(), 5, 4., 1., 1., 'x', limit=9.)
    assert not o.fits and o.advice[0]=='2 of the 5 folds: run_folds=(0, 1)'
    assert len(Cost(whale.tenth, pd.DataFrame(), 1, 10., .1, 1., 'x').advice)==1   # its networks differ in length, and `epochs=` makes them alike
    assert o.advice[1]=='epochs=4 instead of 12' and 4/12*20<=8 and '(200, 200)' in o.advice[2] and (200/320)**2*20<=8

# --- the sanity run

def test_learns(tmp_path):
    "A hundred pictures are learned by heart: loss under .05, all right; nothing is left behind"
    o = overfit(animal.house, sample('animal', 120), **tiny)
    assert o.ok and o.history.valid_loss.iloc[-1]<.05 and o.n==100 and 'can learn' in repr(o)
    assert not [*tmp_path.iterdir()]

@pytest.mark.parametrize('broken', [dict(lr=0.), dict(lr=1e-9)])
def test_not_learned(broken):
    o = overfit(animal.house, sample('animal', 120), n=40, epochs=3, **tiny|broken)
    assert not o.ok and o.epoch is None and 'lr' in o.advice and 'not learned' in repr(o)

def test_pictures_of_others():
    "Pictures that change their place from pass to pass cannot be learned"
    def mixed_up(pictures, frame):
        class Other:
            def __len__(self): return len(frame)
            def __getitem__(self, i): return pictures[np.random.randint(len(frame))]
        return Other()
    o = overfit(animal.house, sample('animal', 120), n=40, epochs=8, **tiny, box=mixed_up)
    assert not o.ok

@pytest.mark.parametrize('task,n', [(imet,60),(bengali,60),(whale,60)], ids=lambda o: getattr(o, '__name__', o))
def test_other_targets(task, n):
    "Losses of other kinds and scales: sums over labels, heads, margins"
    size = dict(whale=(32,64), bengali=(40,64)).get(task.__name__.split('.')[1], 32)
    o = overfit(task.house, sample(task.__name__.split('.')[1], 120), n=n, epochs=2, **tiny|dict(size=size))
    assert len(o.history)==2 and o.n<=n and np.isfinite(o.history.to_numpy(float)).all()

def test_plainest():
    "Of every named recipe something plain is left, and the rows are labelled ones"
    for o in (*imet.methods, *whale.methods, animal.stefano, bengali.argus, inclusive.softf2):
        p = plainest(o)
        assert not (p.parts or p.rounds or p.stages or p.mix or p.ema or p.resize) and p.lr!='find' and p.competition is o.competition
    net = torch.nn.Sequential(torch.nn.Dropout(.3), timm.create_model('convnext_atto', drop_path_rate=.2))
    undrop(net)
    assert not [m for m in net.modules() if getattr(m, 'drop_prob', 0) or isinstance(m, torch.nn.Dropout) and m.p]
    t = whale.table(sample('whale', 100))
    rows = few_rows(t, 40)
    assert (t.y[rows]<len(t.vocab)).all() and np.bincount(t.y[rows]).max()==np.bincount(t.y[t.y<len(t.vocab)]).max()

def test_share_right():
    "As a slow loop"
    rng = np.random.default_rng(0)
    y,p = sparse.csr_matrix((rng.random((50,12))<.2).astype(np.float32)),rng.random((50,12))
    hits = [(i,c) for i in range(50) for c in np.argsort(-p[i])[:int(y[i].sum())] if y[i,c]]
    assert share_right(y, p)==pytest.approx(len(hits)/y.nnz)
    t = Table(frame(2), frame(0), np.zeros((2,2), int), [['a','b'],['x','y','z']])
    assert share_right(np.array([[0,2],[1,1]]), np.array([[.9,.1,.2,.3,.5],[.9,.1,.2,.6,.3]]), t)==.75
