"What `make site-check` finds: nothing on pages as they are, and a fault of each kind that is planted."
import json, shutil, subprocess, sys
from copy import deepcopy
import pytest
from pathlib import Path
from hedgehog_nb import site

HOME = '| Chapter | What it builds |\n|---|---|\n| [First page](01_first.ipynb) | an example |'

def cell(kind, src): return dict(cell_type=kind, id='x', metadata={}, source=src, **(dict(execution_count=None, outputs=[]) if kind=='code' else {}))
def text(s, kind='stdout'): return dict(output_type='stream', name=kind, text=s)
def data(**kw): return dict(output_type='display_data', metadata={}, data={k.replace('_','/'):v for k,v in kw.items()})
def page(title, name, *cells): return [cell('raw', f'---\ndescription: what it is about\noutput-file: {name}.html\ntitle: {title}\n---\n'), *cells]

@pytest.fixture
def copy(tmp_path):
    "A processed copy with two good pages; `write` puts cells in place of those of a page or its notebook"
    opening = 'This paragraph says what the page is about, and it has more than ten words.'
    good = dict(
        index=page('Home', 'index', cell('markdown', opening), cell('markdown', HOME)),
        first=page('First page', 'first', cell('markdown', '[![Open in Colab](https://x.org/badge.svg)](https://x.org)'), cell('markdown', opening),
            cell('markdown', '## A part\n<span id="_helper"></span>'), cell('code', '#| code-fold: true\ndef _helper(): pass'),
            cell('markdown', 'See [home](index.ipynb), [a part](#a-part), [itself](https://site.org/nbs/first.html#_helper).')))
    (tmp_path/'_quarto.yml').write_text('website:\n  sidebar:\n    contents:\n      - text: Home\n        href: nbs/index.ipynb\n'
        '      - section: All\n        contents: [nbs/01_first.ipynb]\n')
    (tmp_path/'nbdev.yml').write_text('website:\n  site-url: https://site.org\n')
    def write(first=None, index=None, source=None):
        for name,cells in (('01_first', first or good['first']), ('index', index or good['index'])):
            f = tmp_path/f'_proc/nbs/{name}.ipynb'
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_text(json.dumps(dict(cells=cells)))
        (tmp_path/'nbs').mkdir(exist_ok=True)
        for name in ('01_first','index'):
            cells = [] if name=='index' else source or [cell('code', '#| exports\ndef _helper(): pass')]
            (tmp_path/f'nbs/{name}.ipynb').write_text(json.dumps(dict(cells=cells)))
        return site.site_problems(tmp_path)
    return write,good

def with_cells(good, *cells): return [*deepcopy(good['first']), *cells]

def test_good_pages(copy):
    write,_ = copy
    assert write() == []

OUTPUTS = [(text('hello', 'stderr'), 'went to stderr'),
    (text('50%|#####     | 1/2'), 'a progress bar'), (text('3/7 [00:01<00:02, 2.5it/s]'), 'a progress bar'),
    (text('a\x1b[31mb'), 'terminal colours'), (text('[bold]hi[/bold]'), 'Rich markup'), (text('x.py:3: FutureWarning: soon'), 'a warning'),
    (data(text_plain='<function f at 0x7f00aa11bb22>'), "an object's address"), (data(text_plain='<foo.Bar object>'), "an object's address"),
    (data(text_plain="{'a': 1,\n 'b': 2,\n 'c': 3,\n 'd': 4}"), 'a dictionary'),
    (dict(output_type='error', ename='KeyError', evalue='', traceback=[]), 'ends in KeyError'),
    (data(image_png='aaaa', text_plain='<Figure size 1x1 with 1 Axes>'), 'a figure without')]

@pytest.mark.parametrize('output,what', OUTPUTS, ids=[w for _,w in OUTPUTS])
def test_outputs(copy, output, what):
    write,good = copy
    found = write(with_cells(good, cell('code', '1+1') | dict(outputs=[output])))
    assert len(found) == 1 and what in found[0] and found[0].startswith('nbs/01_first.ipynb'), found

PLAIN = [text('loss 2.5, 100% of 3 runs'), data(text_plain='tensor([[1., 0.]])'), data(text_plain="{'a': 1}"),
    text('[/work] is no folder [1]'), text('hot [dim=-1]'),
    data(image_png='aaaa', text_plain='<Figure size 1x1 with 1 Axes>')]

@pytest.mark.parametrize('output', PLAIN)
def test_good_outputs(copy, output):
    write,good = copy
    assert write(with_cells(good, cell('code', '#| fig-alt: "what it shows"\n1+1') | dict(outputs=[output]))) == []

LINKS = [('[gone](99_gone.ipynb)', 'which is no page'), ('[gone](first.html#no-part)', 'no such anchor'), ('[gone](#no-part)', 'no such anchor'),
    ('[gone](https://site.org/nbs/gone.html)', 'no page'), ('[gone](https://site.org/nbs/first.html#_gone)', 'no such anchor'),
    ('[the [`x`](first.html) of](first.html)', "inside a link's text"),
    ('![](picture.png)', 'without alt text'), ('<img src="a.png">', 'without alt text'), ('<a href="99_gone.ipynb">', 'no page')]

