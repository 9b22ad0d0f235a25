"""What a GPU machine without a network lacks, in folders small enough to carry one at a time.

    python tests/gpu_files.py --into .gpu --models ~/smollm2-135m-instruct --data ~/wikitext-2     here: .gpu/1 wheels and ptxas, .gpu/2 ... pieces
    python tests/gpu_files.py --join .gpu     there, again after each part that came: .gpu/files/models/NAME, .gpu/files/data/NAME"""
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

def walk(folders):
    "(name in the target, path) of every file in {kind: [folder, ...]}."
    for kind,fs in folders.items():
        for given in fs:
            f = Path(given).expanduser().resolve()
            if not f.exists(): raise SystemExit(f"{given} is neither a file nor a folder")
            yield from ((f'{kind}/{p.relative_to(f.parent)}', p) for p in sorted(f.rglob('*') if f.is_dir() else [f]) if p.is_file())

def cut(into, folders, number=2, most=MOST):
    "Write the files of `folders` into parts from `number` on, each of `most` bytes at the most; how many parts."
    part,room,table,first = None,0,[],number
    def close():
        if part: (part/'pieces.json').write_text(json.dumps(table, indent=1))
    for name,path in walk(folders):
        size,at = path.stat().st_size,0
        with open(path, 'rb') as f:
            sha = hashlib.sha256()
            while block := f.read(2**22): sha.update(block)
            f.seek(0)
            while at<size or not size:
                if not room:
                    close(); part,room,table = into/str(number),most,[]
                    part.mkdir(parents=True); number += 1
                piece = f.read(room)
                table.append(dict(file=name, size=size, sha256=sha.hexdigest(), offset=at, piece=f'{len(table):04}'))
                (part/table[-1]['piece']).write_bytes(piece)
                at += len(piece); room -= len(piece)
                if not size: break
    close()
    return number-first

def join(folder):
    "Put the pieces that are here in their places; {name: bytes that are still missing} of all files begun. Until it is whole, a file is NAME.part."
    target,book = Path(folder)/'files',Path(folder)/'files.json'
    try: have = json.loads(book.read_text())
    except (OSError, ValueError): have = {} # begin anew
    have = {n:x for n,x in have.items() if (target/f'{n}.part').is_file() or (target/n).is_file() and (target/n).stat().st_size==x['size']}
    for table in sorted(Path(folder).glob('[0-9]*/pieces.json')):
        for p in json.loads(table.read_text()):
            path,piece = target/p['file'],table.parent/p['piece']
            part,mine = path.with_name(f'{path.name}.part'),have.get(p['file'])
            if mine is None or mine['sha256']!=p['sha256']: # new, or another file of that name
                part.unlink(missing_ok=True); path.unlink(missing_ok=True)
                mine = have[p['file']] = dict(size=p['size'], sha256=p['sha256'], at={})
            if str(p['offset']) in mine['at']: continue
            if not piece.is_file(): raise SystemExit(f"{piece} is missing: carry {table.parent} again")
            data = piece.read_bytes()
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, 'r+b' if part.exists() else 'w+b') as f: f.seek(p['offset']); f.write(data)
            mine['at'][str(p['offset'])] = len(data)
            if missing(mine)==0: os.replace(part, path)
            book.with_suffix('.tmp').write_text(json.dumps(have)); os.replace(book.with_suffix('.tmp'), book)
    return {n: missing(x) for n,x in have.items()}

def missing(x): return x['size']-sum(x['at'].values())

def emptied(into):
    "The folder, without the parts that were made before. Refuses one in which a number names something else."
    old = [p for p in into.glob('*') if p.name.isdigit()]
    for p in old:
        if not p.is_dir() or any(not re.fullmatch(r'\d{4}|pieces\.json|ptxas\.xz|.+\.whl', f.name) for f in p.iterdir()):
            raise SystemExit(f"{p} is no part that was made here, and a part would take its place; choose another --into")
    for p in old: shutil.rmtree(p)
    return into

def main(a):
    if a.join:
        if not Path(a.join).is_dir(): raise SystemExit(f"{a.join} is no folder of parts")
        left = {n:x for n,x in join(a.join).items() if x}
        if left: raise SystemExit('\n'.join(f"{n} lacks {x/1e6:.1f} MB: carry the other parts" for n,x in left.items()))
        print(f"{Path(a.join)/'files'} is complete")
        return
    folders = dict(models=a.models, data=a.data)
    for _ in walk(folders): pass # they are there
    into = emptied(Path(a.into))
    (into/'1').mkdir(parents=True)
    if not a.no_wheels: first_part(into/'1', a.python)
    cut(into, folders)
    for p in sorted((p for p in into.glob('*') if p.name.isdigit()), key=lambda p: int(p.name)):
        size = sum(f.stat().st_size for f in p.rglob('*') if f.is_file())
        table = json.loads((p/'pieces.json').read_text()) if (p/'pieces.json').exists() else []
        print(f"{p}  {size/1e6:5.1f} MB  {', '.join(dict.fromkeys(r['file'] for r in table) if table else sorted(x.name for x in p.iterdir()))}")
        if size>1.01*MOST: raise SystemExit(f"{p} is larger than {MOST/1e6:.0f} MB")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--into', default='.gpu', metavar='DIR'); p.add_argument('--join', metavar='DIR'); p.add_argument('--no-wheels', action='store_true')
    p.add_argument('--python', default='3.12', help='version of Python there')
    for n in ('--models','--data'): p.add_argument(n, nargs='*', default=[], metavar='FOLDER')
    main(p.parse_args())
