"Where data come from: the order of places, whose `settings.ini` counts, and the defaults"
import os, subprocess, sys
from pathlib import Path
import pytest
from recipes.data import settings
from recipes.data.settings import data_path, find_settings, setting

@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "No settings file, no Kaggle folder and no home of this machine is seen"
    (tmp_path/'work/deep').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'work/deep')
    monkeypatch.setattr(settings, 'KAGGLE', tmp_path/'kaggle')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cachehome'))
    monkeypatch.setenv('TMPDIR', str(tmp_path))

def _mk(f, text=''):
    f.parent.mkdir(parents=True, exist_ok=True)
    f.write_text(text, encoding='utf-8')
    return f

def test_order(tmp_path, capsys):
    "`path=` before `settings.ini` before Kaggle before the sample, and one line about the last three"
    get = lambda **kw: data_path('imet', 'slug', **kw)
    assert get() is None
    assert 'built-in sample' in capsys.readouterr().out
    (tmp_path/'kaggle/competitions/slug').mkdir(parents=True)
    assert get()==tmp_path/'kaggle/competitions/slug'
    (tmp_path/'kaggle/slug').mkdir()
    assert get()==tmp_path/'kaggle/slug'
    assert 'Kaggle kernel' in capsys.readouterr().out
    (tmp_path/'mine').mkdir()
    _mk(tmp_path/'settings.ini', '[imet]\npath = mine\n')
    assert get()==tmp_path/'mine'
    assert capsys.readouterr().out.count('\n')==1
    (tmp_path/'other').mkdir()
    assert get(path=str(tmp_path/'other'))==tmp_path/'other'
    assert capsys.readouterr().out==''

def test_no_slug(tmp_path):
    "Without a slug the whole of the Kaggle folder is not taken for the data"
    (tmp_path/'kaggle').mkdir()
    assert data_path('mine') is None

def test_nearest_of_ours(tmp_path):
    "The nearest file of ours wins; other programs' are passed over, readable or not"
    far = _mk(tmp_path/'settings.ini', '[whale]\npath = .\n')
    near = _mk(tmp_path/'work/settings.ini', '[DEFAULT]\nlib_name = x\n[flake8]\nworkers = 3\n')
    assert find_settings()[0]==far
    near.write_text('key without a section\n')
    assert find_settings()[0]==far
    near.write_text('[DEFAULT]\nworkers = 3\n')
    assert find_settings()[0]==near
    assert find_settings('birds')[0]==near
    near.write_text('[birds]\npath = .\n')
    assert find_settings('birds')[0]==near and find_settings()[0]==far

@pytest.mark.parametrize('text', ['\ufeff[imet]\npath = ..\n', '[imet]\npath = %(x)s/..\n', '[imet]\npath: ..\n'])
def test_odd_text(tmp_path, text):
    "A byte order mark, a percent sign and a colon are read as written"
    (tmp_path/'work/%(x)s').mkdir()
    _mk(tmp_path/'work/settings.ini', text)
    assert data_path('imet').resolve() in (tmp_path, tmp_path/'work')

@pytest.mark.parametrize('text,msg', [
    ('[imet]\npath = gone\n', r'gone is not a folder .*path in section \[imet\] of .*settings.ini'), ('[imet]\npath\n', r'settings.ini can not be read')])
def test_bad_file(tmp_path, text, msg):
    "What was given and is wrong stops, and says where"
    _mk(tmp_path/'settings.ini', text)
    with pytest.raises((FileNotFoundError,ValueError), match=msg): data_path('imet')

def test_bad_path(tmp_path):
    "A file is no folder"
    f = _mk(tmp_path/'x.zip')
    with pytest.raises(FileNotFoundError, match='x.zip is not a folder .given as path='): data_path('imet', path=f)

def test_setting(tmp_path):
    "Settings are relative to their file, and have defaults"
    assert setting('runs')==Path.cwd()/'runs'
    assert setting('cache')==tmp_path/'cachehome/fastai-recipes'
    assert 1<=setting('workers')<=8
    _mk(tmp_path/'settings.ini', '[DEFAULT]\nruns = out\ncache = c\nworkers = 0\n')
    assert (setting('runs'),setting('cache'),setting('workers'))==(tmp_path/'out',tmp_path/'c',0)

def test_cache_not_writable(tmp_path, monkeypatch):
    "Without a home to write to, the cache is in the temporary folder"
    monkeypatch.setenv('XDG_CACHE_HOME', str(_mk(tmp_path/'a_file')))
    monkeypatch.setattr(settings.tempfile, 'tempdir', None)
    assert setting('cache').parent==tmp_path

def test_workers_are_shared(tmp_path, monkeypatch):
    "Folds that are trained at a time share the cores, unless a number was asked for"
    monkeypatch.setattr(settings.os, 'sched_getaffinity', lambda pid: set(range(6)), raising=False)
    for n,want in ((1,6),(2,3),(4,1),(9,1)):
        monkeypatch.setenv('RECIPES_PARALLEL', str(n))
        assert setting('workers')==want
    _mk(tmp_path/'settings.ini', '[DEFAULT]\nworkers = 5\n')
    assert setting('workers')==5

@pytest.mark.parametrize('n', ['two','-1','1.5'])
def test_bad_workers(tmp_path, n):
    _mk(tmp_path/'settings.ini', f'[DEFAULT]\nworkers = {n}\n')
    with pytest.raises(ValueError, match=f'workers = {n} in .*whole number'): setting('workers')

def test_unknown_setting():
    with pytest.raises(ValueError, match='there are runs, cache, workers'): setting('batch')

def test_light():
    "Settings need no torch"
    code = 'import sys, recipes.data.settings; assert not {"torch","pandas","numpy"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(settings.__file__).parents[2], env=os.environ)
