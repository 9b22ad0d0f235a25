"What was trained, saved alone; whole models' speed as it is measured; and the models' part of `make gpu` in little, killed and taken up."
import math, json, os, shutil, signal, subprocess, sys, tarfile
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
import gpu_models
from helpers.commands import hedgehog
from hedgehog_nb.experiments import generation
from hedgehog_nb.models import cache as caches
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.experiments.generation import benchmark_models, models_table, ReservedLayer
from hedgehog_nb.training.distill import distill
from hedgehog_nb.training.finetune import merge_lora
from hedgehog_nb.training.checkpoint import load_state, save_state
from hedgehog_nb.training.saving import load_trained, save_trained
from helpers.tiny_models import MODELS, corpus, llama, tokens, vit
from helpers.training import adapted, finetuned

pytestmark = pytest.mark.processes

LORA = dict(r=4, target_modules='all-linear')

# what was trained, alone

@torch.no_grad()
def logits(model, x): return model(input_ids=x, use_cache=False).logits

@pytest.mark.parametrize('name', ['llama','gpt2'])
def test_maps_and_adapters_make_the_same_model(name, tmp_path):
    model = linearize(MODELS[name](), layers='0,2', num_maps=2)
    distill(model, [corpus(4)], 1)
    tuned = adapted(model, corpus(8), 2, 4, lora=LORA)
    save_trained(tuned, tmp_path/'a', base='somewhere')
    want = logits(merge_lora(tuned), tokens())
    back = load_trained(MODELS[name](), tmp_path/'a')
    assert torch.equal(logits(back, tokens()), want) and not hasattr(back, 'peft_config') and all(p.requires_grad for p in back.parameters())
    assert sorted(p.name for p in (tmp_path/'a').iterdir())==['adapter_config.json','adapter_model.safetensors','maps.safetensors']
    assert all(p.stat().st_mode & 0o777==0o644 for p in (tmp_path/'a').iterdir())
    assert json.loads((tmp_path/'a'/'adapter_config.json').read_text())['base_model_name_or_path']=='somewhere'

def test_maps_alone_and_other_models_than_writers(tmp_path):
    model = linearize(vit()); x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        next(m for m in model.modules() if hasattr(m, 'w_q')).w_q.add_(.1)
        save_trained(model, tmp_path/'a')
        assert torch.equal(load_trained(vit(), tmp_path/'a')(pixel_values=x).logits, model(pixel_values=x).logits)
    assert [p.name for p in (tmp_path/'a').iterdir()]==['maps.safetensors']

def test_what_does_not_fit_is_named(tmp_path):
    model = linearize(llama())
    save_trained(model, tmp_path/'a', base='llama')
    with pytest.raises(ValueError, match='exists already'): save_trained(model, tmp_path/'a')
    save_trained(model, tmp_path/'a', base='llama', overwrite=True)
    with pytest.raises(ValueError, match='not converted'): save_trained(llama(), tmp_path/'b')
    with pytest.raises(ValueError, match='not written by save_trained'): load_trained(llama(), tmp_path)
    for other in (llama(head_dim=16), llama(layers=4)):
        with pytest.raises(ValueError, match='another model, llama: .* is in (the one given|that one) only'): load_trained(other, tmp_path/'a')

def in_bits(model, bits):
    "As GGUF rounds: matrices only, in blocks of 32 that have a scale of their own."
    with torch.no_grad():
        for p in model.parameters():
            if p.dim()<2 or p.numel()%32: continue
            b = p.view(-1, 32); s = b.abs().amax(1, keepdim=True).clamp_min(1e-9)/(2**(bits-1)-1)
            b.copy_((b/s).round()*s)
    return model

def other_layer(model):
    torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    return model

COPIES = dict(bfloat16=lambda m: m.bfloat16(), half=lambda m: m.half(), back=lambda m: m.bfloat16().float(), q8=lambda m: in_bits(m, 8))

@pytest.mark.parametrize('copy', COPIES)
def test_copies_in_other_precisions_are_the_original(trained, copy, recwarn):
    load_trained(COPIES[copy](llama()), trained)
    assert not [w for w in recwarn if 'another precision' in str(w.message)]

@pytest.mark.parametrize('bits', [5,4,3])
def test_coarse_copies_are_warned_of(trained, bits):
    with pytest.warns(UserWarning, match='trained on llama at another precision, or in another state: .* differs by [0-9]+%'):
        load_trained(in_bits(llama(), bits), trained)

