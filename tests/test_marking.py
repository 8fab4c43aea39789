"Boxes, landmarks and masks found by small networks: losses, alignment, folds, files, and what is said of wrong ones"
import random, shutil
from functools import partial
import cv2, numpy as np, pandas as pd, pytest, torch
from torchvision.ops import box_iou, generalized_box_iou
from recipes import boxes, from_json, landmarks, masks, whale
from recipes.data.alignment import FLUKE, Aligned, aligned, fit_affine, move_points, spans, unaligned, warp
from recipes.data.augment import none, squish
from recipes.data.boxes import boxed
from recipes.data.checks import BadInput
from recipes.data.draw_whales import draw_whale
from recipes.data.identities import BOX, read_identities
from recipes.data.loaders import Files, Items
from recipes.data.marked import Marked, MaskTexts, Points, shift_moves, turn_moves
from recipes.data.rle import RLE_SIZE, rle_decode, rle_encode
from recipes.losses.places import BoxLoss, MaskLoss, PointLoss, dice, ordered, pair_giou, pair_iou
from recipes.recipe.core import BadField
from recipes.recipe.marking import mean_outputs

rng = np.random.RandomState(0)
tiny = dict(arch='test_resnet', pretrained=False, size=(32,64), bs=8, epochs=1, folds=2, precision='fp32')
MARKS = [f'{o}_{c}' for o in FLUKE for c in 'xy']

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    at = tmp_path_factory.mktemp('whale')
    draw_whale(at, 80, n_test=10)
    return at

@pytest.fixture(scope='module')
def table(drawn): return read_identities(drawn)

@pytest.fixture
def files(drawn, tmp_path): return shutil.copytree(drawn, tmp_path/'whale')

