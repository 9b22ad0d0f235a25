"`compile_only.py` on a file of its own: one kernel that compiles, one that does not, one that wants more shared memory than there is."
import json
import pytest
from helpers.interpreter import python
pytest.importorskip('triton')
pytestmark = [pytest.mark.processes, pytest.mark.slow]

KERNELS = '''
import pytest, torch, triton, triton.language as tl
pytestmark = pytest.mark.kernel

@triton.jit
def _double_kernel(x_ptr, n, BLOCK:tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2*tl.load(x_ptr + i, mask=i < n), mask=i < n)

@triton.jit
def _unknown_kernel(x_ptr, BLOCK:tl.constexpr): tl.store(x_ptr + tl.arange(0, BLOCK), there_is_no_such_name)

@triton.jit
def _large_kernel(x_ptr, y_ptr, BLOCK:tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None]*BLOCK + i[None, :]
    tl.store(x_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)).to(tl.bfloat16))

def test_double():
    x = torch.ones(8)
    for block in (16, 32, 16): _double_kernel[(1,)](x, 8, BLOCK=block)
    assert x[0]==2 # nothing runs, and nothing is asserted

def test_unknown(): _unknown_kernel[(1,)](torch.ones(16), BLOCK=16)

def test_large(): _large_kernel[(1,)](*torch.ones(2, 256, 256, dtype=torch.bfloat16), BLOCK=256, num_warps=8)
'''

def test_what_it_takes(tmp_path):
    said = python('tests/helpers/compile_only.py', '--help').stdout
    assert '-n 2' in said and "pytest's arguments" in said and 'It is a pytest plugin as well' in said
    res = python('tests/helpers/compile_only.py', '--out', str(tmp_path/'nosuch'/'o.json'))
    assert res.returncode==2 and f"there is no folder {tmp_path/'nosuch'}" in res.stderr and not res.stdout
    file = tmp_path/'test_kernels_of_a_page.py'; file.write_text(KERNELS)
    for capability,most in ((80, '166,912'), (89, '101,376')):
        res = python('tests/helpers/compile_only.py', '--capability', str(capability), f'{file}::test_double')
        assert res.returncode==0 and f'2 variants compiled for sm_{capability}, 0 failed, 0 over {most} bytes' in res.stdout, res.stdout + res.stderr

def test_a_line_for_each_kernel_and_what_is_wrong_with_it(tmp_path):
    (tmp_path/'test_kernels_of_a_page.py').write_text(KERNELS)
    res = python('tests/helpers/compile_only.py', str(tmp_path/'test_kernels_of_a_page.py'), '--out', str(tmp_path/'out.json'))
    rows = json.loads((tmp_path/'out.json').read_text())
    assert res.returncode==1 and '3 variants compiled for sm_90, 1 failed, 1 over 232,448' in res.stdout, res.stdout + res.stderr
    assert 'FAILED _unknown_kernel' in res.stdout and 'there_is_no_such_name' in res.stdout and 'TOO LARGE _large_kernel' in res.stdout
    assert '2 passed' in res.stdout and '1 failed' in res.stdout # what does not compile ends its test, as on a GPU
    assert sorted(r['kernel'] for r in rows)==['_double_kernel']*2+['_large_kernel','_unknown_kernel']
    double = [r for r in rows if r['kernel']=='_double_kernel']
    assert all(r['spilled']==r['shared']==0 for r in double) and max(r.get('shared', 0) for r in rows)>227*1024
