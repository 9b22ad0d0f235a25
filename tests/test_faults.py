"Mistakes of users and accidents of machines: one clear line on stderr, an exit code that is not 0, nothing written."
import gzip, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from typer.testing import CliRunner
from hedgehog_nb import cli
from hedgehog_nb.cli import app

torch = pytest.importorskip('torch')
TINY = '--seq-len 64 --batch-size 4 --eval-tokens 128 --distill-steps 1 --finetune-steps 1'.split()

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def tree(): return sorted(str(p) for p in Path('.').rglob('*'))

def fails(*args, code=1):
    "Run a command that must fail; what it said, in one line, having written nothing"
    before = tree()
    r = CliRunner().invoke(app, [str(a) for a in args], prog_name='hedgehog')
    assert r.exit_code==code, (r.stdout, r.stderr, r.exception)
    assert tree()==before and r.stdout=='' and 'Traceback' not in r.stderr
    lines = r.stderr.splitlines()
    if code==1: assert len(lines)==1 and lines[0].startswith('hedgehog: ') and len(lines[0])<500, r.stderr
    return r.stderr

def linearize(model='embedded', *more, data='embedded', out='out', code=1): return fails('linearize', model, '--data', data, '--out', out, *TINY, *more, code=code)

def says(msg, *words): assert all(w in msg for w in words), msg

def tiny(cls, config, folder='tiny'):
    "A folder with a random model and the embedded model's tokenizer"
    from hedgehog_nb.data import load_embedded
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    load_embedded()[1].save_pretrained(folder)
    return folder

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
    says(linearize(tiny(GPTNeoForCausalLM, GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[['global'],2]], intermediate_size=16, vocab_size=512, max_position_embeddings=64))),
        'GPTNeoForCausalLM', 'attention interface')

def test_model_without_attention():
    from transformers import MambaConfig, MambaForCausalLM
    says(linearize(tiny(MambaForCausalLM, MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=512))), 'MambaForCausalLM')

def test_no_language_model():
    from transformers import BertConfig, BertModel
    says(linearize(tiny(BertModel, BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=512))), 'BertModel', 'no language model', 'in Python')

def test_converted_already(here):
    r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','m',*TINY])
    assert r.exit_code==0
    says(linearize('m'), 'converted already')
    (here/'m'/'model.safetensors').write_bytes((here/'m'/'model.safetensors').read_bytes()[:2000])
    says(fails('generate', 'm', '--prompt', 'x'), 'hedgehog: ')

# Texts

@pytest.mark.parametrize('name,raw,words', [('empty.txt', b'', ['empty.txt is empty']), ('blank.txt', b' \n\n ', ['blank.txt is empty']), ('binary.txt', bytes(range(256)), ['binary.txt','binary']),
    ('nul.txt', b'a\0b', ['nul.txt','binary']), ('cut.txt.gz', gzip.compress(b'x'*9999)[:40], ['cut.txt.gz']), ('bad.jsonl', b'{"text": 1', ['bad.jsonl','line 1']),
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
    (['--finetune-lr','0'], ['--finetune-lr','above 0']),
    (['--device','tpu9'], ["'tpu9'",'cpu']),
    (['--dtype','int8'], ["'int8'",'bfloat16']),
    (['--seq-len','1024'], ['1024','512']),
    (['--eval-tokens','10'], ['10','64']),
])
def test_bad_settings(args, words): says(linearize('embedded', *args), *words)

@pytest.mark.parametrize('args', [['--seq-len','1'], ['--batch-size','0'], ['--distill-tokens','-1'], ['--steps','3'], ['--lr','fast']])
def test_usage(args): linearize('embedded', *args, code=2)

def test_usage_names_what_is_missing(): says(fails('linearize', 'embedded', '--data', 'embedded', code=2), '--out')

def test_diverged(here):
    "Found in the middle of a run: what was done so far has been said, the last line says why it ended"
    r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','out',*TINY,'--lr','1e37','--distill-steps','3'])
    assert r.exit_code==1 and 'Traceback' not in r.stderr and tree()==[]
    says(r.stderr.splitlines()[-1], 'hedgehog: the loss of', 'lower the learning rate')

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

def test_disk_full(monkeypatch):
    "A failure while the folder is being filled"
    from hedgehog_nb import linearize as _
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(cli.Camera, 'attention', full)
    before = tree()
    r = CliRunner().invoke(app, ['linearize','embedded','--data','embedded','--out','out',*TINY])
    assert r.exit_code==1 and tree()==before and 'No space left' in r.stderr.splitlines()[-1]

# Bugs and interruptions

def test_unexpected_error_is_one_line_unless_debug(monkeypatch):
    def broken(*a, **k): raise RuntimeError('the inner\nworkings')
    monkeypatch.setattr(cli, 'write_story', broken)
    says(fails('generate', 'embedded', '--prompt', 'x'), 'unexpected RuntimeError: the inner workings', '--debug')
    r = CliRunner().invoke(app, ['generate','embedded','--prompt','x','--debug'])
    assert isinstance(r.exception, RuntimeError)

@pytest.mark.parametrize('sig,phase', [(signal.SIGINT,'distill'), (signal.SIGTERM,'finetune')])
def test_stopped_run_leaves_nothing(here, root, sig, phase):
    code = 'from hedgehog_nb.cli import app; app()'
    other = dict(distill='finetune', finetune='distill')[phase]
    p = subprocess.Popen([sys.executable, '-c', code, *'linearize embedded --data embedded --out out --record r.json --seq-len 64 --eval-tokens 128'.split(), f'--{phase}-steps', '100000', f'--{other}-steps', '1'],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH':str(root)})
    waiting = 'swapped in' if phase=='distill' else 'distilled'
    for line in p.stderr:
        if waiting in line: break
    time.sleep(.5)
    p.send_signal(sig)
    out,err = p.communicate(timeout=60)
    assert p.returncode==128+sig and err.splitlines()[-1]=='hedgehog: stopped; nothing was written'
    assert out=='' and 'Traceback' not in err and tree()==[]