@pytest.mark.parametrize('make', [lambda: llama(seed=1), lambda: other_layer(llama())], ids=['seed','layer'])
def test_another_original_is_refused_before_it_is_changed(trained, make):
    with pytest.raises(ValueError, match=r'another model, llama: .*weight differs by [0-9]+% of its size'): load_trained(other := make(), trained)
    assert not hasattr(other.config, 'hedgehog')

@pytest.mark.parametrize('more', [dict(modules_to_save=['lm_head']), dict(bias='all'), dict(use_dora=True)], ids=lambda m: next(iter(m)))
def test_what_peft_trains_beside_adapters_is_not_compared(more, tmp_path):
    make = MODELS['gpt2' if 'bias' in more else 'llama']
    lora = dict(r=4, target_modules=['c_attn'] if 'bias' in more else 'all-linear', **more)
    tuned = adapted(linearize(make()), corpus(8), 2, 4, lr=.1, lora=lora)
    save_trained(tuned, tmp_path/'a', base='it')
    want,base = logits(merge_lora(tuned), tokens()),make()
    if 'modules_to_save' in more: torch.nn.init.normal_(base.lm_head.weight) # a new head, as a classifier's is at each load
    torch.testing.assert_close(logits(load_trained(base, tmp_path/'a'), tokens()), want)

def test_a_model_that_was_finetuned_whole_needs_its_own_weights(tmp_path):
    model = finetuned(linearize(llama()), corpus(8), 4, 4, lr=.3)
    save_trained(model, tmp_path/'a', base='llama')
    with pytest.raises(ValueError, match='another model'): load_trained(llama(), tmp_path/'a')
    base = llama(); base.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(logits(load_trained(base, tmp_path/'a'), tokens()), logits(model, tokens()))

def cut(f): f.write_bytes(f.read_bytes()[:-9])
def renamed(f): w = load_file(f); save_file({n.replace('layers.0', 'layers.9'):x for n,x in w.items()}, f, {'format':'pt'})
def halved(f): w = load_file(f); save_file(dict([*w.items()][::2]), f, {'format':'pt'})
def pickled(f): torch.save(load_file(f), f.with_suffix('.bin')); f.unlink()
def no_base(f): save_state(f, **{k:v for k,v in load_state(f).items() if k!='base'})
def nan_in(f): w = load_file(f); w[next(iter(w))].fill_(math.nan); save_file(w, f, {'format':'pt'})
def less(f): kept = load_state(f); del kept['maps'][next(iter(kept['maps']))]; save_state(f, **kept)
def nan_maps(f): kept = load_state(f); next(iter(kept['maps'].values())).fill_(math.nan); save_state(f, **kept)
def other_rank(f): c = json.loads(f.read_text()); f.write_text(json.dumps({**c, 'r':2*c['r']}))
def nothing(f): f.write_text('{}')
def earlier(f): save_state(f, **{k:v for k,v in load_state(f).items() if k!='original'})

DAMAGED = [
    ('adapter_config.json', Path.unlink, 'lacks adapter_config.json'), ('adapter_model.safetensors', Path.unlink, 'lacks adapter_model.safetensors'),
    ('adapter_model.safetensors', pickled, 'lacks adapter_model.safetensors'), ('adapter_model.safetensors', cut, 'adapters in .* cannot be read'),
    ('adapter_model.safetensors', renamed, 'do not fit: .*layers'),
    ('adapter_model.safetensors', halved, 'do not fit'), ('adapter_model.safetensors', nan_in, 'is not finite'),
    ('adapter_config.json', cut, 'adapters in .* cannot be read'), ('adapter_config.json', nothing, 'adapters in .* cannot be read'),
    ('adapter_config.json', other_rank, 'adapters in .* cannot be read: .*size mismatch'), ('maps.safetensors', cut, 'maps.safetensors is damaged'),
    ('maps.safetensors', less, 'maps.safetensors is damaged: .*feature_map.* is missing in it'), ('maps.safetensors', nan_maps, 'is not finite'),
    ('maps.safetensors', no_base, 'maps.safetensors is damaged'), ('maps.safetensors', earlier, 'of an earlier version')]

