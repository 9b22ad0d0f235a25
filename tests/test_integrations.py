"Converted models in the tools of `integrations.py`: each case again on the small models, where its package is installed; INTEGRATIONS=all: the slow ones too."
import copy, json, os
import pytest, torch
from helpers import integrations
from helpers.integrations import CASES, SLOW, SUBJECTS, Subject, examine, installed
from hedgehog_nb.models.attention import linear_layers

PAIRS = [(k, n) for k in CASES for n,(kind,_) in SUBJECTS.items() if kind==k[2]]

@pytest.fixture(scope='module')
def subject(tmp_path_factory):
    made,work = {},tmp_path_factory.mktemp('subjects')
    return lambda name: made.setdefault(name, None) or made.__setitem__(name, Subject(name, *SUBJECTS[name], work)) or made[name]

@pytest.fixture(scope='module')
def stored(root): return {(r['tool'], r['what'], r['model']):r for r in json.loads((root/'results'/'integrations.json').read_text())['rows']}

def test_the_results_are_of_these_cases(stored):
    assert {k for k in stored if k[2] in SUBJECTS}=={(*k[:2], n) for k,n in PAIRS} and {k[2] for k in stored}-set(SUBJECTS)=={'smollm2-135m','minilm-l6-v2'}
    assert all(r['value'] or r['note'] for r in stored.values()) and sum(not r['value'] for r in stored.values())==3

@pytest.mark.parametrize('key,name', PAIRS, ids=[f'{k[0]}-{k[1]}-{n}' for k,n in PAIRS])
def test_tool(key, name, subject, stored):
    if not installed(CASES[key][1]): pytest.skip(f"{CASES[key][1]} is not installed")
    if key in SLOW and os.environ.get('INTEGRATIONS')!='all': pytest.skip("takes minutes: INTEGRATIONS=all, as make test-all says")
    row,was = examine(key, subject(name)),stored[(*key[:2], name)]
    assert (row['value'], bool(row['note']))==(was['value'], bool(was['note']))
    if row['version']==was['version']: assert row['note']==was['note']

# --- the cases can fail

def worse(s):
    "The subject with maps that differ in each load, as if a folder did not keep them."
    class Worse(type(s)):
        def model(self, **kw):
            m = super().model(**kw)
            with torch.no_grad():
                for l in linear_layers(m).values(): l.feature_map.w_q += torch.randn_like(l.feature_map.w_q)
            return m
    other = copy.copy(s); other.__class__ = Worse
    return other

# these load the model twice and compare
TWICE = [k for k in CASES if k[:2] in (('pipeline','text-generation'), ('accelerate','cpu_offload'), ('accelerate','disk_offload'),
    ('gguf','from a .gguf file'), ('peft','LoRA: train, save, AutoPeft, merge'), ('peft','rsLoRA, PiSSA'))]

@pytest.mark.parametrize('key', TWICE, ids=lambda k: f'{k[0]}-{k[1]}')
def test_a_lost_map_is_noticed(key, subject):
    with pytest.raises(AssertionError): examine(key, worse(subject('stories260k')))

def test_a_lost_state_is_noticed(subject, monkeypatch):
    def forget(m, args, kwargs):
        if kwargs.get('recurrent_layer') is not None: kwargs['recurrent_layer'].state = None
    load = integrations.load_linearized
    def loaded(*args, **kw):
        m = load(*args, **kw)
        for l in linear_layers(m).values(): l.register_forward_pre_hook(forget, with_kwargs=True)
        return m
    monkeypatch.setattr(integrations, 'load_linearized', loaded); monkeypatch.setattr(torch, 'compile', lambda f, **kw: f)
    with pytest.raises(AssertionError): examine(('torch','compile: generate','decoder'), subject('stories260k'))
