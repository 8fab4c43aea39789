"Checks on the repository as a whole: what each notebook's own lessons cannot see"
import ast, filecmp, importlib, inspect, io, json, os, re, shutil, subprocess, sys, tokenize
from copy import deepcopy
from pathlib import Path
import pytest
from fastcore.nbio import read_nb
from nbdev.clean import clean_nb
from nbdev.showdoc import show_doc

root,pkgs = Path(__file__).parent.parent,('callbacks','recipes')
nbs = sorted((root/'nbs').glob('*.ipynb'))
mods = [f for p in pkgs for f in sorted((root/p).rglob('[!_]*.py'))]
each_nb = pytest.mark.parametrize('f', nbs, ids=lambda f: f.stem)

def name(f): return '.'.join(f.relative_to(root).with_suffix('').parts)
each = pytest.mark.parametrize('f', mods, ids=name)

# --- notebooks

def apart(cmp):
    "Files of a `dircmp` that differ or are on one side, folders below included"
    res = [f'{cmp.left}/{o}' for o in cmp.diff_files+cmp.left_only+cmp.right_only+cmp.funny_files]
    return res + [o for sub in cmp.subdirs.values() for o in apart(sub)]

def test_exported(tmp_path):
    "`callbacks/` and `recipes/` are what `nbs/` exports"
    junk = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for o in 'nbs',*pkgs: shutil.copytree(root/o, tmp_path/o, ignore=junk)
    shutil.copy(root/'pyproject.toml', tmp_path)
    for f in [f for p in pkgs for f in (tmp_path/p).rglob('[!_]*.py')]: f.unlink()
    env = {**os.environ, 'PYTHONPATH':str(tmp_path)}
    subprocess.run([Path(sys.executable).with_name('nbdev-export')], cwd=tmp_path, env=env, check=True)
    res = [o for p in pkgs for o in apart(filecmp.dircmp(root/p, tmp_path/p, ignore=['__pycache__']))]
    assert not res, f'{res}: run `nbdev-export`, or `nbdev-update` after editing a module'

@each_nb
def test_clean(f):
    "`nbdev-clean` was run"
    nb = read_nb(f)
    was = deepcopy(nb.cells)
    clean_nb(nb)
    assert nb.cells==was and all(c.get('execution_count') is None for c in nb.cells)

@each_nb
def test_named(f):
    "A notebook is named after its module, and says in a line what it is"
    cells = [''.join(c.source) for c in read_nb(f).cells]
    assert re.match(r'# .+\n\n> .+', cells[0])
    exp = [o[1] for c in cells if (o := re.search(r'^#\| *default_exp +(\S+)', c, re.M))]
    assert exp==[f.stem.split('_', 1)[-1]] or (not exp and '.' not in f.stem)

LINK = re.compile(r'https://fastai-recipes\.github\.io/fastai-recipes/([\w.]+)\.html')

@each_nb
def test_linked(f):
    "Links between pages go to the site's address, and to pages that are there"
    text = '\n'.join(''.join(c.source) for c in read_nb(f).cells if c.cell_type=='markdown')
    pages = {o.stem.split('_', 1)[-1] if o.stem[0].isdigit() else o.stem for o in nbs}
    assert not {*LINK.findall(text)}-pages and not re.findall(r'\]\([^)]*\.ipynb\b[^)]*\)', text)

# --- nothing of the machine it was made on

AT = re.compile(r'(?<![\w.}/:])/(?:work|root|home|Users|tmp|private|var/folders)/[\w.~-]+|site-packages')

def said(o):
    "Text of a stored output; pictures are left out"
    data = {k:v for k,v in o.get('data', {}).items() if not k.startswith('image/')}
    return ''.join(''.join(v) for v in [o.get('text', ''), *data.values(), o.get('traceback', '')])

@each_nb
def test_no_machine_in_outputs(f):
    "No output names a folder of the machine it was run on, or ends in an error or a warning"
    outs = [(i,o) for i,c in enumerate(read_nb(f).cells) for o in c.get('outputs', [])]
    assert not [(i,m[0]) for i,o in outs if (m := AT.search(said(o)))]
    assert not [i for i,o in outs if o.output_type=='error' or 'Warning: ' in said(o)]

def test_no_machine_in_text():
    "No file that people read names a folder of the machine it was written on"
    kinds = '*.py','*.md','*.toml','*.cfg','*.ini','*.yml','*.css','Makefile'
    inside = [f for d in ('nbs','tests',*pkgs) for k in kinds for f in (root/d).rglob(k)]
    texts = {f:f.read_text() for f in [*inside, *(f for k in kinds for f in root.glob(k)), root/'.ci/run']}
    texts |= {f:'\n'.join(''.join(c.source) for c in read_nb(f).cells) for f in nbs}
    assert not {str(f.relative_to(root)):m[0] for f,s in texts.items() if (m := AT.search(s)) and f!=Path(__file__)}

# --- functions

def body_lines(f, src):
    "Lines of code in the body of function `f`, without docstring, comments and blank lines"
    body = f.body[1:] if ast.get_docstring(f) else f.body
    if not body: return 0
    toks = tokenize.generate_tokens(io.StringIO(src).readline)
    skip = tokenize.COMMENT,tokenize.NL,tokenize.NEWLINE,tokenize.INDENT,tokenize.DEDENT,tokenize.ENDMARKER
    on = {n for t in toks if t.type not in skip for n in range(t.start[0], t.end[0]+1)}
    return len(on & set(range(body[0].lineno, body[-1].end_lineno+1)))

