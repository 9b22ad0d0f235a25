"Tables and figures of the benchmark page, from files made up in a folder that is thrown away; and what a run says it did not run."
import pytest, torch
from hedgehog_nb.bench import CURVES, Case, bench_curves, bench_table, default_cases, plot_bench, run_benchmark
from hedgehog_nb.results import Table, read_results, write_results

def row(T, variant='hedgehog', metric='ms', value=1., experiment='bench-forward', B=1, floor=.5, **kw):
    return dict(experiment=experiment, model='attention', data='random', variant=variant, metric=metric, value=value, B=B, H=8, Hkv=8, T=T, D=64, dtype='bfloat16', causal=True, times_floor=value/floor) | kw

@pytest.fixture
def made_up(tmp_path):
    "Two devices; on the later one a shape at three lengths, another at one, memory, and the machine's own rows."
    def write(name, rows, device, date):
        write_results(tmp_path/name, rows, command='none', device='cpu')
        text = (tmp_path/name).read_text().splitlines()
        import json
        text = [f' "device": {json.dumps(device)},' if l.startswith(' "device"') else f' "date": {json.dumps(date)},' if l.startswith(' "date"') else l for l in text]
        (tmp_path/name).write_text('\n'.join(text)+'\n')
    machine = dict(experiment='bench-forward', model='machine', data='random', variant='copy', metric='bytes_per_s', value=1e12, unit='B/s')
    write('bench-a.json', [machine] + [row(T, v, value=T/512*k) for T in (2048, 512, 1024) for v,k in (('hedgehog', 1.), ('sdpa', 3.))] + [row(8192, B=8, value=7.)]
          + [row(T, metric='bytes', value=T*2**20, experiment='bench-train') for T in (512, 1024)] + [row(512, experiment='bench-decode', value=.25)], 'GPU A', '2026-03-02T00:00:00+00:00')
    write('bench-b.json', [row(T, value=99.) for T in (512, 1024, 2048, 4096)], 'GPU B', '2026-03-01T00:00:00+00:00')
    return read_results(tmp_path)

def test_tables(made_up):
    t = bench_table(made_up, 'bench-forward')
    assert t.header==['case','hedgehog','sdpa'] and t.rows[0]==['B=1 H=8 T=2048 D=64 bfloat16', '4 (8.0×)', '12 (24.0×)'] and t.rows[-1]==['B=8 H=8 T=8192 D=64 bfloat16', '7 (14.0×)', '–'] and len(t.rows)==4
    assert 'GPU A' in t.caption and '99' in str(bench_table(made_up, 'bench-forward', 'GPU B')) and '99' not in str(t)
    assert bench_table(made_up, 'bench-decode').rows==[['B=1 H=8 T=512 D=64 bfloat16', '0.25 (0.5×)']]

@pytest.mark.parametrize('experiment', ['bench-forward','bench-train','bench-decode','cpu-forward','cpu-train','cpu-decode'])
def test_what_was_not_run_says_so(experiment):
    t = bench_table([], experiment)
    assert t.header==['case','state'] and t.rows and all(r[1]=='not run yet' and 'T=' in r[0] for r in t.rows)
    if experiment.endswith('decode'): return
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
    from hedgehog_nb.kernels.cpu import library
    said = {}
    rows = run_benchmark(tmp_path/'cpu.json', 'cpu', [Case('forward',1,2,2,T,16,torch.float32) for T in (64,128)], minutes=1, on_case=lambda c,s: said.update({c.T:s}))
    assert set(said)=={64,128}
    for s in said.values():
        assert isinstance(s['hedgehog-torch'], float) and isinstance(s['sdpa'], float) and s['hedgehog-kernels'] in ('the kernels run on a GPU','Triton is not installed')
        assert isinstance(s['hedgehog'], float if library()[0] else str)
        assert all(isinstance(x, str) for n,x in s.items() if n.startswith(('sdpa-','fla-')))
    rows = read_results(tmp_path)
    assert {r['experiment'] for r in rows}=={'cpu-forward'} and bench_curves(rows, 'cpu-forward')[0]['hedgehog-torch'][0]==(64,128) and not bench_curves(rows, 'cpu-forward', 'bytes')[0]
    assert all('not run yet' in r for r in bench_table(rows, 'bench-forward').rows)

def test_the_cases_of_both_places():
    for place in ('cpu','cuda'):
        cases = default_cases(place)
        assert len(set(cases))==len(cases) and {c.kind for c in cases}=={'forward','train','decode'}
