"The command line as its users meet it: help, the round trip linearize → evaluate → generate, results files, the demo."
import json, resource, subprocess, sys
from pathlib import Path
import pytest
from helpers import commands
from hedgehog_nb.cli import commands as cli
from hedgehog_nb.training.recipe import log_spaced, steps_for, tokens_after
from hedgehog_nb.cli.console import word_wrap

pytestmark = pytest.mark.processes

torch = pytest.importorskip('torch')
COMMANDS = 'linearize', 'evaluate', 'generate', 'properties', 'bench', 'demo'
SHORT = '--seq-len 64 --batch-size 4 --eval-tokens 256'.split()

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def hedgehog(*args, code=0, **kw):
    "Run the command. A conversion is by the paper's recipe, where it names none."
    if args[0]=='linearize' and not {'--recipe','--config','--help'} & {*map(str, args)}: args = *args, '--recipe', 'paper'
    return commands.hedgehog(*args, code=code, **kw)

@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    "A folder written by `hedgehog linearize`, its results file, and what the command printed"
    d = tmp_path_factory.mktemp('converted')
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', d/'tales', '--record', d/'run.json', '--json', '--baseline', '--evals', 3,
        '--num-maps', 2, '--seed', 1,
        '--distill-tokens', 2048, '--finetune-steps', 3, '--experiment', 'demo', *SHORT)
    return d/'tales', d/'run.json', r

# What it says about itself

@pytest.mark.parametrize('cmd', [(), *((c,) for c in COMMANDS)])
def test_help(cmd):
    out = hedgehog(*cmd, '--help').stdout
    assert 'Usage: hedgehog' in out and 'Examples' in out and '$ hedgehog' in out
    assert all(c in out for c in (COMMANDS if not cmd else ('--debug','--json')))
    assert hedgehog(*cmd, '-h').stdout==out

def test_help_names_every_map_and_form():
    from hedgehog_nb.ops.hedgehog import FORMS
    from hedgehog_nb.attentions.base import FEATURE_MAPS
    out = hedgehog('linearize', '--help', env={'COLUMNS':'200', 'TERMINAL_WIDTH':'200'}).stdout
    assert all(n in out for n in (*FORMS, *FEATURE_MAPS))

def test_help_is_quick_and_light(root):
    code = ("import sys; from hedgehog_nb.cli import app; app(['--help'], standalone_mode=False); "
        "print([m for m in ('torch','transformers','datasets','matplotlib','numpy') if m in sys.modules])")
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    took = []
    for _ in range(2): # the first may have bytecode to write
        t = spent()
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, check=True).stdout
        assert out.strip().endswith('[]')
        took.append(spent()-t)
    assert min(took)<1 # processor time: a busy machine stretches the other

def test_version():
    import hedgehog_nb
    out = hedgehog('--version').stdout
    assert out.startswith(f'hedgehog_nb {hedgehog_nb.__version__} (torch ') and out.count('\n')==1

# linearize → evaluate → generate

def test_linearize_saves_everything(converted):
    out,_,r = converted
    assert {'config.json','model.safetensors','tokenizer.json','attention.png','perplexity.png','results.json'} <= {p.name for p in out.iterdir()}
    assert all((out/f).read_bytes()[:8]==b'\x89PNG\r\n\x1a\n' for f in ('attention.png','perplexity.png'))
    assert not [p for p in out.parent.iterdir() if p.name.startswith('.')]
    assert out.stat().st_mode & 0o055==0o055

def test_linearize_json_is_the_record(converted):
    out,record,r = converted
    said = json.loads(r.stdout)
    assert said.pop('out')==str(out)
    assert said==json.loads(record.read_text())==json.loads((out/'results.json').read_text())
    assert 'perplexity' in r.stderr and 'Traceback' not in r.stderr and 'Warning' not in r.stderr

