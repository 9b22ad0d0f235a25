"One contract for `distill` and `finetune`: the same kinds of data, the same settings, the same history; schedules and defaults as the paper's."
import inspect, math
import datasets, pytest, torch, transformers
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, PreTrainedTokenizerFast
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.training.checkpoint import TrainingHistory
from hedgehog_nb.training.distill import distill
from hedgehog_nb.training.finetune import add_lora, finetune, merge_lora
from helpers.tiny_models import VOCAB, bert, corpus, gpt2, llama, vit
from helpers.training import OnStep

PHASES = [distill, finetune]
BLOCKS = corpus(10)

def made(): return linearize(llama(layers=2))

def rows(x=BLOCKS): return [dict(input_ids=r.tolist(), attention_mask=[1]*len(r)) for r in x]

class ListDataset(torch.utils.data.Dataset):
    def __len__(self): return len(BLOCKS)
    def __getitem__(self, i):
        if i>=len(BLOCKS): raise IndexError
        return dict(input_ids=BLOCKS[i])

SHUFFLED = dict(
    blocks=lambda: BLOCKS,
    tuple_of_blocks=lambda: tuple(BLOCKS),
    lists_of_ids=lambda: BLOCKS.tolist(),
    list_of_dicts=rows,
    dataset=lambda: datasets.Dataset.from_list(rows()),
    dataset_with_text=lambda: datasets.Dataset.from_list([dict(r, text='a story', idx=i) for i,r in enumerate(rows())]),
    torch_dataset=ListDataset,
    tokenizer_output=lambda: transformers.BatchEncoding(dict(input_ids=BLOCKS)))
IN_ORDER = dict(
    list_of_batches=lambda: list(BLOCKS.split(4)),
    list_of_dict_batches=lambda: [dict(input_ids=b, labels=b) for b in BLOCKS.split(4)],
    loader=lambda: DataLoader(BLOCKS, batch_size=4),
    loader_of_rows=lambda: DataLoader(datasets.Dataset.from_list(rows()).with_format('torch'), batch_size=4))

@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('kind', SHUFFLED)
def test_rows_of_any_kind_are_the_same_run(train, kind):
    assert train(made(), SHUFFLED[kind](), 4, batch_size=4).losses==train(made(), BLOCKS, 4, batch_size=4).losses

@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('kind', IN_ORDER)
def test_batches_of_any_kind_are_the_same_run(train, kind):
    "In their own order, and begun anew where they end."
    want = train(made(), [BLOCKS[:4], BLOCKS[4:8], BLOCKS[8:], BLOCKS[:4]], 4).losses
    assert train(made(), IN_ORDER[kind](), 4).losses==want

@pytest.mark.parametrize('train', PHASES)
def test_streams_are_read_in_their_order(train):
    stream = datasets.Dataset.from_list(rows()).to_iterable_dataset()
    want = train(made(), [BLOCKS[:4], BLOCKS[4:8], BLOCKS[8:], BLOCKS[:4]], 4).losses
    assert train(made(), stream, 4, batch_size=4).losses==want
    with pytest.warns(UserWarning, match='ended after 3 of 4'): assert train(made(), iter(rows()), 4, batch_size=4).losses==want[:3]
    with pytest.raises(ValueError, match='a stream has no length.*give steps'): train(made(), stream, epochs=1)

@pytest.mark.parametrize('train', PHASES)
def test_epochs_and_steps(train):
    count = lambda **kw: len(train(made(), BLOCKS, batch_size=4, **kw).losses)
    assert [count(), count(epochs=1), count(epochs=2), count(epochs=.5), count(steps=2)]==[3, 3, 6, 2, 2]
    assert train(made(), BLOCKS, epochs=2, batch_size=4).losses==train(made(), BLOCKS, steps=6, batch_size=4).losses
    for kw,said in ((dict(steps=2, epochs=2), 'steps or epochs'), (dict(steps=0), '1 or more steps'), (dict(epochs=0), '1 or more'),
        (dict(epochs=math.nan), 'epochs=nan'), (dict(steps=2.5), 'steps=2.5'),
        (dict(batch_size=0), 'batch_size=0'),
        (dict(eval_steps=3), 'give eval_data too'), (dict(eval_steps=0, eval_data=BLOCKS), 'eval_steps=0'), (dict(save_steps=0), 'save_steps=0')):
        with pytest.raises(ValueError, match=said): train(made(), BLOCKS, **kw)
    with pytest.raises(TypeError, match="save_every=3.*nearest is save_steps"): train(made(), BLOCKS, save_every=3)

