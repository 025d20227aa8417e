"Adapters on any model: what goes on comes off, what is folded stays true, and what cannot be is refused."
import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from ptbook.adapt.adapters import Adapted, Method, adapt, attached, drop, find_linears, fits, merge, merged, parts, remove, trainable, use, using
from ptbook.adapt.lora import LoRA, Scattered
from ptbook.basics.models import Transformer, logits_of, style
from ptbook.basics.stacked import fit_stacked
from ptbook.basics.train import fit

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99)
MODELS = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3)), ["query", "dense"]),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), ["q_proj", "down_proj"]),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32)), ["c_attn", "c_proj"]), # Conv1D
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)), ["q", "wo"]),
    "ours": (lambda: Transformer(style("qwen2", vocab_size=99, hidden_size=32, layers=2, heads=4, kv_heads=2)), ["qkv", "up"])}
IDS = torch.randint(99, (3, 10), generator=torch.Generator().manual_seed(0))


def says(model: nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if isinstance(model, hf.T5ForConditionalGeneration) else {}
    with torch.no_grad(): return logits_of(model, IDS, **more)


def stir(model: nn.Module, name: str = "default", std: float = 0.1, seed: int = 0):
    "Give an adapter something to say."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in parts(model, name).values():
            for p in part.parameters(): p.copy_(std * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("family", MODELS)
def test_what_goes_on_changes_nothing_and_comes_off_without_a_trace(family):
    torch.manual_seed(0)
    make, targets = MODELS[family]
    model = make().eval()
    state, before = copy.deepcopy(model.state_dict()), says(model)
    adapt(model, LoRA(r=2), targets)
    assert torch.equal(says(model), before)
    stir(model)
    assert (says(model) - before).abs().max() > 1e-3
    with using(model, None): assert torch.equal(says(model), before)
    remove(model)
    assert list(model.state_dict()) == list(state) and all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert all(p.requires_grad for p in model.parameters()) and not attached(model)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", [LoRA(r=3, alpha=7), Scattered(1)], ids=["lora", "scattered"])
def test_merged_says_what_unmerged_says(family, method):
    torch.manual_seed(0)
    make, targets = MODELS[family]
    model = adapt(make().eval(), method, targets)
    stir(model)
    after, kept = says(model), copy.deepcopy(model.state_dict())
    with merged(model): assert (says(model) - after).abs().max() < 1e-4
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())
    plain = merge(model)
    assert type(plain) is type(make()) and not any(isinstance(m, Adapted) for m in plain.modules()) and (says(plain) - after).abs().max() < 1e-4


def test_only_the_adapter_and_what_is_named_learn():
    torch.manual_seed(0)
    model = adapt(MODELS["bert"][0](), LoRA(r=2), ["query"], train_also=["classifier"])
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {n for n in learns if ".adapters.default." in n or n.startswith("classifier.")} and "classifier.bias" in learns
    assert trainable(model).trainable == 2 * 2 * (32 + 32) + 32 * 3 + 3
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in learns}
    fit(model, lambda m, b: F.cross_entropy(m(b[0]).logits, b[1]), [(IDS, torch.tensor([0, 1, 2]))], 3, lr=1e-2, progress=False)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    assert any(p.adapters["default"].B.abs().max() > 0 for p in model.modules() if isinstance(p, Adapted))


def test_each_adapter_has_a_head_of_its_own():
    torch.manual_seed(0)
    model = MODELS["bert"][0]().eval()
    before = says(model)
    adapt(model, LoRA(r=2), ["query"], train_also=["classifier"], name="a")
    with torch.no_grad(): model.classifier.bias.add_(1)
    adapt(model, LoRA(r=1), ["value"], train_also=["classifier"], name="b")
    assert torch.equal(says(model), before) # b begins at the base's head, not at a's
    with using(model, "a"): assert (says(model) - before - 1).abs().max() < 1e-5
    assert torch.equal(says(model), before)
    with pytest.raises(ValueError, match="head"): use(model, ["a", "b", None])
    drop(model, "b")
    assert list(attached(model)) == ["a"] and torch.equal(says(model), before)
    assert (says(merge(model, "a")) - before - 1).abs().max() < 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_every_row_its_own_adapter(family):
    torch.manual_seed(0)
    make, targets = MODELS[family]
    model = make().eval()
    for seed, name in enumerate("ab"):
        adapt(model, LoRA(r=2), targets, name=name)
        stir(model, name, 0.2, seed)
    alone = {}
    for name in ("a", "b", None):
        with using(model, name): alone[name] = says(model)
    with using(model, ["b", None, "a"]): mixed = says(model)
    assert all((mixed[i] - alone[name][i]).abs().max() < 1e-4 for i, name in enumerate(["b", None, "a"]))
    with using(model, ["a"]), pytest.raises(ValueError, match="rows"): says(model)


