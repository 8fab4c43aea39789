"Inclusive Images: what is read, what is refused, who is held out, and the whole way from files to a submission"
import csv, hashlib, shutil
import cv2, numpy as np, pandas as pd, pytest
from pathlib import Path
from recipes import inclusive
from recipes.cli import main
from recipes.data.checks import BadInput
from recipes.data.draw_openimages import PAIRS, draw_inclusive, human_labels, labels_of, machine_labels
from recipes.data.folds import assign_folds, fold_rows
from recipes.data.inclusive import few_of_each, read_inclusive, write_inclusive
from recipes.data.table import Table
from recipes.infer.predictions import check_submission
from recipes.infer.search import best_threshold
from recipes.recipe.tuned import on_tuning
from recipes.recipe.ensemble import predict_runs
from recipes.recipe.core import from_json
from recipes.recipe.folder import Run
from scipy import sparse

LABELS = 'train_human_labels.csv','train_machine_labels.csv'

def rows(f): return pd.read_csv(f, dtype=str, keep_default_na=False)

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    at = tmp_path_factory.mktemp('drawn')
    draw_inclusive(at, 120, n_test=24)
    return at

@pytest.fixture
def files(drawn, tmp_path): return shutil.copytree(drawn, tmp_path/'inclusive')

def edit(f, row, **cells):
    df = rows(f)
    for k,v in cells.items(): df.loc[row, k] = v
    df.to_csv(f, index=False)

def refused(files, **kwargs):
    with pytest.raises(BadInput) as e: read_inclusive(files, **kwargs)
    return str(e.value),{(o.where,o.kind):o for o in e.value.problems}

# --- the drawn sample

def digest(at):
    h = hashlib.sha256()
    for f in sorted(at.glob('*.csv')): h.update(f.name.encode()+f.read_bytes())
    return h.hexdigest()[:16]

def test_sample_same_everywhere(drawn, tmp_path):
    "Raise `VERSION` in `recipes.data.fixtures` when this number changes"
    np.random.seed(5)
    draw_inclusive(tmp_path/'again', 120, n_test=24)
    assert digest(tmp_path/'again')==digest(drawn)=='75d70769c6ee172d'
    draw_inclusive(tmp_path/'other', 120, n_test=24, seed=1)
    assert digest(tmp_path/'other')!=digest(drawn)
    for split in 'train','test':
        a,b = ({o.name:o.read_bytes() for o in (d/split).iterdir()} for d in (drawn,tmp_path/'again'))
        assert a==b and len(a)=={'train':120,'test':24}[split]

def test_sample_format(drawn):
    for o in LABELS: assert list(rows(drawn/o))==['ImageID','Source','LabelName','Confidence']
    assert set(rows(drawn/LABELS[0]).Confidence)=={'0','1'}
    assert set(rows(drawn/LABELS[1]).Confidence.astype(float))<=set(np.arange(5, 11)/10)
    assert {o.stem for o in (drawn/'train').iterdir()}=={*rows(drawn/LABELS[0]).ImageID, *rows(drawn/LABELS[1]).ImageID}
    assert {o.stem for o in (drawn/'test').iterdir()}==set(rows(drawn/'stage_1_sample_submission.csv').image_id)
    tuned = [o.split(',') for o in (drawn/'tuning_labels.csv').read_text().splitlines()]
    assert sum((drawn/'test'/f'{i}.jpg').exists() for i,_ in tuned)==6==len(tuned)-1
    answers = dict(rows(drawn/'answers.csv').values)
    assert all(answers[i]==o for i,o in tuned[:-1])

def test_sample_shift(drawn):
    "Elsewhere grounds have other colours, and other things are common"
    def corner(f): return cv2.imread(str(f))[-2:,-2:].mean((0,1))
    hue = {o:np.stack([corner(f)/corner(f).sum() for f in (drawn/o).iterdir()]) for o in ('train','test')}
    near = np.linalg.norm(hue['test'][:,None]-hue['train'], axis=2).min(1)
    within = np.sort(np.linalg.norm(hue['train'][:,None]-hue['train'], axis=2), axis=1)[:,1]
    assert np.median(near)>2*np.median(within)
    share = lambda df,col: df[col].str.split().explode().value_counts(normalize=True)
    here,there = share(rows(drawn/LABELS[0]), 'LabelName'),share(rows(drawn/'answers.csv'), 'labels')
    assert here.corr(there.reindex(here.index).fillna(0))<.95

