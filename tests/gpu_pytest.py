"""A pytest plugin for tests on a GPU that may be cut off: the tests of kernels only, the important first, each result written as it comes,
and those written are not run again.

    python -m pytest -p gpu_pytest --gpu-log results/tests.jsonl -n 16 --dist load --maxschedchunk 1 tests/test_kernels*.py

A result counts as long as the library and the tests are what they were. What failed before a change comes first after it."""
import hashlib, json, os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST = 'repeat','everything','dtypes','forms' # in the name of a test: in this order, before what is not named here
EARLY = 'shapes','whole','packed','prompt','windows','wide','autocast','decode','graph'
LATE = 'errors','wrong','refused','fit','drawn' # these last

def sources():
    "A digest of what the tests depend on."
    h = hashlib.sha256()
    for p in sorted([*(ROOT/'hedgehog_nb').rglob('*.py'), *(ROOT/'tests').rglob('*.py')]): h.update(p.read_bytes())
    return h.hexdigest()[:16]

def read(log):
    "Rows of a log; a line that was cut off is none."
    rows = []
    for l in Path(log).read_text().splitlines() if Path(log).exists() else ():
        try: rows.append(json.loads(l))
        except ValueError: pass
    return rows

def rank(name):
    "Lower is earlier."
    for i,n in enumerate(FIRST):
        if n in name: return i
    if any(n in name for n in LATE): return 99
    return 10 if any(n in name for n in EARLY) else 20

def summary(log):
    "(passed, failed ids) of what counts."
    last = {r['test']:r for r in read(log) if r['sources']==sources()}
    return sum(r['outcome']!='failed' for r in last.values()), [t for t,r in last.items() if r['outcome']=='failed']

def pytest_addoption(parser): parser.addoption('--gpu-log', metavar='FILE', help='results of tests on a GPU, a line each; made if absent')

def pytest_configure(config):
    log = config.getoption('--gpu-log')
    if not log: return
    if not hasattr(config, 'workerinput'): # workers, also such as replace one that died, leave out what was done when the run began
        rows,now = read(log),sources()
        failed = [r['test'] for r in rows if r['sources']!=now and r['outcome']=='failed']
        os.environ['GPU_PYTEST'] = json.dumps(dict(done=[r['test'] for r in rows if r['sources']==now], failed=failed))
        config.pluginmanager.register(_Log(log, now))

def pytest_collection_modifyitems(config, items):
    if not config.getoption('--gpu-log'): return
    past = json.loads(os.environ['GPU_PYTEST'])
    done,failed = set(past['done']),set(past['failed'])
    keep = [i for i in items if i.get_closest_marker('kernel') and i.nodeid not in done]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(keep)])
    items[:] = sorted(keep, key=lambda i: (i.nodeid not in failed, rank(i.name)))

class _Log:
    def __init__(self, log, now): self.log,self.now = Path(log),now; self.log.parent.mkdir(parents=True, exist_ok=True)
    def pytest_runtest_logreport(self, report):
        "A test is done when it has been called, skipped, or could not be set up."
        if report.when=='call' or report.failed or report.when=='setup' and report.skipped:
            row = dict(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), sources=self.now)
            if report.failed: row['why'] = str(report.longrepr)[-600:]
            with open(self.log, 'a') as f: f.write(json.dumps(row)+'\n')

if __name__=='__main__':
    import sys
    if len(sys.argv)!=2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"gpu_pytest.py LOG tells how the tests went; {f'there is no log {sys.argv[1]}' if len(sys.argv)==2 else f'given {len(sys.argv)-1} logs'}")
    passed,failed = summary(sys.argv[1])
    print(f"{passed} passed, {len(failed)} failed in all calls so far")
    for t in failed: print('  ', t)
    sys.exit(bool(failed))
