"The Transformer: choices that change what they should, generation with and without a cache, bad input, derivatives."
import copy

import pytest
import torch
import torch.nn.functional as F

from ptbook.basics.models import (CHOICES, STYLES, SigmoidGELU, Transformer, TransformerConfig, gelu_tanh, generate, logits_of, pick, relative_buckets,
                                  rope_table, rotate, style, visible)

torch.set_num_threads(1)
DECODERS = {"gpt2": {}, "llama": dict(kv_heads=2), "qwen2": dict(kv_heads=1), "t5": dict(init_std=1.0)}

def make(name, seed=0, **sizes):
    torch.manual_seed(seed)
    return Transformer(style(name, **{**dict(hidden_size=32, heads=4, layers=2, vocab_size=50, max_length=64, init_std=0.3), **sizes})).eval()

def ids_like(batch, length, seed=0): return torch.randint(5, 50, (batch, length), generator=torch.Generator().manual_seed(seed))

# --- generation ---

@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 5)])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_generation_equals_uncached(name, temperature, top_k, padded):
    model, ids = make(name, **DECODERS[name]), ids_like(3, 7)
    mask = (torch.arange(7)[None] >= torch.tensor([0, 2, 5])[:, None]).long() if padded else None
    run = lambda cache: generate(model, ids, 40, temperature=temperature, top_k=top_k, generator=torch.Generator().manual_seed(3), use_cache=cache,
                                 attention_mask=mask)
    a, b = run(True), run(False)
    assert torch.equal(a, b)
    assert a.shape == (3, 41 if name == "t5" else 47)
    assert a.unique().numel() > 3, "a constant sequence tells nothing"

@pytest.mark.parametrize("name", DECODERS)
def test_cache_in_chunks_gives_the_same_logits(name):
    from ptbook.basics.models import Slot
    model, ids = make(name, **DECODERS[name]), ids_like(2, 12)
    c = model.config
    cache = [Slot(model.embedding.tokens.weight, 2, c.kv_heads, 12, c.head_dim) for _ in model.decoder.blocks]
    cuts = [slice(0, 3), slice(3, 4), slice(4, 9), slice(9, 12)]
    with torch.no_grad():
        if name == "t5":
            source = ids_like(2, 6, seed=4)
            whole = model(source, decoder_ids=ids)
            parts = [model(source, decoder_ids=ids[:, cut], cache=cache) for cut in cuts]
        else:
            whole = model(ids)
            parts = [model(ids[:, cut], cache=cache) for cut in cuts]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)

@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_left_padding_does_not_change_what_is_generated(name):
    model, ids = make(name), ids_like(2, 9)
    alone = generate(model, ids[1:, 4:], 12, temperature=0)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    assert torch.equal(generate(model, ids, 12, temperature=0, attention_mask=mask)[1:, 9:], alone[:, 5:])

def test_after_eos_only_eos_and_an_early_stop():
    model, ids, calls = make("gpt2"), ids_like(4, 3), []
    model.register_forward_hook(lambda *a: calls.append(1))
    free = generate(model, ids, 30, generator=torch.Generator().manual_seed(0))
    eos = int(free[0, 5])
    calls.clear()
    out = generate(model, ids, 30, eos=eos, generator=torch.Generator().manual_seed(0))
    for row, other in zip(out[:, 3:].tolist(), free[:, 3:].tolist()):
        if eos in row:
            end = row.index(eos)
            assert row[end:] == [eos] * (30 - end) and row[:end] == other[:end]
    calls.clear()
    same = ids[:1].repeat(4, 1)
    first = int(generate(model, same, 1, temperature=0)[0, -1])
    calls.clear()
    assert (generate(model, same, 30, temperature=0, eos=first)[:, 3:] == first).all() and len(calls) == 1

def test_generate_takes_any_module_and_restores_its_mode():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make("llama")
        def forward(self, ids): return {"logits": 1}, self.inner(ids)
    class Output:
        def __init__(self, logits): self.logits = logits
    class Wrapped(Other):
        def forward(self, ids, attention_mask=None): return Output(self.inner(ids, attention_mask))
    other, ids = Wrapped().train(), ids_like(2, 5)
    out = generate(other, ids, 6, temperature=0)
    assert other.training and torch.equal(out, generate(other.inner, ids, 6, temperature=0))
    assert logits_of(other, ids).shape == (2, 5, 50)
    assert torch.equal(generate(other, ids, 0), ids)

def test_generated_ids_can_be_trained_on():
    model = make("qwen2").train()
    out = generate(model, ids_like(2, 5), 8)
    model(out).sum().backward()

def test_top_k_draws_only_the_k_likeliest():
    logits = torch.randn(500, 20)
    drawn = pick(logits, 2.0, 3, torch.Generator().manual_seed(0))
    assert (logits.gather(1, drawn) >= logits.topk(3).values[:, -1:]).all()
    assert pick(logits, 2.0, 99).shape == (500, 1)