def test_sample_labels():
    "A label of a pair comes with those of its shape and hue; machines err, and people set some of it right"
    assert labels_of([0])==[PAIRS[0][0],10+PAIRS[0][1],16] and labels_of([59])==[PAIRS[59][0],10+PAIRS[59][1]]
    rng,true = np.random.RandomState(0),[0,3,11,16]
    said = [machine_labels(rng, true) for _ in range(500)]
    right = np.mean([set(o)&set(true)==set(true) for o in said])
    assert .5<right<.8 and .2<np.mean([bool(set(o)-set(true)) for o in said])<.35 and max(map(max, filter(None, said)))<57
    human = [human_labels(rng, true, o) for o in said]
    assert all(v==int(k in true) for o in human for k,v in o.items()) and any(0 in o.values() for o in human)
    assert .05<np.mean([not o for o in human])<.2

# --- reading

def test_read(files):
    "Against a loop over the rows: people win, else the machine's confidence"
    t = read_inclusive(files)
    codes = rows(files/'classes-trainable.csv').label_code.tolist()
    truth,people = {},{}
    for f,into in zip(LABELS[::-1], (truth,people)):
        for r in csv.DictReader(open(files/f)):
            if r['LabelName'] in codes: into[r['ImageID'],r['LabelName']] = float(r['Confidence'])
    truth |= people
    y = t.y.toarray()
    got = {(t.train.id[i],t.vocab[c]):float(y[i,c]) for i,c in zip(*y.nonzero())}
    assert got==pytest.approx({k:v for k,v in truth.items() if v}) and t.vocab==codes
    mask = t.mask.toarray()
    assert {(t.train.id[i],t.vocab[c]) for i,c in zip(*mask.nonzero())}==set(people)
    assert t.train.path.tolist()==[str(files/'train'/f'{o}.jpg') for o in t.train.id]
    assert t.test.id.tolist()==rows(files/'stage_1_sample_submission.csv').image_id.tolist()
    assert t.names[3]=='shape 3' and t.sample.columns.tolist()==['image_id','labels']
    hw = [cv2.imread(o).shape[:2] for o in t.train.path]
    assert t.train[['height','width']].values.tolist()==[list(o) for o in hw]

def test_tuning(files):
    "No header, a table of its own, and its row without a picture is said"
    t = read_inclusive(files)
    lines = dict(o.split(',') for o in (files/'tuning_labels.csv').read_text().splitlines())
    gone = [o for o in lines if not (files/'test'/f'{o}.jpg').exists()]
    assert len(gone)==1 and t.tuning.train.id.tolist()==[o for o in lines if o not in gone]
    vocab = np.array(t.vocab)
    assert [' '.join(vocab[o.nonzero()[1]]) for o in t.tuning.y]==[lines[o] for o in t.tuning.train.id]
    assert f'tuning_labels.csv: 1 of 7 pictures left out (first: {gone[0]})' in t.said
    assert len(t.subset(np.arange(5)).tuning)==6

def test_said(files):
    "Empty classes, labels that are no class, pictures without a label"
    for f in LABELS:
        df = rows(files/f)
        df = df[df.ImageID!=rows(files/LABELS[0]).ImageID[0]] if f==LABELS[1] else df
        if f==LABELS[0]: df.loc[df.ImageID==df.ImageID[0], 'Confidence'] = '0'
        df.to_csv(files/f, index=False)
    t = read_inclusive(files)
    assert t.said[-1]=='3 classes (shape 1 of hue 3, shape 2 of hue 4, shape 3 of hue 5) have no training picture'
    assert '1 of 120 training pictures have no label' in t.said and t.y[0].nnz==0 and t.mask[0].nnz>0
    assert any('a label that is no class: left out' in o for o in t.said)
    assert t.y.shape==(120,60) and (t.label_counts()['count']==0).sum()==3

