"""Compile everything that the kernels' tests launch, for a GPU that need not be there: nothing runs, no value is looked at.

    python tests/helpers/compile_only.py [--capability 90] [--out FILE.json] [-n 2] [pytest's arguments: files, ...]

-n says how many processes compile side by side (1, in this one); without files it takes tests/test_kernels*.py.

Every variant must compile and fit the shared memory of a program; the last lines say how many there were and which spill most.
It is a pytest plugin as well, which is how the processes of -n load it. On a GPU machine the same call fills Triton's cache for the tests."""
import argparse, json, os, re, subprocess, sys, tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80:163, 86:99, 87:163, 89:99, 120:99} # KiB of shared memory that a program may have, by capability; 227 on Hopper and where nothing is said

def stand_in(capability):
    "Let Triton compile for `capability` and launch nothing; let the library take tensors of a CPU for those of a GPU."
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: GPUTarget('cuda', capability, 32))
    triton.runtime.driver.set_active(device)
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kw: note(self.__name__, *attempt(lambda: run(self, *args, grid=grid, warmup=True, **kw)))
    torch.Tensor.is_cuda = property(lambda self: True)
    torch.cuda.device = lambda device: nullcontext()
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)

def attempt(f):
    "(result, None) or (None, what went wrong)."
    try: return f(), None
    except Exception as e: return None, f'{type(e).__name__}: {str(e)[-300:]}'

SEEN = set()

def note(name, compiled, error):
    "Add a line to this process's file for a variant not met before."
    key = name, error or compiled.hash
    if key in SEEN: return
    SEEN.add(key)
    row = (dict(kernel=name, error=error) if error
        else dict(kernel=name, hash=compiled.hash, shared=compiled.metadata.shared, warps=compiled.metadata.num_warps, spilled=spills(compiled)))
    with open(Path(os.environ['COMPILE_ONLY'])/f'{os.getpid()}.jsonl', 'a') as f: print(json.dumps(row), file=f)
    if error: raise RuntimeError(error)

def spills(compiled):
    "Bytes of stack that a thread uses."
    import triton
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin']); f.flush()
        said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', f.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r'STACK:(\d+)', said)[1])

def pytest_configure(config):
    from helpers import interpreter
    interpreter.HERE,interpreter.DEVICE = True,'cpu'
    stand_in(int(os.environ['COMPILE_ONLY_FOR']))

def main():
    p = argparse.ArgumentParser(usage="%(prog)s [--capability 90] [--out FILE.json] [-n 2] [pytest's arguments]", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--capability', type=int, default=90, help="80 for A100, 89 for L4 and RTX 40, 90 for H100 and H200")
    p.add_argument('--out', type=Path, help="a .json file for the variants")
    a,rest = p.parse_known_args()
    if a.out and not a.out.absolute().parent.is_dir(): p.error(f"--out {a.out}: there is no folder {a.out.parent}")
    limit = SHARED.get(a.capability, 227)*1024
    files = [x for x in rest if x.endswith('.py') or '.py::' in x]
    rest = rest if files else rest + sorted(map(str, (ROOT/'tests').glob('test_kernels*.py')))
    with tempfile.TemporaryDirectory() as d:
        # no assertion stops a test here
        env = os.environ | dict(COMPILE_ONLY=d, COMPILE_ONLY_FOR=str(a.capability), PYTHONOPTIMIZE='1', HEDGEHOG_TUNE='0', OMP_NUM_THREADS='1',
                                PYTHONPATH=os.pathsep.join([str(ROOT/'tests'), str(ROOT), os.environ.get('PYTHONPATH', '')]))
        env.pop('TRITON_INTERPRET', None)
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'helpers.compile_only', '--assert=plain', '-p', 'no:cacheprovider',
            '--no-header', '-r', 'N', '-W', 'ignore', '-m', 'kernel and not compiles', *rest], cwd=ROOT, env=env)
        rows = {(r['kernel'], r.get('hash') or r['error']): r for f in Path(d).glob('*.jsonl') for r in map(json.loads, f.read_text().splitlines())}.values()
    bad,good = [r for r in rows if r.get('error')],[r for r in rows if not r.get('error')]
    if a.out: a.out.write_text(json.dumps(list(rows), indent=0))
    by = {}
    for r in good: by.setdefault(r['kernel'], []).append(r)
    print(f"\n{'kernel':<30}{'variants':>9}{'spilling':>9}{'most spilled':>13}{'most shared':>12}")
    for n,rs in sorted(by.items()):
        print(f"{n:<30}{len(rs):>9}{sum(r['spilled']>0 for r in rs):>9}{max(r['spilled'] for r in rs):>13,}{max(r['shared'] for r in rs):>12,}")
    wide = [r for r in good if r['shared']>limit]
    for r in bad: print(f"FAILED {r['kernel']}: {r['error']}")
    for r in wide: print(f"TOO LARGE {r['kernel']}: {r['shared']:,} bytes of shared memory, {limit:,} at most")
    print(f"{len(good)} variants compiled for sm_{a.capability}, {len(bad)} failed, "
        f"{len(wide)} over {limit:,} bytes of shared memory; the most is {max((r['shared'] for r in good), default=0):,}")
    sys.exit(bool(bad or wide or not good))

if __name__=='__main__': main()
