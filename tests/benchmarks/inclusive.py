"Reading and training 7,178 classes and 300,000 pictures: the most memory the main process takes, and how long it reads"
import sys, tempfile
from pathlib import Path
from time import perf_counter
import cv2, numpy as np, pandas as pd
from result import Row
from small import python

# --- the files, written by a process of their own

def codes(c): return np.array([f'/m/0{np.base_repr(46656+i, 36).lower()}' for i in range(c)], dtype=object)

def label_file(f, rng, ids, names, each, source, values):
    "`each` rows a picture, the first class a hundred times as common as the last"
    p = 1/np.arange(len(names)//99, len(names)//99+len(names))
    col = np.searchsorted((p/p.sum()).cumsum(), rng.random(len(ids)*each)).clip(max=len(names)-1)
    conf = np.array(values, dtype=object)[rng.integers(len(values), size=len(col))]
    pd.DataFrame(dict(ImageID=np.repeat(ids, each), Source=source, LabelName=names[col], Confidence=conf)).to_csv(f, index=False)

def pictures(folder, rng, ids, split):
    "Eight small pictures under as many names as are wanted"
    (folder/split).mkdir(parents=True)
    kept = [folder/f'{split}{i}.jpg' for i in range(8)]
    for o in kept: cv2.imwrite(str(o), rng.integers(0, 255, (40,40,3), dtype=np.uint8))
    for i,o in enumerate(ids): (folder/split/f'{o}.jpg').symlink_to(kept[i%8])

def generate(folder, n, c, n_test=1000):
    "The competition's files"
    folder,rng,names = Path(folder).resolve(),np.random.default_rng(0),codes(c)
    ids = np.array([f'{i*7919:016x}' for i in range(n+n_test)], dtype=object)
    train,test = ids[:n],ids[n:]
    for split,o in ('train',train),('test',test): pictures(folder, rng, o, split)
    label_file(folder/'train_human_labels.csv', rng, train, names, 4, 'verification', ['1','1','1','0'])
    label_file(folder/'train_machine_labels.csv', rng, train, names, 8, 'machine', ['0.5','0.6','0.7','0.8','0.9','1.0'])
    pd.DataFrame(dict(label_code=names)).to_csv(folder/'classes-trainable.csv', index=False)
    pd.DataFrame(dict(label_code=names, description=names)).to_csv(folder/'class-descriptions.csv', index=False)
    pd.DataFrame(dict(image_id=test, labels='')).to_csv(folder/'stage_1_sample_submission.csv', index=False)
    (folder/'tuning_labels.csv').write_text(''.join(f'{i},{" ".join(names[rng.integers(c, size=4)])}\n' for i in test[:200]))

# --- what is measured, in a process of its own

class Some:
    "A few of the rows"
    def __init__(self, rows, n): self.rows,self.n = rows,n
    def __len__(self): return self.n
    def __call__(self, rng): return rng.sample(range(len(self.rows)), self.n)

def some(table, rows, n=640): return Some(rows, n)

def peaks(folder):
    "Seconds to read, held-out rows, and MB at most after reading, folding and training"
    from memory import peak
    from recipes import inclusive
    from recipes.data.folds import greedy_folds
    from recipes.recipe.folder import read_table
    began = perf_counter()
    table = read_table(inclusive.competition, folder)
    seconds,read = perf_counter()-began,peak()
    greedy_folds(table, 5)
    folded = peak()
    learn = inclusive.train(folder, arch='test_resnet', size=32, epochs=1, lr=1e-3, resize=(), bs=64, tta=(inclusive.as_is,), cache=False,
        sampler=some, precision='fp32')
    return seconds,len(learn.dls.valid.dataset),*(o/1e6 for o in (read,folded,peak()))

def inclusive(path=None, seeds=0, epochs=0, n=300_000, c=7_178, bar=3_000):
    "Read, fold and train with `n` pictures of `c` classes"
    with tempfile.TemporaryDirectory(prefix='inclusive-') as d:
        python(Path(__file__), 'generate', d, n, c)
        seconds,held,*mb = map(float, python(Path(__file__), 'peaks', d).split()[-5:])
    what = f'{n:,} pictures x {c:,} classes'
    dense = n*c*4/1e6
    return [Row(f'reading {what}, s', seconds, seconds, 1.), Row(f'memory after reading {what}, MB (other: dense)', mb[0], dense, mb[0]/dense),
        Row(f'memory after folds, MB (other: {bar:,})', mb[1], bar, mb[1]/bar, '<=1'),
        Row(f'memory after training, {held:,.0f} held out, MB (other: {bar:,})', mb[2], bar, mb[2]/bar, '<=1')]

if __name__=='__main__':
    if sys.argv[1]=='generate': generate(sys.argv[2], *map(int, sys.argv[3:]))
    else: print(*peaks(sys.argv[2]))