def test_record_schema(converted):
    from hedgehog_nb.results import check_row, read_results
    _,record,_ = converted
    run = json.loads(record.read_text())
    assert list(run)==['command','commit','date','device','versions','seed','wall_s','rows']
    assert run['command'].startswith('hedgehog linearize embedded --data embedded --out tales --record run.json') and run['seed']==1 and run['wall_s']>0
    assert all(check_row(r)==r and r['experiment']=='demo' and r['model']==r['data']=='embedded' for r in run['rows'])
    assert len(read_results(record.parent))==len(run['rows'])

def test_record_rows(converted):
    rows = [r for r in json.loads(converted[1].read_text())['rows'] if r['metric']=='ppl']
    assert [(r['variant'],r['stage'],r['tokens']) for r in rows] == [('softmax-zero-shot','teacher',0),
        *(('softmax','finetune',256*i) for i in (1,2)), ('softmax','finetuned',768),
        ('swapped','swapped',0), ('hedgehog-distilled','distill',512), ('hedgehog-distilled','distill',1024), ('hedgehog-distilled','distilled',2048),
        *(('hedgehog','finetune',2048+256*i) for i in (1,2)), ('hedgehog','finetuned',2816)]
    assert all(r['seed']==1 and r['seq_len']==64 and r['eval_tokens']==256 for r in rows)

def test_evaluate_agrees(converted):
    out,record,_ = converted
    r = hedgehog('evaluate', out, '--data', 'embedded', '--json', *SHORT)
    ppl,want = json.loads(r.stdout), json.loads(record.read_text())['rows'][-1]
    assert abs(ppl['value']/want['value']-1)<1e-5 and ppl['eval_tokens']==256 and ppl['tokens_per_s']>0
    teacher = json.loads(hedgehog('evaluate', 'embedded', '--data', 'embedded', '--json', *SHORT).stdout)
    assert abs(teacher['value']/json.loads(record.read_text())['rows'][0]['value']-1)<1e-5

def test_evaluate_plain(converted):
    r = hedgehog('evaluate', converted[0], '--data', 'embedded', *SHORT)
    assert r.stdout.startswith('perplexity ') and r.stdout.count('\n')==1

def test_generate(converted):
    args = 'generate', converted[0], '--prompt', 'Once upon a time', '--max-new-tokens', 12
    r,j = hedgehog(*args),json.loads(hedgehog(*args, '--json').stdout)
    assert r.stdout.strip()==j['text'].strip() and r.stdout.startswith('Once upon a time') and 'recurrent state' in r.stderr
    assert j['tokens']==12 and j['first_bytes']==j['last_bytes']>0

def test_generate_softmax_cache_grows():
    j = json.loads(hedgehog('generate', 'embedded', '-p', 'Lily', '-n', 8, '--json').stdout)
    assert j['last_bytes']>j['first_bytes']

def test_generate_greedy_and_seeds(converted):
    def text(*a): return json.loads(hedgehog('generate', converted[0], '-p', 'Tom', '-n', 10, '--json', *a).stdout)['text']
    assert text('--temperature', 0)==text('--temperature', 0, '--seed', 3)
    assert text('--seed', 1)==text('--seed', 1)!=text('--seed', 2)

def test_generate_from_stdin():
    assert hedgehog('generate', 'embedded', '-p', '-', '-n', 3, input='Tim saw').stdout.startswith('Tim saw')

