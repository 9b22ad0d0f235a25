"What every test file shares: no network, no window, one thread a process, the same seed before each test."
import gc, os, sys
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


def pytest_collection_finish():
    "What was imported stays. Each run of a Trainer collects garbage, and would look through all objects of the libraries for it."
    gc.collect(); gc.freeze()

def pytest_sessionfinish(): gc.unfreeze()


def pytest_make_parametrize_id(val):
    "Names that a reader understands: settings as name=value, a dtype, function or class by its name, a list by what is in it."
    def name(x):
        if isinstance(x, dict): return ','.join(f'{k}={name(v)}' for k,v in x.items()) or 'plain'
        if isinstance(x, (list, tuple)): return f"({','.join(map(name, x))})" if x else 'none'
        if isinstance(x, (set, frozenset)): return name(sorted(x, key=str))
        if callable(x): return getattr(x, '__name__', type(x).__name__).replace('<lambda>', '')
        if type(x).__name__ in ('Tensor','ndarray'): return f'{type(x).__name__}{tuple(x.shape)}'
        return str(x).removeprefix('torch.')
    if val is not None and not isinstance(val, (bool, int, float, bytes)):
        s = ' '.join(name(val).split())
        return (s if len(s)<=70 else s[:67]+'...') or None


@pytest.fixture(autouse=True)
def seed():
    if 'torch' in sys.modules: sys.modules['torch'].manual_seed(0)


@pytest.fixture(scope='session')
def root(): return Path(__file__).resolve().parent.parent

@pytest.fixture
def rows_at_once(monkeypatch):
    "A list, to which each step of training adds the rows that it computes at once: those of a batch, or of a piece of it."
    from hedgehog_nb.training import distill, trainer
    seen = []
    for cls in (trainer.ResumableTrainer, distill._DistillTrainer):
        def noted(self, model, inputs, *args, step=cls.training_step, **kw):
            seen.append(len(next(iter(inputs.values()))))
            return step(self, model, inputs, *args, **kw)
        monkeypatch.setattr(cls, 'training_step', noted)
    return seen
