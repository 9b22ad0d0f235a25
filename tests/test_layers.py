"The library's layers: imports run one way, from `cli` down to `ops`. Read from the source, so that imports inside functions count too."
import ast, re
from pathlib import Path
import pytest

ORDER = 'ops','kernels','functional','attentions','models','training','analysis','experiments','cli'  # each imports what stands before it
BESIDE = 'data','plots','results','docs','site','notebook','_nbdev','files'  # these import none of the others, but `files`; `site` is made with `docs`
RANK = {name:i for i,names in enumerate(ORDER) for name in ([names] if isinstance(names, str) else names)}
SLOW = 'kernels','functional','cli'  # what is imported inside functions: Triton may not be there, and commands load PyTorch only when they run

def module_name(path, root):
    parts = path.relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1]=='__init__' else parts)

def imports(path, root):
    "(module imported from, name, inside a function?, line) of each import of the library, relative ones resolved."
    package = [*path.relative_to(root).parts[:-1]]
    def walk(node, inside):
        for n in ast.iter_child_nodes(node):
            if isinstance(n, ast.ImportFrom):
                base = '.'.join(package[:len(package)-n.level+1] if n.level else [])
                module = '.'.join(filter(None, [base, n.module]))
                if module.split('.')[0]==package[0]: yield from ((module, a.name, inside, n.lineno) for a in n.names)
            elif isinstance(n, ast.Import): yield from ((a.name, '', inside, n.lineno) for a in n.names if a.name.split('.')[0]==package[0])
            else: yield from walk(n, inside or isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
    return list(walk(ast.parse(path.read_text(encoding='utf-8')), False))

def faults(package):
    "What breaks the layers in the package at this path, as one line each."
    root = package.parent
    modules = {module_name(p, root):p for p in sorted(package.rglob('*.py')) if p.name!='_modidx.py'}
    res,arrows = [],{}
    for name,path in modules.items():
        if name==package.name: continue  # the package itself loads names when they are asked for
        floor = name.split('.')[1]
        for module,what,inside,line in imports(path, root):
            target = f'{module}.{what}' if f'{module}.{what}' in modules else module
            if target==package.name: continue
            other,at = target.split('.')[1],f'{name}:{line}'
            if not {floor, other}<={*RANK, *BESIDE}:
                res.append(f'{at} lies in no layer')
                continue
            arrows.setdefault(name, set()).add(target)
            if other!=floor:
                if floor in BESIDE and other!='files' and (floor,other)!=('site','docs'):
                    res.append(f'{at} imports {target}, and {floor} stands beside the layers')
                elif not {floor, other}&{*BESIDE} and RANK[other]>=RANK[floor]: res.append(f'{at} imports {target}, which lies above it')
                if what.startswith('_') or any(p.startswith('_') for p in target.split('.')): res.append(f'{at} imports the private {target}.{what}')
            if inside and floor!='cli' and not {floor, other}&set(SLOW) and other not in BESIDE: res.append(f'{at} imports {target} inside a function')
    return res+[f"cycle: {' -> '.join(c)}" for c in cycles(arrows)]

def cycles(arrows):
    "One cycle of modules, or none."
    done,path = set(),[]
    def go(m):
        if m in path: return [*path[path.index(m):], m]
        if m in done: return None
        path.append(m)
        found = next(filter(None, map(go, sorted(arrows.get(m, ())))), None)
        path.pop(); done.add(m)
        return found
    return [c for m in sorted(arrows) if (c := go(m))][:1]

PACKAGE = Path(__file__).parents[1]/'hedgehog_nb'

def test_layers(): assert not faults(PACKAGE), '\n'.join(faults(PACKAGE))

@pytest.mark.parametrize('where,line,said', [
    ('ops/softmax.py', 'from ..models.linearize import linearize', 'hedgehog_nb.ops.softmax:1 imports hedgehog_nb.models.linearize, which lies above it'),
    ('ops/softmax.py', 'def f():\n    from hedgehog_nb.training import distill',
        'hedgehog_nb.ops.softmax:2 imports hedgehog_nb.training.distill, which lies above it'),
    ('models/linearize.py', 'from ..ops.linear import _step', 'imports the private hedgehog_nb.ops.linear._step'),
    ('models/linearize.py', 'def f():\n    from ..ops.linear import LinearState', 'imports hedgehog_nb.ops.linear inside a function'),
    ('plots.py', 'import hedgehog_nb.ops.linear', 'stands beside the layers'),
    ('analysis/report.py', 'from ..experiments.recall import RecallTask', 'which lies above it'),
    ('training/losses.py', 'from . import finetune', 'cycle: hedgehog_nb.training.'),
    ('new.py', 'from .ops import linear', 'lies in no layer')])
def test_planted_arrows_are_found(where, line, said, tmp_path):
    "The test above fails on an import that breaks the layers."
    import shutil
    shutil.copytree(PACKAGE, tmp_path/'hedgehog_nb', ignore=shutil.ignore_patterns('assets', '__pycache__'))
    f = tmp_path/'hedgehog_nb'/where
    f.write_text(f"{line}\n{f.read_text(encoding='utf-8') if f.exists() else ''}", encoding='utf-8')
    found = faults(tmp_path/'hedgehog_nb')
    assert any(said in x for x in found), found

def test_each_module_is_written_by_one_notebook():
    "As its header says; the home page's table and the site's sidebar lead from the notebook to the reader."
    for f in PACKAGE.rglob('*.py'):
        text = f.read_text(encoding='utf-8')
        if not re.search('^# AUTOGENERATED! DO NOT EDIT! File', text, re.M): continue
        home = re.search(r'File to edit: (\S+)\.$', text, re.M)[1]
        assert set(re.findall(r'^# %% (\S+\.ipynb) #', text, re.M))=={home} and (f.parent/home).resolve().is_file(), f
