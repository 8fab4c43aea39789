"The HTML report of a run: whole and valid, safe against labels, silent on the network, readable on a phone and in the dark"
import json, re, shutil, subprocess, sys
from collections import Counter
from dataclasses import replace
from functools import partial
from fastcore.xml import to_xml
from html import escape
from html.parser import HTMLParser
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from recipes import animal, bengali, imet, whale
from recipes.data.fixtures import sample
from recipes.infer.embed import by_retrieval
from recipes.infer.tta import as_is
from recipes.look import mistakes
from recipes.look.drawn import charts
from recipes.look.overview import score_interval
from recipes.look.pages import data_table, page, section, span_of
from recipes.look.reports import report
from recipes.recipe.effects import held_out
from recipes.recipe.folder import Run

EVIL = '<script>alert(1)</script>','"><img src=x onerror=alert(2)>',"' onload='alert(3)",'</style></svg><script>alert(4)//'

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A tiny run of each kind of target, and a report of each"
    m = pytest.MonkeyPatch()
    m.chdir(tmp_path_factory.mktemp('reported'))
    kw = dict(arch='test_resnet', pretrained=False, resize=(), epochs=1, bs=16, lr=1e-3, precision='fp32', tta=(as_is,))
    try: yield dict(imet=imet.train(sample('imet', 120), size=64, **kw).run, bengali=bengali.train(sample('bengali', 120), size=(40,64), **kw).run,
        animal=animal.train(sample('animal', 120), size=64, folds=2, **kw).run, second=animal.train(sample('animal', 120), fold=1, size=64, folds=2, **kw).run,
        whale=whale.train(sample('whale', 148), size=(48,64), scorer=partial(by_retrieval, score='mean'), **kw).run)
    finally: m.undo()

