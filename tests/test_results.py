"Results are written whole or not at all, say where they come from, and stand beside the paper's numbers."
import json, os, re, subprocess, sys
from datetime import datetime, timezone
import pytest
from hedgehog_nb import results
from pathlib import Path
from hedgehog_nb.results import code_version, command_line, PAPER, provenance, read_results, results_folder, results_table, unproved_numbers, write_results

ROW = dict(experiment='pretrained-wikitext2', model='smollm2-135m', data='wikitext-2',
    variant='hedgehog', metric='ppl', value=30.25, unit='', tokens=1000, seed=0)


def test_a_run_reads_back_as_it_was_written(tmp_path):
    p = write_results(tmp_path/'deep'/'run.json', [ROW, {**ROW, 'variant':'softmax', 'T':512}], command='hedgehog linearize x', seed=3, wall_s=12.345)
    run = json.loads(p.read_text())
    assert list(run) == ['command','commit','date','device','versions','seed','wall_s','rows']  # DESIGN's schema
    assert (run['command'], run['seed'], run['wall_s']) == ('hedgehog linearize x', 3, 12.35)
    assert {'python','torch','transformers','hedgehog_nb'} <= set(run['versions'])
    rows = read_results(p.parent)
    assert rows[0] == {**ROW, 'file':'run.json', **{k: run[k] for k in ('commit','device','date')}}
    assert rows[1]['T'] == 512
    assert [x.name for x in p.parent.iterdir()] == ['run.json']


def test_missing_fields_are_filled(tmp_path):
    p = write_results(tmp_path/'a.json', [dict(experiment='cola', model='m', data='d', variant='elu', metric='mcc', value=1)], seed=5)
    r, = read_results(tmp_path)
    assert (r['unit'], r['tokens'], r['seed']) == ('%', 0, 5)


@pytest.mark.parametrize('bad', [dict(value=float('nan')), dict(value=float('inf')), dict(value='30'), dict(value=True),
    dict(value=None), dict(experiment=''), dict(model=None), dict(data=3), dict(variant=None), dict(metric=''),
    dict(tokens=-1), dict(tokens=1.5), dict(seed=None), dict(metric='accuracy', unit='points')], ids=str)
def test_a_row_that_is_not_complete_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match='finite' if 'value' in bad else None): write_results(tmp_path/'a.json', [ROW, {**ROW, **bad}])
    assert not list(tmp_path.iterdir())
    for f in ('experiment','model','data','variant','metric','value'):
        with pytest.raises(ValueError, match=f): write_results(tmp_path/'a.json', [{k:v for k,v in ROW.items() if k!=f}])


def test_nothing_to_write(tmp_path):
    with pytest.raises(ValueError): write_results(tmp_path/'a.json', [])
    with pytest.raises(ValueError): write_results(tmp_path/'a.txt', [ROW])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    p = write_results(tmp_path/'a.json', [ROW])
    before = p.read_text()
    def fail(*a): raise OSError('no space left')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError): write_results(p, [{**ROW, 'value':1.}])
    assert p.read_text() == before and [x.name for x in tmp_path.iterdir()] == ['a.json']


def test_a_file_that_is_no_result_is_named(tmp_path):
    for text in ('{', '[]', '{"rows": []}', json.dumps(dict(commit='c', device='d', date='t', rows=[{**ROW, 'value':float('nan')}]))):
        (tmp_path/'broken.json').write_text(text)
        with pytest.raises(ValueError, match='broken.json'): read_results(tmp_path)


def test_no_results_yet(tmp_path):
    assert read_results(tmp_path) == read_results(tmp_path/'absent') == []
    assert 'not run yet' in str(results_table([], 'recall', 'accuracy'))


def test_provenance():
    p = provenance('x', device='cpu')
    assert abs(datetime.fromisoformat(p['date'])-datetime.now(timezone.utc)).total_seconds() < 60 and p['date'].endswith('+00:00')
    assert 'thread' in p['device'] and len(p['device'].split(', ')[0]) > 2
    assert command_line(['/a/b/hedgehog', 'demo', '--out=/x/y/z', '/p/q/', 'rel/path', 'two words']) == "hedgehog demo --out=z q/ rel/path 'two words'"