@pytest.mark.parametrize('file,change,message', DAMAGED, ids=lambda x: getattr(x, '__name__', None))
def test_damaged_folders_are_refused(trained, tmp_path, file, change, message):
    shutil.copytree(trained, tmp_path/'a'); change(tmp_path/'a'/file)
    refused(llama(), tmp_path/'a', message)

def refused(model, path, message):
    "It says why, and leaves the model as it was."
    before,modules,config = {n:(p.clone(), p.requires_grad) for n,p in model.named_parameters()},[*map(type, model.modules())],model.config.to_dict()
    with pytest.raises(ValueError, match=message): load_trained(model, path)
    after = dict(model.named_parameters())
    assert after.keys()==before.keys() and all(p.requires_grad==before[n][1] for n,p in after.items())
    assert all(torch.equal(p, before[n][0]) for n,p in after.items() if not p.is_meta and p.isfinite().all())
    assert [*map(type, model.modules())]==modules and model.config.to_dict()==config and not hasattr(model, 'peft_config')

def test_models_that_are_not_whole_are_refused(trained):
    gone,cut_off = llama(),llama()
    with torch.no_grad(): gone.model.layers[1].mlp.up_proj.weight[3] = math.nan
    refused(gone, trained, r'layers\.1\.mlp\.up_proj\.weight of the model is not finite')
    cut_off.model.layers[1].to('meta')
    refused(cut_off, trained, r'layers\.1\..* is on the meta device')

def test_as_many_weights_in_other_heads(tmp_path):
    save_trained(linearize(llama(heads=4, head_dim=8, kv_heads=4), 'elu'), tmp_path/'a', base='llama')
    refused(llama(heads=2, head_dim=16, kv_heads=2), tmp_path/'a', r'another model, llama, of \(heads, .*\[4, 4, 8\].* given .*\[2, 2, 16\]')

@pytest.mark.parametrize('more', [dict(init_lora_weights='pissa'), dict(init_lora_weights='olora'), dict(trainable_token_indices=[5,6])],
    ids=lambda m: next(iter(m)))
def test_adapters_that_change_the_weights_they_start_from(more, tmp_path):
    tuned = adapted(linearize(llama()), corpus(8), 2, 4, lr=.01, lora=dict(r=4, target_modules='all-linear', **more))
    save_trained(tuned, tmp_path/'a', base='llama')
    want = logits(merge_lora(tuned), tokens())
    torch.testing.assert_close(logits(load_trained(llama(), tmp_path/'a'), tokens()), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='another model'): load_trained(llama(seed=1), tmp_path/'a')

def test_what_was_there_stays_until_it_is_replaced(trained, tmp_path, monkeypatch):
    from hedgehog_nb.training import saving
    shutil.copytree(trained, tmp_path/'a'); before = {p.name:p.read_bytes() for p in (tmp_path/'a').iterdir()}
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(saving, 'save_state', full)
    with pytest.raises(OSError): save_trained(linearize(llama()), tmp_path/'a', overwrite=True)
    assert {p.name:p.read_bytes() for p in (tmp_path/'a').iterdir()}==before and [p.name for p in tmp_path.iterdir()]==['a']
    (tmp_path/'f').touch()
    with pytest.raises(ValueError, match='f is a file'): save_trained(linearize(llama()), tmp_path/'f', overwrite=True)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return save_trained(adapted(linearize(llama()), corpus(8), 1, 4, lora=LORA), tmp_path_factory.mktemp('trained')/'a', base='llama')

def test_the_command_line_saves_it_and_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    little = '--data embedded --seq-len 64 --eval-tokens 256'.split()
    how = '--save trained --lora-rank 4 --batch-size 4 --distill-steps 1 --finetune-steps 2 --finetune-lr 1e-2 --autocast bfloat16'.split()
    hedgehog('linearize', 'embedded', *little, '--out', 'tales', *how)
    files = 'maps.safetensors','adapter_model.safetensors','adapter_config.json','results.json','attention.png','perplexity.png'
    assert sorted(p.name for p in (tmp_path/'tales').iterdir())==sorted(files)
    want = [r['value'] for r in json.loads((tmp_path/'tales'/'results.json').read_text())['rows'] if r['metric']=='ppl'][-1]
    for base in ((), ('--base', 'embedded')):
        got = json.loads(hedgehog('evaluate', 'tales', *little, *base, '--json').stdout)['value']
        assert abs(got/want-1)<.02 # the command computed in bfloat16
    assert 'Once' in hedgehog('generate', 'tales', '--prompt', 'Once', '-n', 3).stdout
    assert 'name that with --base' in hedgehog('evaluate', 'tales', *little, '--base', './none', code=1).stderr
    assert 'not' in hedgehog('evaluate', 'embedded', *little, '--base', 'embedded', code=1).stderr
    assert '--lora-rank' in hedgehog('linearize', 'embedded', *little, '--out', 'other', '--save', 'trained', code=1).stderr
    assert 'model or trained' in hedgehog('linearize', 'embedded', *little, '--out', 'other', '--save', 'all', code=1).stderr

