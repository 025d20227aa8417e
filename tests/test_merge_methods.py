"Merging tensors: limits, identities, equality with peft, and independence of blocks."
import math

import pytest
import torch
from peft.utils import merge_utils

from ptbook.merge.methods import BLOCK, METHODS, Recipe, consensus, cut, drop, linear, merge_state_dicts, merge_tensor, slerp, survivors, trim, wide


def states(k: int, seed: int = 0, dtype=torch.float32, shape=(40, 30)) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(shape, generator=g).to(dtype), "b": torch.randn(7, generator=g).to(dtype), "ids": torch.arange(5) + i} for i in range(k)]


def equal(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("method", METHODS)
def test_one_model_merged_alone_is_itself(method):
    base, one = states(2)
    options = {} if method == "linear" else dict(base=base, density=1.0)
    merged = merge_state_dicts([one], method, **options)
    assert all(torch.allclose(merged[n].float(), one[n].float(), atol=1e-6) for n in one) and torch.equal(merged["ids"], one["ids"])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear"])
def test_scale_zero_is_the_base_and_equal_versions_change_nothing(method):
    base, *tuned = states(4)
    merged = merge_state_dicts(tuned, method, base=base, scale=0.0)
    assert torch.equal(merged["w"], base["w"]) and torch.equal(merged["ids"], tuned[0]["ids"])
    assert torch.equal(merge_state_dicts([base] * 3, method, base=base)["w"], base["w"])


def test_the_order_of_models_does_not_matter_beyond_rounding():
    base, *tuned = states(5)
    for method in ("linear", "task_arithmetic", "ties"):
        one = merge_state_dicts(tuned, method, [1, 2, 3, 4], base=base)
        other = merge_state_dicts(tuned[::-1], method, [4, 3, 2, 1], base=base)
        assert (~torch.isclose(one["w"], other["w"], atol=1e-5)).float().mean() < 0.001, method


def test_weights_are_normalised_or_not():
    a, b = states(2)
    assert torch.allclose(merge_state_dicts([a, b], weights=[2, 6])["w"], 0.25 * a["w"] + 0.75 * b["w"], atol=1e-6)
    assert torch.allclose(merge_state_dicts([a, b], weights=[2, 6], normalize=False)["w"], 2 * a["w"] + 6 * b["w"], atol=1e-5)
    base = states(1, seed=1)[0]
    mean = merge_state_dicts([a, b], "task_arithmetic", [2, 6], base=base, normalize=True)["w"]
    assert torch.allclose(mean, 0.25 * a["w"] + 0.75 * b["w"], atol=1e-5)


def test_low_precision_is_rounded_once():
    tuned = states(8, dtype=torch.bfloat16)
    exact = sum(s["w"].double() for s in tuned) / 8
    assert torch.equal(merge_state_dicts(tuned)["w"], exact.float().bfloat16()) and merge_state_dicts(tuned)["w"].dtype == torch.bfloat16
    assert merge_tensor([torch.ones(3).double()] * 2, Recipe("linear", (1, 1))).dtype == torch.float64


@pytest.mark.parametrize("density", [0.1, 0.35, 0.9])
def test_ties_is_peft_s(density):
    base, *tuned = states(4, shape=(64, 50))
    changes = [t["w"] - base["w"] for t in tuned]
    ours = merge_state_dicts(tuned, "ties", base=base, density=density)["w"] - base["w"]
    assert torch.allclose(ours, merge_utils.ties(changes, torch.ones(3), density), atol=1e-5)


def test_task_arithmetic_is_peft_s():
    base, *tuned = states(4)
    ours = merge_state_dicts(tuned, "task_arithmetic", [0.5, 0.2, -1.0], base=base)["w"] - base["w"]
    assert torch.allclose(ours, merge_utils.task_arithmetic([t["w"] - base["w"] for t in tuned], torch.tensor([0.5, 0.2, -1.0])), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-9, 0.001, 0.2, 0.999, 1.0])
def test_cut_is_the_kth_largest(dtype, density):
    m = torch.randn(1003, dtype=dtype).abs()
    k = max(1, int(density * 1003))
    wanted = m.sort(descending=True).values[k - 1].item() if k < 1003 else 0.0
    assert cut(m.clone(), density) == wanted and (m >= wanted).sum() == k


def test_equal_magnitudes_stay_or_go_together():
    delta = torch.tensor([1.0, -1.0, 1.0, 0.5, -0.25, 0.0])
    assert trim(delta.clone(), cut(delta.abs(), 0.2)).tolist() == [1, -1, 1, 0, 0, 0]
    assert trim(torch.zeros(5), cut(torch.zeros(5), 0.5)).tolist() == [0] * 5
    perm = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(trim(delta[perm], cut(delta[perm].abs(), 0.2)), trim(delta.clone(), cut(delta.abs(), 0.2))[perm])