def test_generate_answers_where_the_model_was_made_for_it(here):
    from hedgehog_nb.data.models import load_embedded
    model,tok = load_embedded()
    tok.chat_template = "{% for m in messages %}User: {{ m['content'] }}\nBot:{% endfor %}"
    for name in ('stories-260K-Instruct', 'stories-digits'): model.save_pretrained(here/name); tok.save_pretrained(here/name)
    said = lambda *args: json.loads(hedgehog('generate', *args, '-n', 8, '--temperature', 0, '--json').stdout)
    asked = said('stories-260K-Instruct', '-p', 'Tell a story.')
    whole = said('stories-digits', '-p', 'User: Tell a story.\nBot:')
    assert asked['chat'] and asked['tokens']==8 and not whole['chat'] and whole['text'].startswith('User: Tell')
    assert said('stories-digits', '-p', 'Tell a story.', '--chat')['text']==asked['text']
    assert said('stories-260K-Instruct', '-p', 'Tell a story.', '--no-chat')['text'].startswith('Tell a story.')
    r = hedgehog('generate', 'stories-260K-Instruct', '-p', 'Tell a story.', '-n', 8)
    assert 'chat template' in r.stderr and not r.stdout.startswith('User')
    assert '--chat asks' in hedgehog('generate', 'stories-digits', '-p', 'Tom', '-n', 2).stderr
    assert 'no chat template: leave out --chat' in hedgehog('generate', 'embedded', '-p', 'Tom', '--chat', code=1).stderr

@pytest.mark.parametrize('name,yes', [('HuggingFaceTB/SmolLM2-135M-Instruct',True), ('google/gemma-2-2b-it',True), ('meta-llama/Llama-2-7b-chat-hf',True),
    ('it/model',True), ('gpt2',False), ('models/italian-llama',False), ('digits',False), ('Qwen/Qwen3-0.6B-Base',False)])
def test_models_that_answer_say_so_in_their_names(name, yes):
    from types import SimpleNamespace
    from hedgehog_nb.cli.console import answers
    assert answers(SimpleNamespace(chat_template='x'), None, name)==yes and not answers(SimpleNamespace(chat_template=None), name)

def test_overwrite(converted, here):
    args = 'linearize', 'embedded', '--data', 'embedded', '--out', 'm', '--distill-tokens', 0, '--finetune-tokens', 0, *SHORT
    hedgehog(*args)
    before = (here/'m'/'results.json').read_text()
    hedgehog(*args, code=1)
    assert (here/'m'/'results.json').read_text()==before
    hedgehog(*args, '--overwrite', '--map', 'elu', '--layers', '0-1')
    assert json.loads((here/'m'/'config.json').read_text())['hedgehog']=={'attention':'elu', 'layers':[0,1]}
    assert [p.name for p in here.iterdir()]==['m']

def test_unlearned_map_is_not_distilled(here):
    r = json.loads(hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'm', '--map', 'elu', '--finetune-steps', 1, '--json', *SHORT).stdout)
    assert [x['variant'] for x in r['rows'] if x['metric']=='ppl']==['softmax-zero-shot','swapped','elu']

def test_own_text_and_eval_data(here):
    Path('book.txt').write_text('The cat sat on the mat. It was a fat cat.\n'*200)
    Path('other.txt').write_text('The dog ran in the park. It was a big dog.\n'*40)
    r = json.loads(hedgehog('linearize', 'embedded', '--data', 'book.txt', '--eval-data', 'other.txt', '--out', 'm', '--distill-steps', 1,
        '--finetune-steps', 0, '--json', *SHORT).stdout)
    assert r['rows'][0]['data']=='book.txt' and r['rows'][-1]['variant']=='hedgehog-distilled'
    assert json.loads(hedgehog('evaluate', 'm', '--data', 'other.txt', '--split', 'all', '--json', *SHORT).stdout)['eval_tokens']==256

def test_recipes_are_options(here):
    "What a recipe says is used where nothing is typed; a phase is judged on held-out text."
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'l', '--recipe', 'lolcats', '--distill-steps', 2, '--finetune-steps', 2,
        '--finetune-on', 'both', '--patience', 3, *SHORT)
    assert 'by the recipe lolcats' in r.stderr and 'adapters of rank 8' in r.stderr and r.stderr.count('it began at')+r.stderr.count('no step was better')==2
    assert json.loads(Path('l/config.json').read_text())['hedgehog']['attention_kwargs']==dict(window=64, relative=True)
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'a', '--recipe', 'best', '--adapt-tokens', 512,
        '--distill-steps', 1, '--finetune-steps', 0, '--last-state', *SHORT)
    assert 'softmax, finetuned first' in r.stdout and 'it began at' not in r.stderr and 'hybrid, distilled' in r.stdout

