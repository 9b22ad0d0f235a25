"Mistakes of users and accidents of machines: one clear line on stderr, an exit code that is not 0, nothing written."
import gzip, json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest
from typer.testing import CliRunner
from hedgehog_nb.cli import commands as cli
from hedgehog_nb.cli import app

pytestmark = pytest.mark.processes

torch = pytest.importorskip('torch')
TINY = '--seq-len 64 --batch-size 4 --eval-tokens 128 --distill-steps 1 --finetune-steps 1'.split()

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def tree(): return sorted(str(p) for p in Path('.').rglob('*') if '__pycache__' not in p.parts) # Python writes those

def fails(*args, code=1):
    "Run a command that must fail; what it said, in one line, having written nothing"
    before = tree()
    r = CliRunner().invoke(app, [str(a) for a in args], prog_name='hedgehog')
    assert r.exit_code==code, (r.stdout, r.stderr, r.exception)
    assert tree()==before and r.stdout=='' and 'Traceback' not in r.stderr
    lines = r.stderr.splitlines()
    if code==1: assert len(lines)==1 and lines[0].startswith('hedgehog: ') and len(lines[0])<500, r.stderr
    return r.stderr

def linearize(model='embedded', *more, data='embedded', out='out', code=1):
    return fails('linearize', model, '--data', data, '--out', out, *TINY, *more, code=code)

def says(msg, *words): assert all(w in msg for w in words), msg

def tiny(cls, config, folder='tiny'):
    "A folder with a random model and the embedded model's tokenizer"
    from hedgehog_nb.data.models import load_embedded
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    load_embedded()[1].save_pretrained(folder)
    return folder

# Code of the user's own

SQUARE = """from hedgehog_nb.attentions.base import FeatureMap, register_attention
@register_attention('square_of_a_test')
class Square(FeatureMap):
    def phi(self, x): return x*x
"""

@pytest.fixture
def square(here, monkeypatch):
    "A file that registers a feature map; all as it was afterwards."
    from hedgehog_nb.attentions.base import ATTENTIONS
    (here/'square_file.py').write_text(SQUARE)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    yield 'square_file.py'
    ATTENTIONS.pop('square_of_a_test', None)

def test_a_map_in_a_file_of_ones_own(square):
    from hedgehog_nb.attentions.base import ATTENTIONS
    (Path('c.toml')).write_text('map = "square_of_a_test"')
    def go(*args):
        r = CliRunner().invoke(app, [*args], prog_name='hedgehog')
        assert r.exit_code==0, r.stderr
    go('--import', square, 'linearize', 'embedded', '--data', 'embedded', '--out', 'out', *TINY, '--config', 'c.toml')
    assert f'hedgehog --import {square} linearize --map square_of_a_test embedded' in json.loads(Path('out/results.json').read_text())['command']
    go('--import', square, 'evaluate', 'out', '--data', 'embedded', '--seq-len', '64', '--eval-tokens', '128')
    ATTENTIONS.pop('square_of_a_test')
    says(fails('evaluate', 'out', '--data', 'embedded'), "no attention is called 'square_of_a_test'", '--import FILE')

def test_a_file_takes_no_librarys_place(square, here):
    "Neither the file, nor one that lies beside it."
    (here/'random.py').write_text(SQUARE+'from beside import x'); (here/'beside.py').write_text('x = 1')
    (here/'tokenizers.py').write_text('raise SystemExit("not this one")')
    code = f'from hedgehog_nb.cli import app; app(prog_name="hedgehog")'
    run = ['--import','random.py','linearize','embedded','--data','embedded','--out','out',*TINY,'--map','square_of_a_test']
    if sys.version_info<(3,11): pytest.skip("-P came with Python 3.11")
    env = {**os.environ, 'PYTHONPATH':str(Path(__file__).parents[1])}
    p = subprocess.run([sys.executable, '-P', '-c', code, *run], capture_output=True, text=True, env=env)
    assert p.returncode==0, p.stderr
    assert 'hedgehog --import random.py generate out --prompt' in p.stderr