def functions(tree):
    "Functions and methods of a module with the class they are in, without those inside functions"
    for o in tree.body:
        if isinstance(o, ast.FunctionDef): yield o,None
        if isinstance(o, ast.ClassDef): yield from ((m,o) for m in o.body if isinstance(m, ast.FunctionDef))

def documented_beside(cls):
    "Names that a class documents in `_docs`, as `fastcore.foundation.docs` wants it"
    found = [o.value for o in (cls.body if cls else []) if isinstance(o, ast.Assign) and o.targets[0].id=='_docs']
    return {k.arg for o in found for k in o.keywords}

@each
def test_functions(f):
    "Every function fits on half a screen; every public one says what it does and what it takes"
    src = f.read_text()
    tree,lines = ast.parse(src),src.splitlines()
    long = {o.name:n for o in ast.walk(tree) if isinstance(o, ast.FunctionDef) and (n := body_lines(o, src))>25}
    assert not long, f'long: {long}'
    public = [(o,c) for o,c in functions(tree) if not o.name.startswith('_') and not (c and c.name.startswith('_'))]
    undocumented = [o.name for o,c in public if not ast.get_docstring(o) and o.name not in documented_beside(c)]
    assert not undocumented, f'no docstring: {undocumented}'
    taken = [(o.name,a.arg) for o,c in functions(tree) if not c and not o.name.startswith('_')
        for a in o.args.args+o.args.kwonlyargs if a.arg not in ('self','cls') and '#' not in lines[a.end_lineno-1]]
    assert not taken, f'no comment beside the parameter: {taken}'

@each
def test_shown(f):
    "The page of a module can show every one of its functions: `show_doc` fails on a default that is an array"
    mod = importlib.import_module(name(f))
    for o in mod.__all__:
        o = getattr(mod, o)
        if inspect.isfunction(o): assert show_doc(o)._repr_markdown_()

# --- layers

LOWEST = 'callbacks','recipes.data','recipes.models','recipes.losses','recipes.metrics','recipes.ranking','recipes.recall','recipes.thresholds'
FLOORS = [LOWEST, ('recipes.infer',), ('recipes.recipe','recipes.look'), ('recipes',), ('recipes.cli',)]   # any other module is a task

def floor(mod):
    "How high `mod` stands: what is imported is not higher"
    hits = [(len(p),i) for i,ps in enumerate(FLOORS) for p in ps if f'{mod}.'.startswith(f'{p}.')]
    return max(hits)[1]

def imported(f):
    "Full names of the modules of ours that file `f` imports, inside functions too"
    here = name(f).split('.')
    for o in ast.walk(ast.parse(f.read_text())):
        if isinstance(o, ast.Import): found = [a.name for a in o.names]
        elif isinstance(o, ast.ImportFrom):
            base = '.'.join([*(here[:-o.level] if o.level else []), *([o.module] if o.module else [])])
            found = [f'{base}.{a.name}' if (root/base.replace('.', '/')/f'{a.name}.py').exists() else base for a in o.names]
        else: continue
        yield from (m for m in found if m.split('.')[0] in pkgs)

@each
def test_layers(f):
    "Imports go down the house; `callbacks` stands on its own"
    here,mods = name(f),list(imported(f))
    if here.startswith('callbacks.'): assert not [m for m in mods if m.startswith('recipes')]
    assert not [m for m in mods if floor(m)>floor(here)]

def test_layers_see(tmp_path, monkeypatch):
    "The test above sees every way to import"
    monkeypatch.setitem(globals(), 'root', tmp_path)
    (f := tmp_path/'recipes/data/x.py').parent.mkdir(parents=True)
    (tmp_path/'recipes/imet.py').touch()
    f.write_text('import recipes.cli as c, os\nfrom ..imet import y\nfrom .. import imet\ndef f():\n    from recipes.look.x import z\n')
    assert list(imported(f))==['recipes.cli','recipes.imet','recipes.imet','recipes.look.x']
    assert [floor(o) for o in ('callbacks.mix','recipes.metrics','recipes.infer.tta','recipes.recipe.core','recipes.imet',
        'recipes.cli')]==[0,0,1,2,3,4]

# --- names

def test_names():
    "No public function shares the name of a module beside it or at the top, which importing it would hide"
    top = {f.stem for p in pkgs for f in (root/p).glob('[!_]*')}
    clash = []
    for f in mods:
        beside = {o.stem for o in f.parent.glob('[!_]*')}
        clash += [(name(f),o.name) for o,c in functions(ast.parse(f.read_text())) if not c and o.name in beside|top]
    assert not clash

def test_light():
    "`import recipes` imports nothing heavy"
    code = "import recipes, sys, json; print(json.dumps([o for o in sys.modules if '.' not in o]))"
    env = {**os.environ, 'PYTHONPATH':str(root)}
    out = subprocess.run([sys.executable, '-c', code], env=env, check=True, capture_output=True, text=True).stdout
    assert not {'torch','fastai','fastcore','numpy','pandas','scipy','matplotlib','timm','albumentations','cv2','PIL'} & set(json.loads(out))
