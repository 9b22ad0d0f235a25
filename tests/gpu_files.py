"""What a GPU machine without a network lacks, in folders small enough to carry one at a time.

    python tests/gpu_files.py --into .gpu --models ~/smollm2-135m-instruct --data ~/wikitext-2     here: .gpu/1 wheels and ptxas, .gpu/2 ... pieces
    python tests/gpu_files.py --join .gpu       there, again after each part that came: .gpu/files/models/NAME, .gpu/files/data/NAME, each when complete
    python tests/gpu_files.py --install .gpu    there: the wheels into .gpu/site, which Python looks into last if .gpu/last is on PYTHONPATH"""
import argparse, hashlib, json, lzma, os, re, shutil, subprocess, sys, tempfile, zipfile
from pathlib import Path

MOST = 45_000_000 # bytes of a part
WHEELS = 'fastcore','flash-linear-attention==0.6.0','fla-core==0.6.0','datasets','dill','multiprocess','gguf'
NVCC,PTXAS = 'nvidia-cuda-nvcc==13.4.92','nvidia/cu13/bin/ptxas'
PLATFORMS = 'manylinux_2_28_x86_64','manylinux_2_17_x86_64','manylinux2014_x86_64'

def download(into, names, python):
    "Wheels for another Python, without what they need."
    platforms = [x for p in PLATFORMS for x in ('--platform', p)]
    pip = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--python-version', python, '--implementation', 'cp']
    subprocess.run([*pip, *platforms, '-d', str(into), *names], check=True)

def first_part(part, python):
    "Wheels, and the assembler, compressed."
    download(part, WHEELS, python)
    with tempfile.TemporaryDirectory() as d:
        download(d, [NVCC], python)
        with zipfile.ZipFile(next(Path(d).glob('*.whl'))) as z, z.open(PTXAS) as src, lzma.open(part/'ptxas.xz', 'wb') as dst: shutil.copyfileobj(src, dst)

# Cutting

def numbered(into):
    "Folders in `into` that are named by digits alone, in their order."
    return sorted((p for p in Path(into).glob('[0-9]*') if re.fullmatch('[0-9]+', p.name) and p.is_dir()), key=lambda p: int(p.name))

def old_parts(into):
    "The parts of an earlier call; a numbered folder that holds anything else is refused."
    if into.exists() and not into.is_dir(): raise SystemExit(f"--into {into} is a file: name a folder")
    for p in numbered(into):
        for x in p.iterdir():
            if not re.fullmatch(r'\d{4}|pieces\.json|ptxas\.xz|.*\.whl', x.name) or x.is_dir():
                raise SystemExit(f"{p} holds {x.name}, which is not of gpu-files, and would be deleted: name another folder with --into")
    return numbered(into)

def chosen(folders, into):
    "{kind: paths} as absolute ones, each there, with files in it and a name of its own."
    res = {k: [Path(os.path.abspath(Path(f).expanduser())) for f in fs] for k,fs in folders.items()}
    for kind,fs in res.items():
        for f in fs:
            if not f.exists(): raise SystemExit(f"{f} is neither a file nor a folder")
            if f.is_dir() and not any(p.is_file() for p in f.rglob('*')): raise SystemExit(f"{f} holds no files")
            if f.resolve() in (into.resolve(), *into.resolve().parents): raise SystemExit(f"{f} holds {into}, where the parts go: name another --into")
            if sum(f.name==g.name for g in fs)>1: raise SystemExit(f"two of --{kind} are named {f.name}: rename one")
    return res

def walk(folders):
    "(name in the target, path) of every file in {kind: [path, ...]}."
    for kind,fs in folders.items():
        for f in fs: yield from ((f'{kind}/{p.relative_to(f.parent)}', p) for p in sorted(f.rglob('*') if f.is_dir() else [f]) if p.is_file())

def sha(path):
    "A digest of a file."
    h = hashlib.sha256()
    with open(path, 'rb') as f:
        while b := f.read(1<<20): h.update(b)
    return h.hexdigest()

