"Packs: predicted in another process, elsewhere, from folders that cannot be written to, with the network blocked"
import json, os, re, shutil, subprocess, sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from zipfile import ZipFile
import pandas as pd, pytest
from fastcore.nbio import read_nb
from recipes import animal
from recipes.data import settings
from recipes.data.checks import BadInput
from recipes.data.fixtures import DRAW
from recipes.recipe import packing
from recipes.recipe.folder import Run
from recipes.recipe.packed import check_pack, data_of, open_pack, predict_pack, recipe_in
from recipes.recipe.packing import pack
from recipes.recipe.wheel import own_wheel, requirements

few = dict(arch='test_resnet', pretrained=False, size=16, epochs=1, bs=12, folds=2, lr=3e-3, precision='fp32')
MINE = '''from recipes.infer.argmax import likeliest
def mine(p, table): return likeliest(p, table, gamma=.5)
def fewer(table, predictions): return table.subset(range(0, len(table), 2))
'''

def silent(f, *args, **kw):
    with redirect_stdout(StringIO()): return f(*args, **kw)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Data, runs, packs and what the runs predict before they are packed"
    at = tmp_path_factory.mktemp('made')
    (at/'mine.py').write_text(MINE)
    DRAW['animal'](at/'data', 60)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(at)
        m.syspath_prepend(at)
        yield silent(make, at)

def make(at):
    import mine
    data,res = at/'data',{}
    oof = animal.cross_validate(data, **few)
    other = animal.train(data, **few|dict(seed=1))
    parts = tuple(animal.house.but(**few|dict(arch=o)) for o in ('test_resnet','test_vit'))
    whole = animal.train(data, recipe=animal.house.but(parts=parts, folds=2))
    rounds = animal.cross_validate(data, **few, rounds=(dict(run_folds=(0,)),dict(data=mine.fewer, rule=mine.mine, run_folds=(0,))))
    every = animal.train(data, fold='all', prior=oof, **few)
    asked = dict(folds=(oof.runs,), blend=([oof.runs,[other.run]],[3,1]), parts=(whole,), rounds=(rounds,), every=(every,))
    for k,(runs,*weights) in asked.items(): pack(runs, at/f'packs/{k}', *weights)
    res = {k:animal.predict(getattr(o[0], 'runs', o[0])) for k,o in asked.items() if k!='blend'}
    from recipes import blend
    res['blend'] = blend([animal.predict(oof.runs),animal.predict(other)], [3,1])
    return dict(at=at, data=data, oof=oof, other=other, before=res)

BLOCKED = '''
import socket, sys, json
from pathlib import Path
def blocked(*args, **kw): raise OSError('the network is blocked')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = blocked
from fastcore.nbio import read_nb
def run(nb, **given):
    env = {}
    for c in read_nb(nb).cells:
        tags = c.metadata.get('tags', [])
        if c.cell_type=='code' and 'install' not in tags: exec(''.join(c.source), env)
        if 'parameters' in tags: env.update(given)
'''

@pytest.fixture(scope='module')
def kernel(made, tmp_path_factory):
    "Every notebook run as in a kernel: the pack's own wheel, folders that are read only, no network; its working folder"
    at = tmp_path_factory.mktemp('kernel')
    inputs,work = at/'input',at/'working'
    work.mkdir()
    shutil.copytree(made['at']/'packs', inputs/'3f9a2c/packs')
    shutil.copytree(made['data'], inputs/'animal')
    wheel = next((inputs/'3f9a2c/packs/folds/wheels').glob('*.whl'))
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--target', at/'site', wheel], check=True)
    for o in [inputs, *inputs.rglob('*')]: o.chmod(0o555 if o.is_dir() else 0o444)
    was = listing(inputs)
    lines = [f'run({str(o/"predict.ipynb")!r}, PACK={str(o)!r}, DATA={str(inputs/"animal")!r}, OUT={o.name+".csv"!r})'
        for o in sorted((inputs/'3f9a2c/packs').iterdir())]
    folds = inputs/'3f9a2c/packs/folds'
    lines.append(f'run({str(folds/"train.ipynb")!r}, PACK={str(folds)!r}, DATA={str(inputs/"animal")!r}, BUDGET=None, FIELDS=dict(epochs=2))')
    lines.append('import recipes\nprint("ran", recipes.__path__[0])')
    env = {**os.environ, 'PYTHONPATH':str(at/'site'), 'XDG_CACHE_HOME':str(at/'cache')}
    res = subprocess.run([sys.executable, '-c', BLOCKED+'\n'.join(lines)], cwd=work, env=env, capture_output=True, text=True)
    yield dict(res=res, work=work, site=at/'site', same=listing(inputs)==was, packs=inputs/'3f9a2c/packs')
    for o in [inputs, *inputs.rglob('*')]: o.chmod(0o755)

