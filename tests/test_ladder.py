"""The ladder: what must not change, what must not need a gradient, and models of every kind."""
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config,
                          T5ForConditionalGeneration)

from ptbook.adapt import ladder
from ptbook.adapt.adapters import adapt, attached, merge, parts, remove, trainable, use, using
from ptbook.adapt.ladder import Ladder, Laddered, fisher_importance, prune_linear, stacks_of, strongest
from ptbook.adapt.lora import LoRA
from ptbook.basics.memory import saved_bytes
from ptbook.basics.models import Transformer, logits_of, style
from ptbook.basics.train import fit
from ptbook.basics.weights import from_hf
from ptbook.basics.worlds import Task, classifier, glyph_vit

IDS, MASK = torch.randint(3, 50, (4, 10), generator=torch.Generator().manual_seed(0)), torch.ones(4, 10, dtype=torch.long)
MASK[:, 7:] = 0
SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def ours(name): return Transformer(style(name, vocab_size=50, hidden_size=32, layers=2, heads=4, max_length=32, **(dict(kv_heads=2) if name == "qwen2" else {})))
def bert(): return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=16))
def gpt2(): return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0))
def llama(): return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
def t5(): return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8, decoder_start_token_id=0))
def torchs(): return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False)


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, **{f"our {n}": lambda n=n: ours(n) for n in ("gpt2", "qwen2", "bert", "t5")}}
CAUSAL = ("gpt2", "llama", "our gpt2", "our qwen2")


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def ask(model, ids=IDS, name="", **kw):
    kw |= {"t5": dict(decoder_input_ids=IDS[:, :6]), "our t5": dict(decoder_ids=IDS[:, :6])}.get(name, {})
    return logits_of(model, ids, **kw)