@pytest.mark.parametrize('train', PHASES)
def test_epoch_events_and_numbers_are_the_datas(train):
    seen = []
    class Note(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **kw): seen.append((state.global_step, round(state.epoch, 6)))
        def on_log(self, args, state, control, logs=None, **kw):
            if 'loss' in logs: assert state.epoch==pytest.approx(state.global_step/3) and {'loss','seconds','learning_rate'}<=logs.keys()
    train(made(), BLOCKS, epochs=2, batch_size=4, callbacks=[Note()])
    assert seen==[(3,1.), (6,2.)]

def mean_over_labels(model, blocks):
    with torch.no_grad(): p = model(input_ids=blocks).logits[:,:-1].log_softmax(-1)
    return -p.gather(-1, blocks[:,1:,None]).mean().item()

@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('kind', ['blocks','rows','batches','stream'])
def test_evaluations(train, kind):
    held = corpus(7, seed=5)
    data = dict(blocks=lambda: held, rows=lambda: rows(held), batches=lambda: list(held.split(3)), stream=lambda: iter(rows(held)))[kind]()
    model = made()
    history = train(model, BLOCKS, 7, batch_size=4, eval_data=data, eval_steps=3)
    assert isinstance(history, TrainingHistory) and [e['step'] for e in history.evaluations]==[0,3,6,7] and len(history.losses)==len(history.seconds)==7
    assert [*history.evaluations[0]]==['step','loss'] and all(math.isfinite(e['loss']) for e in history.evaluations)
    assert history.best_value==min(e['loss'] for e in history.evaluations)
    if train is finetune: assert history.best_value==pytest.approx(mean_over_labels(model, held), rel=1e-5)
    else: # one more step at a learning rate of nothing has the loss of the evaluation
        assert history.best_value==pytest.approx(distill(model, [held], 1, lr=0.).losses[0], rel=1e-6)
    assert history.losses==train(made(), BLOCKS, 7, batch_size=4).losses # evaluating changes nothing

@pytest.mark.parametrize('train', PHASES)
def test_ten_evaluations_if_none_are_asked_for(train):
    steps = lambda n: [e['step'] for e in train(made(), BLOCKS, n, batch_size=4, eval_data=BLOCKS[:2]).evaluations]
    assert steps(7)==[*range(8)] and steps(23)==[0,3,6,9,12,15,18,21,23]

@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('at', [2,4,6,7])
def test_evaluations_are_taken_up_too(tmp_path, train, at):
    kw = dict(batch_size=4, eval_data=BLOCKS[:4], eval_steps=3, save_steps=2, checkpoint=tmp_path/'a')
    with pytest.raises(Stop): train(made(), BLOCKS, 7, callbacks=[stop_at(at)], **kw)
    seen = []
    class Note(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kw): seen.extend(state.log_history)
    history = train(made(), BLOCKS, 7, callbacks=[Note()], **kw)
    want = train(made(), BLOCKS, 7, **{**kw, 'checkpoint':None})
    assert history.losses==want.losses and history.evaluations==want.evaluations
    done = {2:2, 4:4, 6:4, 7:6}[at] # at step 6 the state is written after the evaluation, which it did not live to see
    assert [l['step'] for l in seen if 'loss' in l]==list(range(1, done+1)) and [l['step'] for l in seen if 'eval_loss' in l]==[s for s in (0,3,6) if s<=done]
    again = train(made(), BLOCKS, 7, **kw)
    assert again==history==TrainingHistory.load(tmp_path/'a') # and nothing is done twice

