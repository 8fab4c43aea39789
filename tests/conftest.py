"Every test on its own: an empty working folder, a cache of its own, no settings of this machine, no window"
import os, tempfile
import pytest

# Set before anything is imported that reads them; a process that a test starts inherits them
cache = tempfile.TemporaryDirectory(prefix='cache-')
os.environ |= dict(XDG_CACHE_HOME=cache.name, MPLBACKEND='Agg', NO_ALBUMENTATIONS_UPDATE='1')
os.environ.setdefault('OMP_NUM_THREADS', '2')

@pytest.fixture(scope='session', autouse=True)
def session_cwd(tmp_path_factory):
    "Fixtures that tests share run in a folder without `settings.ini` above it"
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('cwd'))
        yield

@pytest.fixture(autouse=True)
def own_cwd(tmp_path, monkeypatch):
    "What a test writes into the working folder, `runs/` say, is its own"
    monkeypatch.chdir(tmp_path)
