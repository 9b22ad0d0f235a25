"""Kernels are tested on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported and holds for the whole process, so without a GPU one test runs
those of its file that are marked `kernel` in a process of its own, and the other tests of the suite keep theirs as it is."""
import os, subprocess, sys
from pathlib import Path
import pytest, torch

os.environ.setdefault('HEDGEHOG_TUNE', '0') # each shape would be compiled several times
ROOT = Path(__file__).parents[2]
HERE = torch.cuda.is_available() or os.environ.get('TRITON_INTERPRET')=='1'
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

def python(*args, **env): return subprocess.run([sys.executable, *args], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=900)

def other_masks(real):
    "The mask `real` in other dtypes: whatever is not zero is True."
    i,u,f = torch.int64,torch.uint8,torch.float32
    return [real.to(dt)*x for dt,x in ((i, 1), (i, 256), (i, -1), (u, 2), (u, 255), (f, .5), (f, 256.), (torch.bfloat16, -1))]

if HERE and DEVICE=='cpu':
    from hedgehog_nb.docs import quick_interpreter
    quick_interpreter()

def kernel(f):
    "A test that runs kernels: collected only where this process can."
    f.__test__ = HERE
    return pytest.mark.kernel(f)

quick_and_slow = pytest.mark.parametrize('which', ['quick', pytest.param('slow', marks=pytest.mark.slow)])

def few(n, names, cases, **kw):
    "As `pytest.mark.parametrize`; all but the first `n` cases are slow."
    cases = list(cases)
    slow = [pytest.param(*(c if ',' in names else (c,)), marks=pytest.mark.slow) for c in cases[n:]]
    return pytest.mark.parametrize(names, cases[:n] + slow, **kw)

def compiles(code, tmp_path):
    "Run `code`, which compiles for a GPU that need not be there, in a process of its own without anything compiled before."
    pytest.importorskip('triton')
    path = os.pathsep.join((str(ROOT/'tests'), *filter(None, [os.environ.get('PYTHONPATH')])))
    res = python('-c', code, TRITON_INTERPRET='0', TRITON_DEFAULT_FP_FUSION='1', TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path)
    assert res.returncode==0, res.stderr

def under_the_interpreter(file):
    "A test that runs the tests of `file` that run kernels in a process with the interpreter: those that are quick, and those that are slow."
    @pytest.mark.interpreter
    @quick_and_slow
    def run(which):
        pytest.importorskip('triton')
        res = python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '--durations=5', file,
            '-m', f"kernel and not compiles and {'' if which=='slow' else 'not '}slow", TRITON_INTERPRET='1', OMP_NUM_THREADS='1', PYTEST_ADDOPTS='')
        print(res.stdout)
        assert res.returncode==0, res.stdout + res.stderr
        assert ' passed' in res.stdout and 'skipped' not in res.stdout
    return run
