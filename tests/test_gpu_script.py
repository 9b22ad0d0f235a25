"What `make gpu` starts, as far as a machine without a GPU can tell: it refuses with a word of why, and its repeated runs work in Triton's interpreter."
import shutil, subprocess
import pytest, torch
from interpreter import ROOT, python

@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_without_a_gpu_it_says_so():
    res = subprocess.run(['env', 'CUDA_VISIBLE_DEVICES=', 'bash', ROOT/'tests'/'gpu.sh'], capture_output=True, text=True, timeout=120)
    assert res.returncode==1 and 'needs PyTorch and a GPU' in res.stderr and not res.stdout

@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_parts_are_timed_and_reported(tmp_path):
    "The script with a python that only pretends: what fails is named and does not stop the rest."
    fake = tmp_path/'python'
    fake.write_text('#!/usr/bin/env bash\ncase "$*" in\n *get_device_name*re.sub*|*re.sub*) echo pretended-gpu;;\n *get_device_name*) echo "Pretended GPU";;\n *gpu_repeat*) exit 7;;\n *pytest*shapes*) echo tested;;\n *bench*) echo "bench $*";;\nesac\nexit 0\n')
    fake.chmod(0o755)
    res = subprocess.run(['env', f'PYTHON={fake}', f'OUT={tmp_path}', 'WORKERS=1', 'bash', ROOT/'tests'/'gpu.sh'], capture_output=True, text=True, timeout=120)
    *_,last = res.stdout.split('== pretended-gpu')
    said = last.strip().splitlines()[1:]
    assert res.returncode==1 and f'--out {tmp_path}/bench-pretended-gpu.json' in res.stdout, res.stdout + res.stderr
    assert [s.partition(':')[0] for s in said if 'sanitizer' not in s]==["the kernels' tests, the first half", 'every kernel, again and again', 'hedgehog bench', "the kernels' tests, the other half"]
    assert 'FAILED (7)' in said[1] and 'passed' in said[0] and 'passed' in said[-1]
    res = subprocess.run(['env', f'PYTHON={fake}', f'OUT={tmp_path}', 'SECONDS_ALL=2', 'bash', ROOT/'tests'/'gpu.sh'], capture_output=True, text=True, timeout=120)
    assert res.returncode==1 and res.stdout.count('not run, no time left')>=4

def test_every_kernel_repeats():
    pytest.importorskip('triton')
    res = python('tests/gpu_repeat.py', '--small', **({} if torch.cuda.is_available() else dict(TRITON_INTERPRET='1')))
    lines = res.stdout.splitlines()
    assert res.returncode==0 and len(lines)>=16 and all('the same bits' in l for l in lines), res.stdout + res.stderr