def shaken(model, std=0.3):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parts(model)[""].parameters(): p.add_(std * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_at_first_and_nothing_stays_at_last(name):
    model = made(name)
    before, keys = ask(model, name=name), list(model.state_dict())
    laddered = adapt(model, Ladder(reduction=4))
    assert isinstance(laddered, Laddered) and torch.equal(ask(laddered, name=name), before)
    assert not torch.allclose(ask(shaken(laddered), name=name), before, atol=1e-4)
    with using(laddered, None): assert torch.equal(ask(laddered, name=name), before)
    back = remove(laddered).requires_grad_(False)
    assert back is model and torch.equal(ask(back, name=name), before) and list(back.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in back.modules())


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_side_learns_and_no_block_does(name):
    model, inside = shaken(adapt(made(name), Ladder(reduction=4))), []
    for m in {child for stack in model.places for b in stack for child in model.get_submodule(b).modules() if isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D"}:
        m.register_forward_hook(lambda m, a, out: inside.append(out.requires_grad or torch.is_grad_enabled()))
    ask(model, name=name).pow(2).mean().backward()
    assert inside and not any(inside) and torch.is_grad_enabled()
    for n, p in model.named_parameters(): assert (p.grad is not None) == n.startswith("adapters."), n


@pytest.mark.parametrize("name", ["bert", "t5", "our bert", "our t5"])
def test_padding_is_not_seen(name):
    model, other = shaken(adapt(made(name), Ladder(reduction=4))), IDS.clone()
    other[:, 7:] = 5
    masked = ask(model, name=name, attention_mask=MASK)
    kept = slice(0, 7) if name == "our bert" else slice(None)
    assert torch.allclose(masked[:, kept], ask(model, other, name, attention_mask=MASK)[:, kept], atol=1e-5)
    assert not torch.allclose(masked, ask(model, name=name), atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("mask", [None, torch.ones(4, 10, dtype=torch.long)])
def test_the_side_does_not_look_ahead(name, mask):
    model, other = shaken(adapt(made(name), Ladder(reduction=4))), IDS.clone()
    other[:, 7:] = 5
    a, b = ask(model, attention_mask=mask), ask(model, other, attention_mask=mask)
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-5) and not torch.allclose(a[:, 7:], b[:, 7:], atol=1e-4)


def test_a_decoder_does_not_look_ahead_and_reads_the_encoders_side():
    model, decoder = shaken(adapt(made("t5"), Ladder(reduction=4))), IDS[:, :6].clone()
    decoder[:, 4:] = 7
    a, b = (model(input_ids=IDS, decoder_input_ids=d).logits for d in (IDS[:, :6], decoder))
    assert torch.allclose(a[:, :4], b[:, :4], atol=1e-5)
    with torch.no_grad():
        before = model(input_ids=IDS, decoder_input_ids=decoder).logits
        parts(model)[""].rails[0].first.bias.add_(torch.randn(8))
        assert not torch.equal(model(input_ids=IDS, decoder_input_ids=decoder).logits, before)
    with pytest.raises(ValueError, match="encoder"): model.get_decoder()(input_ids=decoder[:2], encoder_hidden_states=torch.randn(2, 3, 32))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generating_without_a_cache(name):
    model, ids = shaken(adapt(made(name), Ladder(reduction=4))), IDS[:1, :5]
    written = model.generate(ids, max_new_tokens=4, use_cache=False, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(4): ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids)
    with pytest.raises(ValueError, match="use_cache"): model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.is_grad_enabled() and torch.equal(model(ids).logits, model(ids).logits)


def test_a_plain_torch_encoder_and_settings_that_json_can_hold():
    torch.manual_seed(0)
    x, model = torch.randn(3, 5, 32), torchs().eval()
    method = Ladder(reduction=4, layers=[1], merge_last=False)
    assert Ladder(**json.loads(json.dumps(method.settings()))) == method
    assert Ladder(importance={"w": torch.ones(1)}).settings() == Ladder().settings()
    before = model(x).detach()
    model = adapt(model, method)
    assert model(x).shape == before.shape and not torch.allclose(model(x), before) and len(parts(model)[""].rails[0].blocks) == 1
    again = adapt(copy.deepcopy(remove(copy.deepcopy(model))), method)
    parts(again)[""].load_state_dict(parts(model)[""].state_dict())
    assert torch.equal(again(x), model(x))


def test_copies_are_apart_and_devices_follow():
    model = adapt(made("bert"), Ladder(reduction=4), train_also=["classifier"])
    twin = copy.deepcopy(model)
    assert twin.base is not model.base and twin.watch.model is twin and twin._parameters is twin.base._parameters
    shaken(twin)
    assert not torch.allclose(ask(twin), ask(model), atol=1e-4)
    assert {p.dtype for p in model.double().parameters()} == {torch.float64} and ask(model).dtype == torch.float64
    assert model.config is model.base.config and model.num_labels == 2
    with pytest.raises(AttributeError, match="nowhere"): model.nowhere


def test_modes():
    torch.manual_seed(0)
    model = adapt(bert().train(), Ladder(reduction=4), train_also=["classifier"])
    assert model.training and parts(model)[""].training and not any(m.training for m in model.bert.modules())
    assert torch.equal(ask(model), ask(model)) # the backbone's dropout is off
    assert remove(model).training


def test_several_ladders_and_their_heads():
    model = adapt(made("bert"), Ladder(reduction=4), train_also=["classifier"], name="a")
    base = ask(model).detach()
    fit(model, lambda m, b: F.cross_entropy(logits_of(m, b), torch.tensor([0, 1, 0, 1])), [IDS], 10, lr=1e-2, weight_decay=0.0, progress=False)
    a = ask(model).detach()
    assert adapt(model, Ladder(reduction=8), train_also=["classifier"], name="b") is model and torch.equal(ask(model), base) # a new one begins from the base
    use(model, "a")
    assert torch.equal(ask(model), a) and sorted(attached(model)) == ["a", "b"] and set(attached(model)["a"].own) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="targets"): adapt(model, Ladder(reduction=4), ["bert.encoder.layer.0"], name="c")
    with pytest.raises(ValueError, match="LADDER"): merge(model, "a")


def test_bytes_do_not_grow_with_the_backbone():
    kept, x = [], torch.randn(4, 1, 16, 16)
    for layers in (3, 6, 12):
        vit = Transformer(style("vit", hidden_size=48, layers=layers, heads=4, image_size=16, patch_size=4, classes=10))
        model = adapt(vit, Ladder(reduction=4, layers=[0, 1, 2]))
        kept.append(saved_bytes(lambda: model(x).sum(), model, x).bytes)
    assert kept[0] == kept[1] == kept[2] > 0


def test_gradients_need_no_graph_of_the_backbone():
    model, x = shaken(adapt(glyph_vit(0), Ladder(reduction=4))), torch.randn(4, 1, 16, 16)
    model(x).pow(2).sum().backward()
    ways = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    use(model, None)
    states, hooks = [], [b.register_forward_hook(lambda m, a, out: states.append(out)) for b in model.encoder.blocks]
    with torch.no_grad(): first = model.embedding(x); model(x)
    for hook in hooks: hook.remove()
    side = parts(model)[""].requires_grad_(True)
    model.logits(model.encoder.norm(states[-1] + side.up(side.last(side.rails[0]([first, *states]))))[:, 0]).pow(2).sum().backward()
    assert all(torch.allclose(model.get_parameter(n).grad, g, atol=1e-5) for n, g in ways.items())


def test_pruning():
    w = torch.arange(12.0).view(3, 4)
    assert prune_linear(w) is w and torch.equal(prune_linear(w, torch.arange(3), torch.arange(4)), w)
    assert torch.equal(prune_linear(w, torch.tensor([2, 0]), torch.tensor([1])), torch.tensor([[9.0], [1.0]]))
    assert torch.equal(prune_linear(w[0], torch.tensor([3])), w[0, 3:]) and strongest(torch.tensor([3.0, 1.0, 5.0, 4.0]), 2).tolist() == [2, 3]


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bert", "t5"])
def test_a_reduction_of_one_copies_the_blocks(name):
    model = ours(name).eval()
    side = parts(adapt(copy.deepcopy(model), Ladder(reduction=1, init="prune")))[""]
    stacks = [s.blocks for s in (model.encoder, model.decoder) if s is not None]
    for rail, blocks in zip(side.rails, stacks):
        for mine, theirs in zip(rail.blocks, blocks):
            assert all(torch.equal(p, theirs.get_parameter(n)) for n, p in mine.named_parameters() if "cross" not in n)


def test_pruning_keeps_what_matters_and_drops_what_is_dead():
    vit = glyph_vit(0)
    alive = torch.arange(0, 48, 4) # of the residual stream
    with torch.no_grad():
        for block in vit.encoder.blocks:
            for n, p in block.named_parameters():
                dead = torch.ones(48, dtype=torch.bool)
                dead[alive] = False
                if n in ("attention.qkv.weight", "ffn.up.weight"): p[:, dead] = 0
                if n in ("attention.out.weight", "ffn.down.weight"): p[dead] = 0
    side = parts(adapt(vit, Ladder(reduction=4, init="prune")))[""]
    assert torch.equal(side.rails[0].first.weight, F.one_hot(alive, 48).float())
    assert torch.equal(side.rails[0].rungs[2](torch.ones(1, 48)), torch.ones(1, 12))
    hf = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8)).eval()
    twin = from_hf(hf)
    block = parts(adapt(hf, Ladder(reduction=2, init="prune")))[""].rails[1].blocks[0]
    assert set(block.ffn.up.weight.flatten().tolist()) <= set(twin.decoder.blocks[0].ffn.up.weight.flatten().tolist())


