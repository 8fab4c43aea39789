"""Recipes of a task at equal time: `python tests/benchmarks/equal_time.py TASK [FOLDER] [--arch resnet18] [--side 64] [--secs 180]`

Each recipe is trained with the same network, long side and precision for about `secs` seconds, `--seeds 3` times on a fold each, from scratch
unless `--weights FILE` says otherwise, a recipe with rounds as its first round; `--recipes a,b` picks some, `--jobs 2` trains two at a time with half of the cores each.
What is printed: the held-out score of each, and by how much `house` is better, with a paired bootstrap 95 % interval.
"""
import json, os, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from time import perf_counter
os.environ.setdefault('MPLBACKEND', 'Agg')
import numpy as np

DEFAULTS = dict(arch='resnet18', side='64', secs='180', seeds='3', recipes='', jobs='1', weights='', only='')

def options(argv):
    "Task, folder, and the rest by name"
    opts,words,todo = dict(DEFAULTS),[],list(argv)
    while todo:
        o = todo.pop(0)
        if o[2:] in opts and o.startswith('--') and todo: opts[o[2:]] = todo.pop(0)
        elif o.startswith('--'): sys.exit(__doc__)
        else: words.append(o)
    if not words: sys.exit(__doc__)
    return words[0],words[1] if len(words)>1 else None,opts

def same_folds(table, seed=0):
    "The same folds for every recipe: five, or four that hold out pictures of ids that stay in training"
    from recipes.data.folds import stratified_folds
    from recipes.data.whale_folds import id_folds
    return id_folds(table, 4, 0, share=.28) if table.y.ndim==1 and table.y.max()==len(table.vocab) else stratified_folds(table, 5, 0)

def with_fields(recipe, **fields):
    "The recipe with fields changed in all stages, parts and rounds"
    from recipes.recipe.settling import changed
    return changed(recipe, fields)

def at_side(recipe, side):
    "The recipe with its longest side `side`, and so its parts; smaller stages shrink with it"
    from callbacks.resize import hw
    from recipes.recipe.settling import beside
    longest = max(max(hw(o.size)) for o in recipe.steps())
    def fit(size): return tuple(max(8, round(o*side/longest)) for o in hw(size))
    def small(d): return d|(dict(size=fit(d['size'])) if 'size' in d else {})|(dict(parts=of(d['parts'])) if 'parts' in d else {})
    def of(parts): return tuple(at_side(o, side) for o in parts)
    scales = beside(recipe.scales, recipe.size, fit(recipe.size))
    stages,rounds = (tuple(map(small, o)) for o in (recipe.stages,recipe.rounds))
    return recipe.but(size=fit(recipe.size), scales=scales, stages=stages, rounds=rounds, parts=of(recipe.parts))

def prepared(task, name, opts, seed):
    "A named recipe with what all have in common"
    recipe = getattr(task, name)
    n = int(min(min(o.bs for o in recipe.steps()), 64))   # large batches take too few steps in minutes
    kw = dict(arch=opts['arch'], pretrained=False, weights=opts['weights'] or None, folds=same_folds, run_folds=None, seed=seed, bs=n, precision='auto')
    return at_side(with_fields(recipe, **kw), int(opts['side']))

def timed(task, folder, recipe, fold):
    "The run, its seconds, and those of its epochs"
    from fastai.callback.core import Callback
    from fastai.learner import defaults
    class Fits(Callback):
        "Seconds of all fits but the search for a rate"
        secs = 0
        def before_fit(self): self.began = perf_counter()
        def after_fit(self): Fits.secs += (perf_counter()-self.began)*(not hasattr(self.learn, 'lr_finder'))
    began,before = perf_counter(),defaults.callbacks
    defaults.callbacks = [*before,Fits]
    try: run = task.train(folder, fold=fold, recipe=recipe).run
    finally: defaults.callbacks = before
    return run,perf_counter()-began,Fits.secs

def affordable(task, folder, recipe, secs):
    "Epochs that take about so many seconds, from a short trial"
    trial,total,inside = timed(task, folder, with_fields(recipe, epochs=max(6, 2*len(recipe.stages))), 0)
    return max(len(recipe.steps()), round((secs-(total-inside))/inside*len(trial.history)))