def test_metrics_beside_the_loss():
    model = linearize(vit(layers=1))
    g = torch.Generator().manual_seed(0)
    data = [dict(pixel_values=torch.randn(3,16,16, generator=g)+i%2, labels=i%2) for i in range(10)]
    accuracy = lambda p: dict(accuracy=float((p.predictions.argmax(-1)==p.label_ids).mean()))
    history = finetune(model, data, 4, batch_size=4, eval_data=data, eval_steps=4, keep_best=False, compute_metrics=accuracy)
    with torch.no_grad(): out = model(torch.stack([r['pixel_values'] for r in data])).logits
    y = torch.tensor([r['labels'] for r in data])
    assert [e['step'] for e in history.evaluations]==[0,4]
    assert history.evaluations[1:]==[dict(step=4, accuracy=pytest.approx((out.argmax(-1)==y).double().mean().item()),
        loss=pytest.approx(torch.nn.functional.cross_entropy(out, y).item(), rel=1e-5))]

# --- what is in a batch

def ragged(n=10): return [dict(input_ids=r[:6+3*(i%4)].tolist(), attention_mask=[1]*(6+3*(i%4))) for i,r in enumerate(corpus(n))]

class Pad:
    "What `DataCollatorWithPadding` does, without a tokenizer; on either side, to any width, with labels or without."
    def __init__(self, left=False, extra=0, labels=None): self.left,self.extra,self.labels = left,extra,labels
    def __call__(self, batch):
        n = max(len(r['input_ids']) for r in batch)+self.extra
        put = lambda v, fill: [fill]*(n-len(v))+v if self.left else v+[fill]*(n-len(v))
        out = {k: torch.tensor([put(r[k], 0) for r in batch]) for k in ('input_ids','attention_mask')}
        if self.labels=='tokens': out['labels'] = out['input_ids'].masked_fill(out['attention_mask']==0, -100)
        if self.labels=='none count': out['labels'] = torch.full_like(out['input_ids'], -100)
        return out

@pytest.mark.parametrize('left,extra,labels', [(False,9,None), (True,0,None), (True,9,None), (False,0,'tokens'), (False,0,'none count'), (True,5,'none count')])
@pytest.mark.parametrize('make', [llama, gpt2])
def test_padding_and_labels_do_not_change_what_distillation_learns(make, left, extra, labels):
    runs = []
    for pad in (Pad(), Pad(left, extra, labels)):
        model = linearize(make(layers=2).double())
        runs.append((distill(model, ragged(), 6, batch_size=4, collator=pad).losses, [p for n,p in model.named_parameters() if 'feature_map' in n]))
    (a,p),(b,q) = runs
    assert a==pytest.approx(b, rel=1e-9)
    for x,y in zip(p, q): torch.testing.assert_close(x, y, rtol=0, atol=1e-7)

@pytest.mark.parametrize('left,extra', [(False,9), (True,0), (True,9)])
def test_padding_does_not_change_what_a_language_model_learns(left, extra):
    a,b = (finetune(made().double(), ragged(), 6, batch_size=4, collator=pad).losses for pad in (Pad(), Pad(left, extra)))
    assert a==pytest.approx(b, rel=1e-6)

def test_a_language_models_labels_are_its_tokens():
    a = finetune(made(), ragged(), 4, batch_size=4, collator=Pad()).losses
    assert a==finetune(made(), ragged(), 4, batch_size=4, collator=Pad(labels='tokens')).losses
    assert finetune(made(), BLOCKS, 4, batch_size=4).losses==finetune(made(), [dict(input_ids=x, labels=x) for x in BLOCKS], 4, batch_size=4).losses

def test_no_labels_where_they_are_not_the_tokens():
    with pytest.raises(ValueError, match='BertForMaskedLM learns from labels; given input_ids.*collator'): finetune(linearize(bert(layers=1)), BLOCKS, 2)
    with pytest.raises(ValueError, match='ViTForImageClassification learns from labels; given pixel_values'):
        finetune(linearize(vit(layers=1)), [dict(pixel_values=torch.randn(3,16,16))]*4, 2)

