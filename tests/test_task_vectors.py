"""Task vectors: bad input is refused at the door, and the identities hold for modules the notebook does not show."""
import copy

import pytest
import torch
from torch import nn

from ptbook.merge.task_vectors import (
    Composed, accuracy, apply, blocks_of, classify, cosine_matrix, dealt, first_of_each, grid_alpha, images, learn, learn_add, learn_few_shot, learn_negate,
    learn_unsupervised, network, placed, pseudo_label_loss, rank_blocks, sharpen, task_vector, trusted_labels, views)


def moved(model: nn.Module, seed: int) -> nn.Module:
    out, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in out.parameters(): p.add_(0.3 * torch.randn(p.shape, generator=g))
    return out


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()


@pytest.fixture
def vectors(base): return [task_vector(base, moved(base, s)) for s in (1, 2, 3)]


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, 1, 6, 6, generator=g), torch.randint(4, (40,), generator=g)


def same(a, b, x, atol=1e-5): return torch.allclose(a(x), b(x), atol=atol)


def test_integer_buffers_are_left_out_and_running_statistics_are_kept(base):
    names = set(blocks_of(base))
    assert "1.num_batches_tracked" not in names and {"1.running_mean", "1.running_var", "0.bias"} <= names
    tuned = moved(base, 1)
    tuned[1].running_mean += 1
    x = torch.randn(5, 1, 6, 6)
    assert same(apply(base, [task_vector(base, tuned)], 1.0), tuned, x)


def test_tied_weights_are_one_block():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert list(blocks_of(model)) == ["a.weight", "a.bias", "b.bias"]
    tuned = moved(model, 1)
    out = apply(model, [task_vector(model, tuned)], 1.0)
    assert out["b"].weight is out["a"].weight and torch.allclose(out["b"].weight, tuned["a"].weight)


def test_base_and_vectors_are_left_alone(base, vectors, data):
    before = copy.deepcopy(base.state_dict())
    trains = [p.requires_grad for p in base.parameters()]
    apply(base, vectors, 0.7)
    learn_few_shot(Composed(base, vectors), *data, 3)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), base.state_dict().values()))
    assert trains == [p.requires_grad for p in base.parameters()] and not any(t.requires_grad for v in vectors for t in v.values())


@pytest.mark.parametrize("options", [{}, {"blockwise": False}, {"partition": 1}, {"partition": 5}])
def test_composed_agrees_with_apply(base, vectors, data, options):
    m = Composed(base, vectors, **options)
    assert same(m, base, data[0], 0)
    g = torch.Generator().manual_seed(0)
    n, count = len(vectors), len(m.names)
    coef = torch.randn(n, generator=g) if options.get("blockwise") is False else torch.randn(n, count, generator=g)
    with torch.no_grad(): m.coef.copy_(coef if coef.shape == m.coef.shape else coef[..., None].expand_as(m.coef))
    wanted = apply(base, vectors, coef)
    assert same(m, wanted, data[0], 1e-4) and same(m.model(), wanted, data[0], 1e-4)
    fresh = copy.deepcopy(base)
    fresh.load_state_dict(m.merged())
    assert same(fresh, wanted, data[0], 1e-4)


def test_every_part_of_a_split_counts_in_every_block(base, vectors, data):
    m = Composed(base, vectors, partition=3)
    slope = torch.autograd.grad(classify(m, data), m.coef)[0]
    trained = [j for j, k in enumerate(m.names) if "running" not in k]
    assert (slope[:, trained] != 0).all() # biases and convolutions too
    sizes = [torch.bincount(getattr(m, f"part_{j}").flatten(), minlength=3) for j in trained]
    assert all(s.max() - s.min() <= 1 for s in sizes)


def test_chain_rule(base, vectors, data):
    slope = lambda **o: torch.autograd.grad(classify(m := Composed(base, vectors, **o), data), m.coef)[0]
    blockwise = slope()
    assert torch.allclose(blockwise.sum(1), slope(blockwise=False), atol=1e-5)
    assert (blockwise[:, [j for j, k in enumerate(blocks_of(base)) if "running" in k]] == 0).all() # statistics have no gradient
    assert torch.allclose(slope(partition=4).sum(2), blockwise, atol=1e-5)
    assert torch.equal(rank_blocks(m := Composed(base, vectors), lambda m: classify(m, data)), blockwise.abs()) and m.coef.grad is None


