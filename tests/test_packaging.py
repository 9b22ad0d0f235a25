"What a user installs, and the frame around the book: wheel, lazy names, README, site, Makefile, sync check."
import configparser, json, os, re, shutil, subprocess, sys, tarfile, zipfile
from email import message_from_string
from pathlib import Path

import pytest, yaml
from packaging.requirements import Requirement

pytestmark = pytest.mark.processes

NAMES = {'make_attention', 'attention_report', 'compare_attentions', 'linear_attention',
    'linearize', 'save_linearized', 'load_linearized', 'distill', 'align', 'finetune', 'make_feature_map'}


def sh(*args, cwd=None, **env):
    "Run a command; what it printed, with its exit code"
    r = subprocess.run([str(a) for a in args], cwd=cwd, env={**os.environ, **env}, text=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return r.returncode, r.stdout

def ok(*args, **kw):
    rc, out = sh(*args, **kw)
    assert rc == 0, out
    return out

def py(code, **kw): return ok(sys.executable, '-c', code, **kw).strip()


# ---- the wheel, built from the source archive as PyPI's users get it

@pytest.fixture(scope='session')
def dist(root, tmp_path_factory):
    src = tmp_path_factory.mktemp('src')
    for f in 'settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE'.split(): shutil.copy(root/f, src)
    shutil.copytree(root/'hedgehog_nb', src/'hedgehog_nb', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(root/'results', src/'results')
    ok(sys.executable, '-m', 'build', '--no-isolation', '--outdir', src/'dist', src)
    return src/'dist'

@pytest.fixture(scope='session')
def wheel(dist): return zipfile.ZipFile(next(dist.glob('*.whl')))

@pytest.fixture(scope='session')
def metadata(wheel): return message_from_string(wheel.read(next(n for n in wheel.namelist() if n.endswith('/METADATA'))).decode())


def test_source_archive_can_build(dist):
    names = {n.partition('/')[2] for n in tarfile.open(next(dist.glob('*.tar.gz'))).getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'README.md'} <= names

def test_wheel_holds_the_package_and_nothing_else(root, wheel):
    tree = {p.relative_to(root).as_posix() for p in (root/'hedgehog_nb').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    packed = {n for n in wheel.namelist() if '.dist-info/' not in n and not n.endswith('/')}
    assert packed == tree | {f'hedgehog_nb/assets/{p.relative_to(root).as_posix()}' for p in (root/'results').glob('*.json')}
    assert any(n.startswith('hedgehog_nb/assets/') and n.endswith('.safetensors') for n in packed) and 'hedgehog_nb/kernels/cpu/kernels.c' in packed
    assert any(n.endswith('licenses/LICENSE') for n in wheel.namelist())

def test_metadata_is_settings_ini(root, metadata):
    ini = configparser.ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini')
    want = set()
    for key, val in ini['DEFAULT'].items():
        extra = key.removesuffix('requirements').rstrip('_')
        for r in map(Requirement, val.split('\n')[1:]):
            marks = [m for m in (str(r.marker or ''), f'extra == "{extra}"' if extra else '') if m]
            want.add((r.name, str(r.specifier), ' and '.join(marks)))
    have = {(r.name, str(r.specifier), str(r.marker or '')) for r in map(Requirement, metadata.get_all('Requires-Dist'))}
    assert have == want
    assert any(r[0] == 'triton' and r[2] == 'platform_system == "Linux"' for r in have)

def test_every_requirement_has_one_lower_bound(root):
    ini = configparser.ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini')
    bounds = {}
    for r in (Requirement(l) for v in ini['DEFAULT'].values() for l in v.split('\n')[1:]): bounds.setdefault(r.name, set()).add(str(r.specifier))
    assert all(len(b) == 1 and '>=' in min(b) for b in bounds.values()), bounds

def test_metadata_facts(wheel, metadata):
    assert metadata['Name'].replace('-', '_') == 'hedgehog_nb' and metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Version'] == py('import hedgehog_nb; print(hedgehog_nb.__version__)')
    assert metadata['Requires-Python'] == '>=3.10'
    eps = configparser.ConfigParser(delimiters=['='])
    eps.read_string(wheel.read(next(n for n in wheel.namelist() if n.endswith('entry_points.txt'))).decode())
    assert dict(eps['console_scripts']) == {'hedgehog': 'hedgehog_nb.cli:app'}
    assert dict(eps['nbdev']) == {'hedgehog_nb': 'hedgehog_nb._modidx:d'}

def test_installed_wheel_works_away_from_the_checkout(dist, tmp_path):
    "Its assets are found, its index for nbdev loads, and its command answers"
    site = tmp_path/'site'
    ok(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', site, next(dist.glob('*.whl')))
    env = dict(cwd=tmp_path, PYTHONPATH=str(site))
    where, model = py('import hedgehog_nb; from importlib.resources import files; p = files("hedgehog_nb")/"assets"\n'
                      'print(hedgehog_nb.__file__); print(len(list(p.rglob("model.safetensors"))))', **env).splitlines()
    assert Path(where).is_relative_to(site) and model == '1'
    py('from hedgehog_nb._modidx import d; assert d["syms"]', **env)
    assert 'demo' in ok(site/'bin'/'hedgehog', '--help', **env)
    assert int(py('from hedgehog_nb.results import read_results; print(len(read_results()))', **env)) > 1000

def test_one_version(root):
    import hedgehog_nb
    v = hedgehog_nb.__version__
    assert f'\n## {v}\n' in (root/'CHANGELOG.md').read_text() and f'\nversion: {v}\n' in (root/'CITATION.cff').read_text()


# ---- the package's own names

def test_import_is_light(root):
    "`import hedgehog_nb` loads nothing heavy, and still shows every name"
    assert py('import sys, hedgehog_nb as h; '
        'print(sorted({"torch", "transformers", "triton", "numpy"} & set(sys.modules)), set(h.__all__) <= set(dir(h)))', cwd=root) == '[] True'

def test_names():
    import hedgehog_nb
    assert set(hedgehog_nb.__all__) == NAMES
    with pytest.raises(AttributeError, match='no_such_name'): hedgehog_nb.no_such_name

@pytest.mark.parametrize('name', sorted(NAMES))
def test_name_loads(name):
    import hedgehog_nb
    assert callable(getattr(hedgehog_nb, name)) and getattr(hedgehog_nb, name).__name__ == name

# ---- README and site

def squeeze(md):
    "Markdown without what Quarto and we may write differently: spacing, table rules, quotes, escapes, links on names in backticks"
    md = re.sub(r'\[(`[^`\n]+`)\]\([^)]*\)', r'\1', md).translate(str.maketrans('‘’“”', "''\"\""))
    md = md.replace('\\', '').replace('…', '...').replace('–', '--')
    md = re.sub(r'-{3,}:?', '---', md)
    return [' '.join(l.replace('|', ' | ').split()) for l in md.splitlines() if l.strip()]

def test_readme_is_the_home_page(root):
    from hedgehog_nb.docs import readme_md
    assert squeeze((root/'README.md').read_text()) == squeeze(readme_md(str(root/'nbs/index.ipynb'))), 'run make readme'

def test_quickstart_has_two_lines(root):
    fences = re.findall(r'^## Quickstart from a clone\n.*?^```\s*bash\n(.*?)^```', (root/'README.md').read_text(), flags=re.M|re.S)
    assert fences == ['make demo\nmake test\n']

def test_squeeze_sees_changes(root):
    md = (root/'README.md').read_text()
    assert squeeze(md) == squeeze(md.replace('|---|---|', '| :------ | ----- |'.replace(':', '')))
    for old, new in [('## Quickstart', '## Quick start'), ('make demo', 'make dem'), ('causal', 'casual'), ('(B, H, T, D)', '(B, T, H, D)')]:
        if old in md: assert squeeze(md) != squeeze(md.replace(old, new, 1))

def hrefs(o):
    "Every page named in a sidebar"
    if isinstance(o, str): return [o] if o.endswith('.ipynb') else []
    if isinstance(o, dict): return [p for k, v in o.items() if k in ('href', 'contents') for p in hrefs(v)]
    return [p for v in o for p in hrefs(v)]

def test_sidebar_lists_every_page(root):
    cfg = yaml.safe_load((root/'_quarto.yml').read_text())
    pages = {p.relative_to(root).as_posix() for d in ('nbs', 'kernels') for p in (root/d).glob('[!_.]*.ipynb')}
    listed = hrefs(cfg['website']['sidebar'])
    assert sorted(listed) == sorted(pages)
    assert cfg['project']['render'][0] == listed[0] == 'nbs/index.ipynb'

def test_pages_are_numbered_in_the_order_of_the_sidebar(root):
    "Chapters from 01, kernels from 01, reference from 90, each without a hole; a second page of a chapter follows it with a letter"
    pages = hrefs(yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar'])[1:]
    series = {}
    names = [p.split('/') for p in pages]
    assert all(re.fullmatch(r'\d\d[b-z]?_\w+\.ipynb', n) for _,n in names)
    for d in ('nbs','kernels'): assert [n for e,n in names if e==d] == sorted(n for e,n in names if e==d)
    for d,n in names:
        if n[2]=='_': series.setdefault((d, n >= '90'), []).append(int(n[:2]))
    assert {k: (v[0], v == [*range(v[0], v[0]+len(v))]) for k, v in series.items()} == {('nbs', False): (1, True),
        ('kernels', False): (1, True), ('nbs', True): (90, True)}

def test_home_page_and_sidebar_say_the_same(root):
    "The same pages in the same order, each under the title that it has itself"
    from fastcore.nbio import read_nb
    pages = hrefs(yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar'])[1:]
    table = '\n'.join(c.source for c in read_nb(root/'nbs/index.ipynb').cells if '| Chapter' in c.source)
    rows = {os.path.normpath(f'nbs/{p}'): title for title, p in re.findall(r'^\| \[([^]]+)\]\(([^)]+)\)', table, re.M)}
    assert [*rows] == pages
    assert rows == {p: read_nb(root/p).cells[0].source.splitlines()[0].removeprefix('# ') for p in pages}

def test_titles_stand_alone(root):
    "nbdev leaves out of a page what stands in the cell of its title, but for the line below it."
    from fastcore.nbio import read_nb
    for p in [*(root/'nbs').glob('[!_.]*.ipynb'), *(root/'kernels').glob('[!_.]*.ipynb')]:
        title,*rest = read_nb(p).cells[0].source.splitlines()
        assert title.startswith('# ') and all(not l or l.startswith('> ') for l in rest), p.name

def test_home_page_links_lead_somewhere(root):
    from fastcore.nbio import read_nb
    for c in read_nb(root/'nbs/index.ipynb').cells:
        for t in re.findall(r'\]\(([^)\s]+\.ipynb)\)', c.source): assert (root/'nbs'/t).exists(), t

def test_nbdev_yml_follows_pyproject(root, tmp_path):
    for f in ('pyproject.toml', '_quarto.yml', 'nbdev.yml'): shutil.copy(root/f, tmp_path)
    py('from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', cwd=tmp_path)
    for f in ('_quarto.yml', 'nbdev.yml'): assert (tmp_path/f).read_text() == (root/f).read_text()


# ---- Makefile

def make(root, *args):
    "Run make as from a fresh shell, whatever this one was started with"
    return sh('env', *(f'-u{v}' for v in 'MAKEFLAGS MFLAGS MAKELEVEL PYTHON VENV TORCH WORKERS LOWEST OLDEST'.split()),
        'make', '-C', root, '--no-print-directory', *args)

@pytest.mark.skipif(not shutil.which('make'), reason='needs make')
class TestMakefile:
    def test_help_names_the_commands(self, root):
        rc, out = make(root)
        assert rc == 0 and all(re.search(rf'^  {t} ', out, re.M) for t in ('demo', 'test', 'test-slow', 'test-lowest', 'test-all', 'gpu', 'sync', 'docs'))

    def test_fresh_set_up_takes_torch_first(self, root, tmp_path):
        rc, out = make(root, '-n', 'demo', f'VENV={tmp_path}/v')
        steps = [out.index(s) for s in ('-m venv', 'install torch==2.13.0', '-e .', 'hedgehog demo')]
        assert rc == 0 and steps == sorted(steps) and '[dev]' not in out

    def test_torch_can_be_chosen(self, root, tmp_path):
        rc, out = make(root, '-n', 'test', f'VENV={tmp_path}/v', 'TORCH=torch==2.11.0 --no-index')
        assert rc == 0 and 'install torch==2.11.0 --no-index' in out and "-e '.[dev]'" in out

    def test_what_uv_cannot_install_pip_does(self, root, tmp_path):
        (tmp_path/'bin').mkdir(); (tmp_path/'.stamp-torch').touch()
        for name,code in dict(python='echo pip "$@"', uv='echo uv "$@"; exit $UV_ENDS', hedgehog='echo it runs').items():
            (tmp_path/'bin'/name).write_text(f'#!/bin/sh\n{code}\n'); (tmp_path/'bin'/name).chmod(0o755)
        for ends in '01':
            (tmp_path/'.stamp-core').unlink(missing_ok=True)
            rc, out = make(root, 'demo', f'VENV={tmp_path}', f'UV_ENDS={ends}')
            assert rc == 0 and f'uv pip install -q --python {tmp_path}/bin/python -e .\n' in out and 'it runs' in out
            assert ('pip tries now' in out) == bool(re.search(r'^pip .* -q -e \.$', out, re.M)) == (ends == '1')

    def test_lowest_versions_are_tested_where_they_were_installed(self, root, tmp_path):
        rc, out = make(root, '-n', 'test-lowest', f'LOWEST={tmp_path}/v', 'OLDEST=python3.10')
        steps = [out.index(s) for s in (f'python3.10 -m venv --clear {tmp_path}/v', 'install -q uv',
            '--resolution lowest-direct --extra dev', '-q --no-deps -e .', '-m pytest')]
        assert rc == 0 and steps == sorted(steps)
        for s in ('torch', 'core', 'dev', 'lowest'): (tmp_path/f'.stamp-{s}').touch()
        rc, out = make(root, '-n', 'test-lowest', f'LOWEST={tmp_path}')
        assert rc == 0 and 'install' not in out and f'PATH="{tmp_path}/bin:' in out

    def test_lowest_needs_an_old_python(self, root, tmp_path):
        rc, out = make(root, 'test-lowest', f'LOWEST={tmp_path}/v', 'OLDEST=')
        assert rc != 0 and 'No Python 3.10' in out and not (tmp_path/'v').exists()

    def test_workflows_name_targets(self, root):
        runs = [s.get('run', '') for f in (root/'.github/workflows').glob('*.yaml') for j in yaml.safe_load(f.read_text())['jobs'].values() for s in j['steps']]
        named = set(re.findall(r'^make ([\w-]+)', '\n'.join([*runs, (root/'.ci/run').read_text()]), flags=re.M))
        have = set(re.findall(r'^([\w-]+):', (root/'Makefile').read_text(), flags=re.M))
        assert {'sync', 'test', 'test-slow', 'test-lowest', 'demo', 'docs'} <= named <= have

    def test_slow_tests_are_left_out_and_run_apart(self, root, tmp_path):
        "`make test` and `make test-slow` run each test once, and CI runs both."
        for s in ('torch', 'core', 'dev'): (tmp_path/f'.stamp-{s}').touch()
        said = {t: re.findall(r'-m pytest .* -m (.*) tests$', make(root, '-n', t, f'VENV={tmp_path}')[1], re.M) for t in ('test', 'test-slow', 'test-all')}
        assert said == {'test': ['"not slow"'], 'test-slow': ['slow'], 'test-all': ['"not slow"', 'slow']}
        jobs = yaml.safe_load((root/'.github/workflows/test.yaml').read_text())['jobs'].values()
        assert any(re.search(r'make test-slow$', s.get('run', '')) for j in jobs for s in j['steps'])
        assert 'make test ' in (root/'.ci/run').read_text()

    def test_every_marker_is_registered(self, root):
        "pytest refuses any other, so that a slip of the pen leaves no test out."
        registered = set(re.findall(r'^    "(\w+): ', (root/'pyproject.toml').read_text(), re.M))
        used = set(re.findall(r'pytest\.mark\.(\w+)', '\n'.join(f.read_text() for f in (root/'tests').rglob('*.py'))))
        assert used - {'parametrize', 'skipif'} == registered and '--strict-markers' in (root/'pyproject.toml').read_text()

    def test_second_run_sets_nothing_up(self, root, tmp_path):
        for s in ('torch', 'core'): (tmp_path/f'.stamp-{s}').touch()
        rc, out = make(root, '-n', 'demo', f'VENV={tmp_path}')
        assert rc == 0 and 'install' not in out and 'hedgehog demo' in out

    def test_new_requirements_are_installed(self, root, tmp_path):
        for s in ('torch', 'core'): (tmp_path/f'.stamp-{s}').touch()
        os.utime(tmp_path/'.stamp-core', (0, 0))
        rc, out = make(root, '-n', 'demo', f'VENV={tmp_path}')
        assert rc == 0 and '-e .' in out and 'install torch' not in out

    def test_old_python_is_named(self, root, tmp_path):
        rc, out = make(root, 'demo', f'VENV={tmp_path}/v', 'PYTHON=false')
        assert rc != 0 and 'Python 3.10' in out and not (tmp_path/'v').exists()

    def test_docs_without_quarto_says_so(self, root, tmp_path):
        if shutil.which('quarto'): pytest.skip('Quarto is here')
        for s in ('torch', 'core', 'dev'): (tmp_path/f'.stamp-{s}').touch()
        rc, out = make(root, 'docs', f'VENV={tmp_path}')
        assert rc != 0 and 'make docs needs Quarto' in out


# ---- the sync check

@pytest.fixture(scope='module')
def synced(root, tmp_path_factory):
    "A small project in sync: one notebook, its module, and our sync script"
    p = tmp_path_factory.mktemp('synced')
    for d in ('.ci', 'nbs', 'hedgehog_nb'): (p/d).mkdir()
    for f in ('pyproject.toml', '.gitignore', '.ci/sync', 'nbs/91_docs.ipynb', 'nbs/index.ipynb', 'hedgehog_nb/__init__.py'): shutil.copy(root/f, p/f)
    ok('git', 'init', '-q', cwd=p)
    ok('nbdev-export', cwd=p, PATH=PATH)
    return p

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])

def sync(p): return sh('.ci/sync', cwd=p, PATH=PATH)

@pytest.mark.skipif(not shutil.which('git'), reason='needs git')
class TestSync:
    @pytest.fixture
    def proj(self, synced, tmp_path): return Path(shutil.copytree(synced, tmp_path/'p'))

    def test_in_sync(self, proj):
        before = {f: f.read_bytes() for f in proj.rglob('*') if f.is_file()}
        rc, out = sync(proj)
        assert rc == 0 and 'In sync' in out, out
        assert {f: f.read_bytes() for f in proj.rglob('*') if f.is_file()} == before

    def test_module_edited_by_hand(self, proj):
        with open(proj/'hedgehog_nb/docs.py', 'a') as f: f.write('\nx = 1\n')
        rc, out = sync(proj)
        assert rc == 1 and 'M hedgehog_nb/docs.py' in out and (proj/'hedgehog_nb/docs.py').read_text().endswith('x = 1\n')

    def test_module_without_notebook(self, proj):
        code = (proj/'hedgehog_nb/docs.py').read_text().replace('91_docs', '99_gone')
        (proj/'hedgehog_nb/gone.py').write_text(code * (1 + 200_000//len(code)))  # a difference that no pipe holds
        rc, out = sync(proj)
        assert rc == 1 and 'D hedgehog_nb/gone.py' in out

    def test_notebook_not_exported(self, proj):
        (proj/'hedgehog_nb/docs.py').unlink()
        rc, out = sync(proj)
        assert rc == 1 and '?? hedgehog_nb/docs.py' in out

    def test_notebook_not_clean(self, proj):
        nb = proj/'nbs/91_docs.ipynb'
        nb.write_text(nb.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
        rc, out = sync(proj)
        assert rc == 1 and 'M nbs/91_docs.ipynb' in out

    @pytest.mark.parametrize('where', ['tests/helpers/x.py', 'hedgehog_nb/by_hand.py', 'nbs/91_docs.ipynb'])
    def test_long_line(self, proj, where):
        "Of code: prose and captions are one line a paragraph."
        f = proj/where; f.parent.mkdir(parents=True, exist_ok=True)
        def plant(line):
            if f.suffix=='.py': return f.write_text(f'{line}\n')
            nb = json.loads(f.read_text()); nb['cells'][-1] |= dict(cell_type='code', source=[line], metadata={}, execution_count=None, outputs=[])
            f.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False)+'\n')
        plant('x = "' + 'a'*154 + '"'); rc, out = sync(proj)
        assert rc == 0, out
        plant('x = "' + 'a'*155 + '"'); rc, out = sync(proj)
        assert rc == 1 and 'at most 160 columns' in out and where in out and 'line 1: 161 columns' in out, out
        if f.suffix=='.ipynb':
            plant('#| fig-cap: "' + 'a'*155 + '"'); rc, out = sync(proj)
            assert rc == 0, out

    def test_nowhere_to_copy_to(self, proj):
        before = sorted(proj.rglob('*'))
        rc, out = sh('.ci/sync', cwd=proj, PATH=PATH, TMPDIR=str(proj/'nowhere'))
        assert rc == 1 and 'nowhere' in out and sorted(proj.rglob('*')) == before

    def test_in_a_hook_of_a_worktree(self, proj):
        "Git says there which repository its commands are of; ours is the copy"
        who = '-c', 'user.name=x', '-c', 'user.email=x@localhost'
        ok('git', 'add', '-A', cwd=proj); ok('git', *who, 'commit', '-qm', 'one', cwd=proj)
        hook = proj/'.git/hooks/pre-commit'
        hook.write_text('#!/bin/sh\nexec .ci/sync\n'); hook.chmod(0o755)
        ok('git', 'worktree', 'add', '-q', proj/'w', cwd=proj)
        (proj/'w/notes.txt').write_text('x'); ok('git', 'add', '-A', cwd=proj/'w')
        out = ok('git', *who, 'commit', '-m', 'two', cwd=proj/'w', PATH=PATH)
        assert 'In sync' in out and ok('git', 'log', '--format=%s', cwd=proj/'w').split() == ['two', 'one']

    def test_without_nbdev(self, proj):
        for tool in ('git', 'bash', 'sh', 'dirname', 'mktemp', 'mkdir', 'cp', 'rm', 'grep', 'sed'):
            (proj/'bin').mkdir(exist_ok=True)
            (proj/'bin'/tool).symlink_to(shutil.which(tool))
        rc, out = sh('.ci/sync', cwd=proj, PATH=str(proj/'bin'))
        assert rc == 1 and 'could not be exported' in out

    def test_without_git(self, proj):
        shutil.rmtree(proj/'.git')
        rc, out = sh('.ci/sync', cwd=proj, PATH=PATH, GIT_CEILING_DIRECTORIES=str(proj.parent))
        assert rc == 1 and 'needs a git checkout' in out