def test_all_problems_at_once(files):
    "One message, one line each"
    for i,(f,kw) in enumerate([(LABELS[0],dict(Confidence='0.5')), (LABELS[0],dict(LabelName='/m/nobody')), (LABELS[1],dict(Confidence='1.5')),
        (LABELS[1],dict(ImageID='../../etc/passwd')), ('classes-trainable.csv',dict(label_code='/m/0spare')),
        ('stage_1_sample_submission.csv',dict(image_id='gone'))]): edit(files/f, i, **kw)
    lines = (files/'tuning_labels.csv').read_text().splitlines()
    lines += [lines[0], rows(files/LABELS[1]).ImageID[9]+',/m/01000', lines[1].split(',')[0][:-1]+'x,/m/what']
    (files/'tuning_labels.csv').write_text('\n'.join(lines)+'\n')
    msg,found = refused(files)
    assert {(LABELS[0],'no_number'),(LABELS[0],'unknown_label'),(LABELS[1],'no_number'),('tuning_labels.csv','same_id'),
        ('tuning_labels.csv','tuning_in_train'),(LABELS[0],'id_leaves')}<=set(found)
    assert msg.count('\n- ')==len(found) and msg.startswith(f'inclusive: {len(found)} problems in the files')

def test_pictures(files):
    "A training picture that is gone is a problem; with `skip_bad` it is left out, truth and mask too"
    t = read_inclusive(files)
    (files/'train'/f'{t.train.id[3]}.jpg').unlink()
    (files/'train'/f'{t.train.id[5]}.jpg').write_bytes(b'')
    msg,found = refused(files)
    assert found[LABELS[0],'no_picture'].examples==[t.train.id[3]] and ('train/','bad_picture') in found
    got = read_inclusive(files, skip_bad=True)
    keep = np.setdiff1d(np.arange(120), [3,5])
    assert got.train.id.tolist()==t.train.id[keep].tolist() and (got.y!=t.y[keep]).nnz==0 and (got.mask!=t.mask[keep]).nnz==0
    assert any('2 of 120 pictures left out' in o for o in got.said)
    (files/'test'/f'{t.test.id[0]}.jpg').unlink()
    assert ('stage_1_sample_submission.csv','no_picture') in refused(files, skip_bad=True)[1]

def test_same_picture(files):
    "In train and in test, twice in the tuning file, twice in the submission"
    t = read_inclusive(files)
    sub = rows(files/'stage_1_sample_submission.csv')
    sub.loc[len(sub)] = [t.train.id[0],'']
    sub.loc[len(sub)] = sub.loc[0]
    sub.to_csv(files/'stage_1_sample_submission.csv', index=False)
    shutil.copy(t.train.path[0], files/'test')
    msg,found = refused(files)
    assert found[LABELS[0],'train_in_test'].examples==[t.train.id[0]]
    assert found['stage_1_sample_submission.csv','same_id'].examples==[sub.image_id[0]]

def test_missing_files(files):
    for o in 'tuning_labels.csv','class-descriptions.csv','stage_1_sample_submission.csv': (files/o).unlink()
    msg,found = refused(files)
    assert found[str(files),'missing_file'].examples==['tuning_labels.csv','class-descriptions.csv','sample_submission.csv']

def test_tuning_with_header(files):
    "Who wrote a header is told"
    f = files/'tuning_labels.csv'
    f.write_text('image_id,labels\n'+f.read_text())
    assert 'labels' in str(refused(files)[1]['tuning_labels.csv','unknown_label'])

def test_later_stage(files):
    "The last stage's submission is taken; one without a stage before all"
    a = rows(files/'stage_1_sample_submission.csv')
    a[:5].to_csv(files/'stage_2_sample_submission.csv', index=False)
    assert len(read_inclusive(files).test)==5
    a[:3].to_csv(files/'sample_submission.csv', index=False)
    assert len(read_inclusive(files).test)==3

# --- held-out rows

def many(n=4000, c=300, seed=0):
    rng = np.random.default_rng(seed)
    p = 1/np.arange(2, c+2)
    y = sparse.csr_matrix((rng.random(n*6).astype(np.float32)/2+.5, (np.repeat(np.arange(n), 6), rng.choice(c, n*6, p=p/p.sum()))), (n,c))
    y.data = y.data.clip(max=1)
    frame = pd.DataFrame(dict(id=[f'{i}' for i in range(n)], path=''))
    return Table(frame, frame[:0], y, [f'c{i}' for i in range(c)])

