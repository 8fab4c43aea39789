"""The benchmarks: `python tests/benchmarks/run.py [DATA] [--only name,...] [--seeds 3] [--epochs N]`

DATA is a folder that holds each task's files in a folder of its own (`imet` and so on); without it the built-in samples are used.
A name of `--only` stands for every benchmark that begins with it. `--epochs` replaces every training's number.
"""
import contextlib, os, sys, tempfile
from importlib import import_module
from pathlib import Path
os.environ.setdefault('MPLBACKEND', 'Agg')
from inclusive import inclusive
from keypoints import keypoints
from multilabel import calibrate, classes, expected
from pairs import assignment, mining, scoring
from parquet import parquet
from result import lines
from retrieval import retrieval
from small import importing, loading, memory, thresholds
from together import together
from training import animal, bengali, gpu, resnet18, seresnext50, whale
from transfer import transfer

BENCHMARKS = {'import':importing, 'loader':loading, 'memory':memory, 'thresholds':thresholds,
    'retrieval':retrieval, 'parquet':parquet, 'train-resnet18':resnet18, 'train-seresnext50':seresnext50, 'train-bengali':bengali,
    'train-animal':animal, 'train-whale':whale, 'assignment':assignment, 'mining':mining, 'scoring':scoring, 'keypoints':keypoints, 'together':together,
    'classes':classes, 'expected':expected, 'calibrate':calibrate, 'scale':inclusive, 'transfer':transfer, 'gpu-resnet50':gpu}
OTHER = {f'train-{o}':o for o in ('bengali','animal','whale')} | dict(keypoints='whale', together='whale')   # whose files they take; the rest take iMet's

def options(argv):
    "The folder, the names, and the numbers of seeds and epochs"
    given,data = dict(only='', seeds='', epochs=''),None
    todo = list(argv)
    while todo:
        o = todo.pop(0)
        if not o.startswith('--'): data = Path(o).resolve()
        elif o[2:] in given and todo: given[o[2:]] = todo.pop(0)
        else: sys.exit(__doc__)
    only = tuple(given['only'].split(','))
    return data,[o for o in BENCHMARKS if o.startswith(only)],*(int(given[o] or 0) for o in ('seeds','epochs'))

def folder(data, task):
    "Where the pictures of a task are"
    if data is None: return import_module(f'recipes.{task}').competition.sample(1000)
    if not (data/task/'train.csv').exists(): sys.exit(f'{data} holds no {task}/train.csv: give the folder that holds {task}/')
    return data/task

@contextlib.contextmanager
def own_folder():
    "A working folder whose settings send runs and caches into it"
    with tempfile.TemporaryDirectory(prefix='bench-') as d, contextlib.chdir(d):
        Path('settings.ini').write_text('[DEFAULT]\nruns = runs\ncache = cache\n')
        yield

def main(argv):
    "Run what is asked for; the exit status says whether every bar was met"
    data,names,seeds,epochs = options(argv)
    rows = []
    with own_folder():
        of = {o:OTHER.get(o, 'imet') for o in names}
        paths = {o:folder(data, o) for o in set(of.values())}
        for name in names:
            print(f'--- {name}', flush=True)
            new = BENCHMARKS[name](paths[of[name]], seeds, epochs)
            rows += new
            print('\n'.join(lines(new)), flush=True)
    print('', *lines(rows), sep='\n')
    return any(o.met=='NO' for o in rows)

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