def test_sampling_has_the_models_probabilities():
    p = torch.tensor([0.1, 0.2, 0.7])
    drawn = pick(p.log().expand(20_000, 3), 1.0, None, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.flatten().bincount() / 20_000, p, atol=0.015)

# --- the network ---

@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_the_future_does_not_reach_the_past(name):
    model, ids = make(name), ids_like(1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 50
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.allclose(before[:, 6:], after[:, 6:])

@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "roberta", "t5"])
def test_padding_content_does_not_matter_and_no_nan(name, side):
    model, ids, real = make(name), ids_like(3, 8), torch.ones(3, 8, dtype=torch.bool)
    cut = slice(0, 5) if side == "left" else slice(3, 8)
    real[1, cut] = False
    if name == "roberta": ids[1, cut] = 1
    other = ids.where(real, ids if name == "roberta" else (ids + 7) % 45 + 5)
    extra = dict(decoder_ids=ids_like(3, 4)) if name == "t5" else {}
    a, b = (model(x, real.long(), **extra) for x in (ids, other))
    assert a.isfinite().all()
    rows = slice(None) if name == "t5" else real
    assert torch.allclose(a[rows], b[rows], atol=1e-5)
    loss = a.square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

def test_grouped_heads_with_one_group_each_is_multi_head_attention():
    grouped, full = make("llama", kv_heads=2), make("llama")
    state = full.state_dict()
    with torch.no_grad(): # repeat each key/value head
        for name, p in grouped.state_dict().items():
            if name.endswith("qkv.weight"):
                q, k, v = p.view(-1, 8, 32).split((4, 2, 2))
                p = torch.cat((q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))).flatten(0, 1)
            state[name].copy_(p)
    ids = ids_like(2, 9)
    assert torch.allclose(full(ids), grouped(ids), atol=1e-4)

def test_rope_scores_depend_on_the_offset_only():
    table, q, k = rope_table(60, 16), torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    score = lambda i, j: (rotate(q, table[:, i:i + 1, None]) * rotate(k, table[:, j:j + 1, None])).sum()
    assert torch.allclose(score(3, 1), score(41, 39), atol=1e-4) and not torch.allclose(score(3, 1), score(3, 2), atol=1e-2)

def test_rope_grows_beyond_max_length():
    short, long = make("llama", max_length=8), make("llama", max_length=64)
    ids = ids_like(1, 40)
    assert torch.equal(short(ids), long(ids)) and torch.equal(generate(short, ids, 30, temperature=0), generate(long, ids, 30, temperature=0))

@pytest.mark.parametrize("both", [True, False])
def test_relative_buckets_equal_transformers(both):
    from transformers.models.t5.modeling_t5 import T5Attention
    offset = torch.arange(-300, 301)
    for buckets, far in ((32, 128), (8, 20), (16, 64)):
        want = T5Attention._relative_position_bucket(offset, both, buckets, far)
        assert torch.equal(relative_buckets(buckets, far, both)[offset.clamp(-far, far) + far], want)

def test_visible():
    see = visible(torch.tensor([[0, 0, 1, 1]]), 4, 4)[0, 0].long().tolist()
    assert see == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert visible(None, 2, 4)[0, 0].long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]

def test_tied_head_has_no_tensor_of_its_own_and_untied_has():
    tied, untied = make("gpt2"), make("gpt2", tied=False)
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"head"}
    assert all(torch.equal(a, b) for a, b in zip(copy.deepcopy(tied).state_dict().values(), tied.state_dict().values()))

@pytest.mark.parametrize("width", [32, 64, 256])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "t5"])
def test_first_loss_is_close_to_uniform(name, width):
    torch.manual_seed(0)
    model, ids = Transformer(style(name, hidden_size=width)), torch.randint(260, (8, 33))
    logits = model(ids, decoder_ids=ids[:, :-1]) if name == "t5" else model(ids[:, :-1])
    assert abs(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item() - torch.tensor(260.0).log()) < 0.35

def test_every_choice_builds_and_learns():
    for norm in CHOICES["norm"]:
        for position in CHOICES["position"]:
            for activation in CHOICES["activation"]:
                model = Transformer(TransformerConfig(norm=norm, position=position, activation=activation, gate=norm == "rms", vocab_size=9,
                                                      hidden_size=16, dropout=0.1, attention_dropout=0.1))
                model(torch.randint(9, (2, 6))).square().mean().backward()
                assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

def test_vit():
    model = Transformer(style("vit", hidden_size=32, channels=3, image_size=16, patch_size=4, classes=5))
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5) and model.hidden(torch.randn(2, 3, 16, 16)).shape == (2, 17, 32)

