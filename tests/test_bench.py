"""Tables and figures of the benchmark page, from files made up in a folder that is thrown away; \
what a run says it did not run; and contenders that raise, hang, die or are wrong."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from hedgehog_nb.experiments import bench
from hedgehog_nb.experiments.bench import (
    bench_curves, bench_table, Case, compile_ahead, compile_share, register_benchmark, BENCHMARKS, CURVES,
    default_cases, measurements, plot_bench, prepare, resumable, run_benchmark, TURNS, WrongResult)
from hedgehog_nb.results import read_results, Table, write_results
from helpers.timing import measured_quickly

pytestmark = pytest.mark.processes

@pytest.fixture(autouse=True)
def quick_measurements(monkeypatch): measured_quickly(monkeypatch)

def row(T, variant='hedgehog', metric='ms', value=1., experiment='bench-forward', B=1, floor=.5, **kw):
    return dict(experiment=experiment, model='attention', data='random', variant=variant, metric=metric,
        value=value, B=B, H=8, Hkv=8, T=T, D=64, dtype='bfloat16', causal=True, times_floor=value/floor) | kw

@pytest.fixture
def made_up(tmp_path):
    "Two devices; on the later one a shape at three lengths, another at one, memory, and the machine's own rows."
    def write(name, rows, device, date):
        write_results(tmp_path/name, rows, command='none', device='cpu')
        text = (tmp_path/name).read_text().splitlines()
        import json
        text = [f' "device": {json.dumps(device)},' if l.startswith(' "device"')
            else f' "date": {json.dumps(date)},' if l.startswith(' "date"') else l for l in text]
        (tmp_path/name).write_text('\n'.join(text)+'\n')
    machine = dict(experiment='bench-forward', model='machine', data='random', variant='copy', metric='bytes_per_s', value=1e12, unit='B/s')
    write('bench-a.json', [machine] + [row(T, v, value=T/512*k) for T in (2048, 512, 1024) for v,k in (('hedgehog', 1.), ('sdpa', 3.))]
          + [row(8192, B=8, value=7.)] + [row(T, metric='bytes', value=T*2**20, experiment='bench-train') for T in (512, 1024)]
          + [row(512, experiment='bench-decode', value=.25)], 'GPU A', '2026-03-02T00:00:00+00:00')
    write('bench-b.json', [row(T, value=99.) for T in (512, 1024, 2048, 4096)], 'GPU B', '2026-03-01T00:00:00+00:00')
    return read_results(tmp_path)

def test_tables(made_up):
    t = bench_table(made_up, 'bench-forward')
    assert (t.header==['case','hedgehog','sdpa'] and t.rows[0]==['B=1 H=8 T=2048 D=64 bfloat16', '4 (8.0×)', '12 (24.0×)']
            and t.rows[-1]==['B=8 H=8 T=8192 D=64 bfloat16', '7 (14.0×)', '–'] and len(t.rows)==4)
    assert 'GPU A' in t.caption and '99' in str(bench_table(made_up, 'bench-forward', 'GPU B')) and '99' not in str(t)
    assert bench_table(made_up, 'bench-decode').rows==[['B=1 H=8 T=512 D=64 bfloat16', '0.25 (0.5×)']]

@pytest.mark.parametrize('experiment', ['bench-forward','bench-train','bench-decode','bench-distill','cpu-forward','cpu-train','cpu-decode'])
def test_what_was_not_run_says_so(experiment):
    t = bench_table([], experiment)
    assert t.header==['case','state'] and t.rows and all(r[1]=='not run yet' and 'T=' in r[0] for r in t.rows)
    if experiment.endswith(('decode','distill')): return
    for what in CURVES:
        t = plot_bench([], experiment, what)
        assert isinstance(t, Table) and t.rows[0][1]=='not run yet'

def test_curves(made_up):
    c,shape,device = bench_curves(made_up, 'bench-forward')
    assert c=={'hedgehog': ((512,1024,2048), (1.,2.,4.)), 'sdpa': ((512,1024,2048), (3.,6.,12.))} and shape=='B=1 H=8 D=64 bfloat16' and device=='GPU A'
    assert bench_curves(made_up, 'bench-forward', 'times_floor')[0]['hedgehog'][1]==(2.,4.,8.)
    assert bench_curves(made_up, 'bench-train', 'bytes')[0]=={'hedgehog': ((512,1024), (512.,1024.))}
    assert bench_curves(made_up, 'bench-forward', device='GPU B')[0]['hedgehog'][1]==(99.,)*4
    with pytest.raises(ValueError, match='what is one of ms, bytes, times_floor'): bench_curves(made_up, 'bench-forward', 'speed')

@pytest.mark.parametrize('experiment,what', [('bench-forward','ms'), ('bench-train','bytes'), ('bench-forward','times_floor')])
def test_figures(made_up, experiment, what, tmp_path):
    from hedgehog_nb.plots import save_figure, use_style
    with use_style():
        ax = plot_bench(made_up, experiment, what)
        lines = {l.get_label(): l for l in ax.get_lines()}
        curves,shape,device = bench_curves(made_up, experiment, what)
        assert set(curves)==set(lines)-{'byte floor'} and ('byte floor' in lines)==(what=='times_floor')
        for n,(x,y) in curves.items(): assert tuple(lines[n].get_xdata())==x and tuple(lines[n].get_ydata())==y
        assert ax.get_ylabel()==CURVES[what] and '(tokens)' in ax.get_xlabel() and device in ax.get_title() and shape in ax.get_title()
        assert [t.get_text() for l in ax.figure.legends for t in l.get_texts()]==[*lines]
        assert save_figure(ax, tmp_path/'f.png').stat().st_size>10_000

def test_a_run_on_a_cpu_measures_and_says_what_it_did_not(tmp_path):
    from hedgehog_nb.kernels.cpu.build import library
    said = {}
    rows = run_benchmark(tmp_path/'cpu.json', 'cpu', [Case('forward',1,2,2,T,16,torch.float32) for T in (64,128)],
        minutes=1, on_result=lambda c,s,done,total: said.update({c.T:s}))
    assert set(said)=={64,128}
    for s in said.values():
        assert (isinstance(s['hedgehog-torch'], float) and isinstance(s['sdpa'], float)
                and s['hedgehog-kernels'] in ('the kernels run on a GPU','Triton is not installed'))
        assert isinstance(s['hedgehog'], float if library()[0] else str)
        assert all(isinstance(x, str) for n,x in s.items() if n.startswith(('sdpa-','fla-')))
    rows = read_results(tmp_path)
    assert ({r['experiment'] for r in rows}=={'cpu-forward'} and bench_curves(rows, 'cpu-forward')[0]['hedgehog-torch'][0]==(64,128)
            and not bench_curves(rows, 'cpu-forward', 'bytes')[0])
    assert all('not run yet' in r for r in bench_table(rows, 'bench-forward').rows)

def test_the_cases_of_both_places():
    for place in ('cpu','cuda'):
        cases = default_cases(place)
        assert len(set(cases))==len(cases) and {c.kind for c in cases}=={'forward','train','decode',*(['distill'] if place=='cuda' else [])}

@pytest.mark.parametrize('dtype,causal', [(torch.float32, True), (torch.bfloat16, False)])
def test_the_distillation_loss(dtype, causal):
    "Ours and PyTorch's are checked against fp64; softmax's forward and backward is the yardstick."
    c = Case('distill',2,4,2,70,16,dtype,causal)
    for name in BENCHMARKS['distill']:
        if name in ('sdpa-flash','hedgehog-half'): continue # on a GPU
        if name=='hedgehog' and not bench_library(): continue
        err = prepare(c, name, 'cpu')[1]
        assert err is None if name=='sdpa' else err<1e-5
    assert {n for _,n in measurements([c])}=={'hedgehog','hedgehog-half','hedgehog-torch','sdpa','sdpa-flash'}

def bench_library():
    from hedgehog_nb.kernels.cpu.build import library
    return library()[0] is not None

# What a run does with contenders that fail, on a CPU

F32 = torch.float32
SMALL = [Case('forward',1,2,2,T,16,F32) for T in (64,128)]
ROOT = Path(__file__).resolve().parents[1]
OWN = '''
import os, sys, time, torch
from hedgehog_nb.experiments.bench import *
def at(call): return lambda c,x: lambda: call(c, x)
def note(c, x): open(os.environ['NOTES'], 'a').write(f'{os.getpid()} ')
def wait(c, x): note(c, x); time.sleep(1000)
for name,call in dict(raises=lambda c,x: {}['no such kernel'], hangs=wait, dies=lambda c,x: os.kill(os.getpid(), 11)).items():\
 register_benchmark(name, 'forward')(at(call))
register_benchmark('hedgehog-wrong', 'forward')(at(lambda c,x: x['v']*1.5))
register_benchmark('infinite', 'forward')(at(lambda c,x: x['v']/0))
cases = [Case('forward',1,2,2,T,16,torch.float32) for T in (64,128)]
show = lambda c,said,done,total: print(c.T, *said.items(), f'{done}/{total}', flush=True)
if __name__=='__main__': run_benchmark(sys.argv[1], 'cpu', cases, sys.argv[3:], 5, show, 'none', resume=True, timeout=float(sys.argv[2]), isolate=True)
'''

@pytest.fixture
def own(tmp_path):
    "Start a run of own contenders, each measured in a process that can be stopped, as on a GPU."
    (tmp_path/'own.py').write_text(OWN)
    env = os.environ | dict(PYTHONPATH=str(ROOT), NOTES=str(tmp_path/'notes'))
    def start(timeout, *names, **kw):
        return subprocess.Popen([sys.executable, str(tmp_path/'own.py'), str(tmp_path/'own.json'), str(timeout), *names],
            env=env | kw, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start

def rows_of(path): return [r for r in json.loads(Path(path).read_text())['rows'] if 'B' in r]

@pytest.mark.slow
def test_what_raises_hangs_dies_or_is_wrong_costs_only_its_own_row(own, tmp_path):
    p = own(15, 'sdpa', 'hedgehog-torch', 'raises', 'hangs', 'dies', 'hedgehog-wrong', 'infinite')
    out,err = p.communicate(timeout=300)
    rows = {(r['variant'], r['T']):r for r in rows_of(tmp_path/'own.json')}
    assert all(rows[n, T]['metric']!='failed' for n in ('sdpa','hedgehog-torch') for T in (64,128))
    reasons = {n: [rows[n, T]['reason'] for T in (64,128)] for n in ('raises','hangs','dies','hedgehog-wrong','infinite')}
    assert reasons['hangs']==['stopped after 15 s']*2 and rows['hangs', 64]['value']>14.9 and rows['hangs', 64]['unit']=='s'
    assert (reasons['raises']==["KeyError: 'no such kernel'"]*2 and reasons['dies']==['its process ended with SIGSEGV']*2
            and reasons['infinite']==['ArithmeticError: its numbers are not finite']*2)
    assert all(r.startswith('WRONG: off by ') for r in reasons['hedgehog-wrong']) and p.returncode==1
    assert 'WrongResult: wrong, and not timed: hedgehog-wrong on forward B=1 H=2 T=64' in err and err.count('hedgehog-wrong on')==2
    assert '14/14' in out and 'failed' in str(bench_table(read_results(tmp_path), 'cpu-forward'))

class Pretended:
    "A worker that answers what it was told to."
    process = 1
    def __init__(self, *answers): self.answers,self.limits = list(answers),[]
    def __call__(self, seconds, *_): self.limits.append(seconds); return self.answers.pop(0)

def test_what_cost_twice_its_time_for_nothing_is_given_up():
    got = list(bench._one_by_one([(SMALL[0], 'sdpa'), (SMALL[0], 'flex')], 'cpu', time.time()+9, 3., {'sdpa': 6.}, Pretended(('ok', {}))))
    assert [(n, r[:2]) for _,d in got for n,r in d.items()]==[('sdpa', ('absent', 'given up: it failed before, and took long to')), ('flex', ('ok', {}))]

def test_the_end_of_the_run_is_not_the_fault_of_a_contender():
    todo = [(SMALL[0], n) for n in ('sdpa','flex','einsum')]
    w = Pretended(('ok', {}), ('late', 'stopped'), ('ok', {}))
    assert [next(iter(d)) for _,d in bench._one_by_one(todo, 'cpu', time.time()+9, 30., {}, w)]==['sdpa'] and w.limits[0]==30 and w.limits[1]<=9
    w = Pretended(('late', 'stopped'), ('ok', {}), ('ok', {}))
    assert [next(iter(d)) for _,d in bench._one_by_one(todo, 'cpu', time.time()+99, 30., {}, w)]==['sdpa','flex','einsum']
    assert [next(iter(d)) for _,d in bench._one_by_one(todo, 'cpu', time.time()-1, 30., {}, Pretended(('ok', {})))]==['sdpa'] # the first at any rate

def alive(pid):
    try: os.kill(pid, 0); return Path(f'/proc/{pid}/stat').read_text().split()[2]!='Z' if Path('/proc').exists() else True
    except (OSError, ValueError): return False

@pytest.mark.slow
def test_a_run_that_is_killed_leaves_what_it_measured_and_goes_on(own, tmp_path):
    p = own(500, 'sdpa', 'hangs')
    for _ in range(2): assert "('sdpa', " in p.stdout.readline()
    for _ in range(600):
        if (tmp_path/'notes').exists(): break
        time.sleep(.1)
    p.send_signal(signal.SIGKILL); p.communicate()
    before = rows_of(tmp_path/'own.json')
    assert {(r['variant'], r['T']) for r in before}=={('sdpa',64), ('sdpa',128)}
    child = int((tmp_path/'notes').read_text().split()[0])
    for _ in range(100):
        if not alive(child): break
        time.sleep(.1)
    assert not alive(child), 'the process that measured outlives the run'
    p = own(20, 'sdpa', 'raises')
    out,err = p.communicate(timeout=300)
    assert p.returncode==0 and "'sdpa'" not in out and out.splitlines()[0].endswith('3/4'), err
    after = rows_of(tmp_path/'own.json')
    assert after[:len(before)]==before and [r['variant'] for r in after[len(before):]]==['raises']*2

@pytest.fixture
def contenders(monkeypatch):
    "Contenders that a test registers are gone after it."
    for kind in BENCHMARKS: monkeypatch.setitem(BENCHMARKS, kind, dict(BENCHMARKS[kind]))

def test_by_turns_what_raises_leaves_the_others(contenders, tmp_path):
    calls = []
    def third(): calls.append(1); assert len(calls)<3, 'third call'; return torch.zeros(1)
    register_benchmark('third', 'forward')(lambda c,x: third)
    register_benchmark('never', 'forward')(lambda c,x: 1/0)
    register_benchmark('hedgehog-off', 'forward')(lambda c,x: lambda: x['v'])
    said = {}
    with pytest.raises(WrongResult, match='hedgehog-off on forward B=1 H=2 T=64 .* hedgehog-off on forward B=1 H=2 T=128'):
        run_benchmark(tmp_path/'b.json', 'cpu', SMALL, ['third','never','hedgehog-off','sdpa'], 1, lambda c,s,*n: said.update({c.T:(s, n)}))
    assert said[64][0]['third']=='AssertionError: third call\nassert 3 < 3'.replace('\n', ' ') or 'third call' in said[64][0]['third']
    assert (said[64][0]['never'].startswith('ZeroDivisionError') and said[64][0]['hedgehog-off'].startswith('WRONG')
            and isinstance(said[64][0]['sdpa'], float) and said[64][1]==(4,8))
    assert {r['variant'] for r in rows_of(tmp_path/'b.json') if r['metric']=='ms'}=={'sdpa'} and 'matmul_tflops' in rows_of(tmp_path/'b.json')[0]

@pytest.mark.parametrize('kind', ['forward','train','decode'])
def test_an_error_in_one_head_or_the_last_tokens_is_seen(contenders, kind):
    c = Case(kind,2,4,2,80,16,F32)
    def spoiled(where):
        def f(c, x):
            good = BENCHMARKS[kind]['hedgehog-torch'](c, x)
            def run():
                o = good(); m = torch.zeros_like(o); m[where] = 1
                return o*(1+.01*m) if kind=='decode' else o + .01*m*o.detach().norm()/m.norm()*(x['v'].repeat_interleave(2, 1) if kind=='train' else 1)
            return run
        return f
    assert prepare(c, 'hedgehog-torch', 'cpu')[1]<1e-5
    for i,where in enumerate([(0, slice(0,2)), (-1, slice(2,4)), (slice(None), slice(None), slice(-5, None))]):
        register_benchmark(f'hedgehog-{i}', kind)(spoiled(where))
        with pytest.raises(WrongResult, match=r'off by .* of the norm of the fp64 result; allowed 1e-04'): prepare(c, f'hedgehog-{i}', 'cpu')

def test_a_file_of_another_device_commit_or_version_is_not_gone_on_from(tmp_path):
    f = tmp_path/'b.json'
    assert resumable(f, 'cpu')==dict(rows=[], wall_s=0., cases={}, other=False)
    write_results(f, [row(64, experiment='cpu-forward', dtype='float32')], command='none', device='cpu', wall_s=5)
    got = resumable(f, 'cpu')
    assert len(got['rows'])==1 and got['wall_s']==5 and not got['other'] and [c.T for c in got['cases']]==[64]
    for key,value in (('commit','0123'), ('device','NVIDIA H200'), ('versions',{'torch':'1.0'})):
        g = tmp_path/f'{key}.json'
        g.write_text(json.dumps(json.loads(f.read_text()) | {key:value}))
        assert resumable(g, 'cpu')==dict(rows=[], wall_s=0., cases={}, other=True)
    f.write_text('{')
    with pytest.raises(ValueError, match='b.json is no file of results'): resumable(f, 'cpu')

def test_the_order_on_a_gpu():
    todo = measurements(cases := default_cases('cuda'))
    names = [n for _,n in todo]
    assert len(set(todo))==len(todo)==sum(len(BENCHMARKS[c.kind]) for c in cases)
    assert [n for c,n in todo if c==cases[0]][:5]==list(TURNS[0]) and todo[0]==(cases[0], 'hedgehog')
    last = lambda *ns: max(i for i,n in enumerate(names) if n in ns); first = lambda *ns: min(i for i,n in enumerate(names) if n in ns)
    assert last(*TURNS[0]) < first(*TURNS[1]) < last(*TURNS[1]) < first('hedgehog-torch','einsum') < last('hedgehog-torch','einsum') < first(*TURNS[3])
    assert list(dict.fromkeys(c for c,n in todo if n=='hedgehog'))==cases and set(n for _,n in measurements(cases, ['flex','sdpa']))=={'flex','sdpa'}

# Compiling

def test_each_shape_has_a_compiled_function_of_its_own(monkeypatch):
    from torch._dynamo.testing import CompileCounter
    counter,compile = CompileCounter(),torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: compile(f, backend=counter, **kw))
    def f(x): return x*2 + 1
    for n in range(3, 15): assert torch.equal(bench._compiled(f)(torch.ones(n)), torch.full((n,), 3.))
    assert counter.frame_count==12
    shared = torch.compile(f, dynamic=False, fullgraph=True)
    with pytest.raises(Exception, match='(?i)recompile|cache.?size|fullgraph'): # and what would go on uncompiled says so
        for n in range(3, 30): shared(torch.ones(n))

def test_shares_of_what_an_autotuner_chooses_among(monkeypatch):
    autotuner = pytest.importorskip('triton.runtime.autotuner')
    seen = []
    monkeypatch.setattr(autotuner.Autotuner, 'run',
        lambda self, *a, **kw: seen.append((self.configs, self.do_bench(lambda: seen.append('called'), quantiles=()))))
    tuner = lambda n: type('T', (), dict(configs=list(range(n)), run=lambda self: autotuner.Autotuner.run(self)))()
    bench._share_configs(2, 4)
    a,b = tuner(11),tuner(1)
    for t in (a, a, b): t.run()
    assert [s[0] for s in seen if s!='called']==[[2,6,10], [2,6,10], [0]] and seen.count('called')==3 and a.cache_results is False

def test_compiling_ahead_runs_every_share_in_processes(contenders, monkeypatch):
    ran = []
    register_benchmark('hedgehog-kernels', 'forward')(lambda c,x: lambda: ran.append(c.T))
    monkeypatch.setenv('HEDGEHOG_TUNE', '1')
    todo = [(c, 'hedgehog-kernels') for c in SMALL]*2
    for i in range(3): compile_share(todo, 'cpu', i, 3)
    assert sorted(ran)==[64,64,128,128] and os.environ['HEDGEHOG_TUNE']=='0'
    got = compile_ahead([(c, n) for c in SMALL for n in ('hedgehog','sdpa')], 'cpu', seconds=120, processes=2)
    assert [g[0] for g in got]==['ok','ok'] and got[0][1][0]=='ok', got
    assert compile_ahead([(SMALL[0], 'sdpa')], 'cpu', processes=2)==[]

# The command

def test_the_command_reports_what_is_wrong_and_goes_on(contenders, monkeypatch, tmp_path):
    from typer.testing import CliRunner
    from hedgehog_nb.cli import app
    register_benchmark('hedgehog-off', 'forward')(lambda c,x: lambda: x['v'])
    monkeypatch.setattr(bench, 'default_cases', lambda device: SMALL)
    out = tmp_path/'b.json'
    call = lambda *args: CliRunner().invoke(app, ['bench', '--device', 'cpu', '--out', str(out), '--only', 'hedgehog-off', '--only', 'sdpa', *args])
    r = call()
    assert (r.exit_code==1 and re.search(r'4/4.*T=128', r.output) and r.output.count('sdpa')==2
            and r.output.count('WRONG: off by')==2 and 'hedgehog: wrong, and not timed: hedgehog-off on forward' in r.output)
    assert 'numbers in' in r.output and 'exists already' in call().output
    r = call('--resume')
    assert r.exit_code==1 and 'going on from the' in r.output and 'ms' not in r.output.split('going on')[1].partition('hedgehog:')[0]
    out.write_text(out.read_text().replace('"commit": "', '"commit": "other '))
    assert 'is of another device, commit or versions; choose another --out, or say --overwrite' in ' '.join(call('--resume').output.split())
    assert call('--resume', '--overwrite').output.count('WRONG')==2
    whole = json.loads(out.read_text())
    for broken in ({**whole, 'wall_s':'long'}, {**whole, 'rows':[r | dict(dtype='flaot32') for r in whole['rows']]},
            {n:x for n,x in whole.items() if n!='wall_s'}, []):
        out.write_text(json.dumps(broken))
        r = call('--resume'); assert r.exit_code==1 and "b.json is no file of results" in r.output and 'unexpected' not in r.output
    assert call('--resume', '--overwrite').output.count('WRONG')==2 and len(json.loads(out.read_text())['rows'])==len(whole['rows'])

def test_what_was_stopped_is_measured_again_with_more_time(contenders, monkeypatch, tmp_path):
    out,asked = tmp_path/'b.json',[]
    def late(todo, device, end, timeout, lost, worker):
        for c,n in todo: asked.append(n); yield c, {n: ('failed', f'stopped after {timeout:g} s', timeout)}
    monkeypatch.setattr(bench, '_one_by_one', late); monkeypatch.setattr(bench, '_rates', lambda device, dtype: dict(device='cpu', copy=1e9, matmul=1e9))
    monkeypatch.setattr(bench.Worker, '__call__', lambda self, seconds, f, *args: ('ok', f(*args))); monkeypatch.setattr(bench, 'compile_ahead', lambda *a: [])
    run = lambda timeout: run_benchmark(out, 'cpu', SMALL[:1], ['sdpa'], resume=True, timeout=timeout, isolate=True)
    for timeout,times in ((5, 1), (5, 1), (4, 1), (50, 2), (50, 2)): run(timeout); assert len(asked)==times and len(rows_of(out))==1
    assert rows_of(out)[0]['reason']=='stopped after 50 s'