def test_blocks_of_two_lengths(here):
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'two', '--seq-len', 32, '--long-blocks', 4, '--distill-tokens', 1024,
        '--finetune-tokens', 0, '--batch-size', 4, '--eval-tokens', 256, '--json')
    got = json.loads(r.stdout)['rows']
    assert '50% of the tokens in blocks of 128' in r.stderr and [x['tokens'] for x in got if x['stage']=='distilled']==[1024]*2

@pytest.mark.parametrize('budget', [('--distill-tokens', 256, '--finetune-tokens', 0), ('--distill-steps', 0, '--finetune-tokens', 40_000)])
def test_budgets_are_kept_by_all_phases(budget, here):
    "Finetuning before and after the conversion takes steps of the same size, so that both read what the plan says."
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'm', '--recipe', 'best', '--seq-len', 16, '--adapt-tokens', 16_384, *budget,
        '--eval-tokens', 256, '--json')
    plan,tokens = r.stderr,{x['stage']:x['tokens'] for x in json.loads(r.stdout)['rows']}
    assert 'adapt     16,384 tokens' in plan and tokens['adapted']==16_384, plan

def test_alignment_takes_steps_of_distillation(here):
    "A small budget for it does not shrink the others' batches; it is left out where weights cannot be trained."
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'a', '--recipe', 'paper', '--map', 'hedgehog', '--seq-len', 32, '--distill-steps', 2,
        '--align-tokens', 512, '--finetune-tokens', 0, '--eval-tokens', 256, '--json')
    assert [(x['stage'], x['tokens']) for x in json.loads(r.stdout)['rows'] if x['metric']=='ppl'][2:]==[('distilled',512),('aligned',1024)]
    half = ('linearize', 'embedded', '--data', 'embedded', '--recipe', 'best', '--map', 'hedgehog', '--dtype', 'float16', '--distill-tokens', 64,
        '--finetune-tokens', 0, '--seq-len', 32, '--eval-tokens', 64)
    assert 'align' not in hedgehog(*half, '--out', 'b').stderr
    assert '--align-tokens 64 trains the weights of attention' in ' '.join(hedgehog(*half, '--out', 'c', '--align-tokens', 64, code=1).stderr.split())

@pytest.mark.parametrize('bad,says', [(('--long-blocks', 9, '--seq-len', 64), 'makes blocks of 576 tokens, and this model has 512 positions'),
    (('--long-blocks', 8, '--seq-len', 64, '--distill-tokens', 128, '--finetune-tokens', 0), 'joins so many blocks, and these budgets and this text come to 2'),
    (('--recipe', 'beste'), 'recipe is one of paper, lolcats, best'),
    (('--lr', '0'), '--lr is above 0, or auto; given 0'),
    (('--finetune-lr', '-1'), '--finetune-lr is above 0'), (('--finetune-on', 'logits'), '--finetune-on is one of labels, teacher, both'),
    (('--last-state', '--patience', '2'), '--patience counts evaluations'),
    (('--save', 'trained', '--lora-rank', '2', '--adapt-tokens', '512'), '--adapt-tokens changes that')], ids=lambda x: x[-1] if isinstance(x, tuple) else '')
def test_settings_of_training_are_checked_first(bad, says, here):
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'm', *bad, *SHORT, code=1)
    assert says in ' '.join(r.stderr.split()) and not [*here.iterdir()]

# The demo