def test_few_of_each():
    "A tenth of each class is held out, but five rows are enough; commoner classes take what rarer ones brought"
    t = many()
    folds = assign_folds(t, few_of_each)
    train,held = fold_rows(folds, 0)
    n,k = (np.asarray((t.y[o]!=0).sum(0)).ravel() for o in (np.arange(len(t)),held))
    assert (k>=np.minimum(n//10, 5)).all() and (k[n<10]<n[n<10]).all()
    assert len(held)<5*(n>=10).sum()*.6 and len(train)+len(held)==len(t) and set(folds)=={0,-1}
    assert (few_of_each(t)==folds).all() and (few_of_each(t, seed=1)!=folds).any()
    assert (few_of_each(t, share=.5, most=40)==0).sum()>len(held)

# --- writing

def test_empty_rows(drawn, tmp_path):
    "A picture may have no label: an empty field, in the order of the sample"
    t = read_inclusive(drawn)
    y = sparse.csr_matrix(([True,True], ([0,0], [5,2])), (len(t.test),60))
    y.sort_indices()
    df = check_submission(write_inclusive(t.test.id[::-1], y[::-1], t), t.sample)
    df.to_csv(tmp_path/'s.csv', index=False)
    got = rows(tmp_path/'s.csv')
    assert got.image_id.tolist()==t.sample.image_id.tolist() and got.labels.tolist()==[f'{t.vocab[2]} {t.vocab[5]}']+['']*23
    assert (tmp_path/'s.csv').read_text().splitlines()[2]==f'{t.test.id[1]},'

def test_golden_metric():
    "The vector that tells averages over samples, over classes and over all apart, with soft labels, too"
    y = sparse.csr_matrix(np.array([[.7,0,0,0],[1,.5,0,0],[0,0,0,0],[1,1,.9,0],[0,0,0,0]], np.float32))
    p = sparse.csr_matrix(np.array([[1,1,0,0],[1,0,0,0],[0,0,0,0],[0,0,0,0],[1,0,0,0]], bool))
    assert inclusive.competition.metric(y, p)==pytest.approx(.2777778, abs=1e-7)

# --- the whole way

@pytest.fixture(scope='module')
def run(drawn, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('run'))
        main(['train','inclusive','--path',str(drawn),'--arch','test_resnet','--pretrained','false','--size','32','--epochs','2',
            '--lr','0.003','--bs','16','--resize','()'])
        yield next(Path('runs/inclusive').glob('*/fold0')).resolve()

def test_command_line(run, drawn, tmp_path):
    o = Run(run)
    held = fold_rows(few_of_each(o.table), 0)[1]
    assert o.done and o.score>.1 and o.valid.ids==o.table.train.id[held].tolist() and o.valid.p.shape==(len(held),60)
    main(['predict', str(run), '--out', 'out.csv'])
    got = rows('out.csv')
    assert got.image_id.tolist()==o.table.sample.image_id.tolist()
    vocab = set(o.table.vocab)
    assert got.labels.str.split().map(lambda o: len(o)>0 and set(o)<=vocab and len(o)==len(set(o))).all()

def test_on_tuning(run, capsys):
    "Thresholds of the tuning set decide the test set; held-out rows have others"
    tuned,preds = on_tuning(run),inclusive.predict(run)
    t = Run(run).table
    assert 'tuned on the 6 pictures' in capsys.readouterr().out
    assert tuned.ids==t.tuning.train.id.tolist() and tuned.p.shape==(6,60) and (tuned.y!=t.tuning.y).nnz==0
    assert 0<=tuned.score()<=1
    want = best_threshold(tuned.p, t.tuning.y, min_labels=1)
    assert preds.values==want and preds.submission().image_id.tolist()==t.sample.image_id.tolist()
    assert predict_runs(run).values==Run(run).valid.values!=want
    assert inclusive.predict(run, test=t.tuning.train).oof.ids==Run(run).valid.ids   # pictures of one's own: held-out rows decide
    same = on_tuning([Run(run)])
    assert np.allclose(same.p, tuned.p, atol=1e-6)
    at = {o:i for i,o in enumerate(preds.ids)}   # tuning pictures are test pictures, too
    assert np.allclose(preds.p[[at[o] for o in tuned.ids]], tuned.p, atol=1e-3)

def test_house():
    "No pretrained weights, and the recipe goes to text and back"
    assert not inclusive.house.pretrained and from_json(inclusive.house.to_json())==inclusive.house