def rows(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

def some(drawn, name, at, n=60, **cells):
    "A table of the first `n` rows of another, with columns changed"
    df = rows(drawn/name).iloc[:n]
    for k,v in cells.items(): df[k] = v(df[k])
    df.to_csv(at/'some.csv', index=False)
    return at/'some.csv'

# --- losses

def random_boxes(n):
    p = rng.rand(n, 4).astype(np.float32)
    return torch.from_numpy(np.concatenate([np.minimum(p[:,:2], p[:,2:]), np.maximum(p[:,:2], p[:,2:])+.01], 1))

def test_iou_is_torchvisions():
    a,b = random_boxes(200),random_boxes(200)
    assert torch.allclose(pair_iou(a, b), box_iou(a, b).diagonal(), atol=1e-5)
    assert torch.allclose(pair_giou(a, b), generalized_box_iou(a, b).diagonal(), atol=1e-5)

def test_losses_lead_there():
    "Gradient steps on outputs end at the truth, from boxes that are inside out or far off too"
    for loss,y,raw in ((BoxLoss(),random_boxes(20)*.9,torch.randn(20, 4)*3),(PointLoss(),torch.rand(20, 8)*1.1-.05,torch.randn(20, 8))):
        raw = raw.clone().requires_grad_()
        opt = torch.optim.Adam([raw], .05)
        for _ in range(500):
            opt.zero_grad()
            loss(raw, y).backward()
            assert torch.isfinite(raw.grad).all()
            opt.step()
        assert (loss.activation(raw)-y).abs().mean()<.02
    p = ordered(torch.randn(50, 4))
    assert (p[:,:2]<=p[:,2:]).all()

def test_mask_loss():
    "Cross entropy and dice by hand"
    raw,y = torch.randn(3, 1, 6, 8),(torch.rand(3, 6, 8)>.5).float()
    p = raw.squeeze(1).sigmoid().numpy()
    want = [-np.mean(t*np.log(q)+(1-t)*np.log(1-q))+1-(2*(q*t).sum()+1)/(q.sum()+t.sum()+1) for q,t in zip(p, y.numpy())]
    assert np.allclose(MaskLoss(reduction='none')(raw, y).numpy(), want, atol=1e-5)
    assert torch.allclose(dice(y, y), torch.ones(3))

# --- alignment

def dot_at(im):
    "Centre of mass of a picture of one bright spot"
    w = im[...,0].astype(float)
    w[w<60] = 0
    y,x = np.mgrid[:w.shape[0],:w.shape[1]]
    return np.array([(x*w).sum(),(y*w).sum()])/w.sum()

@pytest.mark.parametrize('turn', [0,180])
@pytest.mark.parametrize('hw', [(96,192),(220,400)])
def test_points_come_to_the_target(hw, turn):
    "Exactly known landmarks lie on the target to half a pixel, in pixels as they are seen"
    to = np.array(list(FLUKE.values()))*[192,96]-.5
    a,s = np.radians(turn+15),hw[1]/250
    m = np.column_stack([s*np.array([[np.cos(a),-.9*np.sin(a)],[np.sin(a),.9*np.cos(a)]]),np.zeros(2)])
    p = move_points(m, to)
    p += np.array(hw[::-1])/2-p.mean(0)
    for i in range(4):
        im = np.zeros((*hw,3), np.uint8)
        y,x = np.mgrid[:hw[0],:hw[1]]
        im[:] = (255*np.exp(-((x-p[i,0])**2+(y-p[i,1])**2)/(2*(2.5*s)**2)))[...,None]
        out = warp(im, p, list(FLUKE.values()), (96,192))
        k = out.shape[0]/96
        assert np.linalg.norm((dot_at(out)+.5)/k-.5-to[i])<.5

def test_least_squares():
    "With four points that no map fits, numpy's solution of the normal equations"
    p,q = rng.rand(4, 2)*100,rng.rand(4, 2)*100
    a = np.column_stack([p,np.ones(4)])
    assert np.allclose(fit_affine(p, q), np.linalg.solve(a.T@a, a.T@q).T)
    assert not spans(np.outer(np.arange(4), [1,2.])) and not spans(np.full((4,2), np.nan))

def test_aligned_source(drawn, table):
    "At whatever size it is decoded; mirrored rows; rows without landmarks; a target of one's own"
    df = table.train.iloc[:8].reset_index(drop=True)
    files = Files(list(df.path))
    src = aligned(files, df, margin=.1)
    class Halved:
        def __getitem__(self, i): return cv2.resize(files[i], None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
    big = aligned(Halved(), df)
    for i in range(8):
        a,b = (cv2.resize(o[i], (192,96)).astype(float) for o in (src,big))
        assert abs(a-b).mean()<4
    gone = df.copy()
    gone.loc[[2,5], MARKS] = np.nan
    part = aligned(files, gone, margin=.1)
    assert part.usable.tolist()==[i not in (2,5) for i in range(8)]
    assert (part[2]==boxed(files, df, margin=.1)[2]).all() and (part[3]==src[3]).all()
    assert (aligned(files, df.assign(mirrored=True))[1]==src[1][:,::-1]).all()
    three = dict(left=(.1,.5), right=(.9,.5), base=(.5,.9))
    out = aligned(files, df, three, (64,64))[0]
    assert out.shape[0]==out.shape[1]

def test_mirrored_target(table):
    "A mirrored row is the mirrored picture with left and right swapped"
    df = table.train.iloc[:3].reset_index(drop=True)
    files = Files(list(df.path))
    class Flipped:
        def __getitem__(self, i): return np.ascontiguousarray(files[i][:,::-1])
    other = df.rename(columns={f'{a}_{c}':f'{b}_{c}' for a,b in (('left','right'),('right','left')) for c in 'xy'})
    for o in FLUKE: other[f'{o}_x'] = df.width-1-other[f'{o}_x']
    for i in range(3): assert abs(aligned(files, df.assign(mirrored=True))[i].astype(int)-aligned(Flipped(), other)[i]).mean()<2

def test_share(table):
    "Half of the training pictures are moved, all others; the recipe of it can be written"
    df = table.train.iloc[:4].reset_index(drop=True)
    items = Items(aligned(Files(list(df.path)), df, share=.5), list(df.id), [1]*100, (squish,none), (24,48), train=True)
    random.seed(1)
    train,held = np.stack([o for o,_ in items]),items.but(train=False)
    a,b = ((train==o).all((1,2,3)) for o in (held[0][0],unaligned(held)[0][0]))
    assert (a!=b).all() and 30<a.sum()<70 and isinstance(held.pictures, Aligned)
    recipe = whale.third.but(box=partial(aligned, share=.5, target=FLUKE))
    assert from_json(recipe.to_json())==recipe

def test_recipe_trains_on_aligned(drawn):
    "As a recipe's `box`"
    learn = whale.train(drawn, box=partial(aligned, share=.5), arch='test_resnet', pretrained=False, size=(32,64), epochs=1, bs=16, lr=1e-3, resize=())
    assert 0<=learn.run.score<=1

# --- moving pictures and truth together

class Block:
    "A bright block"
    def __getitem__(self, i):
        im = np.full((64,128,3), 114, np.uint8)
        im[24:40,48:80] = 255
        return im

def where(on):
    y,x = np.nonzero(on)
    return np.array([x.min(),y.min(),x.max()+1,y.max()+1])

@pytest.mark.parametrize('kind', ['box','points','mask'])
def test_truth_moves_along(kind):
    corners = np.array([[48,24],[80,40]])/[128,64]
    mask = np.zeros(RLE_SIZE)
    mask[72:120,144:240] = 1
    truth = dict(box=Points(corners[None], box=True), points=Points(corners[None], slack=.1), mask=MaskTexts([rle_encode(mask)]))[kind]
    moves = (shift_moves if kind=='box' else turn_moves)(None)[:1]
    items = Marked(Block(), ['a'], [0]*60, (64,128), truth, moves)
    items.pipe.reseed(3)
    for im,y in items:
        on = im[...,0]>190
        if kind=='mask': assert (on&(y>.5)).sum()/(on|(y>.5)).sum()>.85
        elif kind=='box': assert abs(where(on)-y*[128,64,128,64]).max()<=1.5
        else:   # the middle of the block is that of its corners
            mid = (y.reshape(2, 2)*[128,64]).mean(0)
            assert np.linalg.norm(np.argwhere(on).mean(0)[::-1]+.5-mid)<1

def test_left_and_right():
    "Names are swapped where the picture is mirrored, and nowhere else"
    p = np.array([[[.2,.3],[.5,.4],[.7,.3],[.5,.8]]])
    items = Marked(Block(), ['a'], [0]*40, (64,128), Points(p, swap=[2,1,0,3], slack=.1), [])
    seen = {tuple(np.round(y, 3).tolist()) for _,y in items}
    assert seen=={tuple(np.float32([.2,.3,.5,.4,.7,.3,.5,.8]).round(3).tolist()),tuple(np.float32([.3,.3,.5,.4,.8,.3,.5,.8]).round(3).tolist())}

# --- folds

@pytest.fixture(scope='module')
def learners(drawn, tmp_path_factory): return boxes.train(drawn, some(drawn, 'bounding_boxes.csv', tmp_path_factory.mktemp('some')), **tiny)

def test_folds(learners):
    "Each labelled picture is held out once, and judged by that network alone"
    assert sorted(np.concatenate([o.held for o in learners]))==list(range(60))
    df,res = learners[0].frame,boxes.held_out(learners).set_index('Image')
    for learn in learners:
        one = boxes.predict([learn], df.iloc[learn.held], overwrite=True).set_index('Image')
        assert np.allclose(one, res.loc[one.index, list(BOX)], atol=.11)
        true = torch.tensor(df.iloc[learn.held][list(BOX)].to_numpy())
        assert np.allclose(res.iou[one.index], box_iou(true, torch.tensor(res.loc[one.index, list(BOX)].to_numpy())).diagonal(), atol=1e-6)

def test_average(learners, table):
    "The mean of what each network says"
    each = [np.concatenate(list(mean_outputs([o], table.test))) for o in learners]
    assert np.allclose(np.concatenate(list(mean_outputs(learners, table.test))), np.mean(each, 0), atol=1e-6) and abs(each[0]-each[1]).max()>1e-4

def test_same_seed(learners, drawn, tmp_path):
    again = boxes.train(drawn, some(drawn, 'bounding_boxes.csv', tmp_path), **tiny)
    other = boxes.train(drawn, tmp_path/'some.csv', **tiny|dict(seed=1))
    for a,b,c in zip(learners, again, other):
        sa,sb,sc = (o.model.state_dict() for o in (a,b,c))
        assert all(torch.equal(sa[k], sb[k]) for k in sa) and any(not torch.equal(sa[k], sc[k]) for k in sa)

def test_known_stay(learners, drawn, table, tmp_path):
    "Boxes by hand stay unless asked; a table, a frame and a folder are the same pictures; nothing is replaced by accident"
    true = rows(drawn/'bounding_boxes.csv').set_index('Image').astype(float)
    df = boxes.predict(learners, table).set_index('Image')
    true,hand = true.loc[df.index],df.index.isin(learners[0].frame.id)
    same = (df==true).all(axis=1).to_numpy()
    assert len(df)==90 and hand.sum()==60 and same[hand].all() and not same[~hand].any()
    assert (boxes.predict(learners, drawn).set_index('Image').loc[df.index]==df).to_numpy().all()
    new = boxes.predict(learners, table, overwrite=True).set_index('Image')
    wh = pd.concat([table.train,table.test]).set_index('id').loc[new.index, ['width','height']].to_numpy()
    assert (new!=true).any(axis=1).mean()>.9 and (new.to_numpy()>=0).all() and (new[['x1','y1']].to_numpy()<=wh).all()
    assert (new.x1>new.x0).all() and (new.y1>new.y0).all()
    assert boxes.write(df.reset_index(), tmp_path)==tmp_path/'bounding_boxes.csv'
    with pytest.raises(ValueError, match='there already'): boxes.write(df.reset_index(), tmp_path)

def test_show_and_plan(learners):
    learners[0].dls.show_batch(max_n=2)
    with pytest.raises(BadField, match="did you mean 'epochs'"): boxes.train('nowhere', epohcs=3)

# --- files

def test_written_is_read(files):
    "What `make` writes into a set's folder is what its reader has"
    for task,name in ((boxes,'bounding_boxes.csv'),(landmarks,'landmarks.csv'),(masks,'masks.csv')):
        table = some(files, name, files, 24)
        at = task.make(files, files, overwrite=True, **{'masks' if task is masks else 'file':table}, **tiny)
        table.unlink()
        assert at==files/name
        df,t = pd.read_csv(at, na_filter=False).set_index('Image'),read_identities(files)
        for frame in t.train,t.test:
            cols = ['mask'] if task is masks else list(df)
            assert (frame[cols].to_numpy()==df.loc[frame.id].to_numpy()).all()
    with pytest.raises(ValueError, match='there already'): boxes.make(files, files, **tiny)

def faults(f, *args):
    with pytest.raises(BadInput) as e: f(*args)
    return {o.kind:o.examples for o in e.value.problems}

@pytest.mark.parametrize('name,cells,kind,n', [
    ('bounding_boxes.csv', dict(x0=lambda o: o.where(o.index>1, '500')), 'empty_box', 2),
    ('bounding_boxes.csv', dict(y1=lambda o: o.where(o.index>2, 'low')), 'no_number', 3),
    ('bounding_boxes.csv', dict(Image=lambda o: 'x'+o), 'no_picture', 60),
    ('landmarks.csv', dict(left_x=lambda o: o.where(o.index>1, '900')), 'far_point', 2),
    ('landmarks.csv', dict(left_x=lambda o: o.where(o.index>1, '')), 'no_number', 2),
    ('landmarks.csv', dict(Image=lambda o: o.where(o.index!=4, '../x.jpg')), 'id_leaves', 1),
    ('landmarks.csv', dict(Image=lambda o: o.where(o.index!=4, o.iloc[5])), 'same_id', 1),
    ('masks.csv', dict(rle_mask=lambda o: o.where(o.index>3, '')), 'empty_mask', 4),
    ('masks.csv', dict(rle_mask=lambda o: o.where(o.index>0, '73728 2')), 'bad_mask', 1)])
def test_wrong_tables(drawn, tmp_path, name, cells, kind, n):
    read = dict(bounding_boxes=boxes.read_boxes, landmarks=landmarks.read_landmarks, masks=masks.read_masks)[name[:-4]]
    found = faults(read, drawn, some(drawn, name, tmp_path, **cells))
    assert list(found)==[kind] and len(found[kind])==n

@pytest.mark.parametrize('read,cols', [(boxes.read_boxes, 'Image,x0,y0,x1,y1'), (masks.read_masks, 'Image,rle_mask')])
def test_no_table(drawn, tmp_path, read, cols):
    with pytest.raises(BadInput, match=cols): read(drawn, tmp_path/'none.csv')
    (tmp_path/'some.csv').write_text(f'{cols}\n')
    assert 'no_rows' in faults(read, drawn, tmp_path/'some.csv')

def test_wrong_columns(drawn, tmp_path):
    df = rows(drawn/'landmarks.csv')
    for bad,kind in ((df.drop(columns='base_y'),'bad_column'),(df[['Image','left_x','left_y','right_x','right_y']],'few_points'),(rows(drawn/'bounding_boxes.csv'),'bad_column')):
        bad.to_csv(tmp_path/'some.csv', index=False)
        assert kind in faults(landmarks.read_landmarks, drawn, tmp_path/'some.csv')

def test_folder_of_masks(drawn, table, tmp_path):
    "Painted masks are the table's; those of another size, empty ones and strangers are named"
    text = rows(drawn/'masks.csv').set_index('Image').rle_mask
    for o in table.train.iloc[:5].itertuples():
        m = cv2.resize(rle_decode(text[o.id]).astype(np.uint8)*255, (o.width,o.height))
        cv2.imwrite(str(tmp_path/o.id.replace('.jpg', '.png')), m)
    df = masks.read_masks(drawn, tmp_path).set_index('id').rle_mask
    for k,v in df.items(): assert (rle_decode(v)&rle_decode(text[k])).sum()/(rle_decode(v)|rle_decode(text[k])).sum()>.9
    a,b = (tmp_path/o.replace('.jpg', '.png') for o in table.train.id[:2])
    cv2.imwrite(str(a), cv2.imread(str(a))[:-3])
    cv2.imwrite(str(b), cv2.imread(str(b))*0)
    shutil.copy(b, tmp_path/'who.png')
    found = faults(masks.read_masks, drawn, tmp_path)
    assert set(found)=={'mask_size','empty_mask','no_picture'} and found['no_picture']==['who.png'] and found['empty_mask']==[table.train.id[1]]
    assert f'{table.train.width[0]} x {table.train.height[0]}' in found['mask_size'][0]

def test_no_pictures(learners, tmp_path):
    with pytest.raises(FileNotFoundError, match='no pictures'): boxes.predict(learners, tmp_path)

# --- does it learn

long = dict(arch='test_resnet', pretrained=False, folds=2, precision='fp32')

@pytest.fixture(scope='module')
def more(tmp_path_factory):
    at = tmp_path_factory.mktemp('more')
    draw_whale(at, 200, n_test=10)
    return at

@pytest.mark.slow
def test_boxes_learn(more): assert boxes.held_out(boxes.train(more, **long, size=(64,128), epochs=40, bs=16)).iou.mean()>.7

@pytest.mark.slow
def test_landmarks_learn(more): assert landmarks.held_out(landmarks.train(more, **long, size=(64,128), epochs=40, bs=16)).error.median()<.07

@pytest.mark.slow
def test_masks_learn(drawn): assert masks.held_out(masks.train(drawn, **long, size=(32,64), epochs=12, bs=4, lr=5e-3)).iou.mean()>.8
