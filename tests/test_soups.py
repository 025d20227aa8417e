"""Soups: identities that hold for any model, and what is refused."""
import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from ptbook.basics.claims import as_scale
from ptbook.merge import soups
from ptbook.merge.soups import LearnedSoup, average, barrier, greedy_soup, interpolate, make_world, merged, path, plane, refresh_batchnorm, uniform_soup


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("make", [mlp, gpt2, bert])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_a_soup_of_copies_is_the_copy(make, k):
    model = make(0)
    assert same(uniform_soup([model] * k), model)
    assert same(greedy_soup([model] * k, lambda m: 0.0).model, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back_as_it_was(dtype):
    model = mlp(0).to(dtype)
    assert same(uniform_soup([model] * 3), model)
    state = average([mlp(s).to(dtype).state_dict() for s in range(3)])
    assert all(t.dtype == dtype for t in state.values())


def test_float64_has_nothing_wider_to_be_summed_in():
    state = average([mlp(0).double().state_dict()] * 3)
    assert all(t.dtype == torch.float64 and torch.allclose(t, mlp(0).double().state_dict()[n], rtol=1e-15) for n, t in state.items())


def test_order_does_not_matter_and_ends_are_ends():
    models = [mlp(s) for s in range(4)]
    assert same(uniform_soup(models), uniform_soup(models[::-1]))
    assert same(interpolate(models[0], models[1], 0.0), models[0]) and same(interpolate(models[0], models[1], 1.0), models[1])


def test_nothing_is_shared_with_the_ingredients():
    models = [mlp(s) for s in range(2)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    soup = uniform_soup(models)
    with torch.no_grad():
        for p in soup.parameters(): p.zero_()
    assert all(torch.equal(t, was[n]) for m, was in zip(models, before) for n, t in m.state_dict().items())
    only = greedy_soup(models[:1], lambda m: 1.0).model
    with torch.no_grad(): only[0].weight.zero_()
    assert torch.equal(models[0][0].weight, before[0]["0.weight"])


def test_tied_weights_stay_tied():
    soup = uniform_soup([gpt2(0), gpt2(1)])
    assert soup.lm_head.weight is soup.transformer.wte.weight


def test_integers_come_from_the_first():
    a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    b.num_batches_tracked += 5
    assert average([a.state_dict(), b.state_dict()])["num_batches_tracked"] == 0


@pytest.mark.parametrize("accept_ties", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_greedy_never_falls_below_the_best_single(seed, accept_ties):
    models, g = [mlp(s) for s in range(6)], torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 4, generator=g), torch.randint(3, (40,), generator=g)
    score = lambda m: (m(x).argmax(-1) == y).float().mean().item()
    result = greedy_soup(models, score, accept_ties)
    kept = [t.score for t in result.history if t.kept]
    assert kept == sorted(kept) and score(result.model) == kept[-1] >= max(map(score, models))
    assert [t.model for t in result.history if t.kept] == result.ingredients and len(result.history) == 6
    assert same(result.model, uniform_soup([models[i] for i in result.ingredients]))
    if not accept_ties: assert len(set(kept)) == len(kept)


def test_scores_are_asked_for_once_each():
    asked = []
    greedy_soup([mlp(s) for s in range(5)], lambda m: asked.append(m) or 0.0)
    assert len(asked) == 2 * 5 - 1


def test_what_is_refused():
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    for wrong, word in (([], "none"), ([a, {}], "0.weight"), ([a, nn.Linear(4, 8).state_dict()], "weight"), ([a, {**b, "0.bias": torch.zeros(9)}], "0.bias"), ([a, {**b, "0.bias": torch.full((8,), torch.nan)}], "0.bias")):
        with pytest.raises(ValueError, match=word): average(wrong)
    for weights in ([0.5, 0.6], [1.0]):
        with pytest.raises(ValueError, match="weights"): average([a, b], weights)
    with pytest.raises(ValueError, match="NaN"): greedy_soup([mlp(0)], lambda m: float("nan"))
    for f in (uniform_soup, LearnedSoup):
        with pytest.raises(ValueError, match="none"): f([])
    with pytest.raises(ValueError, match="none"): greedy_soup([], lambda m: 0.0)
    with pytest.raises(ValueError, match="line"): plane(mlp(0), mlp(1), interpolate(mlp(0), mlp(1), 0.3), lambda m: 0.0)
    with pytest.raises(ValueError, match="n:"): path(mlp(0), mlp(1), lambda m: 0.0, 1)


def test_the_plane_passes_through_its_models():
    models, seen = [mlp(s) for s in range(3)], {}
    flat = lambda m: nn.utils.parameters_to_vector(m.parameters())
    grid = plane(*models, lambda m: (flat(m) - flat(models[2])).norm().item(), n=5, margin=0.0)
    unit = (flat(models[1]) - flat(models[0])).norm().item()
    for y, row in zip(grid.y, grid.scores):
        for x, found in zip(grid.x, row): assert found == pytest.approx(((x - grid.corners[2, 0]) ** 2 + (y - grid.corners[2, 1]) ** 2) ** 0.5 * unit, rel=1e-3, abs=1e-3)


def test_a_barrier_is_what_lies_below_the_line():
    dip = lambda m: -abs(m[0].weight.mean().item())
    a, b = mlp(0), mlp(0)
    with torch.no_grad(): a[0].weight.fill_(-1.0), b[0].weight.fill_(1.0)
    assert barrier(a, b, dip) == 0.0 and barrier(a, b, lambda m: -dip(m)) == pytest.approx(1.0)


def test_a_learned_soup_of_a_hugging_face_model():
    models = [bert(s) for s in range(3)]
    learned, ids = LearnedSoup(models), torch.randint(31, (2, 8))
    expected = uniform_soup(models).eval()(ids).logits
    assert torch.allclose(learned.eval()(ids), expected, atol=1e-5)
    learned(ids).sum().backward()
    assert all(p.grad is None for m in models for p in m.parameters()) and sum(p.numel() for p in learned.parameters()) == 1 + 3 * len(learned.names)
    assert torch.allclose(learned.soup().eval()(ids).logits, expected, atol=1e-5)


def test_batchnorm_forgets_what_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    net[1].running_mean += 100
    x = torch.randn(64, 4)
    refresh_batchnorm(net, [x])
    assert torch.allclose(net[1].running_mean, net[0](x).mean(0), atol=1e-5) and not net[1].training and net[1].momentum == 0.1
    assert refresh_batchnorm(plain := mlp(0), [x]) is plain


def test_no_image_is_in_two_parts():
    images, labels, (a, b, c) = soups.pictures(None, 3)
    assert len(images) == len(labels) == 1797 and a + b + c < len(images) and images.min() == 0 and 0.9 < images.max() <= 1.1
    world = make_world(3)
    assert len(world.test[0]) == 8 * (1797 - a - b - c) and torch.equal(world.test[1], world.shifted[1])


def test_arms_at_the_smallest_scale():
    arms = soups.model_soups(1000, as_scale("tiny"))
    assert all(0 <= v <= 1 for n, v in arms.items() if "gain" not in n) and "greedy soup, shifted" in arms