# --- GELU ---

def test_gelu_is_torchs_with_first_and_second_derivatives():
    x = torch.linspace(-6, 6, 400, dtype=torch.float64, requires_grad=True)
    theirs = lambda t: F.gelu(t, approximate="tanh")
    assert torch.allclose(gelu_tanh(x), theirs(x), atol=1e-12)
    assert torch.allclose(torch.autograd.grad(gelu_tanh(x).sum(), x)[0], torch.autograd.grad(theirs(x).sum(), x)[0], atol=1e-10)
    assert torch.autograd.gradcheck(gelu_tanh, x[::20]) and torch.autograd.gradgradcheck(gelu_tanh, x[::20])

def test_gelu_under_vmap_and_func_grad():
    x = torch.randn(3, 5, requires_grad=True)
    f = lambda row: SigmoidGELU.apply(row)[0].square().sum()
    got = torch.func.vmap(torch.func.grad(f))(x.detach())
    assert torch.allclose(got, torch.autograd.grad(F.gelu(x, approximate="tanh").square().sum(), x)[0], atol=1e-5)

def test_stacked_models_train_as_one_by_one():
    models = [make("gpt2", seed=s).train() for s in range(3)]
    ids = torch.stack([ids_like(2, 8, s) for s in range(3)])
    params, buffers = torch.func.stack_module_state(models)
    loss = lambda p, b, i: torch.func.functional_call(models[0], (p, b), (i,)).logsumexp(-1).mean()
    grads = torch.func.vmap(torch.func.grad(loss))(params, buffers, ids)
    for s, model in enumerate(models):
        model(ids[s]).logsumexp(-1).mean().backward()
        assert all(torch.allclose(grads[n][s], p.grad, atol=1e-5) for n, p in model.named_parameters())

# --- bad input ---

@pytest.mark.parametrize("build, words", [
    (lambda: style("gtp2"), ["gtp2", "gpt2", "roberta"]),
    (lambda: style("gpt2", norm="batch"), ["norm='batch'", "layer", "rms"]),
    (lambda: style("gpt2", position="sine"), ["position='sine'", "rope"]),
    (lambda: style("gpt2", activation="tanh"), ["activation='tanh'", "gelu"]),
    (lambda: style("gpt2", hidden_size=30, heads=4), ["heads=4", "hidden_size=30"]),
    (lambda: style("llama", heads=4, kv_heads=3), ["kv_heads=3", "heads=4"]),
    (lambda: style("llama", hidden_size=12, heads=4), ["head_dim=3", "even"]),
    (lambda: style("llama", head_dim=7), ["head_dim=7", "even"]),
    (lambda: style("vit", image_size=30, patch_size=7), ["patch_size=7", "image_size=30"]),
    (lambda: style("gpt2", heads=0), ["heads"]),
    (lambda: make("gpt2")(torch.tensor([[1, 99]])), ["99", "vocab_size=50"]),
    (lambda: make("gpt2")(torch.tensor([[1, -1]])), ["-1", "vocab_size=50"]),
    (lambda: make("gpt2")(ids_like(1, 65)), ["65", "max_length=64"]),
    (lambda: make("gpt2")(ids_like(2, 6), torch.ones(2, 5)), ["attention_mask", "(2, 5)", "(2, 6)"]),
    (lambda: make("bert")(ids_like(2, 6), torch.ones(6)), ["attention_mask", "(6,)", "(2, 6)"]),
    (lambda: make("t5")(ids_like(2, 6)), ["decoder_ids"]),
    (lambda: make("vit")(torch.zeros(1, 3, 28, 28)), ["images", "(1, 3, 28, 28)"]),
    (lambda: generate(make("gpt2"), ids_like(1, 4), 61), ["65 tokens", "max_length=64"]),
    (lambda: generate(make("gpt2"), ids_like(1, 4), -1), ["n=-1"]),
    (lambda: generate(make("gpt2"), ids_like(1, 4), 1, temperature=-0.1), ["temperature=-0.1"]),
    (lambda: generate(make("gpt2"), ids_like(1, 4), 1, top_k=0), ["top_k=0"]),
    (lambda: generate(make("bert"), ids_like(1, 4), 1), ["encoder"]),
    (lambda: generate(make("gpt2"), ids_like(2, 4), 1, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])), ["left"]),
])
def test_bad_input_is_named(build, words):
    with pytest.raises(ValueError) as error: build()
    assert all(word in str(error.value) for word in words), str(error.value)

def test_unknown_field_is_a_type_error():
    with pytest.raises(TypeError, match="n_heads"): style("gpt2", n_heads=2)

def test_styles_are_complete(): assert set(STYLES) == {"gpt2", "llama", "qwen2", "bert", "roberta", "t5", "vit"}
