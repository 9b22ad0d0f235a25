"What the scripts for a GPU share: a compiler's own cache, and work in processes side by side, where one that hangs or breaks costs only itself."
import os, re, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

def ptxas():
    "(path, version) of the assembler that Triton takes: TRITON_PTXAS_PATH, or the one that comes with it."
    import triton
    path = os.environ.get('TRITON_PTXAS_PATH') or triton.knobs.nvidia.ptxas.path
    return path, re.search(r'V([\d.]+)', subprocess.run([path, '--version'], capture_output=True, text=True, check=True).stdout)[1]

def own_cache():
    "Let Triton keep what it compiles apart for each assembler, unless TRITON_CACHE_DIR names a folder; (path, version) of the assembler."
    (path,version),home = ptxas(),os.path.expanduser('~') # '~' where there is none
    os.environ.setdefault('TRITON_CACHE_DIR', os.path.join(home if os.path.isabs(home) else tempfile.gettempdir(), '.triton', f'ptxas-{version}'))
    return path, version

def in_parallel(
    f, # Function of a module, called as f(name)
    names, # What to call it with, the longest first
    seconds:float=75., # For each call, compiling included
    processes:int=None, # Side by side; one for each core, 16 at most, if None; 0: in this process, one after the other
    total:float=None, # Seconds for all of them
): # yields (name, state, value, seconds) as calls end; state is 'ok', or 'failed' or 'late' with the reason
    "Call `f` with each name, each process with its own GPU context."
    from hedgehog_nb.experiments.bench import attempt, Worker
    names,end = [*names],time.time()+(total or 1e9)
    n = min(16, os.cpu_count() or 1, len(names)) if processes is None else processes
    if not n:
        for x in names: t = time.time(); yield x, *attempt(f, x), time.time()-t
        return
    mine,workers = threading.local(),[]
    def call(x):
        t = time.time()
        if t>end: return x, 'late', 'not begun: no time left', 0.
        if not hasattr(mine, 'worker'): mine.worker = Worker(); workers.append(mine.worker)
        try:
            if not mine.worker.process: mine.worker.start()
        except Exception as e: return x, 'failed', f'no process: {e}', time.time()-t
        t = time.time()
        return x, *mine.worker(min(seconds, max(1., end-t)), f, x), time.time()-t
    with ThreadPoolExecutor(n) as pool:
        try:
            for done in as_completed([pool.submit(call, x) for x in names]): yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for w in workers: w.stop()