def test_a_run_goes_on_with_the_same_code_alone(square, here, monkeypatch):
    from hedgehog_nb.training import recipe
    args = ['--import', square, 'linearize', 'embedded', '--data', 'embedded', '--out', 'out', *TINY, '--map', 'square_of_a_test']
    def stop(*a, **kw): raise OSError(28, 'No space left', 'out')
    with monkeypatch.context() as m:
        m.setattr(recipe, 'finetune', stop)
        assert CliRunner().invoke(app, args).exit_code==1
    (here/square).write_text(SQUARE.replace('x*x', '2*x*x'))
    r = CliRunner().invoke(app, args)
    assert r.exit_code==1; says(r.stderr, 'keeps an unfinished run with other settings (--import', '--restart')
    (here/square).write_text(SQUARE)
    assert CliRunner().invoke(app, args).exit_code==0

@pytest.mark.parametrize('name,text,words', [('nothing.py', None, ['no file nothing.py']), ('no_such_module', None, ["No module named 'no_such_module'"]),
    ('broken_file.py', 'x = 1/0', ['broken_file.py', 'ZeroDivisionError'])])
def test_imports_that_fail(here, monkeypatch, name, text, words):
    monkeypatch.setattr(sys, 'path', [*sys.path])
    if text is not None: (here/name).write_text(text)
    says(fails('--import', name, 'evaluate', 'embedded', '--data', 'embedded'), f'--import {name}', *words)

# Models

@pytest.mark.parametrize('cmd', ['linearize','evaluate','generate'])
@pytest.mark.parametrize('spec,words', [('./nowhere', ['./nowhere','no such folder']), ('nowhere.gguf', ['nowhere.gguf','no such GGUF file']),
    ('some-org/some-model', ['some-org/some-model','without a network','local folder','embedded'])])
def test_missing_model(cmd, spec, words):
    more = dict(linearize=['--data','embedded','--out','out'], evaluate=['--data','embedded'], generate=['--prompt','x'])[cmd]
    says(fails(cmd, spec, *more), *words)

def test_folder_without_a_model(here):
    (here/'empty').mkdir()
    says(linearize('empty'), 'empty', 'config.json')

def test_broken_model(here):
    (here/'m').mkdir(); (here/'m'/'config.json').write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    says(linearize('m'), 'm ')
    (here/'m'/'config.json').write_text('{"model_ty')
    says(linearize('m'), 'm ')

def test_broken_gguf(here):
    (here/'m.gguf').write_bytes(b'not gguf')
    says(linearize('m.gguf'), 'm.gguf')

def test_architecture_without_the_interface():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM
    says(linearize(tiny(GPTNeoForCausalLM, GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[['global'],2]],
        intermediate_size=16, vocab_size=512, max_position_embeddings=64))), 'GPTNeoForCausalLM', 'attention interface')

def test_model_without_attention():
    from transformers import MambaConfig, MambaForCausalLM
    says(linearize(tiny(MambaForCausalLM, MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=512))), 'MambaForCausalLM')

def test_no_language_model():
    from transformers import BertConfig, BertModel
    says(linearize(tiny(BertModel, BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=512))),
        'BertModel', 'no language model', 'in Python')

def test_converted_already(here):
    r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','m',*TINY])
    assert r.exit_code==0
    says(linearize('m'), 'converted already')
    (here/'m'/'model.safetensors').write_bytes((here/'m'/'model.safetensors').read_bytes()[:2000])
    says(fails('generate', 'm', '--prompt', 'x'), 'hedgehog: ')

# Texts

@pytest.mark.parametrize('name,raw,words', [('empty.txt', b'', ['empty.txt is empty']), ('blank.txt', b' \n\n ', ['blank.txt is empty']),
    ('binary.txt', bytes(range(256)), ['binary.txt','binary']), ('nul.txt', b'a\0b', ['nul.txt','binary']),
    ('cut.txt.gz', gzip.compress(b'x'*9999)[:40], ['cut.txt.gz']), ('bad.jsonl', b'{"text": 1', ['bad.jsonl','line 1']),
    ('short.txt', b'Once upon a time.', ['short.txt','6 tokens','smaller'])], ids=lambda x: x if isinstance(x,str) else '')
@pytest.mark.parametrize('cmd', ['linearize','evaluate'])
def test_bad_text(here, cmd, name, raw, words):
    (here/name).write_bytes(raw)
    says(linearize(data=name) if cmd=='linearize' else fails('evaluate', 'embedded', '--data', name, '--split', 'all'), *words)