def listing(folder): return {str(o):(o.stat().st_mtime_ns, o.stat().st_size) for o in folder.rglob('*')}

def test_kernel_runs(kernel):
    "The notebooks ran, with the code of the wheel, and wrote nothing into the input"
    assert not kernel['res'].returncode, kernel['res'].stderr[-3000:]
    assert f'ran {kernel["site"]}' in kernel['res'].stdout
    assert kernel['same']

@pytest.mark.parametrize('name', ['folds','blend','parts','rounds','every'])
def test_same_submission(kernel, made, name):
    "What is predicted from the pack is what was predicted before packing"
    df = pd.read_csv(kernel['work']/f'{name}.csv', dtype=str)
    assert df.equals(made['before'][name].submission().astype(str))

def test_same_scores(made):
    "Scores too, of averaged folds, of a blend with weights, and of joined parts"
    for name,o in made['before'].items():
        after = silent(predict_pack, made['at']/'packs'/name, made['data'])
        assert abs(after.p-o.p).max()<1e-6, name
        assert after.values==o.values and after.table.sample is not None

def test_trained(kernel):
    "The training notebook wrote a run, as its parameters said"
    made, = (kernel['work']/'runs/animal').glob('*/fold0')
    assert Run(made).done and len(Run(made).history)==2
    assert (kernel['work']/'submission.csv').exists()

def test_nothing_of_this_machine(made):
    "No text of a pack names a folder of the machine it was packed on"
    texts = [o for o in (made['at']/'packs').rglob('*') if o.suffix in ('.json','.ipynb','.md','.txt') and o.name!='valid.json']
    assert len(texts)>20 and not [o for o in texts if str(made['at']) in o.read_text()]

def test_what_is_packed(made):
    "No checkpoints, logs or test predictions; the parts of a run and the rows of a round are there"
    at = made['at']/'packs'
    names = {o.relative_to(at).as_posix() for o in at.rglob('*') if o.is_file()}
    assert not [o for o in names if o.endswith(('last.ckpt','history.csv','test.npy','.py')) and not o.startswith('rounds/code')]
    assert {'parts/runs/0/0-fold0/part1/fold0/model.safetensors','rounds/runs/0/0-fold0/rows.npz','rounds/code/mine.py'}<=names
    assert json.loads((at/'rounds/pack.json').read_text())['modules']==['mine']
    assert [len(o) for o in open_pack(at/'blend', made['data'])]==[2,1]

# --- uploaded badly

@pytest.fixture
def copy(made, tmp_path): return Path(shutil.copytree(made['at']/'packs/folds', tmp_path/'attached'))

