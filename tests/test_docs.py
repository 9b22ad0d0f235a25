"`show_code`: what becomes of exported cells on their page"
from types import SimpleNamespace
from fastcore.nbio import NbCell
from hedgehog_nb.docs import show_code

def shown(*cells):
    "The sources of a page's cells; a source that begins with `show_doc` is one that nbdev put there"
    nb = [NbCell(i, dict(cell_type='code', source=src, metadata={}, outputs=[])) for i,src in enumerate(cells)]
    for c in nb: c.directives_,c.has_sd = c.directives,c.source.startswith('show_doc')
    proc = show_code.__new__(show_code)
    proc.nb = SimpleNamespace(cells=nb)
    proc.begin()
    return [c.source for c in proc.nb.cells]

OPEN,FOLDED = '#| code-fold: show\n#| code-summary: "Exported source"\n','#| code-fold: true\n#| code-summary: "Code: f"\n'

def test_open_and_folded():
    f = 'def f(): pass'
    assert shown('#| exports\n'+f) == [OPEN+f]
    for mark in ('#| exports\n#| code-fold: true', '#| code-fold: true\n#| exports', '#|exports\n#|code-fold: true', '#| exporti'):
        assert shown(f'{mark}\n{f}')[-1] == FOLDED+f, mark
    assert shown('#| export\nimport os', '#| exports\n#| hide\n'+f, f) == [f]

    assert shown('#| exports\n#| code-fold: true\nN = 3') == ['#| code-fold: true\n#| code-summary: "Code"\nN = 3']

def test_headings_stand_above_the_code_in_its_order():
    "nbdev puts the heading of the last definition first"
    src = 'def f(): pass\ndef g(): pass'
    assert shown('#| exports\n'+src, 'show_doc(g)', 'show_doc(f)', 'f()') == ['show_doc(f)', 'show_doc(g)', OPEN+src, 'f()']
    a,b = ('#| exports\ndef a(): pass', '#| exports\ndef b(): pass')
    assert [s.split('\n')[-1] for s in shown(a, 'show_doc(a)', b, 'show_doc(b)')] == ['show_doc(a)', 'def a(): pass', 'show_doc(b)', 'def b(): pass']

def test_strings_keep_their_lines():
    src = 'def f(): return """\n#| exports\n#| code-fold: true\n"""'
    assert shown('#| exports\n'+src) == [OPEN+src]

def test_anchors():
    "Of private names and of methods, and none of functions without a name"
    assert shown('#| exports\nasync def _f(): pass')[0] == '<span id="_f"></span>'
    assert shown('#| exports\nclass A:\n    def m(self): pass')[0] == '<span id="a.m"></span>'
    assert len(shown('#| exports\n@x.register\ndef _(a): pass')) == 1