@pytest.mark.parametrize('spec,words', [('nowhere.txt', ['nowhere.txt','no such file']), ('some/dataset', ['some/dataset','without a network','embedded'])])
def test_missing_text(spec, words): says(linearize(data=spec), *words)

def test_folder_without_texts(here):
    (here/'texts').mkdir()
    says(linearize(data='texts'), 'texts holds no text files')

def test_wrong_column(here):
    (here/'a.jsonl').write_text('\n'.join(json.dumps(dict(title='x', body='y'))for _ in range(30)))
    says(linearize(data='a.jsonl'), 'title, body')
    says(linearize('embedded', '--text-column', 'z', data='a.jsonl'), 'title, body')

def test_unknown_split(): says(fails('evaluate', 'embedded', '--data', 'embedded', '--split', 'tset'), "'tset'", 'train')

# Settings

@pytest.mark.parametrize('args,words', [
    (['--map','hedgehop'], ["'hedgehop'",'hedgehog','elu','taylor']),
    (['--form','soft'], ["'soft'",'softmax_halves']),
    (['--map','elu','--num-maps','2'], ["'elu'",'num_maps']),
    (['--layers','9'], ['layers 0 to 4']),
    (['--layers','some'], ["'some'",'0-5,8']),
    (['--objective','all'], ["'all'",'weights, outputs, both']),
    (['--lr','nan'], ['--lr','above 0']),
    (['--align-lr','0'], ['--align-lr','above 0']),
    (['--finetune-lr','0'], ['--finetune-lr','above 0']),
    (['--device','tpu9'], ["'tpu9'",'cpu']),
    (['--dtype','int8'], ["'int8'",'bfloat16']),
    (['--seq-len','1024'], ['1024','512']),
    (['--eval-tokens','10'], ['10','64']),
])
def test_bad_settings(args, words): says(linearize('embedded', *args), *words)

@pytest.mark.parametrize('args', [['--seq-len','1'], ['--batch-size','0'], ['--distill-tokens','-1'], ['--steps','3'], ['--lr','fast'], ['--align-lr','AUTO']])
def test_usage(args): linearize('embedded', *args, code=2)

def test_usage_names_what_is_missing(): says(fails('linearize', 'embedded', '--data', 'embedded', code=2), '--out')

def left(): return sorted(p.name for p in Path('.').iterdir())

def test_diverged(here):
    "Found in the middle of a run: what was done so far has been said and is kept, the last line says why it ended"
    r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','out',*TINY,'--recipe','paper','--lr','1e37','--distill-steps','3'])
    assert r.exit_code==1 and 'Traceback' not in r.stderr and left()==['.out-run']
    says(r.stderr.splitlines()[-1], 'hedgehog: the loss of', 'lower the learning rate', 'kept in .out-run')

def test_diverged_finetuning(here):
    r = CliRunner().invoke(app,
        ['linearize','embedded','--data','embedded','--out','out',*TINY,'--finetune-lr','1e37','--finetune-steps','50','--batch-size','1'])
    assert r.exit_code==1 and 'Traceback' not in r.stderr and left()==['.out-run']
    says(r.stderr.splitlines()[-1], 'hedgehog: step ', 'lower the learning rate', 'kept in .out-run')

@pytest.mark.parametrize('args', [['--temperature','-1'], ['--top-p','2'], ['--max-new-tokens','0']])
def test_generate_usage(args): fails('generate', 'embedded', '--prompt', 'x', *args, code=2)

def test_empty_prompt():
    "A tokenizer that adds nothing of its own"
    from transformers import GPT2Config, GPT2LMHeadModel
    d = tiny(GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=512, n_positions=32))
    f = Path(d)/'tokenizer.json'
    f.write_text(json.dumps(dict(json.loads(f.read_text()), post_processor=None, normalizer=None)))
    says(fails('generate', d, '--prompt', ''), 'prompt is empty')

# Where to write

def test_out_exists(here):
    (here/'out').mkdir(); (here/'out'/'thesis.txt').write_text('mine')
    says(linearize(), 'out exists already', '--overwrite')
    says(linearize('embedded', '--overwrite'), 'out', 'will not be replaced')
    assert (here/'out'/'thesis.txt').read_text()=='mine'

def test_out_is_a_file(here):
    (here/'out').write_text('mine')
    says(linearize(), 'exists already')
    says(linearize('embedded', '--overwrite'), 'will not be replaced')
    says(linearize(out='out/deeper'), 'cannot be written')