def test_fisher_importance():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 1, 3)
    model.bias.requires_grad_(False)
    found = fisher_importance(model, x, lambda m, b: m(b).sum())
    assert torch.allclose(found["weight"], (x[:, 0] ** 2).sum(0).expand(2, 3)) and torch.allclose(found["bias"], torch.full((2,), 5.0))
    assert not model.bias.requires_grad and model.weight.requires_grad and model.training
    with pytest.raises(ValueError, match="batches"): fisher_importance(model, [], lambda m, b: m(b).sum())
    vit = glyph_vit(0)
    scores = {n: torch.rand_like(p) for n, p in vit.named_parameters()}
    adapt(copy.deepcopy(vit), Ladder(reduction=4, init="prune", importance=scores))
    with pytest.raises(KeyError, match="encoder.blocks.0"): adapt(vit, Ladder(reduction=4, init="prune", importance={"head": torch.ones(1)}))


def test_what_is_refused():
    for settings, word in ((dict(reduction=0), "reduction"), (dict(gate_T=0.0), "gate_T"), (dict(init="fisher"), "init"), (dict(layers=[]), "layers"), (dict(layers=[1, 0]), "layers")):
        with pytest.raises(ValueError, match=word): Ladder(**settings)
    for settings, word in ((dict(reduction=5), "heads"), (dict(reduction=8), "heads"), (dict(reduction=4, layers=[3]), "from 0 to 2"), (dict(reduction=2, init="prune", heads=3), "prune")):
        with pytest.raises(ValueError, match=word): adapt(glyph_vit(0), Ladder(**settings))
    with pytest.raises(ValueError, match="no blocks"): adapt(glyph_vit(0), Ladder(reduction=4), ["nothing"])
    with pytest.raises(ValueError, match="no nn.ModuleList"): stacks_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lies in the backbone"): adapt(made("bert"), Ladder(reduction=4), train_also=["LayerNorm"])
    with pytest.raises(ValueError, match="below the blocks"): ask(adapt(made("bert"), Ladder(reduction=4), train_also=["word_embeddings"]))
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="adapters already"): adapt(adapt(glyph_vit(0), LoRA(r=2), name="x"), Ladder(reduction=4))
    with pytest.raises(ValueError): adapt(made("bert"), Ladder(reduction=4, init="prune")) # a model that `from_hf` does not read
    seconds = adapt(made("gpt2"), Ladder(reduction=4))
    use(seconds, ["default", None, "default", None])
    with pytest.raises(ValueError, match="rows"): ask(seconds)
    assert torch.is_grad_enabled() and trainable(seconds).trainable > 0