def test_bfloat16_vectors_and_state(base, vectors, data):
    half = [{k: t.bfloat16() for k, t in v.items()} for v in vectors]
    m = Composed(base, half)
    with torch.no_grad(): m.coef.fill_(0.5)
    assert m(data[0]).dtype == torch.float32 and same(m, apply(base, vectors, 0.5), data[0], 0.05)
    assert "coef" in m.state_dict() and not any(k.startswith("vector_") for k in m.state_dict())


def test_keep_holds_the_others_at_zero(base, vectors, data):
    keep = torch.zeros(3, len(blocks_of(base)), dtype=torch.bool)
    keep[1, 0] = True
    m = Composed(base, vectors, keep=keep)
    learn_few_shot(m, *data, 5)
    changed = [k for k, t in blocks_of(m.model()).items() if not torch.equal(t, blocks_of(base)[k])]
    assert changed == ["0.weight"] and (m.coef[~keep] == 0).all()


def test_once_computes_the_weights_once_and_is_over_after_an_error(base, vectors, data):
    m = Composed(base, vectors)
    with m.once():
        now = m.now
        m(data[0])
        assert m.now is now
    with pytest.raises(RuntimeError), m.once(): raise RuntimeError
    assert m.now is None


def test_learning_lowers_the_loss_and_keeps_the_best(base, vectors, data):
    m = Composed(base, vectors)
    learn_add(m, [[data], [data]], 30)
    assert classify(m, data) < classify(base, data)
    m = Composed(base, vectors)
    learn(m, classify, [data], 10, score=lambda model: -model.coef.abs().sum().item(), every=2) # the start is the best
    assert (m.coef == 0).all()
    small, large = (Composed(base, vectors) for _ in range(2))
    learn(small, classify, [data], 30, penalty=10.0), learn(large, classify, [data], 30)
    assert small.coef.abs().sum() < large.coef.abs().sum()


def test_negation_never_falls_below_its_floor(base, vectors, data):
    x, y = data
    control = x, base(x).argmax(1) # the base is always right about it
    score = lambda m: (accuracy(m, data), accuracy(m, control))
    m = Composed(base, vectors)
    learn_negate(m, [data], [control], score, 20, floor=0.9)
    forgotten, kept = score(m)
    assert kept >= 0.9 and forgotten <= score(base)[0]


def test_pseudo_labels(base, data):
    x, y = data
    none, all_ = torch.full((40,), -1), y
    assert pseudo_label_loss(1.0, 0.5)(base, (x, x, none)) == 0 # nobody is sure enough
    assert torch.allclose(pseudo_label_loss(1.0, 0.5)(base, (x, x, all_)), classify(base, (x, y)))
    p = base(x).softmax(1)
    assert torch.allclose(pseudo_label_loss(0.0, 1.0)(base, (x, x, none)), -(p * p.log()).sum(1).mean(), atol=1e-5) # the entropy
    labels = trusted_labels(p, 2)
    assert all((labels == c).sum() <= 2 for c in range(4)) and (labels[labels >= 0] == p.argmax(1)[labels >= 0]).all()


def test_sharpening_survives_zeros():
    p = torch.tensor([[1.0, 0.0], [0.6, 0.4]])
    assert torch.allclose(sharpen(p, 0.5).sum(1), torch.ones(2)) and sharpen(p, 0.5)[1, 0] > 0.6


def test_unsupervised_runs_on_any_module(base, vectors, data):
    for m in (Composed(base, vectors), copy.deepcopy(base)):
        run = learn_unsupervised(m, data[0], data[0] + 0.1, 0.0, 4, lr=1e-3)
        assert len(run.losses) == 4


