"""*Run all* for every page, as somebody does who has the installed package and nothing else: each notebook runs from its first cell to its last in a
Jupyter kernel, in an empty folder. `make run-all` makes the environment (the built wheel, nbclient and ipykernel) and calls this with it.

    python tests/run_all.py [PART OF A NAME ...]
"""
import os, sys, tempfile, time
from pathlib import Path
from subprocess import DEVNULL
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent

def run(path):
    "The cells that said they do not run here; raises the error of the first cell that fails."
    nb = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as d:
        client = NotebookClient(nb, timeout=900, kernel_name='python3', resources=dict(metadata=dict(path=d)))
        client.execute(stdout=DEVNULL, stderr=DEVNULL) # what the kernel itself says of ports and profilers
    return sum('Not run here' in o.get('text', '') for c in nb.cells for o in c.get('outputs', []))

def main(parts):
    pages = [p for p in sorted([*ROOT.glob('nbs/*.ipynb'), *ROOT.glob('kernels/*.ipynb')]) if not parts or any(s in p.name for s in parts)]
    if not pages: sys.exit(f'No page has {parts} in its name')
    for n in ('HEDGEHOG_MODELS','HEDGEHOG_DATA','HEDGEHOG_SLOW','TRITON_INTERPRET','PYTHONPATH'): os.environ.pop(n, None)
    failed = []
    for p in pages:
        start = time.time()
        try: how = f'ran, {n} cells left out' if (n := run(p)) else 'ran'
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: how,failed = f'FAILED\n{e}',[*failed, p.name]
        print(f'{p.relative_to(ROOT)}: {how}, {time.time()-start:.0f} s', flush=True)
    print(f'{len(pages)-len(failed)} of {len(pages)} pages run from the first cell to the last' + (f'; these do not: {", ".join(failed)}' if failed else ''))
    return bool(failed)

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