def cut(into, folders, number=2, most=MOST):
    "Write the files of `folders` into parts from `number` on, each of `most` bytes at the most, and what the files are into each; how many parts."
    paths = dict(walk(chosen(folders, into)))
    files = {n: dict(size=p.stat().st_size, sha256=sha(p)) for n,p in paths.items()}
    part,room,table,first = None,0,[],number
    def close():
        if part: (part/'pieces.json').write_text(json.dumps(dict(files=files, pieces=table), indent=1))
    for name,path in paths.items():
        size,at = files[name]['size'],0
        with open(path, 'rb') as f:
            while at<size or not size:
                if not room:
                    close(); part,room,table = into/str(number),most,[]
                    part.mkdir(parents=True); number += 1
                piece = f.read(min(room, size-at))
                if size and not piece: raise SystemExit(f"{path} has become shorter meanwhile: run this again")
                table.append(dict(file=name, offset=at, bytes=len(piece), piece=f'{len(table):04}'))
                (part/table[-1]['piece']).write_bytes(piece)
                at += len(piece); room -= len(piece)
                if not size: break
    close()
    return number-first

# Joining

def read_json(path, good):
    "What a file says, or None if it is absent, broken or not `good`."
    try:
        got = json.loads(path.read_text())
        return got if good(got) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError): return None

def is_files(x): return all(isinstance(r['size'], int) and isinstance(r['sha256'], str) for r in x.values())
def is_book(x): return is_files(x) and all(isinstance(b, int) and int(o)>=0 for r in x.values() for o,b in r['at'].items())
def is_table(x): return is_files(x['files']) and all(p['file'] in x['files'] and p['offset']+p['bytes']>=0 and '/' not in p['piece'] for p in x['pieces'])

def complete(x): return bool(x['at']) and sum(x['at'].values())==x['size']

def join(folder):
    """Put the pieces that are here in their places; ({name: bytes that are still missing} of all files, what is wrong with the pieces).

    A model or text is put together in NAME.part, and becomes NAME when each of its files is complete. files.json keeps which pieces came."""
    folder = Path(folder)
    if not folder.is_dir(): raise SystemExit(f"there is no folder {folder}")
    target,book,wrong,tables = folder/'files',folder/'files.json',[],{}
    for d in numbered(folder):
        if not (d/'pieces.json').exists(): continue
        if t := read_json(d/'pieces.json', is_table): tables[d] = t
        else: wrong.append(f"{d/'pieces.json'} is broken, or of an older gpu_files.py: carry {d.name} again")
    have = read_json(book, is_book) or {}
    for t in tables.values():
        for n,x in t['files'].items():
            if have.get(n, {}).get('sha256')!=x['sha256']: have[n] = x | dict(at={})
    def unit(n): return target.joinpath(*n.split('/')[:2])
    def part(n): return unit(n).with_name(unit(n).name+'.part')
    def place(n): return (unit(n) if unit(n).exists() else part(n)).joinpath(*n.split('/')[2:])
    def write_book():
        book.with_suffix('.new').write_text(json.dumps(have)); os.replace(book.with_suffix('.new'), book)
    for n,x in have.items(): # the book must fit the disk
        f = place(n); size = f.stat().st_size if f.is_file() else -1
        if size<max((int(o)+b for o,b in x['at'].items()), default=0) or complete(x) and size!=x['size']: x['at'] = {}
        if not x['at'] and size==x['size'] and sha(f)==x['sha256']: x['at'] = {'0':size}
    units = {}
    for n,x in have.items(): units.setdefault(unit(n), []).append((n, x))
    for u,xs in units.items():
        if not all(complete(x) for _,x in xs) and u.exists():
            p = part(xs[0][0])
            if p.exists(): shutil.rmtree(p) if p.is_dir() else p.unlink()
            os.replace(u, p)
    for d,t in tables.items():
        for p in t['pieces']:
            x,f,src = have[p['file']],place(p['file']),d/p['piece']
            if x['sha256']!=t['files'][p['file']]['sha256']: wrong.append(f"{d} is of another call than the other parts: carry those of one call"); break
            if complete(x) or str(p['offset']) in x['at']: continue
            data = src.read_bytes() if src.is_file() else b''
            if not src.is_file() or len(data)!=p['bytes']:
                wrong.append(f"{src} is {'broken' if src.is_file() else 'missing'}: carry {d.name} again"); continue
            f.parent.mkdir(parents=True, exist_ok=True)
            with open(f, 'r+b' if x['at'] else 'w+b') as out: out.seek(p['offset']); out.write(data)
            x['at'][str(p['offset'])] = len(data)
            if complete(x) and sha(f)!=x['sha256']: x['at'] = {}; wrong.append(f"{p['file']} is not what was cut: carry its parts again")
            write_book()
    for u,xs in units.items():
        if all(complete(x) for _,x in xs) and not u.exists(): os.replace(part(xs[0][0]), u)
    write_book()
    return {n: x['size']-sum(x['at'].values()) if x['at'] else max(x['size'], 1) for n,x in have.items()}, wrong

