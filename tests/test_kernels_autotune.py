"""Configurations timed and remembered, with a timer that only pretends: no GPU is needed, and none is used."""
import ast, importlib, json, os, tempfile, threading
from contextlib import nullcontext
from pathlib import Path
import pytest, torch
pytest.importorskip('triton')
from triton.runtime.errors import OutOfResources
from hedgehog_nb import kernels
from hedgehog_nb.kernels import autotune as tuning
from hedgehog_nb.kernels.autotune import autotune, candidate_configs
from hedgehog_nb.kernels.launch import launch

@pytest.fixture(autouse=True)
def fresh(monkeypatch): monkeypatch.setattr(tuning, '_CACHE', {})

class Timer:
    "Milliseconds by candidate; remembers what it was asked."
    def __init__(self, *ms): self.ms,self.asked = ms,[]
    def __call__(self, c):
        self.asked.append(c['n'])
        ms = self.ms[c['n']]
        if isinstance(ms, Exception): raise ms
        return ms

CANDIDATES = [dict(n=i) for i in range(3)]

def test_the_fastest_is_chosen_once(tmp_path):
    t,path = Timer(3, 1, 2),tmp_path/'deep'/'t.json'
    assert [autotune('k', CANDIDATES, t, path) for _ in range(3)]==[dict(n=1)]*3 and t.asked==[0,1,2]
    assert json.loads(path.read_text())=={'k': dict(n=1)} and {p.name for p in path.parent.iterdir()}=={'t.json','.t.json.lock'}

def test_the_next_process_reads_the_file_and_times_nothing(tmp_path):
    autotune('k', CANDIDATES, Timer(3, 1, 2), tmp_path/'t.json'); tuning._CACHE.clear()
    t = Timer(0, 9, 9)
    assert autotune('k', CANDIDATES, t, tmp_path/'t.json')==dict(n=1) and not t.asked
    assert autotune('another', CANDIDATES, t, tmp_path/'t.json')==dict(n=0) and t.asked==[0,1,2]
    assert json.loads((tmp_path/'t.json').read_text())=={'k': dict(n=1), 'another': dict(n=0)}

def test_of_equals_the_first_and_what_cannot_run_is_not_chosen(tmp_path):
    too_much = OutOfResources(300_000, 232_448, 'shared memory')
    assert autotune('a', CANDIDATES, Timer(2, 1, 1), tmp_path/'t.json')==dict(n=1)
    assert autotune('b', CANDIDATES, Timer(too_much, 5, 4), tmp_path/'t.json')==dict(n=2)
    assert autotune('c', CANDIDATES, Timer(*[too_much]*3), tmp_path/'t.json')==dict(n=0)
    with pytest.raises(RuntimeError, match='illegal'): autotune('d', CANDIDATES, Timer(RuntimeError('illegal memory access'), 1, 1), tmp_path/'t.json')
    assert autotune('e', CANDIDATES, Timer(3, RuntimeError('PassManager::run failed'), 2), tmp_path/'t.json')==dict(n=2) # a neighbour that does not compile

@pytest.mark.parametrize('full', range(3))
def test_without_room_to_time_in_the_default_is_taken_and_not_kept(tmp_path, full):
    ms = [3, 1, 2]; ms[full] = torch.OutOfMemoryError('CUDA out of memory')
    assert autotune('k', CANDIDATES, Timer(*ms), tmp_path/'t.json')==dict(n=0) and not tuning._CACHE and not (tmp_path/'t.json').exists()
    assert autotune('k', CANDIDATES, Timer(3, 1, 2), tmp_path/'t.json')==dict(n=1)

def test_a_machine_without_an_assembler(monkeypatch):
    class Nothing:
        @property
        def ptxas(self): raise RuntimeError('Cannot find ptxas')
    monkeypatch.setattr(tuning.triton.knobs, 'nvidia', Nothing())
    assert tuning.assemblers()==dict(ptxas='', ptxas_path='')