def test_flipped_byte(copy):
    f = copy/'runs/0/1-fold1/model.safetensors'
    b = bytearray(f.read_bytes())
    b[len(b)//2] ^= 1
    f.write_bytes(b)
    with pytest.raises(BadInput, match=r'1 file with other content \(runs/0/1-fold1/model.safetensors\)'): check_pack(copy)
    with pytest.raises(BadInput): predict_pack(copy)

def test_half_uploaded(copy):
    "All that is wrong is said at once; wheels that were added are no fault"
    (copy/'wheels/more-1.0-py3-none-any.whl').touch()
    check_pack(copy)
    (copy/'runs/0/0-fold0/valid.npy').unlink()
    f = copy/'runs/0/0-fold0/model.safetensors'
    f.write_bytes(f.read_bytes()[:77])
    with pytest.raises(BadInput, match=r'(?s)(?=.*missing \(runs/0/0-fold0/valid.npy\))(?=.*model.safetensors: 77 of [\d,]+ bytes)'): check_pack(copy)
    (copy/'pack.json').write_text((copy/'pack.json').read_text()[:300])
    with pytest.raises(ValueError, match='pack.json is cut short'): check_pack(copy)

# --- where things are found

def test_finds_pack_and_data(copy, made, tmp_path, monkeypatch):
    "A pack some folders deep is found; the competition's files are those of the kernel, never the sample"
    (tmp_path/'input/datasets/someone').mkdir(parents=True)
    at = copy.rename(tmp_path/'input/datasets/someone/x')
    source = next(''.join(c.source) for c in read_nb(at/'predict.ipynb').cells if 'found =' in ''.join(c.source))
    env = dict(PACK=None)
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    exec(source.replace('/kaggle/input', str(tmp_path/'input')), env)
    assert env['PACK']==at
    with pytest.raises(FileNotFoundError, match='0 packs'): exec(source.replace('/kaggle/input', str(tmp_path/'none')), dict(PACK=None))
    monkeypatch.setattr(settings, 'KAGGLE', tmp_path/'input')
    with pytest.raises(FileNotFoundError, match='animal are not here: add the competition'): silent(data_of, at)
    (tmp_path/'input/animal').symlink_to(made['data'])
    assert silent(data_of, at)==tmp_path/'input/animal'
    assert silent(predict_pack, at).submission().equals(made['before']['folds'].submission())

def test_sides(copy, made):
    "A table that was laid beside the competition's files is there again, beside links to them"
    (copy/'sides').mkdir()
    (copy/'sides/bounding_boxes.csv').write_text('Image,x0\n')
    at = data_of(copy, made['data'])
    assert {o.name for o in at.iterdir()}=={'bounding_boxes.csv', *(o.name for o in made['data'].iterdir())}
    assert (at/'train.csv').samefile(made['data']/'train.csv') and not (made['data']/'bounding_boxes.csv').exists()
    packing.copy_sides(at, copy/'again')
    assert [o.name for o in (copy/'again').iterdir()]==['bounding_boxes.csv']

def test_backbones(made, tmp_path, monkeypatch):
    "Published weights come along where they are on this machine, and training starts from them"
    (tmp_path/'w.safetensors').write_bytes(b'weights')
    monkeypatch.setattr(packing, '_weights', lambda arch: tmp_path/'w.safetensors')
    run = made['other'].run
    packing.copy_backbones([run.recipe], tmp_path/'none')
    assert not (tmp_path/'none').exists()
    parts = animal.house.but(parts=(run.recipe.but(pretrained=True), run.recipe.but(arch='seresnext50', pretrained=True)))
    packing.copy_backbones([parts], tmp_path/'backbones')
    assert sorted(o.name for o in (tmp_path/'backbones').iterdir())==['seresnext50_32x4d.safetensors','test_resnet.safetensors']
    at = Path(shutil.copytree(made['at']/'packs/folds', tmp_path/'p'))
    assert recipe_in(at)==made['oof'].runs[0].recipe
    shutil.move(tmp_path/'backbones', at/'backbones')
    assert recipe_in(at)==made['oof'].runs[0].recipe.but(weights=str(at/'backbones'))

# --- refused

def test_refused(made, tmp_path):
    run = made['other'].run
    with pytest.raises(ValueError, match='is there already'): pack(run, tmp_path)
    shutil.copytree(run.path, tmp_path/'fold0')
    (tmp_path/'fold0/done.json').unlink()
    with pytest.raises(ValueError, match=r'not trained to its end: train\(resume='): pack(tmp_path/'fold0', tmp_path/'out')
    assert not (tmp_path/'out').exists() and [o.name for o in tmp_path.iterdir()]==['fold0']
    with pytest.raises(ValueError, match='notebook or script'): packing.copy_code(('__main__',), tmp_path/'code')
    text = (run.path/'recipe.json').read_text().replace('recipes.animal:competition', 'recipes.imet_files:competition')
    (tmp_path/'fold0/recipe.json').write_text(text)
    shutil.copy(run.path/'done.json', tmp_path/'fold0')
    with pytest.raises(ValueError, match='several competitions'): pack([run, tmp_path/'fold0'], tmp_path/'out')

def test_package_of_own(tmp_path, monkeypatch):
    "The whole package of a module is copied"
    (tmp_path/'mypkg/deep').mkdir(parents=True)
    for o in '__init__.py','net.py','deep/__init__.py','deep/loss.py': (tmp_path/'mypkg'/o).write_text('X = 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    packing.copy_code(('mypkg.deep.loss','mypkg.net'), tmp_path/'code')
    assert len(list((tmp_path/'code/mypkg').rglob('*.py')))==4

# --- the wheel

def test_wheel(tmp_path):
    "Every module of both packages, with right hashes as pip checks them; exact versions of what it needs"
    import recipes
    z = ZipFile(own_wheel(tmp_path))
    root = Path(recipes.__path__[0]).parent
    ours = {f.relative_to(root).as_posix() for o in ('callbacks','recipes') for f in (root/o).rglob('*.py')}
    assert ours=={o for o in z.namelist() if '.dist-info/' not in o}
    info = next(o for o in z.namelist() if o.endswith('METADATA'))
    assert 'Name: fastai-recipes' in z.read(info).decode() and 'Requires-Dist: timm' in z.read(info).decode()
    assert len(z.read(info.replace('METADATA', 'RECORD')).decode().splitlines())==len(z.namelist())
    lines = requirements()
    assert {'fastai','torch','timm','safetensors'}<={o.partition('==')[0] for o in lines}
    assert all(re.fullmatch(r'[\w.-]+(==[\w.]+)?', o) for o in lines)