@pytest.fixture(scope='module')
def pages(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('pages')
    return {k:report(runs[k], folder/f'{k}.html') for k in ('imet','bengali','animal','whale')}

class Seen(HTMLParser):
    "Elements, attributes and text of a page; elements that are closed in the wrong order"
    void = {'meta','link','img','br','hr','input'}
    def __init__(self, text):
        super().__init__()
        self.open,self.wrong,self.elements,self.text = [],[],[],''
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.elements.append((tag, dict(attrs)))
    def handle_endtag(self, tag):
        if not self.open or self.open.pop()!=tag: self.wrong.append(tag)
    def handle_data(self, data): self.text += data if self.open and self.open[-1]!='style' else ''
    def tags(self): return Counter(o for o,_ in self.elements)
    def values(self, *names): return [a[k] for _,a in self.elements for k in names if k in a]

active = {'script','iframe','object','embed','form','base','audio','video','source','foreignobject','animate','set'}

def check(text):
    "Well formed, and with nothing that runs or is fetched"
    seen = Seen(text)
    assert not seen.wrong and not seen.open, seen.wrong[:3]
    assert not active & set(seen.tags())
    assert not [k for _,a in seen.elements for k in a if k.startswith('on')]
    assert {o[:5] for o in seen.values('src')}<={'data:'}
    ids = seen.values('id')
    assert len(ids)==len(set(ids))
    links = seen.values('href','xlink:href')
    assert all(o=='data:,' or o[1:] in ids and o[0]=='#' for o in links)
    assert not seen.values('srcset','action','poster','data','background')
    styles = ' '.join([*seen.values('style'), *re.findall(r'<style>(.*?)</style>', text, re.S)])
    assert '@import' not in styles and all(o[0]=='#' for o in re.findall(r'url\((.*?)\)', styles))
    assert all(a.get('alt') for t,a in seen.elements if t=='img') and all(a.get('aria-label') for t,a in seen.elements if t=='svg')
    assert text.startswith('<!doctype html>') and seen.tags()['title']==seen.tags()['h1']==seen.tags()['main']==1
    assert ('html',dict(lang='en')) in seen.elements
    return seen

wanted = {'score','curves','decision','worst-pictures','where-it-looks','classes','calibration','slices','recipe','environment'}

@pytest.mark.parametrize('task', ['imet','bengali','animal','whale'])
def test_all_targets(runs, pages, task):
    text,run = pages[task].read_text(),runs[task]
    seen = check(text)
    assert wanted<=set(seen.values('id')) and len(text)<1_000_000
    assert seen.tags()['img']>=15 and seen.tags()['svg']>=3
    score,low,high = score_interval(run.valid)
    assert score==pytest.approx(run.score) and f'{score:.4f}' in seen.text and f'{low:.4f} to {high:.4f}' in seen.text
    worst = run.valid.ids[mistakes.Labels(run.valid).order[0]]
    assert seen.text.index(worst)>seen.text.index('Worst pictures')
    assert run.env['torch'] in seen.text and 'test_resnet' in seen.text and str(len(run.valid)) in seen.text
    assert 'No maps' not in seen.text or task=='whale'
    for k,v in run.valid.values.items(): assert k in seen.text and (isinstance(v, dict) or f'{v:.3g}'[:4] in seen.text)
    assert not plt.get_fignums()

def test_names_do_not_run(runs, tmp_path):
    "Labels, fields, notes and commands are text, whatever is in them"
    run = runs['animal']
    own = tmp_path/'runs'/'fold0'
    shutil.copytree(run.path, own)
    (own.parent/'note.json').write_text(json.dumps(dict(lb=.5, text=EVIL[0])))
    env = json.loads((own/'env.json').read_text())
    (own/'env.json').write_text(json.dumps(env|dict(command=EVIL[1], device=EVIL[2])))
    names = [f'{EVIL[i%4]}{i}' for i in range(len(run.table.vocab))]
    (own/'classes.json').write_text(json.dumps(names))
    table = replace(run.table, names=names, vocab=names, train=run.table.train.assign(id=[f'<b>{o}' for o in run.table.train.id]))
    about = json.loads((own/'valid.json').read_text())
    (own/'valid.json').write_text(json.dumps(about|dict(ids=[f'<b>{o}' for o in about['ids']])))
    evil = Run(own, run.recipe.but(about=EVIL[0], name=EVIL[1]), table=table)
    text = report(evil).read_text()
    seen = check(text)
    assert '<script' not in text and 'b' not in seen.tags()
    assert seen.text.count('alert(1)')>5 and all(o in seen.text for o in EVIL)
    assert '0.5000' in seen.text and 'entered by hand' in seen.text

def test_folds_and_files(runs, tmp_path):
    "A folder of folds, a list, one fold; where the page is written"
    both = [runs['animal'],runs['second']]
    for i,o in enumerate(both): shutil.copytree(o.path, tmp_path/'cv'/f'fold{i}')
    f = report(tmp_path/'cv')
    assert f==tmp_path/'cv'/'report.html' and report(tmp_path/'cv'/'fold1')==tmp_path/'cv'/'fold1'/'report.html'
    seen = check(f.read_text())
    oof = held_out(both)
    assert f'{oof.score():.4f}' in seen.text and all(f'{o.score:.4f}' in seen.text for o in both) and 'mean of 2 folds' in seen.text
    assert len(oof)==120 and '120' in seen.text
    assert report(both, tmp_path/'a.html').read_text().count('<svg')==f.read_text().count('<svg')
    assert report(str(tmp_path/'cv'/'fold0'), str(tmp_path/'b.html')).exists()

def test_one_of_two_folds_is_done(runs, tmp_path):
    for i in (0,1): shutil.copytree(runs['animal' if i==0 else 'second'].path, tmp_path/'cv'/f'fold{i}')
    for o in ('done.json','valid.npy','valid.json'): (tmp_path/'cv'/'fold1'/o).unlink()
    seen = check(report(tmp_path/'cv').read_text())
    assert f"{runs['animal'].score:.4f}" in seen.text and 'fold 1: 1 of 1 epochs' in seen.text

@pytest.mark.parametrize('lost', [('done.json','valid.npy','valid.json'), ('done.json','valid.npy','valid.json','history.csv','model.safetensors')])
def test_unfinished(runs, tmp_path, lost):
    shutil.copytree(runs['imet'].path, tmp_path/'fold0')
    for o in lost: (tmp_path/'fold0'/o).unlink()
    seen = check(report(tmp_path/'fold0').read_text())
    assert 'no fold is trained to its end' in seen.text and 'found at the end of training' in seen.text
    assert ('curves' in seen.values('id'))==('history.csv' not in lost) and 'worst-pictures' not in seen.values('id')

def test_nothing_held_out(runs, tmp_path):
    "A run on all rows, with values of other runs"
    shutil.copytree(runs['imet'].path, tmp_path/'all')
    for o in ('valid.npy','valid.json'): (tmp_path/'all'/o).unlink()
    env = json.loads((tmp_path/'all'/'env.json').read_text())
    (tmp_path/'all'/'env.json').write_text(json.dumps(env|dict(fold='all')))
    (tmp_path/'all'/'done.json').write_text(json.dumps(dict(score=None, values=dict(thr=dict(culture=.125, tag=.0625)))))
    seen = check(report(tmp_path/'all').read_text())
    assert 'No score: nothing was held out' in seen.text and 'found by other runs' in seen.text and 'culture 0.125' in seen.text

def test_pictures_gone(runs, tmp_path):
    "The data are not there any more: what is beside the run is still told"
    shutil.copytree(runs['animal'].path, tmp_path/'fold0')
    env = json.loads((tmp_path/'fold0'/'env.json').read_text())
    (tmp_path/'fold0'/'env.json').write_text(json.dumps(env|dict(data=str(tmp_path/'gone'))))
    seen = check(report(tmp_path/'fold0').read_text())
    assert 'the data cannot be read' in seen.text and 'gone' in seen.text and 'curves' in seen.values('id')
    assert f"{runs['animal'].score:.4f}" in seen.text

def test_no_maps_says_why(runs, monkeypatch, tmp_path):
    def maps(run): return to_xml(mistakes.cam_section(mistakes.Labels(runs['animal'].valid), run))
    shutil.copytree(runs['animal'].path, tmp_path/'fold0')
    (tmp_path/'fold0'/'model.safetensors').unlink()
    assert 'No maps' in maps(Run(tmp_path/'fold0', table=runs['animal'].table))
    assert 'No maps' not in maps(runs['animal'])
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    assert 'pip install' in maps(runs['animal'])

def test_interval_is_the_bootstraps(runs):
    "Half a width against the formula for a mean of 0 and 1"
    preds = runs['animal'].valid
    right = np.asarray(preds.y)==preds.labels
    score,low,high = score_interval(preds)
    se = np.sqrt(right.mean()*(1-right.mean())/len(right))
    assert score==pytest.approx(right.mean()) and low<=score<=high and high-low==pytest.approx(2*1.96*se, rel=.25)

def test_table_cells():
    df = pd.DataFrame({'<i>':['<b>',None], 'share':[.5,np.nan], 'n':[1234567,1], 'span':[span_of((.2,.5,.6), (0,1)),'x & y']})
    seen = Seen(to_xml(data_table(df, shares=('share',))))
    assert not {'b','i'} & set(seen.tags()) and not seen.wrong
    assert all(o in seen.text for o in ('<b>','<i>','0.500','1,234,567','–','x & y'))
    assert '--v:50%' in seen.values('style') and '--l:20.0%;--w:40.0%;--m:50.0%' in seen.values('style')

def test_charts_do_not_share_ids():
    def one():
        ax = plt.subplots()[1]
        ax.plot([1,2],'o-', label='<script>')
        ax.legend()
        return ax
    def two():
        fig,axs = plt.subplots(1, 2)
        for ax in axs: ax.scatter([1,2],[3,1], label='a')
        return fig
    parts = [section(str(i), charts(f, alt='"quoted" <alt>')) for i,f in enumerate((one,two,two))]
    seen = check(page('t', [], parts))
    assert seen.tags()['svg']==5 and '<script>' in seen.text and 'currentColor' in to_xml(*parts)
    assert '"quoted" <alt>' in seen.values('aria-label')

# --- in a real browser ---

chrome = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome','chrome'))), None)
browser = pytest.mark.skipif(chrome is None, reason='no Chromium on this machine: the report cannot be looked at in a browser')

def browse(f, tmp_path, *flags):
    "The page's elements, as the browser has them after loading"
    quiet = '--no-sandbox','--disable-gpu','--no-first-run','--disable-background-networking','--disable-component-update','--disable-sync'
    cmd = [chrome, '--headless=new', *quiet, f'--user-data-dir={tmp_path/"profile"}', '--host-resolver-rules=MAP * ~NOTFOUND', *flags, '--dump-dom', f.as_uri()]
    return subprocess.run(cmd, capture_output=True, text=True, timeout=60, check=True).stdout

def asked_for(f, tmp_path):
    "Addresses that a page, not the browser itself, wanted"
    log = tmp_path/'net.json'
    browse(f, tmp_path, f'--log-net-log={log}')
    text = log.read_text()
    events = json.loads(text if text.rstrip().endswith('}') else text.rstrip().rstrip(',')+']}')['events']
    params = [o.get('params', {}) for o in events]
    return {o['url'] for o in params if 'initiator' in o and o['initiator']!='not an origin' and not o['url'].startswith(('file:','data:'))}

@browser
def test_browser_asks_for_nothing(pages, tmp_path):
    assert not asked_for(pages['imet'], tmp_path)
    text = re.sub('<meta http-equiv.*?>', '', pages['imet'].read_text())
    other = tmp_path/'other.html'
    other.write_text(text.replace('</main>', '<img src="http://a.example/x.png" alt="x"></main>'))
    assert asked_for(other, tmp_path)=={'http://a.example/x.png'}   # a request would have been seen

measure = '''<script>
const out = [], ratio = (a, b) => { const l = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b }, [x, y] = [l(a), l(b)].sort(); return (y + .05) / (x + .05) };
const rgb = s => s.match(/[\\d.]+/g).slice(0, 3).map(Number);
function see(f) { const d = f.contentDocument, s = d.defaultView.getComputedStyle;
  const back = rgb(s(d.body).backgroundColor), of = q => [...d.querySelectorAll(q)].map(e => ratio(rgb(s(e)[e.closest('svg') ? 'fill' : 'color']), back));
  const wide = [...d.querySelectorAll('main *')].filter(e => !e.closest('.scroll,svg') && e.getBoundingClientRect().right > f.clientWidth + 1);
  out.push({width: f.clientWidth, scroll: d.scrollingElement.scrollWidth, back, text: Math.min(...of('p,td,th,dt,dd,h1,h2,a,small,span,code')), chart: Math.min(...of('svg text')),
    texts: d.querySelectorAll('svg text').length, wide: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 99)), broken: [...d.images].filter(i => !i.naturalWidth).length});
  document.title = JSON.stringify(out) }
</script>'''

@browser
@pytest.mark.parametrize('dark', [False,True])
def test_reads_on_a_phone_and_in_the_dark(pages, tmp_path, dark):
    "At 390 pixels nothing is wider than the page, and text stands out, in charts too"
    frames = [re.sub('<meta http-equiv.*?>', '', o.read_text()) for o in pages.values()]
    wrap = ''.join(f'<iframe width="{w}" height="900" style="border:0" onload="see(this)" srcdoc="{escape(o)}"></iframe>' for o in frames for w in (390,1280))
    f = tmp_path/'frames.html'
    f.write_text(f'<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title></title>{measure}{wrap}')
    dom = browse(f, tmp_path, f'--blink-settings=preferredColorScheme={int(not dark)}', '--window-size=1400,1000', '--virtual-time-budget=5000')
    seen = json.loads(re.search('<title>(.*?)</title>', dom)[1].replace('&lt;', '<').replace('&gt;', '>').replace('&amp;', '&'))
    assert Counter(o['width'] for o in seen)=={390:4,1280:4}
    for o in seen:
        assert o['scroll']<=o['width'] and not o['wide'] and not o['broken'], o
        assert (max(o['back'])<60)==dark and o['text']>4.5 and o['chart']>4.5 and o['texts']>20, o
