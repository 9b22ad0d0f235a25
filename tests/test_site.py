"What `make site-check` finds: nothing on pages as they are, and a fault of each kind that is planted."
import json, shutil, subprocess, sys
from copy import deepcopy
import pytest
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
    (data(image_png='aaaa', text_plain='<Figure size 1x1 with 1 Axes>'), 'a figure without'),
    ({'output_type':'display_data', 'data':{'image/svg+xml':'<svg></svg>'}}, 'a figure without'), (data(image_jpeg='aaaa'), 'a figure without'),
    (text('Generating: 12 examples [00:00, 120.1 examples/s]'), 'a progress bar'), (text('0/10 [00:00<?, ?it/s]'), 'a progress bar'),
    (data(text_html='<pre>Working \u2501\u2501\u2501\u2501</pre>', text_plain=''), 'a progress bar'), (text('\x1b]8;;http://x\x1b\\'), 'terminal colours'),
    (text('[bold red]hi'), 'Rich markup'), (text('WARNING:root:low'), 'a warning'), (data(text_markdown='FutureWarning: soon'), 'a warning'),
    (data(text_plain='<__main__.Foo at 0x12ab>'), "an object's address"),
    (text('{"a": 1,\n "b": 2,\n "c": 3}'), 'a dictionary'), (text("result\n{1: 2,\n 3: 4,\n 5: 6}"), 'a dictionary')]

@pytest.mark.parametrize('output,what', OUTPUTS, ids=[f'{i} {w}' for i,(_,w) in enumerate(OUTPUTS)])
def test_outputs(copy, output, what):
    write,good = copy
    found = write(with_cells(good, cell('code', '1+1') | dict(outputs=[output])))
    assert len(found) == 1 and what in found[0] and found[0].startswith('nbs/01_first.ipynb'), found

def test_alt_text_is_a_text(copy):
    write,good = copy
    for src in ('#| fig-alt: ""\nx', 'f("fig-alt:")', '# fig-alt: x'):
        assert ['a figure without' in f for f in write(with_cells(good, cell('code', src) | dict(outputs=[data(image_png='aaaa')])))] == [True], src

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
    ('[gone](99_gone.ipynb "title")', 'no page'), ('[gone](<99 gone.ipynb>)', 'no page'), ('[gone][x]\n\n[x]: 99_gone.ipynb', 'no page'),
    ("<a href='99_gone.ipynb'>", 'no page'), ('<https://site.org/nbs/gone.html>', 'no page'), ('<img alt="x" src="gone.png">', 'no page'),
    ('[gone](b(c).ipynb)', 'b(c).ipynb, which'), ('```\n~~~\n```\n[gone](99.ipynb)', 'no page'), ('[gone](#own)\n## Other {#another}', 'no such anchor'),
    ('[gone](#of)\n\n`{#of}`', 'no such anchor'), ('![][x]\n\n[x]: ../_quarto.yml', 'without alt text'), ('<IMG src="../_quarto.yml">', 'without alt text'),
    ('![](picture.png)', 'without alt text'), ('<img src="a.png">', 'without alt text'), ('<a href="99_gone.ipynb">', 'no page')]

@pytest.mark.parametrize('md,what', LINKS, ids=[m for m,_ in LINKS])
def test_links(copy, md, what):
    write,good = copy
    for c in (cell('markdown', md), cell('code', 'x') | dict(outputs=[data(text_markdown=md)])):
        found = write(with_cells(good, c))
        assert any(what in f for f in found), found

GOOD_LINKS = ['```\n[gone](99.ipynb)\n```', '`[gone](99.ipynb)`', '[mail](mailto:a@b.c)', '~~~\n[gone](99.ipynb)\n~~~',
    '````\n```\n[gone](99.ipynb)\n```\n````',
    '- x\n  ```\n  [gone](99.ipynb)\n  ```', '```\r\n[gone](99.ipynb)\r\n```\r\n', '`` `a` [gone](99.ipynb)``',
    '`a\n[gone](99.ipynb)`', '<!-- [gone](99.ipynb) -->',
    'maths $f[0](x)$', '$$ f[0](x) $$', '\\[a\\](b)', '[a](https://site.org/)', '[a](https://site.organic/x)', '[a](HTTPS://x.org)', 'note[^1]\n\n[^1]: text',
    "<img src='../_quarto.yml' alt='x'>", '## Été <b>x</b> ##\n\n[a](#été-x)', "<span id='x1'></span>[a](#x1)",
    '![alt](https://x.org/a.png)', '[down](../_quarto.yml)']

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

@pytest.mark.parametrize('md', ['\n\n## A heading', '- a list', '1. a list', '| a | b |\n|---|---|', '![a figure](../_quarto.yml)',
    '```\ncode\n```', '$$ x $$', '<!-- x -->\n## A heading'])
def test_no_paragraph(copy, md):
    write,good = copy
    more = ' of ten words and more that is no paragraph at all'
    long = md.replace('a list', 'a list'+more).replace('A heading', 'A heading'+more)
    assert ['paragraph' in f for f in write([good['first'][0], cell('markdown', long), *good['first'][3:]])] == [True]

def test_badge_and_paragraph_in_one_cell(copy):
    write,good = copy
    first = good['first']
    assert write([first[0], cell('markdown', first[1]['source']+'\n\n'+first[2]['source']), *first[3:]]) == []
    assert write([first[0], cell('markdown', ''), *first[1:]]) == []

