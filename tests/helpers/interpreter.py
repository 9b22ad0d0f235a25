"""Kernels are tested on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported and holds for the whole process, so without a GPU one test runs
its file again in a process of its own, and the other tests of the suite keep theirs as it is."""
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
    return f

def run_under_interpreter(file):
    "Run the tests of `file` that run kernels in a process with the interpreter."
    pytest.importorskip('triton')
    res = python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-k', 'not import and not compile', '--durations=5', file,
                 TRITON_INTERPRET='1', OMP_NUM_THREADS='1', PYTEST_ADDOPTS='')
    print(res.stdout)
    assert res.returncode==0, res.stdout + res.stderr
    assert ' passed' in res.stdout and 'skipped' not in res.stdout