@pytest.mark.parametrize('train', PHASES)
def test_what_is_no_data_is_said(train):
    for data,said in ((ragged(), 'rows of 6 to 15 tokens make no batch: give collator='), ([dict(text='a')]*4, 'takes input_ids; given rows of text'),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(rows())), r"has parts train: give one of them, such as data\['train'\]"),
        (torch.utils.data.TensorDataset(BLOCKS), 'given a row'), (BLOCKS[0], 'given a row'), ([], 'is empty'), (None, 'given NoneType'), (3, 'given int')):
        with pytest.raises(ValueError, match=said): train(made(), data, 2)

def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    t = Tokenizer(models.WordLevel({'<pad>':0, '<unk>':1, '<mask>':2, **{f'w{i}':i for i in range(3, VOCAB)}}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', unk_token='<unk>', mask_token='<mask>',
        model_input_names=['input_ids','attention_mask'])

@pytest.mark.parametrize('train', PHASES)
def test_the_collators_of_transformers(train):
    "Padding, and masks drawn at random: the same run twice, and once more from where it was stopped."
    tok = tokenizer()
    data = datasets.Dataset.from_list([dict(text=' '.join(f'w{i}' for i in r[:6+i%5].tolist())) for i,r in enumerate(corpus(12))]).map(lambda r: tok(r['text']))
    assert len(train(made(), data, epochs=1, batch_size=4, collator=DataCollatorForLanguageModeling(tok, mlm=False)).losses)==3
    assert len(distill(made(), data, epochs=1, batch_size=4, collator=DataCollatorWithPadding(tok)).losses)==3
    masked = lambda: train(linearize(bert(layers=1)), data, 4, batch_size=4, collator=DataCollatorForLanguageModeling(tok), eval_data=data, eval_steps=2)
    a,b = masked(),masked()
    assert a.losses==b.losses and a.evaluations==b.evaluations and a.evaluations[0]['loss']!=a.evaluations[1]['loss']

@pytest.mark.parametrize('pieces', [1,3,4,7])
def test_rows_without_a_label_count_nothing(pieces):
    y = BLOCKS[:4].clone(); y[0] = -100
    run = lambda x, y, **kw: finetune(made().double(), [dict(input_ids=x, labels=y)], 2, **kw).losses
    assert run(BLOCKS[:4], y, gradient_accumulation_steps=pieces)==pytest.approx(run(BLOCKS[1:4], BLOCKS[1:4]), rel=1e-6)

def test_a_batch_without_labels_counts_nothing():
    none = dict(input_ids=BLOCKS[:4], labels=torch.full_like(BLOCKS[:4], -100))
    history = finetune(made(), [none, BLOCKS[:4]], 2, eval_data=[none])
    assert history.losses[0]==0 and history.losses[1]>1 and math.isnan(history.evaluations[0]['loss'])

@pytest.mark.parametrize('make', [made, llama, gpt2], ids=['converted','llama','gpt2'])
@pytest.mark.parametrize('kw', [{}, dict(gradient_accumulation_steps=2), dict(lora=dict(r=2, target_modules='all-linear'))], ids=['plain','pieces','lora'])
def test_logits_only_where_a_label_counts(make, kw, monkeypatch):
    "The same losses, from fewer logits; all of them for metrics, and where most tokens have a label."
    from hedgehog_nb.training import finetune as module
    T = BLOCKS.shape[1]
    y = BLOCKS.clone(); y[:,:T-8] = -100; y[0,:T-2] = -100; y[1] = -100
    data,seen,metrics = [dict(input_ids=a, labels=b) for a,b in zip(BLOCKS, y)],[],[]
    def run(data, compute_metrics=None):
        torch.manual_seed(0)
        model = make().eval()
        model.get_output_embeddings().register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
        seen.clear()
        h = finetune(model, data, 3, batch_size=4, eval_data=data, eval_steps=3, compute_metrics=compute_metrics, **kw)
        return h.losses,[e['loss'] for e in h.evaluations],{*seen}
    few = run(data)
    full = run(data, lambda p: metrics.append(p.predictions.shape) or {})
    assert few[2]=={8} and full[2]=={8, T} and {m[1] for m in metrics}=={T}
    assert run([dict(input_ids=b, labels=b) for b in BLOCKS])[2]=={T}
    monkeypatch.setattr(module, '_labelled_logits', lambda model, batch: batch)
    old = run(data)
    assert old[2]=={T}
    for new in (few, full): assert new[0]==pytest.approx(old[0], rel=1e-5) and new[1]==pytest.approx(old[1], rel=1e-5)

def test_a_model_with_a_loss_of_its_own_keeps_all_logits():
    "BART's decoder takes `logits_to_keep`, and compares logits with labels itself."
    x = corpus(4)
    y = x.clone(); y[:,:-4] = -100
    config = transformers.BartConfig(vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, max_position_embeddings=128)
    bart = transformers.BartForCausalLM(config)
    assert len(finetune(bart, [dict(input_ids=a, labels=b) for a,b in zip(x, y)], 2, batch_size=2).losses)==2

@pytest.mark.parametrize('pieces', [1,2])
def test_smoothed_labels_are_a_mean_over_labels_too(pieces):
    run = lambda **kw: finetune(made(), BLOCKS[:4], 1, 4, lr=0., gradient_accumulation_steps=pieces, **kw).losses[0]
    assert run(label_smoothing_factor=1e-6)==pytest.approx(run(), rel=1e-3)

def test_labels_that_are_no_tensor():
    "As those of detectors: a dict for each image."
    from hedgehog_nb.training.finetune import _FinetuneTrainer
    assert _FinetuneTrainer.weight(None, dict(pixel_values=torch.ones(2,3,4,4), labels=[{}, {}]))==2

@pytest.mark.parametrize('train', PHASES)
def test_token_ids_of_any_whole_type(train):
    want = train(made(), BLOCKS, 3, batch_size=4).losses
    for x in (BLOCKS.int(), BLOCKS.numpy(), dict(input_ids=BLOCKS.tolist())): assert train(made(), x, 3, batch_size=4).losses==want
    with pytest.raises(ValueError, match='token ids are whole numbers; given torch.float32'): train(made(), BLOCKS.float(), 3)
    if train is finetune:
        with pytest.raises(ValueError, match='a label for each token; given labels'): finetune(made(), [dict(input_ids=x, label=1) for x in BLOCKS], 3)

# --- what a run leaves behind, and what it goes on from

class Stop(Exception): pass

def stop_at(at):
    def stop(step, *_):
        if step==at: raise Stop
    return OnStep(stop)

class RandomRows(torch.utils.data.Dataset):
    def __len__(self): return len(BLOCKS)
    def __getitem__(self, i):
        x = BLOCKS[i].clone(); x[torch.randint(len(x), (3,))] = int(torch.randint(VOCAB, ()))
        return dict(input_ids=x)

class RandomStream(torch.utils.data.IterableDataset):
    def __iter__(self): yield from RandomRows()

def random_generator(): yield from (r for _ in range(9) for r in RandomRows())

def own_dice():
    g = torch.Generator().manual_seed(3); torch.rand(2, generator=g)
    return DataLoader(BLOCKS, batch_size=4, shuffle=True, generator=g)

@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('data', [RandomRows, RandomStream, random_generator, own_dice])
@pytest.mark.parametrize('at', [1,4])
def test_random_data_is_the_same_when_taken_up(tmp_path, train, data, at):
    kw = dict(batch_size=4, checkpoint=tmp_path/'a', save_steps=1, gradient_accumulation_steps=2)
    with pytest.raises(Stop): train(made(), data(), 7, callbacks=stop_at(at), **kw)
    assert train(made(), data(), 7, **kw).losses==train(made(), data(), 7, **{**kw, 'checkpoint':None}).losses

def test_random_masks_are_the_same_when_taken_up(tmp_path):
    tok = tokenizer(); pad = DataCollatorForLanguageModeling(tok, mlm_probability=.3)
    run = lambda **kw: finetune(linearize(bert(layers=1)), [dict(input_ids=x.tolist()) for x in BLOCKS], 6, batch_size=4, collator=pad, save_steps=1, **kw)
    with pytest.raises(Stop): run(checkpoint=tmp_path/'a', callbacks=[stop_at(3)])
    assert run(checkpoint=tmp_path/'a').losses==run().losses

@pytest.mark.parametrize('train', PHASES)
def test_a_run_that_was_stopped_early_is_over(tmp_path, train):
    kw = dict(batch_size=4, lr=1., eval_data=BLOCKS[:4], eval_steps=1, metric_for_best_model='loss', checkpoint=tmp_path/'a', save_steps=1)
    run = lambda **more: train(made(), BLOCKS, 12, callbacks=[transformers.EarlyStoppingCallback(2)], **{**kw, **more})
    whole = run(checkpoint=None)
    assert len(whole.losses)<12
    for at in range(1, len(whole.losses)):
        kw['checkpoint'] = tmp_path/f'{at}'
        with pytest.raises(Stop): train(made(), BLOCKS, 12, callbacks=[transformers.EarlyStoppingCallback(2), stop_at(at)], **kw)
        for _ in range(2): assert run().losses==whole.losses

@pytest.mark.parametrize('train', PHASES)
def test_another_setting_is_another_run(tmp_path, train):
    train(made(), BLOCKS, 3, checkpoint=tmp_path/'a')
    for kw in (dict(weight_decay=.5), dict(optim='sgd'), dict(lr_scheduler_type='constant'), dict(max_grad_norm=3.)):
        with pytest.raises(ValueError, match=f'keeps another run: {next(iter(kw))} is None there'): train(made(), BLOCKS, 3, checkpoint=tmp_path/'a', **kw)
    with pytest.raises(ValueError, match='is a folder'): train(made(), BLOCKS, 3, checkpoint=tmp_path)

@pytest.mark.parametrize('train,name,said',
    [(t, n, 'has no effect here') for t in PHASES for n in ('logging_strategy','load_best_model_at_end','dataloader_drop_last')]
    + [(distill, n, 'nothing in distillation') for n in ('gradient_checkpointing','label_smoothing_factor','torch_compile')])
def test_settings_without_effect_are_refused(train, name, said):
    with pytest.raises(ValueError, match=f'{name}.*{said}'): train(made(), BLOCKS, 3, **{name:1})
    with pytest.raises(TypeError, match='finetune alone has it'): distill(made(), BLOCKS, 3, warmup_ratio=.1)
    with pytest.raises(TypeError, match='finetune alone has it'): distill(made(), BLOCKS, 3, map_lr=.1)

def test_frozen_parameters():
    model = made().requires_grad_(False); before = {k:v.clone() for k,v in model.state_dict().items()}
    distill(model, BLOCKS, 2) # the maps learn all the same
    assert all(torch.equal(v, before[k])==('feature_map' not in k) for k,v in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match='all parameters are frozen'): finetune(model, BLOCKS, 2)
    model = made(); first,second = (m.feature_map for m in linear_layers(model).values())
    first.requires_grad_(False); before = [p.clone() for m in (first, second) for p in m.parameters()]
    distill(model, BLOCKS, 2) # one map alone
    n = len(list(first.parameters()))
    assert [torch.equal(a, b) for a,b in zip(before, [*first.parameters(), *second.parameters()])]==[True]*n+[False]*n

@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('ends', [True, False])
def test_the_model_is_left_as_it_was_but_for_its_weights(train, training, ends):
    model = made().train(training); vars_before = {k for k in vars(model)}
    kw = dict(gradient_checkpointing=True, neftune_noise_alpha=5., bf16=True) if train is finetune else dict(bf16=True)
    if ends: train(model, BLOCKS, 2, **kw)
    else:
        with pytest.raises(Stop): train(model, BLOCKS, 2, callbacks=[stop_at(1)], **kw)
    assert model.training==(training and not (ends and train is finetune)) and model.config.use_cache and not model.is_gradient_checkpointing
    assert vars(model).keys()==vars_before and not model.get_input_embeddings()._forward_hooks and model.config._attn_implementation=='hedgehog'
    if train is distill: assert all(p.grad is None for p in model.parameters())

# --- schedules and defaults

def rates(train, n, **kw):
    out = []
    class Note(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kw): out.append(logs['learning_rate']) if 'loss' in logs else None
    train(made(), BLOCKS, n, batch_size=4, callbacks=[Note()], **kw)
    return out

def test_distillation_decays_linearly_to_nothing():
    assert rates(distill, 10, lr=.5)==pytest.approx([.5*(1-i/10) for i in range(10)])

def test_finetuning_warms_up_and_decays_by_a_cosine():
    up = [.5*i/4 for i in range(4)]
    assert rates(finetune, 20, lr=.5, warmup_ratio=.2)==pytest.approx(up+[.25*(1+math.cos(math.pi*i/16)) for i in range(16)])
    assert rates(finetune, 4, lr=.5)==pytest.approx([.25*(1+math.cos(math.pi*i/4)) for i in range(4)]) # a twentieth of 4 steps is none

def test_the_schedule_reaches_the_weights():
    "A constant rate ends elsewhere."
    runs = [distill(m, BLOCKS, 6, batch_size=4, lr=.1, **kw) and m for kw in ({}, dict(lr_scheduler_type='constant')) for m in [made()]]
    assert any(not torch.equal(p, q) for p,q in zip(runs[0].parameters(), runs[1].parameters()))

@pytest.mark.parametrize('train,want', [(distill, dict(lr=None, batch_size=8, objective='weights', seed=0, gradient_accumulation_steps=1)),
    (finetune, dict(lr=None, batch_size=8, warmup_ratio=.05, seed=0, gradient_accumulation_steps=1, lora=None))])
def test_default_settings_are_the_papers(train, want):
    "Its appendix: AdamW, 1e-2 for the maps, 6e-4 for the whole, batches of 8, no weight decay."
    have = {n:p.default for n,p in inspect.signature(train).parameters.items()}
    assert {k:have[k] for k in want}==want
    seen = {}
    class Note(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kw): seen.update(args=args, opt=optimizer.optimizer)
    train(made(), BLOCKS, 2, callbacks=[Note()])
    g = seen['opt'].param_groups
    assert seen['args'].learning_rate==(1e-2 if train is distill else 6e-4)
    assert type(seen['opt']) is torch.optim.AdamW and all(x['weight_decay']==0 and x['betas']==(.9,.999) and x['eps']==1e-8 for x in g)
    assert seen['args'].max_grad_norm==(0 if train is distill else 1.) and seen['args'].lr_scheduler_type==('linear' if train is distill else 'cosine')

def test_both_take_the_same_settings_with_the_same_defaults():
    a,b = (inspect.signature(f).parameters for f in PHASES)
    assert not a.keys()-b.keys()
    assert b.keys()-a.keys()=={'warmup_ratio','lora','compute_metrics','teacher','temperature','teacher_weight','map_lr'}
    assert {k for k in a.keys() & b.keys() if a[k].default!=b[k].default}=={'objective'} and [*a][:4]==[*b][:4]==['model','data','steps','batch_size']

# --- adapters

def test_adapters_given_or_made_are_the_same_run():
    lora,x = dict(r=2, target_modules=['q_proj','v_proj']),corpus(2)
    a,b = made(),made()
    transformers.set_seed(0); tuned = add_lora(b, **lora)
    assert finetune(a, BLOCKS, 4, batch_size=4, lora=lora).losses==finetune(tuned, BLOCKS, 4, batch_size=4).losses
    with torch.no_grad(): torch.testing.assert_close(a(x).logits, merge_lora(tuned)(x).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match='has adapters already'): finetune(add_lora(made(), **lora), BLOCKS, 2, lora=lora)

# --- bars

@pytest.mark.parametrize('train', PHASES)
def test_a_bar_where_it_is_asked_for(train, capsys):
    train(made(), BLOCKS, 3, batch_size=4)
    assert capsys.readouterr().err=='' # no terminal
    train(made(), BLOCKS, 3, batch_size=4, progress=True)
    said = capsys.readouterr()
    assert '3/3' in said.err and 'loss=' in said.err and said.out==''