@pytest.mark.parametrize('md,what', LINKS, ids=[m for m,_ in LINKS])
def test_links(copy, md, what):
    write,good = copy
    for c in (cell('markdown', md), cell('code', 'x') | dict(outputs=[data(text_markdown=md)])):
        found = write(with_cells(good, c))
        assert any(what in f for f in found), found

GOOD_LINKS = ['```\n[gone](99.ipynb)\n```', '`[gone](99.ipynb)`', '[mail](mailto:a@b.c)', '![alt](https://x.org/a.png)', '[down](../_quarto.yml)']

@pytest.mark.parametrize('md', GOOD_LINKS)
def test_good_links(copy, md):
    write,good = copy
    assert write(with_cells(good, cell('markdown', md))) == []

def test_opening(copy):
    write,good = copy
    first,opening = good['first'],good['first'][2]
    assert ['paragraph' in f for f in write([c for c in first if c is not opening])] == [True] # it begins with a heading
    assert ['paragraph' in f for f in write([first[0], cell('code', 'import os'), *first[1:]])] == [True] # or with a block of imports
    assert ['paragraph' in f for f in write([first[0], cell('markdown', 'Too short.'), *first[3:]])] == [True]
    raw = cell('raw', first[0]['source'].replace('description: what it is about\n', ''))
    assert ['promise' in f for f in write([raw, *first[1:]])] == [True]

def test_code_that_is_missing(copy):
    write,good = copy
    hidden = [cell('code', '#| exports\ndef _helper(): pass'), cell('code', '#| export\nimport os\nclass Gone:\n    def method(self): pass')]
    assert write(source=hidden) == ['nbs/01_first.ipynb does not show the code of Gone: export it with `#| exports`']

def test_imports_beside_work(copy):
    write,good = copy
    exported = cell('code', '#| exports\ndef _helper(): pass')
    for src in ('import os\nos.getcwd()', '#| hide\nimport os; os.getcwd()', 'def f():\n    import os'):
        assert ['mixes imports' in f for f in write(source=[exported, cell('code', src)])] == [True], src
    for src in ('import os\nfrom a import b', 'os.getcwd()', '#| eval: false\nimport os; os.getcwd()', '#| hide\nimport nbdev; nbdev.nbdev_export()'):
        assert write(source=[exported, cell('code', src)]) == [], src

def test_titles(copy):
    write,good = copy
    other = [good['index'][0], good['index'][1], cell('markdown', HOME.replace('First page', 'Page one'))]
    assert ["calls nbs/01_first.ipynb 'Page one'" in f for f in write(index=other)] == [True]
    assert ['calls nbs/01_first.ipynb None' in f for f in write(index=good['index'][:2])] == [True]

def test_sidebar(copy, tmp_path):
    write,good = copy
    yml = (tmp_path/'_quarto.yml').read_text()
    (tmp_path/'_quarto.yml').write_text(yml.replace('[nbs/01_first.ipynb]', '[{text: Page one, href: nbs/01_first.ipynb}, nbs/02_gone.ipynb]'))
    assert [('Page one' in f, 'no page' in f) for f in write()] == [(True, False), (False, True)]
    (tmp_path/'_quarto.yml').write_text(yml.replace('[nbs/01_first.ipynb]', '[]'))
    assert ['not in the sidebar' in f for f in write()] == [True]

@pytest.mark.processes
def test_whole_run(root, tmp_path):
    "Processing a checkout with one page: nbdev's own faults are told, and `check_site` says 1"
    for f in ('pyproject.toml','nbdev.yml','_quarto.yml','styles.css','settings.ini'): shutil.copy(root/f, tmp_path/f)
    shutil.copytree(root/'hedgehog_nb', tmp_path/'hedgehog_nb', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run(['git','init','-q',tmp_path], check=True)
    nb = json.loads((root/'nbs/93_plots.ipynb').read_text())
    (tmp_path/'nbs').mkdir()
    def write(name, cells): (tmp_path/'nbs'/name).write_text(json.dumps(dict(nb, cells=cells)))
    write('index.ipynb', [cell('markdown', '# Home\n\n> promise')])
    write('93_plots.ipynb', nb['cells'])
    run = lambda: subprocess.run([sys.executable, '-c', 'import sys; from hedgehog_nb.site import check_site; sys.exit(check_site(n_workers=0))'],
        cwd=tmp_path, capture_output=True, text=True, env=dict(site.os.environ, PYTHONPATH=str(tmp_path)))
    r = run()
    assert r.returncode == 1 and 'nbs/index.ipynb does not begin with a paragraph' in r.stdout, r.stdout+r.stderr
    assert '93_plots.ipynb does not show the code' not in r.stdout
    write('93_plots.ipynb', [*nb['cells'], cell('code', '#| exports\nimport no_such_module')])
    r = run()
    assert r.returncode == 1 and 'no_such_module' in r.stderr and 'could not process the pages' in r.stderr, r.stderr
