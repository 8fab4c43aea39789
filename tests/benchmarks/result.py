"What a benchmark says: two sides measured in one run, their ratio, and the bar it should meet"
from typing import NamedTuple

class Row(NamedTuple):
    "A line of the table"
    what:str # What was measured, with its unit
    ours:float # Our side
    other:float # What it is compared with
    ratio:float # The number the bar is about
    bar:str='' # `>=2`, `<=1.3`, or nothing where the number only informs

    @property
    def met(self):
        "Yes, no, or nothing"
        if not self.bar: return ''
        bar = float(self.bar[2:])
        return 'yes' if (self.ratio>=bar if self.bar[0]=='>' else self.ratio<=bar) else 'NO'

def _number(v): return f'{v:,.0f}' if abs(v)>=100 else f'{v:.1f}' if abs(v)>=10 else f'{v:.3f}'

def lines(rows):
    "Rows as text with straight columns"
    cells = [('benchmark','ours','other','ratio','bar','met')]
    cells += [(o.what, *map(_number, (o.ours,o.other,o.ratio)), o.bar, o.met) for o in rows]
    width = [max(map(len, o)) for o in zip(*cells)]
    return [f'{first:<{width[0]}}  '+'  '.join(f'{c:>{w}}' for c,w in zip(rest, width[1:])) for first,*rest in cells]