@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    d = tmp_path_factory.mktemp('demo')
    runs = {n:(2 if r[0] else 0, 2, 1 if r[0] else 3, 2, *r[4:]) for n,r in cli.DEMO['runs'].items()}
    old,cli.DEMO = cli.DEMO,dict(cli.DEMO, runs=runs, seq_len=64, shown=32, max_new_tokens=20)
    try: return d, hedgehog('demo', '--json', '--out', d), hedgehog('demo', '--out', d)
    finally: cli.DEMO = old

def test_the_demo_compares_at_equal_tokens_of_finetuning():
    tokens = {n:b*bb for n,(_,_,b,bb,*_) in cli.DEMO['runs'].items()}
    assert tokens['hedgehog']==tokens['elu'] and tokens['hybrid']==tokens['window']

def test_demo(demo):
    d,as_json,plain = demo
    j = json.loads(as_json.stdout)
    ppl = [r for r in j['rows'] if r['metric']=='ppl']
    assert [(r['variant'],r['map']) for r in ppl] == [('softmax-zero-shot','hedgehog'), ('swapped','hedgehog'), ('hedgehog-distilled','hedgehog'),
        ('hedgehog','hedgehog'), ('swapped','elu'), ('elu','elu'), ('swapped','hedgehog-window'), ('hedgehog-window-distilled','hedgehog-window'),
        ('hedgehog-window','hedgehog-window'), ('swapped','window'), ('window','window')]
    assert ppl[3]['tokens']==ppl[5]['tokens']==3*2*64
    assert j['state_bytes']['hedgehog']==[ppl[3]['state_bytes']] and ppl[0]['state_bytes']==2*5*4*8*4*64 # keys and values of 64 tokens
    assert all(t.startswith('Once upon a time') for t in j['stories'].values())
    assert [p.name for p in d.iterdir()]==['hedgehog_demo.png']
    assert all(s in plain.stdout for s in ('softmax, the teacher', '1+ELU', 'Once upon a time', 'window alone'))

def test_quiet_where_there_is_no_terminal(demo):
    "A line per phase, no bars, no warnings, no control codes"
    _,as_json,plain = demo
    for r in demo[1:]:
        assert 'Warning' not in r.stderr and '\x1b' not in r.stderr and '\r' not in r.stderr and '━' not in r.stderr
        assert len(r.stderr.splitlines())<(60 if r is as_json else 40)

# The parts

@pytest.mark.parametrize('n,b', [(10,4), (10,5), (3,8), (1,1), (7,7)])
def test_budget(n, b):
    "Steps and tokens are each other's inverse, and count what `batches` gives out"
    from hedgehog_nb.data.text import batches
    blocks = torch.zeros(n, 16, dtype=torch.long)
    data,seen = batches(blocks, b, epochs=3),0
    for i,x in enumerate(data,1):
        seen += x.numel()
        assert tokens_after(i, blocks, b)==seen and steps_for(seen, blocks, b)==i and steps_for(seen+1, blocks, b)==i+1

def test_log_spaced(): assert log_spaced(100, 4)==[12,25,50,100] and log_spaced(2, 9)==[1,2] and log_spaced(0, 3)==[]

def test_word_wrap():
    import io
    f = io.StringIO()
    w = word_wrap(f, 10)
    for s in ('one two ', 'three four\nfive ', 'a', 'bc ', 'averyverylongword end'): w(s)
    assert [l.rstrip() for l in f.getvalue().split('\n')]==['one two', 'three four', 'five abc', 'averyverylongword', 'end']

# properties and bench

def test_properties_of_a_model_and_of_maps(here):
    r = hedgehog('properties', 'embedded', '--data', 'embedded', '--map', 'elu', '--map', 'taylor', '--seq-len', 64,
        '--tokens', 128, '--out', here/'p.png', '--json')
    got = json.loads(r.stdout)
    rows = {x['variant']:x for x in got['rows']}
    assert list(rows)==['softmax','elu','taylor'] and got['tokens']==128 and (here/'p.png').read_bytes()[:4]==b'\x89PNG'
    assert rows['softmax']['spearman']>.999 and rows['softmax']['kl']<1e-6 and rows['elu']['share']>.9>rows['softmax']['share'] and rows['elu']['kl']>.1
    by = json.loads(hedgehog('properties', 'embedded', '--data', 'embedded', '--by', 'head', '--seq-len', 64, '--tokens', 64, '--json').stdout)['rows']
    assert len(by)==40 and {(x['layer'],x['head']) for x in by}=={(l,h) for l in range(5) for h in range(8)}

