"`start`: what becomes of a cell before it runs, on a machine that lacks something"
import importlib.util
import pytest
import IPython
from IPython.core.inputtransformer2 import TransformerManager
from hedgehog_nb import notebook

@pytest.fixture
def shell(monkeypatch):
    "What IPython would run of a cell, after `start`; it has one list of transformers, as a kernel has"
    manager = TransformerManager()
    manager.input_transformers_cleanup = manager.cleanup_transforms
    monkeypatch.setattr(IPython, 'get_ipython', lambda: manager)
    monkeypatch.delenv('HEDGEHOG_SLOW', raising=False)
    return manager

def left_out(shell, src): return 'Not run here' in shell.transform_cell(src)

@pytest.mark.parametrize('src', ['#| slow\nx', '#|slow\nx', '\n\n#| hide\n#| slow\nx',
    '%%time\n#| slow\nx', '#| slow\n#| cuda\nx', '# | slow\nx', ' #| slow\nx'])
def test_marked_cells_are_left_out(shell, src):
    notebook.start()
    assert left_out(shell, src)

@pytest.mark.parametrize('src', ['x', '#| slower\nx', '#| slow-ish\nx', '# why\n#| slow\nx', 's = """\n#| slow\n"""', 'print("#| slow")', '"""\n#| slow\n"""'])
def test_other_cells_run(shell, src):
    notebook.start()
    assert shell.transform_cell(src) == src+'\n'

def test_slow_cells_run_when_asked_for(shell, monkeypatch):
    notebook.start()
    monkeypatch.setenv('HEDGEHOG_SLOW', '1')
    assert not left_out(shell, '#| slow\nx')

def test_export_is_called_in_a_checkout_only(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook.start()
    assert shell.transform_cell('import nbdev; nbdev.nbdev_export()').strip() == ''
    assert 'def' in shell.transform_cell('def f(src): return "nbdev_export" in src') # a cell that only names it

def test_a_missing_package_can_be_installed(shell, monkeypatch):
    "The cell that installs it runs, and so does the rest from then on; the first cell may be run again"
    there = []
    monkeypatch.setattr(notebook, 'find_spec', lambda p: p in there or importlib.util.find_spec(p))
    notebook.start(needs='no_such_package')
    assert left_out(shell, 'x')
    for src in ('%pip install no_such_package', '!pip install no_such_package', 'from hedgehog_nb.notebook import start; start()'):
        assert not left_out(shell, src)
    there.append('no_such_package')
    assert not left_out(shell, 'x')

def test_a_second_call_takes_the_place_of_the_first(shell):
    n = len(shell.input_transformers_cleanup)
    notebook.start(needs='no_such_package'); notebook.start()
    assert len(shell.input_transformers_cleanup) == n+1 and not left_out(shell, 'x')