# Wheels

LAST = """# Python runs this when it starts: what was carried comes after all that is installed. The machine's own file of this name runs too.
import os, sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
here = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(os.path.dirname(here), 'site'))
spec = PathFinder.find_spec('sitecustomize', [p for p in sys.path if os.path.abspath(p)!=here])
if spec:
    sys.modules['sitecustomize'] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
"""

def install(folder):
    "The wheels that were carried into `folder`/site, once: a folder that is there is whole, and .wheels in it says of what."
    folder = Path(folder).absolute()
    wheels = [w for d in numbered(folder) for w in sorted(d.glob('*.whl'))]
    site,new,said = folder/'site',folder/'site.new','\n'.join(sorted(w.name for w in wheels))
    (folder/'last').mkdir(exist_ok=True); (folder/'last'/'sitecustomize.py').write_text(LAST)
    if (site/'.wheels').is_file() and (site/'.wheels').read_text()==said: return
    for d in (site, new): shutil.rmtree(d, ignore_errors=True)
    pip = '-m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile --no-cache-dir --target'.split()
    if subprocess.run([sys.executable, *pip, str(new), *map(str, wheels)]).returncode:
        raise SystemExit(f"pip could not install the wheels in {folder}; what it says is above")
    (new/'.wheels').write_text(said)
    os.replace(new, site)

def main(a):
    if a.install: return install(a.install)
    if a.join:
        left,wrong = join(a.join)
        lacks = {n:x for n,x in left.items() if x}
        for w in dict.fromkeys(wrong): print(w)
        for n,x in lacks.items(): print(f"{n} lacks", f'{x/1e6:.1f} MB' if x>=1e5 else f'{x/1e3:.1f} kB', end=': carry the other parts\n')
        if not (wrong or lacks): print(f"{Path(a.join)/'files'} is complete")
        return bool(wrong or lacks)
    into = Path(a.into).expanduser()
    old = old_parts(into)
    chosen(folders := dict(models=a.models, data=a.data), into)
    for p in old: shutil.rmtree(p)
    (into/'1').mkdir(parents=True)
    if not a.no_wheels: first_part(into/'1', a.python)
    cut(into, folders)
    for p in numbered(into):
        size = sum(f.stat().st_size for f in p.rglob('*') if f.is_file())
        table = json.loads((p/'pieces.json').read_text()) if (p/'pieces.json').exists() else {}
        print(f"{p}  {size/1e6:5.1f} MB  {', '.join(dict.fromkeys(r['file'] for r in table['pieces']) if table else sorted(x.name for x in p.iterdir()))}")
        if size>1.01*MOST: raise SystemExit(f"{p} is larger than {MOST/1e6:.0f} MB")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--into', default='.gpu', metavar='DIR'); p.add_argument('--join', metavar='DIR'); p.add_argument('--install', metavar='DIR')
    p.add_argument('--no-wheels', action='store_true'); p.add_argument('--python', default='3.12', help='version of Python there')
    for n in ('--models','--data'): p.add_argument(n, nargs='*', default=[], metavar='FOLDER')
    sys.exit(main(p.parse_args()))