def test_record_exists(here):
    (here/'r.json').write_text('{}')
    says(linearize('embedded', '--record', 'r.json'), 'r.json exists already', '--record')

def test_record_must_be_json(): says(linearize('embedded', '--record', 'r.txt'), 'r.txt', '.json')

def test_demo_out_is_a_file(here):
    (here/'out').write_text('mine')
    says(fails('demo', '--out', 'out'), 'cannot be written')

def full(*a, **k): raise OSError(28, 'No space left on device')

def test_disk_full(monkeypatch):
    "A failure while the folder is being filled: what was trained is kept, and only has to be written"
    with monkeypatch.context() as m:
        m.setattr(cli.AttentionSnapshots, 'attention', full)
        r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','out',*TINY])
        assert r.exit_code==1 and left()==['.out-run']
        says(r.stderr.splitlines()[-1], 'No space left', 'kept in .out-run', 'same command goes on')
    from hedgehog_nb.training import distill, finetune
    monkeypatch.setattr(distill, 'teacher_pass', full); monkeypatch.setattr(finetune._FinetuneTrainer, 'training_step', full)
    r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','out',*TINY])
    assert r.exit_code==0 and left()==['out'], r.stderr

def test_disk_full_in_training(monkeypatch):
    from hedgehog_nb.training import checkpoint
    monkeypatch.setattr(checkpoint, 'save_file', full)
    r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','out',*TINY])
    assert r.exit_code==1 and sorted(p.name for p in Path('.out-run').iterdir())==['command.json','measured.json','settings.json']
    says(r.stderr.splitlines()[-1], '.out-run/distill.safetensors', ': No space left on device', 'nothing was kept yet')

# Files of settings

@pytest.mark.parametrize('name,text,words', [('a.toml', 'distill-step = 3', ["'distill-step'", "nearest is 'distill-steps'"]),
    ('a.yaml', 'batchsize: 3', ["'batchsize'","'batch-size'"]), ('a.toml', 'lr = ', ['a.toml']), ('a.yaml', '[1,2]', ['option: value']),
    ('a.yaml', 'lr: [', ['a.yaml']), ('a.txt', 'lr = 1', ['.toml or .yaml']), ('a.toml', 'config = "b"', ["'config'",'no option'])],
    ids=lambda x: x if isinstance(x,str) else '')
def test_bad_config(here, name, text, words):
    (here/name).write_text(text)
    if name=='a.toml' and sys.version_info<(3, 11): words = ['TOML is read by Python 3.11', 'YAML']
    says(linearize('embedded', '--config', name), *words)

def test_missing_config(): says(linearize('embedded', '--config', 'no.toml'), 'no.toml', 'No such file')

def test_config_with_a_bad_value(here):
    (here/'a.yaml').write_text('batch-size: many')
    fails('linearize', 'embedded', '--data', 'embedded', '--out', 'out', '--config', 'a.yaml', code=2)

def test_lora_targets(): says(linearize('embedded', '--lora-rank', '4', '--lora-targets', 'q_prj'), 'q_prj', 'nearest is q_proj')

# Bugs and interruptions

def test_unexpected_error_is_one_line_unless_debug(monkeypatch):
    def broken(*a, **k): raise RuntimeError('the inner\nworkings')
    monkeypatch.setattr(cli, 'generate_text', broken)
    says(fails('generate', 'embedded', '--prompt', 'x'), 'unexpected RuntimeError: the inner workings', '--debug')
    r = CliRunner().invoke(app, ['generate','embedded','--prompt','x','--debug'])
    assert isinstance(r.exception, RuntimeError)

LONGER = 'linearize embedded --data embedded --seq-len 64 --eval-tokens 128 --num-maps 2 --evals 3 --save-every 3'.split()

def start(root, *args):
    "The command in a process of its own"
    code = 'from hedgehog_nb.cli import app; app(prog_name="hedgehog")'
    return subprocess.Popen([sys.executable, '-c', code, *LONGER, *args], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, 'PYTHONPATH':str(root), 'OMP_NUM_THREADS':'1'})

def until(p, what, seconds):
    for line in p.stderr:
        if what in line: break
    time.sleep(seconds)

