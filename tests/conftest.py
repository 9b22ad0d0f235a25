"What every test file shares: no network, no window, one thread a process, the same seed before each test."
import os, sys
os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')

from pathlib import Path
import pytest
from hypothesis import settings

settings.register_profile('book', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('book')


def pytest_collection_modifyitems(items):
    ("The files that take longest come first, since the last one keeps one worker only: "
     "those that start Triton's interpreter, then those that start other processes.")
    long = {m:{i.path for i in items if i.get_closest_marker(m)} for m in ('interpreter','processes')}
    items.sort(key=lambda i: [i.path not in paths for paths in long.values()])


@pytest.fixture(autouse=True)
def seed():
    if 'torch' in sys.modules: sys.modules['torch'].manual_seed(0)


@pytest.fixture(scope='session')
def root(): return Path(__file__).resolve().parent.parent