def test_properties_of_a_converted_model(converted):
    r = hedgehog('properties', converted[0], '--data', 'embedded', '--seq-len', 64, '--tokens', 64)
    assert 'softmax' in r.stdout and 'hedgehog' in r.stdout and 'rank' in r.stdout

def test_a_hybrid_and_how_much_its_linear_branch_carries(here):
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', here/'h', '--map', 'hedgehog-window', '--window', 8,
        '--relative', '--distill-steps', 1, '--finetune-steps', 0, '--json', *SHORT)
    assert [x['variant'] for x in json.loads(r.stdout)['rows'] if x['metric']=='ppl']==['softmax-zero-shot','swapped','hedgehog-window-distilled']
    assert json.loads((here/'h'/'config.json').read_text())['hedgehog']==dict(attention='hedgehog-window', layers=[0,1,2,3,4],
        attention_kwargs=dict(form='exp', bias=True, window=8, relative=True))
    r = hedgehog('properties', here/'h', '--data', 'embedded', '--seq-len', 64, '--tokens', 64, '--json')
    older = json.loads(r.stdout)['older_keys']
    assert len(older['layers'])==5 and all(0<older[k]<1 for k in ('share','softmax'))

def test_bench_writes_what_it_measured(here, monkeypatch):
    from helpers.timing import measured_quickly
    measured_quickly(monkeypatch)
    r = hedgehog('bench', '--minutes', 0, '--only', 'sdpa', '--only', 'hedgehog-kernels', '--out', here/'b.json')
    rows = json.loads((here/'b.json').read_text())['rows']
    assert [x['value']>0 for x in rows if x['variant']=='sdpa']==[True] and {x['variant'] for x in rows}=={'sdpa','copy','matmul'}
    assert 'not run: the kernels run on a GPU' in r.stdout or torch.cuda.is_available()
    assert 'cases were not begun' in r.stderr and r.stdout.count('not run: train B=')>1
    assert 'cases for a GPU were not run' in r.stderr or torch.cuda.is_available()

@pytest.mark.parametrize('args,says', [(('properties','embedded','--data','embedded','--by','token'), 'model, layer, head; given'),
    (('properties','embedded','--data','embedded','--map','nope'), "no feature map is called 'nope'"),
    (('properties','embedded','--data','embedded','--out','x.doc'), 'draws a .png'), (('bench','--only','nope'), 'given nope'),
    (('bench','--out','x.txt'), 'is a .json file')])
def test_what_properties_and_bench_refuse(args, says):
    r = hedgehog(*args, code=1)
    assert says in r.stderr and r.stderr.count('\n')==1

# Settings from a file, adapters, pieces

@pytest.mark.parametrize('name,text', [
    ('run.toml', 'model = "embedded"\ndata = ["embedded"]\nout = "from-file"\ndistill_steps = 2\nfinetune-steps = 2\nlr = 0.5\n'
        'lora-rank = 4\nlora-targets = ["q_proj", "v_proj"]\nbias = true\n'),
    ('run.yaml', 'model: embedded\ndata: embedded\nout: from-file\ndistill-steps: 2\nfinetune_steps: 2\nlr: 5e-1\n'
        'lora-rank: 4\nlora-targets: q_proj,v_proj\nbias: true\n')])