def _git(d, *args):
    return subprocess.run(['git','-C',str(d),'-c','user.name=t','-c','user.email=t@t',*args], check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_clean_and_of_a_changed_package(tmp_path, monkeypatch):
    pkg = tmp_path/'checkout'/'hedgehog_nb'
    pkg.mkdir(parents=True)
    (pkg/'__init__.py').write_text('')
    monkeypatch.setattr(results.hedgehog_nb, '__file__', str(pkg/'__init__.py'))
    first = code_version()
    assert re.fullmatch(rf'hedgehog_nb {results.hedgehog_nb.__version__} [0-9a-f]{{8}}', first)  # no git at all
    _git(tmp_path, 'init', '-q')
    _git(tmp_path, 'commit', '-q', '--allow-empty', '-m', 'another project')
    assert code_version().startswith('hedgehog_nb ')  # the package lies in somebody else's repository
    _git(pkg.parent, 'init', '-q')
    assert code_version().startswith('hedgehog_nb ')  # no commit yet
    _git(pkg.parent, 'add', '.')
    _git(pkg.parent, 'commit', '-q', '-m', 'one')
    assert code_version() == _git(pkg.parent, 'rev-parse', '--short=12', 'HEAD')
    (pkg.parent/'results').mkdir()
    (pkg.parent/'results'/'a.json').write_text('{}')
    assert '-dirty' not in code_version()  # results are no code
    (pkg/'new.py').write_text('')
    one = code_version(); (pkg/'new.py').write_text('x = 1')
    assert re.fullmatch('[0-9a-f]{12}-dirty-[0-9a-f]{8}', one) and one[:12]==code_version()[:12] and one!=code_version()  # two changes are two codes


def test_results_are_found_from_any_folder_of_the_checkout(root, monkeypatch, tmp_path):
    for d in (root, root/'nbs', tmp_path):
        monkeypatch.chdir(d)
        assert results_folder() == root/'results'


def _rows(*rows): return [{**ROW, 'date':f'2026-01-0{i+1}', 'file':'f', 'commit':'c', 'device':'d', **r} for i,r in enumerate(rows)]


def test_table_stands_beside_the_paper():
    t = results_table(_rows({}, dict(variant='elu', value=1234.5)), 'pretrained-wikitext2', 'ppl')
    by = {r[0]: r for r in t.rows}
    assert t.header == ['variant','model','data','tokens','ppl','paper']
    assert by['hedgehog'][-2:] == ['30.25','16.7']  # ours, the paper's
    assert by['elu'][-2:] == ['1,234','–']          # the paper has none
    assert by['softmax-zero-shot'][-2:] == ['not run yet','28.0']
    assert 'transcribed' in t.caption and 'WikiText-103' in t.caption
    assert t._repr_markdown_().count('\n| ') == len(t.rows)+1


def test_which_number_counts():
    one = lambda *rows: [r[-2] for r in results_table(_rows(*rows), 'demo', 'ppl').rows]
    e = dict(experiment='demo')
    assert one({**e, 'tokens':20, 'value':2.}, {**e, 'tokens':10, 'value':1.}) == ['2']      # the most tokens
    assert one({**e, 'value':2.}, {**e, 'value':1.}) == ['1']                                # the newest
    assert one({**e, 'value':2.}, {**e, 'seed':1, 'value':4.}) == ['3 (2 seeds, 2–4)']       # seeds are averaged
    assert one({**e, 'value':2.}, {**e, 'model':'other', 'value':4.}) == ['2','4']           # models are not
    assert one({**e, 'value':2., 'T':1}, {**e, 'T':2, 'value':4.}) == ['2','4']              # nor shapes
    assert one({**e, 'metric':'kl', 'value':2.}) == ['not run yet']


def test_the_papers_numbers():
    assert all(p['where'] and p['model'] and p['data'] for p in PAPER.values())
    assert PAPER['cola']['metrics']['mcc'] == dict(softmax=58.8, hedgehog=59.2, taylor=58.4,
        exp2=50.0, exp1=45.9, cosformer=39.9, relu=39.5, elu=28.1, performer=24.7)


def test_import_is_light():
    code = 'import sys, hedgehog_nb.results as r; assert "torch" not in sys.modules and "matplotlib" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


PAGES = [p for p in sorted((Path(__file__).parent.parent/'nbs').glob('*.ipynb')) if 'read_results' in p.read_text(encoding='utf-8')]

@pytest.mark.parametrize('page', PAGES, ids=[p.stem for p in PAGES])
def test_numbers_in_the_text_are_shown_or_tested(page):
    "After a page was saved with new results, this is where its text is behind them."
    assert unproved_numbers(json.loads(page.read_text(encoding='utf-8')))==[]

@pytest.mark.parametrize('text,code,output,said', [('it is 98.3%', '', '98.27', []), ('it is 98.4%', '', '98.27', ['98.4%']),
    ('23% and 27%', 'x==[23,27]', '', []), ('256 tokens, 512 and 1,024', 'n = 256,512,1024', '', []), ('131,072 tokens', 'n = 2**17', '', []),
    ('about 260,000', '', '260,032', []), ('about 270,000', '', '260,032', ['270,000']), ('0.26 million, 3.1M', '', '260,032 3,112,000', []),
    ('1.4 nats', '', '1.44', []), ('1.40 nats', '', '1.44', ['1.40']), ('**95.8%** of $x=37$, `n=41`, [a](x/53.html), Section 5.3', '', '95.80', []),
    ('19 heads of 72', '', '', ['72']), ('72 <!-- facts: 72 -->', '', '', []), ('"30%"', 'assert f"{x:.0%}"=="30%"', '', []), ('5e-5, 3.14.2', '', '', [])])
def test_what_counts_as_shown(text, code, output, said):
    page = dict(cells=[dict(cell_type='markdown', source=text), dict(cell_type='code', source=[code], outputs=[dict(output_type='stream', text=[output])])])
    assert [n for n,_ in unproved_numbers(page)]==said
