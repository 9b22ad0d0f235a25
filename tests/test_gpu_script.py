"""What `make gpu` starts, as far as a machine without a GPU can tell: its parts with a python that pretends, \
its scripts in Triton's interpreter, its pytest plugin on tests made up."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from helpers.interpreter import ROOT, python

pytestmark = pytest.mark.processes

bash = pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
INTERPRET = {} if torch.cuda.is_available() else dict(TRITON_INTERPRET='1')
PARTS = 'smoke','tests','sanitize','bench','models'

def script(*args, root=ROOT, **env):
    return subprocess.run(['bash', root/'tests'/'gpu.sh', *args],
        env={k:v for k,v in os.environ.items() if k!='TRITON_INTERPRET'} | {k:str(v) for k,v in env.items()}, capture_output=True, text=True, timeout=120)

FAKE = '''#!/usr/bin/env bash
echo "$PYTHONPATH|${TRITON_INTERPRET:-}|$*" >> "$CALLS"
case "$*" in
  *"print(sources"*) echo "${SOURCES:-same}" ;;
  *gpu_files*--install*) exit ${INSTALL:-0} ;;
  *find_spec*) [[ -z "${LACK:-}" || "$*" != *"('$LACK')"* ]] ;;
  *re.sub*) echo pretended-gpu ;;
  *get_device_name*) echo "Pretended GPU" ;;
  *max*) echo 8.0 ;;
  *gpu_smoke*) exit ${SMOKE:-0} ;;
  *bench*--out*) sleep ${NAP:-0} ;;
esac
'''

@pytest.fixture
def fake(tmp_path):
    "A python that only pretends, and writes its calls down; a compute-sanitizer that starts it."
    def write(name, text): (tmp_path/'bin').mkdir(exist_ok=True); (tmp_path/'bin'/name).write_text(text); (tmp_path/'bin'/name).chmod(0o755)
    write('python', FAKE)
    write('compute-sanitizer', '#!/usr/bin/env bash\necho "========= COMPUTE-SANITIZER $2"\n[ -z "${UNSUPPORTED:-}" ] || { echo "========= Error: '
        'Device not supported"; exit 1; }\n[ "$2" != "${FIND:-}" ] || { echo "========= Invalid __global__ write of size 4"; exit 3; }\n')
    env = dict(PYTHON=tmp_path/'bin'/'python', OUT=tmp_path/'out', CALLS=tmp_path/'calls', WORKERS=3, PATH=f"{tmp_path/'bin'}:{os.environ['PATH']}")
    return lambda *args, **kw: script(*args, **env | kw), lambda: (tmp_path/'calls').read_text().splitlines()

def said(res): return res.stdout.split('== pretended-gpu')[1].strip().splitlines()[1:]

@bash
def test_without_a_gpu_it_says_so():
    res = script(CUDA_VISIBLE_DEVICES='')
    assert res.returncode==1 and 'needs PyTorch and a GPU' in res.stderr and not res.stdout

@bash
def test_every_part_runs_and_is_reported(fake):
    run,calls = fake
    res = run(PYTHONPATH='/beside')
    lines = said(res)
    assert [l.partition(':')[0] for l in lines][:7]==['smoke', 'self-check', 'every kernel, again and again', "the kernels' tests",
        'compute-sanitizer memcheck', 'compute-sanitizer racecheck', 'hedgehog bench'] and 'models' in lines[7]
    assert all('passed' in l for l in lines[:7]), res.stdout
    paths,interpret = {c.split('|')[0] for c in calls()},{c.split('|')[1] for c in calls()}
    assert interpret=={''} and all(p.startswith(f'{ROOT}:') and '/beside' in p.split(':') for p in paths)
    bench = next(c for c in calls() if '--resume' in c)
    assert '--overwrite --minutes 8.0' in bench and bench.endswith('bench-pretended-gpu.json')
    tests = next(c for c in calls() if '-m pytest' in c)
    assert '-p gpu_pytest' in tests and '-n 3 --dist load --maxschedchunk 1' in tests

@bash
def test_parts_by_name_and_one_that_fails_does_not_stop_the_next(fake):
    run,calls = fake
    res = run('smoke', 'bench', SMOKE=7)
    assert (res.returncode==1 and [l.partition(',')[0] for l in said(res)]==['smoke: FAILED (7)', 'self-check: passed', 'hedgehog bench: passed']
            and not any('-m pytest' in c for c in calls()))
    assert run('bench').returncode==0
    for given,name in (('speed', 'speed'), ('', 'an empty name'), ('smoke tests', 'smoke tests')):
        res = run('smoke', given)
        assert res.returncode==2 and res.stderr==f'parts are smoke tests sanitize bench models; given {name}\n'

@bash
def test_what_cannot_be_used_is_refused_at_the_start(fake, tmp_path):
    run,_ = fake
    def refused(code, why, **kw): res = run('smoke', **kw); assert res.returncode==code and why in res.stderr and not res.stdout, res.stderr
    for n in ('SECONDS_PART','WORKERS'):
        for x in ('9.5', 'ten', '0', '-3', '08'): refused(2, f'{n} is a whole number, 1 at least; given {x}\n', **{n:x})
    (tmp_path/'file').write_text('')
    refused(1, f"{tmp_path/'file'/'out'} cannot be written: name another folder with OUT=...", OUT=tmp_path/'file'/'out')
    refused(1, f"there is no interpreter {tmp_path/'nosuch'}: name one with PYTHON=...", PYTHON=tmp_path/'nosuch')
    bare = tmp_path/'bin'/'bare'
    bare.write_text('#!/bin/sh\necho "Traceback" >&2; echo "ImportError: libcudart.so.13 is missing" >&2; exit 1\n')
    bare.chmod(0o755)
    refused(1, f'{bare} cannot import torch: ImportError: libcudart.so.13 is missing\n', PYTHON=bare)
    for how in ('-h', '--help'):
        res = run(how, PYTHON='nosuch')
        assert res.returncode==0 and res.stdout.startswith('What a GPU has to say') and 'SECONDS_PART' in res.stdout and 'pipefail' not in res.stdout

@bash
def test_what_was_carried_is_installed_and_joined(fake, tmp_path):
    run,calls = fake
    copy = tmp_path/'copy'
    (copy/'tests').mkdir(parents=True); shutil.copy(ROOT/'tests'/'gpu.sh', copy/'tests'); (copy/'.gpu'/'1').mkdir(parents=True)
    for f in ('x.whl', 'pieces.json'): (copy/'.gpu'/'1'/f).write_text('')
    assert run('bench', root=copy).returncode==0
    assert ([c.split('|')[2] for c in calls() if 'gpu_files' in c]==['tests/gpu_files.py --install .gpu', 'tests/gpu_files.py --join .gpu']
            and f'{copy}/.gpu/last' in calls()[-1].split('|')[0].split(':'))
    res = run('bench', root=copy, INSTALL=1, LACK='typer')
    assert said(res)==['bench: not run, typer missing: the wheels in .gpu could not be installed, '
        'pip says why above: carry .gpu/1 again, or put the packages on PYTHONPATH']

@pytest.mark.slow
@bash
def test_a_part_has_its_time(fake):
    run,_ = fake
    res = run('smoke', 'bench', SECONDS_PART=6, NAP=30)
    assert res.returncode==1 and 'passed' in said(res)[0] and re.match(r'hedgehog bench: cut off after [56] s; run it again to go on', said(res)[-1])

@bash
@pytest.mark.parametrize('lack,name,part,other',
    [('xdist','pytest-xdist','tests','smoke'), ('typer','typer','bench','tests'), ('peft','peft','models','bench'), ('fastcore','fastcore','smoke',None)])
def test_what_is_missing_stops_only_the_parts_that_need_it(fake, lack, name, part, other):
    run,_ = fake
    res = run(*filter(None, (part, other)), LACK=lack)
    assert res.returncode==1 and said(res)[0]==f'{part}: not run, {name} missing: carry .gpu/1 of `make gpu-files`, or put the packages on PYTHONPATH'
    assert not other or 'passed' in said(res)[1]

@bash
def test_the_sanitizer(fake, tmp_path):
    run,_ = fake
    res = run('sanitize', FIND='racecheck')
    assert res.returncode==1 and [l.split(',')[0] for l in said(res)][:2]==['compute-sanitizer memcheck: passed',
        'compute-sanitizer racecheck: FAILED (3)'] and 'FINDINGS in' in said(res)[2] and 'racecheck' in said(res)[2]
    res = run('sanitize') # what was found stays found
    assert res.returncode==1 and 'FINDINGS in' in said(res)[-1]
    done = tmp_path/'out'/'sanitize-racecheck-pretended-gpu.log.done'; done.write_text('map')
    res = run('sanitize', SOURCES='mended') # but not that of other sources
    assert res.returncode==0 and all('passed' in l for l in said(res)) and not done.exists()
    res = run('sanitize', UNSUPPORTED=1)
    assert res.returncode==0 and [l.partition(':')[2] for l in said(res)]==[" not run, it says 'Device not supported' here"]*2
    (tmp_path/'bin'/'compute-sanitizer').unlink()
    if not shutil.which('compute-sanitizer'):
        res = run('sanitize')
        assert res.returncode==1 and 'compute-sanitizer is not installed' in said(res)[0]

@pytest.mark.skipif(not shutil.which('make'), reason='needs make')
def test_make_leads_there():
    make = lambda *a: subprocess.run(['make', '-n', '--no-print-directory', *a], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (make('gpu')=='tests/gpu.sh' and make('gpu', 'PARTS=smoke bench')=='tests/gpu.sh smoke bench'
            and [make(f'gpu-{p}') for p in PARTS]==[f'tests/gpu.sh {p}' for p in PARTS])
    assert make('gpu-files', 'PYTHON=py', 'MODELS=a b')=='py tests/gpu_files.py --into .gpu --models a b --data'
    res = subprocess.run(['make', '-s', 'gpu-files', 'PYTHON=printf "%s|"', "MODELS='a b' c"], cwd=ROOT, capture_output=True, text=True)
    assert res.stdout=='tests/gpu_files.py|--into|.gpu|--models|a b|c|--data|', res.stderr

# Scripts

@pytest.mark.slow
def test_every_kernel_repeats(tmp_path):
    pytest.importorskip('triton')
    done = tmp_path/'done'
    res = python('tests/gpu_repeat.py', '--size', 'small', '--done', str(done), **INTERPRET)
    lines = res.stdout.splitlines()
    assert res.returncode==0 and len(lines)>=16 and all('the same bits' in l for l in lines), res.stdout + res.stderr
    head,*names = done.read_text().splitlines()
    assert head.startswith('sources ') and len(names)==len(lines)
    res = python('tests/gpu_repeat.py', '--size', 'small', '--done', str(done), **INTERPRET)
    assert res.returncode==0 and not res.stdout
    done.write_text('\n'.join(['sources other', *names])) # what was done with other sources counts no more
    res = python('tests/gpu_repeat.py', '--size', 'small', '--only', 'map', '--done', str(done), **INTERPRET)
    assert res.returncode==0 and res.stdout.startswith('map ') and done.read_text()==f'{head}\nmap\n'
    res = python('tests/gpu_repeat.py', '--size', 'small', '--only', 'nosuch', **INTERPRET)
    assert res.returncode==1 and res.stderr.startswith('there is no kernel nosuch; there are map, ')

@pytest.mark.slow
def test_the_smoke_test(tmp_path):
    pytest.importorskip('triton')
    res = python('tests/gpu_smoke.py', '--small', '--out', str(tmp_path/'s.json'), **INTERPRET)
    *lines,last = res.stdout.splitlines()
    assert (res.returncode==0 and last.startswith('ok  0 of') and len(lines)>=10
            and all(l.startswith('ok ') and 'times the same bits' in l for l in lines)), res.stdout + res.stderr
    rows = json.loads((tmp_path/'s.json').read_text())['rows']
    assert (len(rows)==len(lines) and all(r['metric']=='error' and 0<r['value']<.04 and r['runs_that_differ']==0 for r in rows)
            and {r['variant'].split()[0] for r in rows}=={'fused','apart','window','loss','decode'})

BROKEN = '''
import sys; sys.argv[1:] = ['--small']; sys.path.insert(0, 'tests')
import gpu_smoke as s, torch
s.cases = (lambda f: lambda small: {n: f(small)[n] | dict(T=8) for n in ('fused D=64 exp', 'window D=64 exp', 'decode D=64 exp')})(s.cases)
calls = []
def changes(x, c, mask): calls.append(1); return s.window_reference([y.double() for y in x], c, mask)*(1+len(calls)/1e6)
def raises(x, c, mask): raise RuntimeError('misaligned address')
s.RUN |= dict(fused=(lambda x, c, mask: 1.1*s.attention_reference(x, c, mask), s.attention_reference),\
 window=(changes, s.window_reference), decode=(raises, s.decode_reference))
sys.exit(s.main(True, None, 60))
'''

def test_the_smoke_test_sees_what_is_wrong():
    pytest.importorskip('triton')
    res = python('-c', BROKEN, TRITON_INTERPRET='1')
    off,differs,broke,last = res.stdout.splitlines()
    assert (res.returncode==1 and off.startswith('BAD fused') and '2 times the same bits' in off
            and differs.startswith('BAD window') and '1 of 2 RUNS DIFFER' in differs)
    assert broke.startswith('BAD decode') and 'RuntimeError: misaligned address' in broke and last.startswith('BAD 3 of 3')

PARALLEL = '''
import os, sys, time; sys.path.insert(0, 'tests')
from gpu_parallel import in_parallel
def work(x):
    if x=='dies': os.kill(os.getpid(), 9)
    if x=='hangs': time.sleep(1000)
    if x=='raises': raise KeyError(x)
    return x.upper()
if __name__=='__main__':
    for name,state,value,s in in_parallel(work, ['hangs', 'dies', 'raises', 'a', 'b'], seconds=15, processes=2): print(name, state, value, flush=True)
'''

@pytest.mark.slow
def test_side_by_side_one_that_breaks_costs_only_itself(tmp_path):
    (tmp_path/'p.py').write_text(PARALLEL)
    res = python(str(tmp_path/'p.py'), PYTHONPATH=f"{ROOT}:{ROOT/'tests'}")
    assert sorted(res.stdout.splitlines())==['a ok A', 'b ok B', 'dies failed its process ended with SIGKILL',
        'hangs late stopped after 15 s', "raises failed KeyError: 'raises'"], res.stdout + res.stderr

def test_an_assembler_has_a_cache_of_its_own(tmp_path):
    pytest.importorskip('triton')
    fake = tmp_path/'ptxas'
    fake.write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.4, V13.4.92"\n'); fake.chmod(0o755)
    code = "import os, sys; sys.path.insert(0, 'tests'); import gpu_parallel as g; print(*g.own_cache(), os.environ['TRITON_CACHE_DIR'])"
    env = dict(HOME=str(tmp_path), TRITON_PTXAS_PATH=str(fake))
    res = python('-c', f"import os; os.environ.pop('TRITON_CACHE_DIR', None); {code}", **env)
    assert res.stdout.split()==[str(fake), '13.4.92', str(tmp_path/'.triton'/'ptxas-13.4.92')], res.stderr
    assert python('-c', code, TRITON_CACHE_DIR='/mine', **env).stdout.split()[2]=='/mine'
    nobody = "import os, pwd; os.environ.pop('HOME'); pwd.getpwuid = lambda uid: {}[uid]; os.environ.pop('TRITON_CACHE_DIR', None)"
    res = python('-c', f'{nobody}; {code}', **env, TMPDIR=str(tmp_path))
    assert res.stdout.split()[2:]==[str(tmp_path/'.triton'/'ptxas-13.4.92')], res.stderr

# The pytest plugin

MADE_UP = '''
import os, pytest
kernel = pytest.mark.kernel
@kernel
def test_drawn(): pass
@kernel
@pytest.mark.parametrize('i', [0, 1])
def test_dtypes(i): assert not i or os.environ.get('MENDED')
@kernel
def test_slow(): assert os.environ.get('KILL')!='1' or os.kill(os.getppid() if os.environ.get('PYTEST_XDIST_WORKER') else os.getpid(), 9)
@kernel
def test_shapes(): pass
def test_compiles_for_hopper(): assert 0
'''

@pytest.fixture
def made_up(tmp_path):
    (tmp_path/'test_made_up.py').write_text(MADE_UP)
    def run(*args, **env):
        res = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'gpu_pytest', '-p', 'no:cacheprovider',
            '--gpu-log', 'log.jsonl', *args, 'test_made_up.py'], cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env=os.environ | dict(PYTHONPATH=f"{ROOT/'tests'}:{ROOT}", PYTEST_ADDOPTS='') | env)
        return res, [json.loads(l) for l in (tmp_path/'log.jsonl').read_text().splitlines()]
    return run

def test_kernels_only_the_important_first_and_none_twice(made_up, tmp_path):
    res,rows = made_up()
    assert [r['test'].partition('::')[2] for r in rows]==['test_dtypes[0]', 'test_dtypes[1]', 'test_shapes', 'test_slow', 'test_drawn'], res.stdout
    assert [r['outcome'] for r in rows]==['passed', 'failed'] + ['passed']*3 and 'AssertionError' in rows[1]['why']
    res,rows = made_up()
    assert len(rows)==5 and '6 deselected' in res.stdout
    res = python('tests/gpu_pytest.py', str(tmp_path/'log.jsonl'))
    assert res.returncode==1 and res.stdout.splitlines()==['4 passed, 1 failed in all calls so far', '   test_made_up.py::test_dtypes[1]']
    for args,why in (((), 'given 0 logs'), (('nosuch.jsonl',), 'there is no log nosuch.jsonl')):
        res = python('tests/gpu_pytest.py', *args)
        assert res.returncode==1 and res.stderr==f'gpu_pytest.py LOG tells how the tests went; {why}\n'

@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(made_up):
    res,rows = made_up('-n', '1', '--dist', 'load', '--maxschedchunk', '1', KILL='1')
    assert res.returncode==-9 and 2<=len(rows)<=3
    res,rows = made_up('-n', '2', '--dist', 'load', '--maxschedchunk', '1')
    assert len(rows)==5==len({r['test'] for r in rows}), res.stdout

@pytest.mark.slow
def test_after_a_change_what_failed_comes_first(made_up, tmp_path):
    made_up()
    log = tmp_path/'log.jsonl'
    log.write_text(log.read_text().replace(json.loads(log.read_text().splitlines()[0])['sources'], 'older'))
    res,rows = made_up(MENDED='1')
    assert ([r['test'].partition('::')[2] for r in rows[5:]]==['test_dtypes[1]', 'test_dtypes[0]', 'test_shapes', 'test_slow', 'test_drawn']
            and all(r['outcome']=='passed' for r in rows[5:]))
    assert python('tests/gpu_pytest.py', str(log)).stdout.startswith('5 passed, 0 failed')

# Files to carry

def test_folders_are_cut_and_joined(tmp_path):
    sys.path.insert(0, str(ROOT/'tests'))
    from gpu_files import cut, join
    m,d = tmp_path/'tiny'/'sub',tmp_path/'text'
    m.mkdir(parents=True); d.mkdir()
    (m/'weights').write_bytes(os.urandom(2500)); (m.parent/'config').write_bytes(b'{}'); (m/'empty').write_bytes(b''); (d/'a.txt').write_bytes(b'words'*100)
    n = cut(tmp_path/'parts', dict(models=[m.parent], data=[d]), most=1000)
    parts = sorted((tmp_path/'parts').iterdir())
    assert (n==len(parts)>=4 and [p.name for p in parts]==[str(i) for i in range(2, 2+n)]
            and all(sum(f.stat().st_size for f in p.iterdir() if f.suffix!='.json')<=1000 for p in parts))
    there = tmp_path/'there'
    for i,p in enumerate(parts): # one comes after the other, and the last is gone when the next comes
        for old in there.glob('[0-9]*'): shutil.rmtree(old)
        shutil.copytree(p, there/p.name); left,wrong = join(there)
        assert not wrong and (sum(left.values())>0)==(i<n-1)==(not (there/'files'/'data'/'text').exists())
    for a,b in (('models/tiny/sub/weights', m/'weights'), ('models/tiny/sub/empty', m/'empty'),
            ('models/tiny/config', m.parent/'config'), ('data/text/a.txt', d/'a.txt')):
        assert (there/'files'/a).read_bytes()==b.read_bytes()
    with pytest.raises(SystemExit, match='neither a file nor a folder'): cut(tmp_path/'p', dict(models=[tmp_path/'nope']))

def files(*args): return python('tests/gpu_files.py', *map(str, args))

@pytest.fixture
def parts(tmp_path):
    "A model of 2,500 bytes and a text in four parts, and how to carry some of them and join."
    sys.path.insert(0, str(ROOT/'tests'))
    from gpu_files import cut
    (tmp_path/'tiny').mkdir()
    (tmp_path/'tiny'/'weights').write_bytes(os.urandom(2500))
    (tmp_path/'tiny'/'zconfig').write_bytes(b'{}')
    (tmp_path/'text').write_bytes(b'words'*150)
    assert cut(tmp_path/'parts', dict(models=[tmp_path/'tiny'], data=[tmp_path/'text']), most=1000)==4
    there = tmp_path/'there'; there.mkdir()
    def carry(*numbers):
        for i in numbers: shutil.copytree(tmp_path/'parts'/str(i), there/str(i), dirs_exist_ok=True)
        res = files('--join', there)
        assert not res.stderr, res.stderr
        return res.returncode, res.stdout.splitlines()
    return carry, there, there/'files'/'models'/'tiny'

def test_only_what_is_complete_has_its_name(parts):
    carry,there,tiny = parts
    assert carry(2, 4)==(1, ['models/tiny/weights lacks 1.0 kB: carry the other parts', 'data/text lacks 0.3 kB: carry the other parts'])
    assert not tiny.exists() and (there/'files'/'models'/'tiny.part'/'weights').exists()
    assert (carry(3)[1]==['data/text lacks 0.3 kB: carry the other parts']
            and (tiny/'weights').stat().st_size==2500 and not (there/'files'/'data'/'text').exists())
    assert carry(5)==(0, [f"{there/'files'} is complete"]) and not list((there/'files').rglob('*.part'))

def test_the_disk_counts_not_the_book(parts, tmp_path):
    carry,there,tiny = parts
    want = {f: (tmp_path/'tiny'/f).read_bytes() for f in ('weights','zconfig')}
    def whole(): return {f.name: f.read_bytes() for f in tiny.iterdir()}==want
    assert carry(2, 3, 4, 5)[0]==0 and whole()
    for spoil in (lambda: (tiny/'weights').unlink(), lambda: (tiny/'weights').write_bytes(b'short'),
            lambda: shutil.rmtree(there/'files'), lambda: (there/'files.json').write_text('{"a"')):
        spoil(); assert carry()[0]==0 and whole()
    for i in range(2, 6): shutil.rmtree(there/str(i))
    (there/'files.json').write_text('[]'); assert carry(5)==(0, [f"{there/'files'} is complete"]) # what has the digest is taken
    (tiny/'weights').unlink()
    assert carry()==(1, ['models/tiny/weights lacks 2.5 kB: carry the other parts']) and not tiny.exists()

def test_pieces_that_are_missing_or_broken_are_told(parts, tmp_path):
    carry,there,tiny = parts
    carry(2, 4, 5)
    shutil.copytree(tmp_path/'parts'/'3', there/'3'); piece = there/'3'/'0000'; data = piece.read_bytes()
    piece.unlink(); code,lines = carry(); assert code==1 and lines[0]==f'{piece} is missing: carry 3 again'
    piece.write_bytes(data[:9]); code,lines = carry(); assert code==1 and lines[0]==f'{piece} is broken: carry 3 again'
    piece.write_bytes(bytes(len(data)))
    code,lines = carry()
    assert code==1 and lines[0]=='models/tiny/weights is not what was cut: carry its parts again' and not tiny.exists()
    assert carry(3)[0]==0 and tiny.exists()
    (there/'3'/'pieces.json').write_text('[{"file": "x"}]'); code,lines = carry()
    assert code==1 and 'pieces.json is broken, or of an older gpu_files.py: carry 3 again' in lines[0]
    res = files('--join', there/'nope'); assert res.returncode==1 and res.stderr==f"there is no folder {there/'nope'}\n"

def test_nothing_of_others_is_deleted(tmp_path):
    into,model = tmp_path/'into',tmp_path/'my model'
    for d in (into/'2024-photos', into/'7', model, tmp_path/'b'/'my model', tmp_path/'empty'): d.mkdir(parents=True)
    (into/'2024-photos'/'a.jpg').write_bytes(b'a')
    (into/'7'/'0000').write_bytes(b'old')
    (model/'config').write_bytes(b'{}')
    (tmp_path/'b'/'my model'/'x').write_bytes(b'x')
    cut = lambda *models, to=into: files('--into', to, '--no-wheels', '--models', *models)
    for models,why in (((model, tmp_path/'nope'), 'neither a file nor a folder'), ((model, tmp_path/'b'/'my model'), 'two of --models are named my model'),
                       ((tmp_path,), 'where the parts go'), ((tmp_path/'empty',), 'holds no files')):
        res = cut(*models)
        assert res.returncode==1 and why in res.stderr and (into/'7'/'0000').exists() and not (into/'1').exists(), res.stderr
    res = subprocess.run([sys.executable, ROOT/'tests'/'gpu_files.py', '--into', into, '--no-wheels', '--models', '.'],
        cwd=model, capture_output=True, text=True)
    assert res.returncode==0 and 'models/my model/config' in res.stdout and sorted(p.name for p in into.iterdir())==['1', '2', '2024-photos'], res.stderr
    (into/'2024').mkdir(); (into/'2024'/'b.jpg').write_bytes(b'b')
    res = cut(model)
    assert res.returncode==1 and '2024 holds b.jpg' in res.stderr and (into/'2024'/'b.jpg').exists() and (into/'2').exists()
    assert 'is a file' in cut(model, to=into/'2024'/'b.jpg').stderr

def wheel(folder, name, text):
    "A wheel of one module."
    import zipfile
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder/f'{name}-1.0-py3-none-any.whl', 'w') as z:
        z.writestr(f'{name}.py', text)
        z.writestr(f'{name}-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{name}-1.0.dist-info/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n'); z.writestr(f'{name}-1.0.dist-info/RECORD', '')

def test_carried_wheels_come_last(tmp_path):
    pytest.importorskip('pip')
    gpu,beside = tmp_path/'.gpu',tmp_path/'beside'
    wheel(gpu/'1', 'carried_only', 'x = "carried"'); wheel(gpu/'1', 'iniconfig', 'x = "carried"'); beside.mkdir()
    (gpu/'site').mkdir(); (gpu/'site'/'half.py').write_text('') # of a pip that was killed
    (beside/'sitecustomize.py').write_text("import sys; sys.own = True")
    assert files('--install', gpu).returncode==0 and not (gpu/'site'/'half.py').exists()
    res = python('-c', 'import sys, carried_only, iniconfig; print(carried_only.x, sys.own, hasattr(iniconfig, "x"), sys.path[-1])',
        PYTHONPATH=os.pathsep.join([str(gpu/'last'), str(beside)]))
    assert res.stdout.split()==['carried', 'True', 'False', str(gpu/'site')], res.stderr
    t = (gpu/'site'/'carried_only.py').stat().st_mtime_ns
    assert files('--install', gpu).returncode==0 and (gpu/'site'/'carried_only.py').stat().st_mtime_ns==t
    (gpu/'1'/'broken-1.0-py3-none-any.whl').write_bytes(b'no')
    res = files('--install', gpu)
    assert res.returncode==1 and 'pip could not install the wheels' in res.stderr and not (gpu/'site').exists()

def test_the_names_in_the_heads_are_those_that_are_looked_for():
    import gpu_models
    a = gpu_models.options(['--out', 'x'])
    for name in (Path(a.model).name, Path(a.data).name):
        for f in ('gpu.sh', 'gpu_files.py'): assert f'/{name}' in (ROOT/'tests'/f).read_text(), (name, f)

def test_the_scripts_name_no_place_of_ours():
    for f in (ROOT/'tests').glob('gpu*'): assert not re.search(r'/work|/opt/|/tmp/', f.read_text()), f