def test_the_vote_is_weighted_and_losers_do_not_count():
    def vote(weights): return consensus([torch.tensor([2.0]), torch.tensor([-3.0]), torch.tensor([0.0])], weights).item()
    assert vote([1, 1, 1]) == -3 and vote([2, 1, 9]) == 2 and vote([1, 0, 1]) == 2
    assert consensus([torch.tensor([2.0]), torch.tensor([4.0])], [1, 3], normalize=False).item() == 14


def test_dare_keeps_the_mean_and_its_coins():
    assert torch.equal(survivors(1000, 0.3, "k"), survivors(1000, 0.3, "k"))
    assert abs(survivors(BLOCK, 0.3, "k").float().mean() - 0.3) < 0.01
    dropped = drop(torch.ones(BLOCK), 0.1, "x")
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1.0).div(0.1).item()} and abs(dropped.mean() - 1) < 0.03
    base, *tuned = states(3)
    one, again, other = (merge_state_dicts(tuned, "dare", base=base, seed=s)["w"] for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    same = {"a": tuned[0]["w"], "b": tuned[0]["w"]}
    renamed = merge_state_dicts([same], "dare", base={n: base["w"] for n in same})
    assert not torch.equal(renamed["a"], renamed["b"])  # coins depend on the tensor's name


@pytest.mark.parametrize("method", METHODS)
def test_blocks_do_not_show(method):
    "The methods decide number by number: a block's result is that of the same numbers anywhere."
    g = torch.Generator().manual_seed(2)
    base, *tuned = (torch.randn(BLOCK, generator=g) for _ in range(4))
    recipe = Recipe(method, (0.2, 0.5, 0.3), density=1.0 if "dare" in method else 0.3)
    cuts = [0.5, 0.7, 0.9]
    whole = recipe.merge(base, tuned, "k", cuts)
    pieces = torch.cat([recipe.merge(base[i:i + 999], (t[i:i + 999] for t in tuned), "k", cuts) for i in range(0, BLOCK, 999)])
    assert torch.equal(whole, pieces)


def test_versions_are_looked_at_once_and_left_alone():
    base, *tuned = states(4)
    copies = [{n: t.clone() for n, t in s.items()} for s in (base, *tuned)]
    for method in METHODS: merge_state_dicts(tuned, method, base=base)
    assert all(equal(a, b) for a, b in zip(copies, (base, *tuned)))
    assert linear((t for t in [torch.ones(2), torch.ones(2)]), [1, 2]).tolist() == [3, 3] and wide(base["w"]).data_ptr() != base["w"].data_ptr()


@pytest.mark.parametrize("wrong, word", [
    (dict(method="mean"), "method='mean'"), (dict(weights=[1]), "weights"), (dict(weights=[]), "weights"), (dict(weights=[1, float("nan")]), "finite"),
    (dict(weights=[1, -1]), "zero"), (dict(method="ties"), "base"), (dict(method="ties", base="b", weights=[1, -1]), "vote"),
    (dict(method="ties", base="b", density=0), "density"), (dict(method="dare", base="b", density=1.5), "density"), (dict(scale=float("inf")), "finite")])
def test_wrong_requests_are_named(wrong, word):
    base, *tuned = states(3)
    if "base" in wrong: wrong = wrong | {"base": base}
    with pytest.raises(ValueError, match=word): merge_state_dicts(tuned, **wrong)


def test_what_does_not_fit_is_named():
    a, b = states(2)
    with pytest.raises(ValueError, match="'b'"): merge_state_dicts([a, {n: t for n, t in b.items() if n != "b"}])
    with pytest.raises(ValueError, match="'extra'"): merge_state_dicts([a, b | {"extra": a["w"]}])
    with pytest.raises(ValueError, match=r"states\[1\]"): merge_state_dicts([a, b | {"w": a["w"].T}])
    b["b"][3] = math.inf
    for method in METHODS:
        with pytest.raises(ValueError, match=r"'b' of states\[1\]"): merge_state_dicts([a, b], method, base=states(1, 3)[0])
    with pytest.raises(ValueError, match="opposite"): slerp(a["w"], -a["w"], 0.5)


def test_slerp_walks_the_arc():
    a, b = torch.eye(2)
    assert torch.allclose(slerp(a, b, 0.5), torch.full((2,), math.sqrt(0.5))) and torch.equal(slerp(a, 3 * a, 0.5), 2 * a)