def test_odd_notebooks(copy):
    write,good = copy
    odd = [cell('raw', '<hr>'), {k:v for k,v in cell('code', 'x').items() if k!='outputs'}, cell('code', ['x\n','y']) | dict(outputs=None),
        cell('markdown', '')]
    assert write(with_cells(good, *odd)) == []
    for cells in ([cell('raw', 'no front matter')], [cell('raw', '---\n---\n')], [cell('raw', '')]): assert any('has no `# Title`' in f for f in write(cells))

def test_code_shown_once_of_two(copy):
    write,good = copy
    source = [cell('code', f'#| export{s}\ndef {f}(): pass') for s,f in (('s','_helper'), ('','_helper'), ('s','folded'), ('','later'))]
    source[3]['source'] = source[3]['source'].replace('def', 'async def')
    found = write(with_cells(good, cell('code', '#| echo: false\ndef folded(): pass')), source=source)
    assert [n for n in ('_helper','folded','later') if any(f'the code of {n}:' in f for f in found)] == ['_helper','folded','later'], found

def test_code_that_is_missing(copy):
    write,good = copy
    hidden = [cell('code', '#| exports\ndef _helper(): pass'), cell('code', '#| export\nimport os\nclass Gone:\n    def method(self): pass')]
    assert write(source=hidden) == ['nbs/01_first.ipynb does not show the code of Gone: export it with `#| exports`']

def test_imports_beside_work(copy):
    write,good = copy
    exported = cell('code', '#| exports\ndef _helper(): pass')
    for src in ('import os\nos.getcwd()', '#| hide\nimport os; os.getcwd()', 'def f():\n    import os',
        '%%time\nimport os\nos.getcwd()', '!ls\nimport os\nos.getcwd()'):
        assert ['mixes imports' in f for f in write(source=[exported, cell('code', src)])] == [True], src
    for src in ('import os\nfrom a import b', 'os.getcwd()', '#| eval: false\nimport os; os.getcwd()', '#| hide\nimport nbdev; nbdev.nbdev_export()',
        '#| eval: False\nimport os; os.getcwd()',
        'import os\n%matplotlib inline'):
        assert write(source=[exported, cell('code', src)]) == [], src

def test_titles(copy):
    write,good = copy
    other = [good['index'][0], good['index'][1], cell('markdown', HOME.replace('First page', 'Page one'))]
    assert ["calls nbs/01_first.ipynb 'Page one'" in f for f in write(index=other)] == [True]
    assert ['calls nbs/01_first.ipynb None' in f for f in write(index=good['index'][:2])] == [True]

def test_titles_of_all_kinds(copy):
    write,good = copy
    for title,row in (('The `x` page', '| [The `x` page](01_first.ipynb) | e |'), ('A: "b"', '|[A: "b"](01_first.ipynb)|e|'),
        ('A [b]', '|  [A [b]](01_first.ipynb)   | e |'),
        ('A | b', '| [A \\| b](01_first.ipynb) | e |')):
        first = [cell('raw', f"---\ndescription: what\noutput-file: first.html\ntitle: '{title}'\n---\n"), *good['first'][1:]]
        assert write(first, [*good['index'][:2], cell('markdown', '| Chapter | What |\n|---|---|\n'+row)]) == [], title

@pytest.mark.parametrize('title,name,what', [('Home','first','have one title'), ('First page','index','have one address')])
def test_two_pages_of_one_name(copy, title, name, what):
    write,good = copy
    first = page(title, name, *good['first'][1:])
    assert any(what in f for f in write(first, [*good['index'][:2], cell('markdown', HOME.replace('First page', title))]))

def test_sidebar(copy, tmp_path):
    write,good = copy
    yml = (tmp_path/'_quarto.yml').read_text()
    (tmp_path/'_quarto.yml').write_text(yml.replace('[nbs/01_first.ipynb]', '[{text: Page one, href: nbs/01_first.ipynb}, nbs/02_gone.ipynb]'))
    assert [('Page one' in f, 'no page' in f) for f in write()] == [(True, False), (False, True)]
    (tmp_path/'_quarto.yml').write_text(yml.replace('[nbs/01_first.ipynb]', '[]'))
    assert ['not in the sidebar' in f for f in write()] == [True]

@pytest.mark.processes
def test_no_checkout(tmp_path):
    with pytest.raises(RuntimeError, match='is no git checkout'): site.process_pages(tmp_path, tmp_path/'copy')

@pytest.mark.skipif(not shutil.which('pandoc'), reason='needs Pandoc')
def test_preview_keeps_what_is_there(tmp_path, monkeypatch):
    "It does not empty a folder of notebooks, and writes nothing where no page has the name"
    (tmp_path/'nbs').mkdir(); (tmp_path/'nbs/a.ipynb').write_text('{}')
    for into in ('.', 'nbs'):
        with pytest.raises(ValueError, match='more than a preview'): site.preview_site(tmp_path, tmp_path/into)
    monkeypatch.setattr(site, 'process_pages', lambda root, d, n: d)
    monkeypatch.setattr(site, 'pages_of', lambda proc: [])
    (tmp_path/'old').mkdir(); (tmp_path/'old/x.html').write_text('x')
    with pytest.raises(ValueError, match='No page has'): site.preview_site(tmp_path, tmp_path/'old', only='nothing')
    assert (tmp_path/'old/x.html').exists()

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