def one(task, folder, name, opts, seed, epochs=0):
    "Train one recipe for about so many seconds"
    task = import_module(f'recipes.{task}')
    recipe = prepared(task, name, opts, seed)
    epochs = epochs or affordable(task, folder, recipe, float(opts['secs']))
    run,total,_ = timed(task, folder, with_fields(recipe, epochs=epochs), seed)
    return dict(recipe=name, seed=seed, epochs=epochs, secs=total, score=run.score, rows=run.valid.rows.tolist(),
        labels=np.asarray(_dense(run.valid.labels)).tolist())

def _dense(o): return o.toarray().astype(int) if hasattr(o, 'toarray') else o

def apart(argv, folder, name, seed, threads, epochs=0):
    "The same in a process of its own"
    env = os.environ|dict(OMP_NUM_THREADS=str(threads), PYTHONWARNINGS='ignore')
    with tempfile.TemporaryDirectory() as d:
        Path(d, 'settings.ini').write_text('[DEFAULT]\nruns = runs\n')
        cmd = [sys.executable, str(Path(__file__).resolve()), *argv, '--only', f'{name},{seed},{epochs}']
        p = subprocess.run(cmd, cwd=d, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if p.returncode: sys.exit(f'{name}, seed {seed}:\n{p.stdout[-2000:]}\n{p.stderr[-2000:]}')
    res = json.loads(p.stdout.splitlines()[-1])
    print(f'{name:<10} seed {seed}: {res["score"]:.4f}, {res["epochs"]} epochs, {res["secs"]:.0f} s', flush=True)
    return res

def table_of(done, y, metric):
    "A line a recipe, the best first"
    from recipes.infer.compare import paired_bootstrap
    by = {}
    for o in done: by.setdefault(o['recipe'], []).append(o)
    def joined(k): return [np.concatenate([np.array(o[f]) for o in sorted(by[k], key=lambda o: o['seed'])]) for f in ('rows','labels')]
    rows,ours = joined('house')
    res = []
    for k,v in by.items():
        r,labels = joined(k)
        assert (r==rows).all()
        gain = (0.,0.,0.) if k=='house' else paired_bootstrap(metric, y[rows], ours, labels)
        res.append((np.mean([o['score'] for o in v]), k, np.std([o['score'] for o in v]), np.mean([o['secs'] for o in v]),
            np.mean([o['epochs'] for o in v]), gain))
    return sorted(res, reverse=True)

def main(argv):
    "Train all, print the table"
    name,folder,opts = options(argv)
    task = import_module(f'recipes.{name}')
    folder = str(Path(folder).resolve()) if folder else None
    argv = [name, *([folder] if folder else []), *(w for k,v in opts.items() if v and k!='only' for w in (f'--{k}',v))]
    if opts['only']:
        recipe,*numbers = opts['only'].split(',')
        return print(json.dumps(one(name, folder, recipe, opts, *map(int, numbers))))
    from recipes.words import named
    names = opts['recipes'].split(',') if opts['recipes'] else [k for k,v in named(task).items() if not v.parts]
    jobs = int(opts['jobs'])
    threads = max(1, len(os.sched_getaffinity(0))//jobs)   # those that this process may use
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda o: apart(argv, folder, o, 0, threads), names))
        todo = [(o['recipe'],s,threads,o['epochs']) for s in range(1, int(opts['seeds'])) for o in done]
        done += pool.map(lambda o: apart(argv, folder, *o), todo)
    if 'house' not in names: return
    print(f'\n| {name} recipe | held-out score | ± over seeds | epochs | seconds | house is better by (95 %) |\n|---|---|---|---|---|---|')
    for score,k,std,secs,epochs,(g,lo,hi) in table_of(done, task.table(folder).y, task.competition.metric):
        more = '' if k=='house' else f'{g:+.4f} ({lo:+.4f} to {hi:+.4f})'
        print(f'| {k} | {score:.4f} | {std:.4f} | {epochs:.0f} | {secs:.0f} | {more} |')

if __name__=='__main__': main(sys.argv[1:])