def test_half_precision_base_and_autocast():
    torch.manual_seed(0)
    model = MODELS["llama"][0]().to(torch.bfloat16).eval()
    adapt(model, LoRA(r=2), ["q_proj"])
    stir(model)
    assert all(p.dtype == torch.float32 for part in parts(model).values() for p in part.parameters()) and says(model).dtype == torch.bfloat16
    full = adapt(MODELS["llama"][0]().eval(), LoRA(r=2), ["q_proj"])
    stir(full)
    exact = says(full)
    with torch.autocast("cpu", torch.bfloat16): rough = says(full)
    assert 0 < (rough - exact).abs().max() < 0.1


def test_a_small_change_is_not_lost_in_half_precision():
    torch.manual_seed(0)
    layer, x = adapt(nn.Sequential(nn.Linear(32, 32)), LoRA(r=2), ["0"]).to(torch.bfloat16), torch.randn(200, 32, dtype=torch.bfloat16)
    with torch.no_grad(): parts(layer)["0"].B.fill_(1e-5)
    layer[0].base.weight.data.fill_(1.0) # beside which the change is below bfloat16's resolution
    before = layer(x).detach()
    with using(layer, None): bare = layer(x).detach()
    part = parts(layer)["0"]
    assert torch.equal(layer[0].base.weight + part.delta(), layer[0].base.weight) and part.branch(x).abs().max() > 0
    y = layer(x)
    y.float().sum().backward()
    assert part.B.grad.abs().max() > 0 and (part.add(torch.zeros_like(y), x) != 0).any() and torch.equal(before, part.add(bare.clone(), x))


def test_dropout_is_of_the_branch_and_of_training_only():
    torch.manual_seed(0)
    layer = Adapted(nn.Linear(16, 16))
    layer.adapters["a"], layer.active = LoRA(r=4, alpha=4, dropout=0.5).adapter(layer.base, ""), "a"
    with torch.no_grad(): layer.adapters["a"].B.normal_()
    x = torch.randn(400, 16)
    branch = layer(x) - layer.base(x)
    mean = torch.stack([layer(x) - layer.base(x) for _ in range(300)]).mean(0)
    assert not torch.equal(layer(x) - layer.base(x), branch)
    expected = F.linear(x, layer.adapters["a"].delta())
    assert (mean - expected).abs().mean() < 0.15 * expected.abs().mean()
    layer.eval()
    assert (layer(x) - layer.base(x) - expected).abs().max() < 1e-4


def test_code_that_takes_the_weight_itself_gets_its_change():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    adapt(attention, LoRA(r=2), ["out_proj"])
    stir(attention, std=0.5)
    says = attention(x, x, x)[0]
    with using(attention, None): assert (attention(x, x, x)[0] - says).abs().max() > 1e-2
    with pytest.raises(ValueError, match="rows"): use(attention, ["default", None])
    assert (merge(attention)(x, x, x)[0] - says).abs().max() < 1e-5


def test_a_copy_is_a_model_of_its_own():
    torch.manual_seed(0)
    model = adapt(MODELS["ours"][0]().eval(), LoRA(r=2), ["qkv"], train_also=["norm"])
    twin = copy.deepcopy(model)
    stir(twin)
    before = says(model)
    assert (says(twin) - before).abs().max() > 1e-3
    remove(twin)
    assert torch.equal(says(model), before) and list(attached(model)) == ["default"]