def test_config_is_what_would_be_typed(here, name, text):
    from safetensors.torch import load_file
    if name.endswith('.toml') and sys.version_info<(3,11): pytest.skip('TOML is read by Python 3.11 and later')
    (here/name).write_text(text)
    r = hedgehog('linearize', '--config', name, '--lr', 0.02, '--recipe', 'paper', *SHORT)
    hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'typed', '--distill-steps', 2, '--finetune-steps', 2, '--lr', .02, '--lora-rank', 4,
        '--lora-targets', 'q_proj,v_proj', '--bias', *SHORT)
    a,b = load_file('from-file/model.safetensors'),load_file('typed/model.safetensors')
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    said = json.loads((here/'from-file'/'results.json').read_text())['command'].split()
    assert said[:3]==['hedgehog','linearize','embedded'] and '--config' not in said and said[said.index('--lora-rank')+1]=='4' and said.count('--lr')==1

def test_adapters_leave_a_plain_model_and_move_their_targets_alone(here):
    from safetensors.torch import load_file
    for out,steps in (('a',0),('b',3)): hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', out, '--distill-steps', 1,
        '--finetune-steps', steps, '--lora-rank', 2, '--lora-targets', 'q_proj', '--grad-accum', 2, *SHORT)
    a,b = load_file('a/model.safetensors'),load_file('b/model.safetensors')
    assert a.keys()==b.keys() and {k for k in a if not torch.equal(a[k], b[k])}=={k for k in a if 'q_proj' in k or 'feature_map' in k}

def test_overwritten_and_restarted(here):
    args = 'linearize', 'embedded', '--data', 'embedded', '--out', 'm', '--distill-steps', 1, '--finetune-steps', 0, *SHORT
    (here/'.m-run').mkdir(); (here/'.m-run'/'command.json').write_text('{}'); (here/'.m-run'/'measured.json').write_text('{')
    assert '--restart' in hedgehog(*args, code=1).stderr
    hedgehog(*args, '--restart'); hedgehog(*args, '--overwrite')
    assert sorted(p.name for p in here.iterdir())==['m']

# Implementations, and the check of the kernels

def test_the_implementation_is_an_option(converted, here):
    hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'plain', '--implementation', 'chunked',
        '--distill-steps', 0, '--finetune-steps', 0, *SHORT)
    assert json.loads((here/'plain'/'config.json').read_text())['hedgehog']['implementation']=='chunked'
    values = [json.loads(hedgehog('evaluate', 'plain', '--data', 'embedded', *SHORT, *more, '--json').stdout)['value']
        for more in ((), ('--implementation', 'naive'))]
    assert values[0]==pytest.approx(values[1], rel=1e-4)
    assert hedgehog('generate', 'plain', '--prompt', 'Once', '-n', 3, '--implementation', 'recurrent').stdout
    assert 'implementation is one of naive' in hedgehog('evaluate', 'plain', '--data', 'embedded', *SHORT, '--implementation', 'cuda', code=1).stderr
    assert 'for converted models' in hedgehog('generate', 'embedded', '--prompt', 'Once', '--implementation', 'naive', code=1).stderr
    r = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', 'other', '--implementation', 'fast', *SHORT, code=1)
    assert "given 'fast'" in r.stderr and not (here/'other').exists()

@pytest.mark.parametrize('found,code', [(('', .001), 0), (('output is off by 0.3 of its size [x]', .3), 1)], ids=['right', 'wrong'])
def test_self_check_prints_the_verdicts(monkeypatch, here, found, code):
    pytest.importorskip('triton')
    from hedgehog_nb.kernels import self_check as sc
    monkeypatch.setenv('XDG_CACHE_HOME', str(here/'cache')); monkeypatch.setattr(sc, '_run', lambda c, device: found)
    monkeypatch.setattr(sc.triton.knobs.runtime, 'interpret', True)
    r = hedgehog('bench', '--self-check', '--device', 'cpu', code=code)
    n = len(sc.default_cases())
    assert all(f in r.stdout for f in (*sc.FAMILIES, 'bfloat16', 'triton', 'driver')) and \
        r.stdout.count(found[0] or 'good')==n and not (here/'bench.json').exists()
    assert (f'{n} of {n} checks failed' in r.stderr and sc.ISSUES in r.stderr) if code else (f'all {n} checks passed' in r.stderr)
    rows = json.loads(hedgehog('bench', '--self-check', '--device', 'cpu', '--json', code=code).stdout)
    assert len(rows['rows'])==n and rows['failed']==(n if code else 0)