@pytest.mark.parametrize('text', ['', '{', '[1]', 'null', '{"k": {"n": 7}}', '{"k": 3}', '['*100_000, b'\xff\xfe\x00'])
def test_a_file_that_makes_no_sense_is_ignored_and_replaced(tmp_path, text):
    path = tmp_path/'t.json'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    t = Timer(3, 1, 2)
    assert autotune('k', CANDIDATES, t, path)==dict(n=1) and t.asked==[0,1,2] and json.loads(path.read_text())['k']==dict(n=1)

def test_a_folder_that_cannot_be_written_changes_no_choice(tmp_path):
    (tmp_path/'file').write_text('')
    assert autotune('k', CANDIDATES, Timer(3, 1, 2), tmp_path/'file'/'t.json')==dict(n=1)
    (tmp_path/'t.json').mkdir()
    assert autotune('l', CANDIDATES, Timer(3, 1, 2), tmp_path/'t.json')==dict(n=1) and [p.name for p in tmp_path.iterdir() if p.name.endswith('.tmp')]==[]

def test_many_writers_leave_a_whole_file(tmp_path):
    path = tmp_path/'t.json'
    ts = [threading.Thread(target=lambda i=i: [tuning._write(path, f'{i}-{j}', dict(n=j)) for j in range(20)]) for i in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    kept = json.loads(path.read_text())
    assert len(kept)==80 and all(v==dict(n=int(k.split('-')[1])) for k,v in kept.items())

def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)); assert tuning.tuning_file()==tmp_path/'hedgehog_nb'/'tuning.json'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(Path, 'home', lambda: tmp_path)
    assert tuning.tuning_file()==tmp_path/'.cache'/'hedgehog_nb'/'tuning.json'
    def nowhere(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(Path, 'home', nowhere); monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    assert tuning.tuning_file()==tmp_path/f'hedgehog_nb-{os.getuid()}'/'tuning.json'

def test_candidates():
    c = dict(BLOCK_T=32, num_warps=8, num_stages=3, F=64)
    three = 'BLOCK_T','num_warps','num_stages'
    assert candidate_configs(c)==[{}] and candidate_configs(c, *three)==[{}, dict(BLOCK_T=16), dict(num_warps=4), dict(num_stages=2)]
    assert candidate_configs(c | dict(BLOCK_T=16, num_stages=1), 'BLOCK_T', 'num_stages')==[{}, dict(num_stages=2)]

class Kernel:
    "Stands for a kernel: keeps what it was started with."
    __name__,arg_names = 'kernel',['x_ptr','mask_ptr','stride_xb','stride_xt','T','F','BLOCK_T']
    def __init__(self): self.runs = []
    def __getitem__(self, grid):
        return lambda *args, **kw: self.runs.append((grid, {n:x for n,x in (dict(zip(self.arg_names, args)) | kw).items() if not n.endswith('_ptr')}))

class On:
    "Stands for a tensor on a GPU."
    def __init__(self, device, stride, dtype=torch.float32):
        self.device,self.is_cuda,self.strides,self.dtype = torch.device(device),device!='cpu',(4096, 1024, stride, 1),dtype
    def stride(self): return self.strides

CONFIG = dict(BLOCK_T=32, num_warps=4, num_stages=2, F=64)
ARGS = CONFIG | dict(stride_xb=4096, stride_xt=64, T=1000)

def on_a_gpu(monkeypatch, tmp_path, capturing=False):
    "Pretend: a device, no interpreter, and a timer by which one stage is fastest."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)); monkeypatch.delenv('HEDGEHOG_TUNE', raising=False)
    monkeypatch.setattr(tuning, '_machine', lambda i: [f'GPU {i}', '3.6.0', '13.4'])
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: nullcontext())
    monkeypatch.setattr(tuning.triton.knobs.runtime, 'interpret', False)
    k = Kernel()
    def bench(f, **_):
        f()
        return k.runs.pop()[1]['num_stages']
    monkeypatch.setattr(tuning.triton.testing, 'do_bench', bench)
    return k