def test_an_error_inside_leaves_gradients_on():
    model = adapt(glyph_vit(0), Ladder(reduction=4))
    hook = model.encoder.blocks[1].ffn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): model(torch.randn(2, 1, 16, 16))
    assert torch.is_grad_enabled() and not model.watch.grad
    hook.remove()
    assert model(torch.randn(2, 1, 16, 16)).requires_grad


@pytest.mark.parametrize("kind", ladder.RATES)
def test_every_arm_starts_as_the_same_model_and_trains_a_head(kind):
    x, y = torch.randn(4, 1, 16, 16), torch.randint(10, (4,))
    base, model = classifier(glyph_vit(0), 10, 5), ladder.arm(kind, glyph_vit(0), 5)
    with torch.no_grad(): assert torch.equal(model(x), base(x))
    assert model.get_parameter("head").requires_grad and model.get_parameter("head_bias").requires_grad
    if kind != "LST, no rungs": return
    with torch.no_grad(): parts(model)[""].up.weight.normal_()
    ladder.classify(model, (x, y)).backward()
    rail = parts(model)[""].rails[0]
    assert all(p.grad.abs().max() == 0 for p in (rail.alpha, *rail.rungs.parameters())) and all(p.grad.abs().max() > 0 for p in (rail.first.weight, rail.blocks[0].ffn.up.weight))
    ladder.classify(live := ladder.arm("LST", glyph_vit(0), 5), (x, y)).backward()
    assert parts(live)[""].up.weight.grad.abs().max() > 0


def test_memory_in_the_experiment_is_what_the_claim_says():
    task = Task((torch.randn(40, 1, 16, 16), torch.randint(10, (40,))), (torch.randn(4, 1, 16, 16), torch.randint(10, (4,))))
    kept = {kind: ladder.measure(ladder.arm(kind, glyph_vit(0), 0), task)[0] for kind in ladder.RATES}
    assert kept["LST"] == kept["LST, no rungs"] < 0.5 * kept["LoRA"] and kept["LoRA"] > 0.95 * kept["full"] and kept["head"] < 0.1 * kept["LST"]
    assert kept["LoRA, top block"] <= kept["LST"]
