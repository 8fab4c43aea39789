"""Memory of converting a parquet file of pictures; as a script, one step in a process of its own

    parquet.py write FILE ROWS    a file of so many rows, all in one row group
    parquet.py convert FILE       prints the most anonymous memory held beyond that before, bytes, and seconds
"""
import re, subprocess, sys, threading, time
from functools import partial
from pathlib import Path
import numpy as np

SHAPE = 137,236

def write(file, n):
    "Columns are slices of one array, so that no row group is ever in memory; a tenth of the pixels is ink"
    from pyarrow import array, parquet, table
    rng,pixels = np.random.default_rng(0),SHAPE[0]*SHAPE[1]
    long = np.where(rng.random(n+pixels)<.1, rng.integers(0, 256, n+pixels), 255).astype(np.uint8)
    ids,long = array([f'Train_{i}' for i in range(n)]),array(long)
    cols = [ids, *(long.slice(i, n) for i in range(pixels))]
    parquet.write_table(table(cols, ['image_id', *map(str, range(pixels))]), file, row_group_size=n)

def anonymous():
    "Memory of this process that no file stands behind, bytes"
    return 1024*int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])

class Watch(threading.Thread):
    "Looks every 2 ms how much this process holds"
    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.peak = anonymous()
        self.done = threading.Event()
    def run(self):
        while not self.done.wait(.002): self.peak = max(self.peak, anonymous())

def convert(file):
    "Convert and check some pictures"
    from recipes.data.checks import Problems
    from recipes.data.parquet import fill_parquet, pixels_of
    watch,start = Watch(),time.perf_counter()
    watch.start()
    problems = Problems('bengali')
    ids = problems.check_strips(file)
    problems.stop()
    frame = pixels_of([file], ids, partial(fill_parquet, file=file))
    watch.done.set()
    watch.join()
    print(max(watch.peak, anonymous())-watch.before, time.perf_counter()-start)
    check(np.load(frame.path[0], mmap_mode='r'), len(ids))

def check(out, n):
    "Pixel `j` of row `i` is `i+j` of the one array"
    assert out.shape==(n,*SHAPE)
    flat = out.reshape(n, -1)
    for i in 1,n//2,n-1: assert (flat[i,:-1]==flat[i-1,1:]).all() and len(np.unique(flat[i]))>200

def step(*args):
    "What this script prints in a process of its own"
    return subprocess.run([sys.executable, __file__, *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout

def parquet(path, seeds=0, epochs=0, n=50_000):
    "Converting one row group of 50,000 pictures, as the competition's files are"
    from result import Row
    file = Path('train_image_data_0.parquet').resolve()
    step('write', file, n)
    mb,s = (float(o) for o in step('convert', file).split()[-2:])
    group = n*SHAPE[0]*SHAPE[1]/1e6
    return [Row(f'memory of converting {n:,} rows of parquet, MB (other: the row group; ratio: MB)', mb/1e6, group, mb/1e6, '<=600'),
        Row(f'converting {n:,} rows of parquet, pictures/s', n/s, 0, n/s)]

if __name__=='__main__':
    what,file,*n = sys.argv[1:]
    write(file, int(n[0])) if what=='write' else convert(Path(file))