def start(k, device='cuda:0', programs=3, T=1000, stride=64, mask=None, dtype=torch.float32, **change):
    launch(k, programs, CONFIG | change, tune=('num_warps', 'num_stages'), x=On(device, stride, dtype), mask=mask, T=T)

def test_a_launch_is_tuned_on_a_gpu_only(monkeypatch, tmp_path):
    k = on_a_gpu(monkeypatch, tmp_path)
    start(k, 'cpu'); assert k.runs.pop()==((3,), ARGS) and not tuning._CACHE
    start(k); assert k.runs.pop()==((3,), ARGS | dict(num_stages=1))
    start(k, F=128); start(k, 'cuda:1'); assert len(tuning._CACHE)==3 # other channels, another device
    start(k, mask=On('cuda:0', 1)); assert len(tuning._CACHE)==4 # a tensor more
    key = json.loads(next(iter(tuning._CACHE)))
    assert key[:4]==['GPU 0', '3.6.0', '13.4', 'kernel'] and {'F=64', 'stride_xt=64', 'mask_ptr=None', 'num_warps=4'}<=set(key)
    assert set(json.loads((tmp_path/'hedgehog_nb'/'tuning.json').read_text()))==set(tuning._CACHE)

@pytest.mark.parametrize('change,chosen', [(dict(T=1024), 1), (dict(T=513), 1), (dict(programs=4), 1), # the same class
    (dict(T=1025), 2), (dict(T=8192), 2), (dict(programs=5), 2), (dict(programs=2048), 2), (dict(stride=1024), 2), (dict(dtype=torch.bfloat16), 2)])
def test_the_shape_of_a_launch_is_in_the_key(monkeypatch, tmp_path, change, chosen):
    "Tokens and programs up to a factor of two, and the stride between tokens: a short test does not choose for a long run."
    k = on_a_gpu(monkeypatch, tmp_path)
    start(k); start(k, **change)
    assert len(tuning._CACHE)==chosen

def test_every_tuned_kernel_has_tokens_and_strides():
    "Of each launch with `tune`: the kernel has the parameters that the key and the candidates need."
    seen = set()
    for file in Path(kernels.__file__).parent.glob('*.py'):
        for call in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if not (isinstance(call, ast.Call) and getattr(call.func, 'id', '')=='launch' and any(kw.arg=='tune' for kw in call.keywords)): continue
            k = getattr(importlib.import_module(f'hedgehog_nb.kernels.{file.stem}'), call.args[0].id)
            strides = [n for n in k.arg_names if n.startswith('stride_') and n.endswith('t')]
            assert {'T','BLOCK_T'}<=set(k.arg_names) and 2<=len(strides)<=5, k.__name__
            seen.add(k.__name__)
    assert {'_chunk_fwd_kernel','_chunk_dq_kernel','_fused_fwd_kernel','_window_fwd_kernel'}<=seen, seen

@pytest.mark.parametrize('how', ['variable', 'interpreter'])
def test_it_can_be_turned_off(monkeypatch, tmp_path, how):
    k = on_a_gpu(monkeypatch, tmp_path)
    if how=='variable': monkeypatch.setenv('HEDGEHOG_TUNE', '0')
    else: monkeypatch.setattr(tuning.triton.knobs.runtime, 'interpret', True)
    start(k); assert k.runs==[((3,), ARGS)] and not tuning._CACHE and not (tmp_path/'hedgehog_nb').exists()

def test_nothing_is_timed_while_a_graph_is_recorded(monkeypatch, tmp_path):
    k = on_a_gpu(monkeypatch, tmp_path, capturing=True)
    record = lambda on: monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: on)
    start(k); assert k.runs.pop()==((3,), ARGS) and not tuning._CACHE
    record(False); start(k)
    record(True); start(k)
    tuning._CACHE.clear(); start(k) # as in the next process: the file knows
    assert [r[1]['num_stages'] for r in k.runs]==[1, 1, 1]