@pytest.mark.parametrize('sig,phase', [(signal.SIGINT,'distill'), pytest.param(signal.SIGTERM, 'finetune', marks=pytest.mark.slow)])
def test_stopped_run_says_where_it_is(here, root, sig, phase):
    other = dict(distill='finetune', finetune='distill')[phase]
    p = start(root, '--out', 'out', '--record', 'r.json', f'--{phase}-steps', '100000', f'--{other}-steps', '1')
    until(p, 'untrained' if phase=='distill' else 'distilled', 3)
    p.send_signal(sig)
    out,err = p.communicate(timeout=60)
    last = err.splitlines()[-1]
    assert p.returncode==128+sig and re.fullmatch(rf'hedgehog: stopped; {phase} had done [\d,]+ of [\d,]+ tokens; '
        r'what was done is kept in \.out-run, and the same command goes on from there', last), last
    assert out=='' and 'Traceback' not in err and left()==['.out-run']
    says(linearize('embedded', '--lr', '0.3'), '.out-run keeps an unfinished run with other settings', '--num-maps 2 there, not given here', '--restart')

def test_stopped_before_anything_was_done(here, root, monkeypatch):
    def stop(*a, **k): raise cli.Terminated(15)
    from hedgehog_nb.cli import linearize as module
    monkeypatch.setattr(module, '_prepare', stop)
    r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','out',*TINY])
    assert r.exit_code==143 and r.stderr=='hedgehog: stopped; nothing was written\n' and left()==[]

@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(here, root):
    "SIGKILL in each phase; then weights, rows and order of rows of a run that nobody killed, and no measurement made twice"
    steps = '--distill-steps', '16', '--finetune-steps', '16'
    for phase in ('distill','finetune'):
        p = start(root, '--out', 'killed', *steps)
        while not (here/'.killed-run'/f'{phase}.safetensors').exists() and p.poll() is None: time.sleep(.001)
        p.kill(); p.communicate()
        assert p.returncode==-signal.SIGKILL
    assert left()==['.killed-run']
    r = CliRunner().invoke(app, [*LONGER, '--out', 'killed', *steps])
    assert r.exit_code==0 and 'going on with what is in .killed-run' in r.stderr, r.stderr
    assert CliRunner().invoke(app, [*LONGER, '--out', 'alive', *steps]).exit_code==0
    assert left()==['alive','killed'] and Path('alive/model.safetensors').read_bytes()==Path('killed/model.safetensors').read_bytes()
    a,b = (json.loads((Path(d)/'results.json').read_text())['rows'] for d in ('alive','killed'))
    assert [{k:v for k,v in r.items() if k!='seconds'} for r in a]==[{k:v for k,v in r.items() if k!='seconds'} for r in b]
    assert all(r['seconds']>0 for r in b if r['tokens'])

@pytest.mark.parametrize('moved', [pytest.param(False, marks=pytest.mark.slow), True], ids=['before the folder appears','after it'])
def test_killed_as_it_ends(here, root, moved):
    "SIGKILL just before or just after the folder appears: nothing is left beside the working folder, and the same command ends well"
    code = """if True:
        import os
        from itertools import count
        from hedgehog_nb import results
        from hedgehog_nb.cli import commands as cli
        provenance,n = results.provenance,count()
        results.provenance = lambda *args: dict(provenance(*args), date=f'2026-01-01T00:00:0{next(n)}') # the clock goes on meanwhile
        def replace(a, b, real=os.replace):
            if str(b)!='out' or MOVED: real(a, b)
            if str(b)=='out': os.kill(os.getpid(), 9)
        os.replace = replace
        cli.app(prog_name='hedgehog')""".replace('MOVED', str(moved))
    args = ['linearize','embedded','--data','embedded','--out','out','--record','r.json',*TINY]
    assert subprocess.run([sys.executable, '-c', code, *args],
        env={**os.environ, 'PYTHONPATH':str(root), 'OMP_NUM_THREADS':'1'}, capture_output=True).returncode==-signal.SIGKILL
    assert left()==(['.out-run','out','r.json'] if moved else ['.out-run','r.json'])
    r = CliRunner().invoke(app, args)
    assert r.exit_code==0 and 'going on' in r.stderr, r.stderr
    assert left()==['out','r.json'] and Path('out/results.json').read_bytes()==Path('r.json').read_bytes()