def test_grid_takes_the_first_best(base, vectors):
    assert grid_alpha(base, vectors, lambda m: 1.0)[0] == 0.0
    first = lambda m: m[0].bias[0].item()
    alpha, scores = grid_alpha(base, vectors, first, [0.0, 0.5, 1.0])
    assert scores[[0.0, 0.5, 1.0].index(alpha)] == max(scores) and len(scores) == 3


def test_cosines(vectors):
    c = cosine_matrix([vectors[0], {k: -2 * t for k, t in vectors[0].items()}, vectors[1]])
    assert torch.allclose(c.diag(), torch.ones(3), atol=1e-5) and abs(c[0, 1] + 1) < 1e-5 and torch.allclose(c, c.T)


def test_dealt_keeps_the_numbers_and_the_frozen_blocks(vectors):
    frozen = [{**v, "4.bias": torch.zeros(4)} for v in vectors]
    coef = torch.arange(3.0 * len(frozen[0])).view(3, -1)
    out, column = dealt(coef, frozen, torch.Generator().manual_seed(0)), list(frozen[0]).index("4.bias")
    assert torch.equal(out.sort().values.flatten().sort().values, coef.flatten()) and torch.equal(out[:, column], coef[:, column]) and not torch.equal(out, coef)


def test_views_and_network():
    x = torch.rand(6, 8, 8)
    assert torch.allclose(views(x, placed(), 1, torch.Generator(), 0.0), x.flatten(1), atol=1e-5)
    assert torch.allclose(placed(0.3) @ placed(-0.3), torch.eye(2), atol=1e-6)
    quarter = views(x, placed(torch.pi / 2), 1, torch.Generator(), 0.0).view(6, 8, 8)
    assert torch.allclose(quarter, x.rot90(1, (1, 2)), atol=1e-4) or torch.allclose(quarter, x.rot90(-1, (1, 2)), atol=1e-4)
    assert len(blocks_of(network(64, 0))) == 10
    assert first_of_each(torch.tensor([1, 0, 1, 0, 1]), 2).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("call, error, words", [
    (lambda b, v: apply(b, [], 1.0), ValueError, "vectors: an empty list"),
    (lambda b, v: apply(b, v[0], 1.0), TypeError, "single dict"),
    (lambda b, v: apply(b, v, torch.ones(2)), ValueError, r"coef: shape \(2,\)"),
    (lambda b, v: apply(b, v, torch.ones(3, 2)), ValueError, "coef: shape"),
    (lambda b, v: apply(b, [{"x": torch.ones(1)}], 1.0), ValueError, r"vectors\[0\]: block"),
    (lambda b, v: apply(b, [{**v[0], "4.bias": torch.ones(5)}], 1.0), ValueError, "4.bias.*shape"),
    (lambda b, v: task_vector(b, nn.Linear(2, 2)), ValueError, "tuned: block"),
    (lambda b, v: Composed(b, v, partition=0), ValueError, "partition=0"),
    (lambda b, v: Composed(b, v, blockwise=False, partition=2), ValueError, "partition=2"),
    (lambda b, v: Composed(b, v, keep=torch.ones(2, 2)), ValueError, "keep: shape"),
    (lambda b, v: learn_add(Composed(b, v), []), ValueError, "tasks: got none"),
    (lambda b, v: learn_unsupervised(Composed(b, v), torch.ones(2, 1), torch.ones(3, 1)), ValueError, "strong: shape"),
    (lambda b, v: learn_unsupervised(Composed(b, v), torch.ones(2, 1), torch.ones(2, 1), 1.5), ValueError, "threshold: got 1.5"),
    (lambda b, v: sharpen(torch.ones(1, 2) / 2, 0.0), ValueError, "temperature: got 0.0"),
    (lambda b, v: images(None, 5000), ValueError, "n: got 5000"),
    (lambda b, v: cosine_matrix([]), ValueError, "empty list"),
    (lambda b, v: rank_blocks(Composed(b, v, blockwise=False), lambda m: 0), ValueError, r"wanted \(n, m\)"),
])
def test_bad_input_is_refused(base, vectors, call, error, words):
    with pytest.raises(error, match=words): call(base, vectors)