def test_many_are_trained_side_by_side():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    models = [adapt(copy.deepcopy(base), LoRA(r=2), ["0"]) for _ in range(3)]
    x, y = torch.randn(3, 20, 6), torch.randint(3, (3, 20))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    together = fit_stacked(models, loss, [(x, y)] * 5, 5, lr=1e-2)
    for model, trained, a, b in zip(models, together, x, y):
        alone = fit(copy.deepcopy(model), loss, [(a, b)], 5, lr=1e-2, schedule="constant", warmup=0, weight_decay=0.0, progress=False).model
        assert all((p - q).abs().max() < 1e-5 for p, q in zip(alone.parameters(), trained.parameters()))


def test_names():
    assert fits("a.b.query", ["query"]) and fits("a.b.query", ["b.query"]) and fits("a.b.query", r"a\..*") and fits("x", None)
    assert not fits("a.b.subquery", ["query"]) and not fits("a.b.query", "query")
    model = MODELS["llama"][0]()
    everything = find_linears(model, None)
    assert "lm_head" not in everything and len(everything) == 2 * 7
    tied = MODELS["gpt2"][0]()
    with pytest.raises(ValueError, match="lm_head.*shares.*wte"): find_linears(tied, ["lm_head"])


@pytest.mark.parametrize("call, told", [
    (lambda m: adapt(m, LoRA(r=2), ["querry"]), ["querry", "query"]),
    (lambda m: adapt(m, LoRA(r=2), "query"), ["query"]), # a string is a pattern for the whole name
    (lambda m: adapt(m, LoRA(r=33), ["query"]), ["r=33", "32"]),
    (lambda m: adapt(m, LoRA(r=0)), ["r=0"]),
    (lambda m: adapt(m, LoRA(dropout=1.0)), ["dropout=1.0"]),
    (lambda m: adapt(m, LoRA(init="zeros")), ["zeros", "kaiming"]),
    (lambda m: adapt(m, "lora", ["query"]), ["'lora'", "LoRA(r=8)"]),
    (lambda m: adapt(m, LoRA(), ["query"], name="a.b"), ["a.b"]),
    (lambda m: adapt(m, LoRA(), ["query"], train_also=["clasifier"]), ["clasifier", "classifier"]),
    (lambda m: adapt(nn.ReLU(), LoRA()), ["no linear layer"]),
    (lambda m: merge(m), ["no adapter"]),
])
def test_bad_requests_are_refused_at_the_door(call, told):
    torch.manual_seed(0)
    model = MODELS["bert"][0]()
    state = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError) as error: call(model)
    assert all(t in str(error.value) for t in told), error.value
    assert list(dict(model.named_parameters())) == list(state) and all(p.requires_grad for p in model.parameters()) and not attached(model)


def test_a_name_is_taken_once_and_must_be_known():
    model = adapt(MODELS["bert"][0](), LoRA(r=1), ["query"])
    with pytest.raises(ValueError, match="default"): adapt(model, LoRA(r=1), ["value"])
    for call in (use, drop, merge, parts):
        with pytest.raises(KeyError, match="french.*default"): call(model, "french")
    with pytest.raises(ValueError, match="has an adapter"): adapt(model, LoRA(r=1), ["value"], train_also=["query"], name="b")
    heads = adapt(MODELS["bert"][0](), LoRA(r=1), ["query"], train_also=["classifier"])
    with pytest.raises(ValueError, match="of its own"): adapt(heads, LoRA(r=1), ["classifier"], name="b")


def test_what_runs_beside_the_model_is_not_folded():
    class Aside(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone, self.adapters, self.active = backbone, nn.ModuleDict(), None
        def forward(self, x): return self.backbone(x)

    @dataclass(frozen=True)
    class Besides(Method):
        kind: ClassVar[str] = "BESIDES"
        def attach(self, model, targets, train_also, name):
            from ptbook.adapt.adapters import Attached
            around = Aside(model)
            around.adapters[name] = nn.Linear(1, 1)
            attached(around)[name] = Attached(self, [""], list(train_also))
            return around
        def detach(self, model): return model.backbone

    base = nn.Linear(2, 2)
    model = adapt(base, Besides(), train_also=["weight"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"backbone.weight", "adapters.default.weight", "adapters.default.bias"}
    with pytest.raises(ValueError, match="BESIDES runs beside"): merge(model)
    assert remove(model) is base