# decoding of whole models

@torch.no_grad()
def test_reserved_room_gives_the_same_logits():
    model,x = llama(),tokens(2, 12)
    cache = DynamicCache(config=model.config); cache.layers = [ReservedLayer(12) for _ in cache.layers]
    parts = [model(input_ids=p, past_key_values=cache).logits for p in x.split([7,1,1,3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, x), atol=1e-5, rtol=1e-5)
    assert caches.cache_bytes(cache)==3*2*2*2*12*8*4
    with pytest.raises(ValueError, match='room for 12'): model(input_ids=x[:,:1], past_key_values=cache)

@pytest.mark.parametrize('kw', [None, {}, dict(layers='1'), dict(attention='hedgehog-window', window=4)])
@torch.no_grad()
def test_each_repetition_writes_the_same_tokens(kw):
    "What a CUDA graph records and replays, run twice: it begins where it began."
    model,x = llama(),tokens(2, 9)
    if kw is not None: linearize(model, **kw)
    cache = generation._reserved(model, 9+6)
    model(input_ids=x[:,:8], past_key_values=cache)
    back = generation._back_to(cache)
    a = generation.greedy(model, x[:,8:], cache, 6); back()
    b = generation.greedy(model, x[:,8:], cache, 6)
    want = model.generate(x, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[:,-1:]
    assert torch.equal(a, b) and torch.equal(a, want)

def test_measurements_are_kept_and_failures_told(tmp_path, monkeypatch):
    models,out,said = dict(softmax=llama(), hedgehog=linearize(llama())),tmp_path/'d.json',{}
    measure = generation._measure
    def fails(phase, model, B, *case):
        if B==2 and phase=='decode': raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB')
        return measure(phase, model, B, *case)
    monkeypatch.setattr(generation, '_measure', fails)
    args = dict(name='tiny', batches=(1,2), contexts=(8,16), steps=2, compiled=(), on_case=lambda c, got: said.update({c:got}))
    rows = benchmark_models(models, out, most=16, **args)
    assert len(said)==16 and said['decode hedgehog B=2 T=8']=='OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB'
    assert said['prefill softmax B=2 T=16']=='more than 16 tokens at once' and said['prefill softmax B=2 T=8']['tokens_per_s']>0
    kept = json.loads(out.read_text())['rows']
    assert len(kept)==len(rows)==3*(16-4-2) and {(r['experiment'], r['B'], r['T']) for r in kept}>={('decode-model',1,16),('prefill-model',2,8)}
    size = {r['variant']:r['value'] for r in kept if r['experiment']=='decode-model' and r['T']==16 and r['metric']=='bytes'}
    assert size==dict(softmax=3*2*2*16*8*4, hedgehog=3*2*(16*8+16+1)*4) # what a state holds does not depend on the context
    said.clear(); monkeypatch.setattr(generation, '_measure', measure)
    more = benchmark_models(models, out, most=16, **args)
    assert {c for c,got in said.items() if isinstance(got, dict)}=={f'decode {v} B=2 T={T}' for v in models for T in (8,16)} and len(more)==3*14
    assert str(models_table(more)).splitlines()[0].split('  ')[0]=='batch' and '–' not in str(models_table(more))
    said.clear(); benchmark_models(models, tmp_path/'none.json', minutes=0, **args)
    assert set(said.values())=={'not begun within 0 minutes'} and not (tmp_path/'none.json').exists()
    out.write_text(out.read_text().replace('"device": "', '"device": "another '))
    with pytest.raises(ValueError, match='measurements of another'): benchmark_models(models, out, **args)

# the script

def test_options():
    a = gpu_models.options(['--out', 'x', '--steps', '2'])
    assert a.parts=='embedded,smollm2-135m,decode' and a.minutes<9 and a.work.parts[-2:]==('build','gpu-models')
    with pytest.raises(SystemExit): gpu_models.options(['--out', 'x', '--parts', 'embeded'])

def test_what_is_not_complete_is_not_used(tmp_path, capsys):
    (tmp_path/'smol.part').mkdir()
    for model,why in (('smol', f"not run: {tmp_path/'smol'} is not complete, carry the other parts"), ('other', f"not run: there is no {tmp_path/'other'}")):
        args = f"--out {tmp_path/'o'} --work {tmp_path/'w'} --parts smollm2-135m --data embedded --device cpu --model {tmp_path/model}"
        assert gpu_models.main(args.split()) and why in capsys.readouterr().out

def test_the_last_table(tmp_path):
    (tmp_path/'embedded').mkdir()
    row = lambda stage, value, tokens, seconds: dict(stage=stage, metric='ppl', value=value, tokens=tokens, seconds=seconds)
    got = [row('teacher', 4, 0, 0), row('swapped', 40, 0, 0), row('distilled', 10, 600, 2), row('finetuned', 8, 1000, 6)]
    (tmp_path/'embedded'/'results.json').write_text(json.dumps(dict(rows=got)))
    (tmp_path/'embedded.peak').write_text('2000000000')
    (tmp_path/'decode').mkdir()
    (tmp_path/'decode'/'results.json').write_text(json.dumps(dict(rows=[dict(metric='peak_bytes', value=5), dict(metric='peak_bytes', value=7*10**9)])))
    rows,table = gpu_models.costs(SimpleNamespace(work=tmp_path), {'embedded':('done',3.), 'smollm2-135m':('cut off',9.), 'decode':('done',1.)})
    assert all(x in str(table) for x in ('2.00 GB', '7.00 GB', '300', '100', '4 → 40 → 10 → 8', 'cut off'))
    want = [('embedded','wall_s',None,3.), ('embedded','peak_bytes',None,2*10**9), ('embedded','tokens_per_s','distill',300.),
        ('embedded','tokens_per_s','finetune',100.), ('smollm2-135m','wall_s',None,9.), ('decode','wall_s',None,1.), ('decode','peak_bytes',None,7*10**9)]
    assert [(r['model'], r['metric'], r.get('phase'), r['value']) for r in rows]==want

@pytest.mark.slow
def test_two_steps_killed_and_taken_up(root, tmp_path):
    "The whole script on a CPU: killed after distillation, then run to its end, then once more with nothing left to do."
    out,work = tmp_path/'out',tmp_path/'work'
    how = '--steps 2 --device cpu --model embedded --data embedded --parts embedded,decode'.split()
    cmd = [sys.executable, root/'tests'/'gpu_models.py', '--out', out, '--work', work, *how]
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    with subprocess.Popen([*cmd, '--part', 'embedded'], stderr=subprocess.PIPE, text=True, env=env) as p:
        assert any('✓ distill' in l for l in p.stderr) # the lines up to that one
        p.send_signal(signal.SIGKILL)
    assert p.returncode==-signal.SIGKILL and not list(out.iterdir())
    r = subprocess.run(cmd, capture_output=True, text=True, env=env)
    assert r.returncode==0, r.stdout+r.stderr
    assert 'going on with what is in' in r.stderr and 'decode hedgehog B=1 T=64' in r.stdout and r.stdout.rstrip().splitlines()[-1].startswith(f'in {out}:')
    files = {p.name:p for p in out.iterdir()}
    assert set(files)=={'gpu-embedded.json','embedded.tar','gpu-decode.json','gpu-models.json'}
    with tarfile.open(files['embedded.tar']) as t: names = {n.partition('/')[2] for n in t.getnames()}
    assert {'maps.safetensors','adapter_model.safetensors'} <= names and 'model.safetensors' not in names
    before = {n:p.read_bytes() for n,p in files.items() if n!='gpu-models.json'}
    again = subprocess.run([*cmd[:3], tmp_path/'again', *cmd[4:]], capture_output=True, text=True, env=env)
    assert again.returncode==0 and '✓' not in again.stderr and 'tokens/s  ' not in again.stdout.split('== decode')[1].split('\n\n')[0]
    assert all((tmp_path/'again'/n).read_bytes()==b for n,b in before.items() if n.endswith('.json'))