def test_self_check_without_a_gpu():
    pytest.importorskip('triton')
    if not torch.cuda.is_available(): assert 'PyTorch sees none here' in hedgehog('bench', '--self-check', code=1).stderr

def test_blocks_begin_as_told():
    "Blocks begin as the tokenizer's settings say, or as the command does; what was done is told."
    words = 'evaluate', 'embedded', '--data', 'embedded', '--seq-len', 128
    said = {o: json.loads(hedgehog(*words, '--json', *o).stdout) for o in ((), ('--block-bos',), ('--no-block-bos',))}
    assert said[()]['value']==said[('--no-block-bos',)]['value']<said[('--block-bos',)]['value']
    assert [r['block_start'] for r in said.values()]==['','<s>',''] and 'that begin with <s>' in hedgehog(*words, '--block-bos').stdout

def test_blocks_of_a_conversion(here):
    "linearize and properties take the option too; what was done goes into the rows, and with the folder."
    few = '--distill-steps', 1, '--finetune-steps', 1
    out = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', here/'m', '--block-bos', *few, *SHORT).stderr
    assert 'that begin with <s>' in out and {r['block_start'] for r in json.loads((here/'m'/'results.json').read_text())['rows']}=={'<s>'}
    assert json.loads(hedgehog('properties', here/'m', '--data', 'embedded', '--json', '--tokens', 128).stdout)['block_start']=='<s>'

def test_what_was_trained_is_measured_as_it_was(here):
    "A folder of --save trained holds the tokenizer where a command said how blocks begin."
    few = '--distill-steps', 1, '--finetune-steps', 1, '--lora-rank', 2, '--save', 'trained'
    hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', here/'t', '--block-bos', *few, *SHORT)
    want = json.loads((here/'t'/'results.json').read_text())['rows'][-1]
    got = json.loads(hedgehog('evaluate', here/'t', '--data', 'embedded', '--seq-len', 64, '--eval-tokens', 256, '--json').stdout)
    assert got['block_start']=='<s>' and got['value']==pytest.approx(want['value'], rel=1e-4)

@pytest.mark.parametrize('token', ['[/s]','[gMASK]','[bold]'])
def test_a_token_in_brackets_is_no_markup(token, here):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from helpers.tiny_models import llama
    tok = Tokenizer(models.WordLevel({w:i for i,w in enumerate(['<unk>', token, *(f'w{i}' for i in range(50))])}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(single=[token,'$A'], special_tokens=[(token,1)])
    PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='<unk>', bos_token=token).save_pretrained(here/'m'); llama().save_pretrained(here/'m')
    (here/'t.txt').write_text('\n\n'.join(' '.join(f'w{(7*i+j)%50}' for j in range(20)) for i in range(99)))
    assert f'that begin with {token},' in hedgehog('evaluate', here/'m', '--data', here/'t.txt', '--seq-len', 8, '--eval-tokens', 64).stdout

def test_quantised_weights_are_refused_before_the_first_step(here, monkeypatch):
    from hedgehog_nb.data import models as data
    def quantised(*args, load=data.load_model):
        model,tok = load(*args); model.is_quantized = True
        return model,tok
    monkeypatch.setattr(data, 'load_model', quantised)
    for more in ((), ('--lora-rank', 4)):
        said = hedgehog('linearize', 'embedded', '--data', 'embedded', '--out', here/'q', *more, *SHORT, code=1).stderr
        assert '--finetune-tokens 0' in said and not list(here.glob('.q*')), said
