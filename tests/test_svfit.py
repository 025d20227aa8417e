"""SVFit: identities of the decomposition, what an adapter does to any model, and what is refused."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from ptbook.adapt import svfit as chapter
from ptbook.adapt.adapters import Adapted, adapt, find_linears, linears, matrix, merge, merged, parts, remove, trainable, use
from ptbook.adapt.svfit import Directions, SVFit, SVFitAdapter, beside, directions, random_directions, rank_for_energy, reach, spectrum
from ptbook.basics.claims import as_scale
from ptbook.basics.models import logits_of
from ptbook.basics.train import fit
from ptbook.basics.worlds import glyph_vit


def drawn(*shape: int, seed: int = 0) -> torch.Tensor: return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


MODELS = {bert: (["query", "value", "dense"], {}), gpt2: (["c_attn", "c_fc"], {"c_attn": 3})}
IDS = torch.arange(24).view(3, 8)


def says(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(): return logits_of(model, IDS)


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for i, part in enumerate(parts(model).values()): part.change.copy_(by * drawn(*part.change.shape, seed=i))
    return model


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("make", [directions, random_directions])
def test_directions_are_orthonormal(shape, make):
    for r in range(1, min(shape) + 1):
        d = make(drawn(*shape), r)
        eye = torch.eye(r, dtype=torch.float64)
        assert torch.allclose(d.U.T @ d.U, eye, atol=1e-12) and torch.allclose(d.V @ d.V.T, eye, atol=1e-12)
        assert torch.allclose(d.sigma, torch.diagonal(d.U.T @ drawn(*shape).double() @ d.V.T), atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_the_top_part_is_the_best_of_its_rank(shape):
    W = drawn(*shape).double()
    s = torch.linalg.svdvals(W)
    assert torch.allclose(spectrum(W), s) and torch.allclose(directions(W).product(), W, atol=1e-12)
    for r in range(1, min(shape)):
        top = directions(W, r).product()
        assert (top * (W - top)).sum().abs() < 1e-10 and torch.isclose((W - top).square().sum(), s[r:].square().sum())
        assert (W - top).norm() < (W - random_directions(W, r).product()).norm()


@pytest.mark.parametrize("power", [1, 2, 0.5])
def test_the_rank_is_the_smallest_that_holds_the_share(power):
    s = spectrum(drawn(12, 8))
    share = s.pow(power).cumsum(0) / s.pow(power).sum()
    for energy in (0.01, 0.5, 0.9, 0.99, *share.tolist()[:-1], 1.0):
        r = rank_for_energy(s, energy, power)
        assert share[r - 1] >= energy - 1e-9 and (r == 1 or share[r - 2] < energy)
    assert rank_for_energy(s, 1.0, power) == 8 and rank_for_energy(torch.tensor([3.0, 0.0, 0.0]), 1.0, power) == 1 and rank_for_energy(torch.zeros(3), 0.5) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_singular_values(dtype):
    layer, x = nn.Linear(7, 5).to(dtype), drawn(11, 7).to(dtype)
    part = SVFitAdapter(layer, directions(layer.weight, 3))
    with torch.no_grad(): part.change.copy_(drawn(3))
    loss = lambda y: (y ** 3).sum()
    loss(part.add(layer(x), x)).backward()
    W = (layer.weight + part.delta()).detach().requires_grad_()
    loss(F.linear(x, W, layer.bias)).backward()
    assert torch.allclose(part.change.grad, torch.stack([part.U[:, i] @ W.grad @ part.V[i] for i in range(3)]), rtol=1e-3)
    assert torch.allclose(part.sigma, torch.diagonal(part.U.T @ W.detach() @ part.V.T), atol=1e-5) # sigma is what the layer now has along them
    assert torch.allclose(part.branch(x), x @ part.delta().T, atol=1e-5)


def test_signs_of_a_pair_change_nothing():
    layer, x, signs = nn.Linear(7, 5), drawn(11, 7), torch.tensor([1.0, -1, 1, -1, -1])
    d = directions(layer.weight)
    one, other = SVFitAdapter(layer, d), SVFitAdapter(layer, Directions(d.U * signs, d.V * signs[:, None], d.sigma))
    with torch.no_grad(): one.change.copy_(drawn(5)), other.change.copy_(drawn(5))
    assert torch.allclose(one.branch(x), other.branch(x), atol=1e-6) and torch.allclose(one.delta(), other.delta(), atol=1e-6)


@pytest.mark.parametrize("r", [1, 3, 5])
def test_it_starts_where_pissa_starts(r):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    W = model[0].weight.detach().double().clone()
    layer = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, init_lora_weights="pissa", target_modules=["0"])).base_model.model[0]
    top = directions(W, r).product()
    assert torch.allclose((layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double(), top, atol=1e-5)
    assert torch.allclose(layer.base_layer.weight.double(), W - top, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("settings", [{}, dict(r=3), dict(energy=0.8), dict(basis="random"), dict(basis="random", energy=0.8, power=1)])
def test_a_model_is_what_it_was_until_it_learns_and_can_be_folded(make, settings):
    (targets, fused), base = MODELS[make], make()
    model = adapt(copy.deepcopy(base), SVFit(fused=fused, **settings), targets)
    assert torch.equal(says(model), says(base))
    sizes = {place: len(part.sigma) for place, part in parts(model).items()}
    assert trainable(model).trainable == sum(sizes.values()) and not any(n.endswith((".U", ".V", "sigma0")) for n in model.state_dict())
    known = moved(model) and says(model)
    assert (known - says(base)).abs().max() > 1e-3
    with merged(model): assert torch.allclose(says(model), known, atol=1e-4)
    plain = merge(copy.deepcopy(model))
    assert torch.allclose(says(plain), known, atol=1e-4) and not any(isinstance(m, Adapted) for m in plain.modules())
    assert torch.equal(says(remove(model)), says(base))


@pytest.mark.parametrize("basis", ["weight", "random"])
def test_what_learnt_is_all_there_is_to_keep(basis):
    method = SVFit(basis=basis, seed=3, fused={"c_attn": 3})
    model = moved(adapt(gpt2(), method, ["c_attn", "c_fc"]))
    kept = {n: p for n, p in model.state_dict().items() if n.endswith("change")}
    again = adapt(gpt2(), type(method)(**method.settings()), ["c_attn", "c_fc"])
    assert set(again.load_state_dict(kept, strict=False).missing_keys).isdisjoint(kept)
    assert torch.equal(says(again), says(model))


def test_full_rank_and_as_many_numbers_as_the_smaller_side():
    model = adapt(bert(), SVFit(), ["query", "intermediate.dense"])
    assert [len(p.sigma) for p in parts(model).values()] == [16] * 4 # of 16 x 16 and 24 x 16
    one = next(iter(parts(model).values()))
    assert torch.allclose(one.U * one.sigma @ one.V, matrix(linears(model)[find_linears(model, ["query"])[0]]), atol=1e-6)


def test_only_singular_values_learn_and_they_may_pass_zero():
    model, labels = adapt(bert(), SVFit(), ["query", "value", "dense"], train_also=["classifier"]), torch.tensor([0, 1, 1])
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad} | {n: b.clone() for n, b in model.named_buffers()}
    run = fit(model, lambda m, b: F.cross_entropy(logits_of(m, b[0]), b[1]), [(IDS, labels)], 30, lr=0.1, weight_decay=0.0, progress=False)
    assert run.losses[-1] < 0.5 * run.losses[0] and any((p.sigma < 0).any() for p in parts(model).values())
    assert all(torch.equal(t, frozen[n]) for n, t in (*model.named_parameters(), *model.named_buffers()) if n in frozen)
    U = next(iter(parts(model).values())).U
    assert torch.allclose(U.T @ U, torch.eye(16), atol=1e-5)


def test_matrices_in_one_layer_are_taken_apart():
    W = drawn(12, 4).double()
    d = beside([directions(part) for part in W.split([4, 2, 6])])
    assert d.U.shape == (12, 4 + 2 + 4) and torch.allclose(d.product(), W, atol=1e-12)
    pairs = [u[:, None] * v for u, v in zip(d.U.T, d.V)]
    assert all(abs((p * q).sum()) < 1e-12 for p, q in itertools.combinations(pairs, 2)) # so that each value is a direction of its own
    layer = nn.Linear(4, 12)
    assert len(SVFit(fused={"qkv": [4, 2, 6]}).adapter(layer, "a.qkv").sigma) == 10 and len(SVFit(fused={"qkv": 3}).adapter(layer, "a.out").sigma) == 4


def test_random_directions_differ_by_layer_and_seed_and_can_be_drawn_again():
    layer, make = nn.Linear(6, 5), lambda name, seed: SVFit(basis="random", seed=seed).adapter(layer, name).U
    assert torch.equal(make("a", 0), make("a", 0)) and not torch.equal(make("a", 0), make("b", 0)) and not torch.equal(make("a", 0), make("a", 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_double_and_learns_in_single(dtype):
    model = adapt(nn.Sequential(nn.Linear(8, 8)).to(dtype), SVFit(), ["0"])
    part, x = parts(model)["0"], drawn(3, 8).to(dtype)
    assert part.U.dtype == part.change.dtype == torch.float32 and torch.allclose(part.U.T @ part.U, torch.eye(8), atol=1e-5)
    with torch.no_grad(): part.change.fill_(0.5)
    assert model(x).dtype == dtype and (model(x) - model[0].base(x)).abs().max() > 0.1
    with merged(model): assert matrix(model[0].base).dtype == dtype


def test_autocast():
    layer, x = nn.Linear(8, 8), drawn(5, 8)
    model = moved(adapt(nn.Sequential(layer), SVFit(), ["0"]), 1.0)
    with torch.no_grad():
        high, base = model(x), layer(x)
        with torch.autocast("cpu", torch.bfloat16): low = model(x)
    assert low.dtype == torch.bfloat16 and (low - high).abs().max() < 0.1 < 0.5 < (high - base).abs().max()


def test_several_on_one_base():
    model = adapt(adapt(bert(), SVFit(), ["query"], name="a"), SVFit(r=2), ["query"], name="b")
    with torch.no_grad():
        for name in "ab": [part.change.fill_(1.0) for part in parts(model, name).values()]
    alone = {}
    for name in ("a", "b", None):
        use(model, name)
        alone[name] = says(model)
    use(model, ["a", None, "b"])
    assert all(torch.allclose(says(model)[i], alone[name][i], atol=1e-5) for i, name in enumerate(["a", None, "b"]))


def test_reach():
    W = drawn(9, 5)
    d = directions(W)
    assert reach(d.product(), d) == pytest.approx(1) and reach(-3 * W, d) == pytest.approx(1)
    assert reach(torch.outer(d.U[:, 0], d.V[1]), d) < 1e-12 # a pair that is none
    assert reach(drawn(9, 5, seed=1), d) <= 1


def test_what_is_refused():
    layer = nn.Linear(6, 4)
    for wrong, word in ((dict(r=2, energy=0.5), "one of the two"), (dict(r=0), "r=0"), (dict(r=1.5), "r=1.5"), (dict(energy=0.0), "energy=0.0"), (dict(energy=1.1), "energy=1.1"), (dict(energy=float("nan")), "energy=nan"),
                        (dict(power=0), "power=0"), (dict(basis="weights"), "weights")):
        with pytest.raises(ValueError, match=word): SVFit(**wrong)
    with pytest.raises(ValueError, match="r=5: wanted 1 to 4"): SVFit(r=5).adapter(layer, "layer")
    for layout in (3, 0, [4, 4], [5, -1]):
        with pytest.raises(ValueError, match="fused.*4 rows of 'layer'"): SVFit(fused={"layer": layout}).adapter(layer, "layer")
    for weight, word in ((torch.zeros(3), "shape"), (torch.zeros(2, 2, 2), "shape"), (torch.ones(2, 2, dtype=torch.int8), "int8"), (torch.tensor([[1.0, torch.nan]]), "1 of its numbers")):
        for f in (spectrum, directions, random_directions):
            with pytest.raises(ValueError, match=word): f(weight)
    for values in (torch.zeros(0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="singular values"): rank_for_energy(values, 0.5)
    with pytest.raises(ValueError, match="zero"): reach(torch.zeros(4, 6), directions(layer.weight))
    with pytest.raises(ValueError, match="querry"): adapt(bert(), SVFit(), ["querry"])


def test_arms_learn_what_they_say():
    base = glyph_vit(0)
    sizes = {name: chapter.learns(chapter.ready(base, arm, 0)) for name, arm in chapter.arms(0).items()}
    block = (3 + 1 + 1 + 1) * 48
    assert sizes["SVFit"] == sizes["random bases"] == 3 * block and sizes["head"] == 0
    assert sizes["LoRA r=4"] == 4 * sizes["LoRA r=1"] == 3 * 4 * (48 + 144) and sizes["LoRA r=1, all layers"] == 3 * (48 + 144 + 48 + 48 + 2 * (48 + 192))
    assert sizes["full fine-tuning"] == sum(p.numel() for n, p in base.named_parameters() if n not in chapter.HEAD)


def test_every_arm_begins_with_the_same_outputs():
    base, images = glyph_vit(0), drawn(2, 1, 16, 16)
    with torch.no_grad(): outputs = [chapter.ready(base, arm, 1)(images) for arm in chapter.arms(7).values()]
    assert all(torch.equal(o, outputs[0]) for o in outputs)


def test_the_experiment_at_the_smallest_scale(tmp_path, monkeypatch):
    monkeypatch.setenv("PTBOOK_CACHE", str(tmp_path))
    got = chapter.svfit(1000, as_scale("tiny"))
    assert got["SVFit parameters"] < got["LoRA r=4 parameters"] and all(0 <= v <= 1 for n, v in got.items() if "parameters" not in n)
