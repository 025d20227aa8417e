import copy
import itertools
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import TensorDataset

from ptbook.basics.claims import SCALES
from ptbook.curate import skills
from ptbook.curate.skills import (
    Interleaved, Mixer, Schedule, SkillIt, Staircase, curriculum, domain_texts, graph_from_losses, graph_runs, learn_graph, lego, mixture_counts, mixture_indices, only,
    proportional, side_by_side, skill_losses, solve_lego, staircase, train_with_sampler, uniform)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("n", [1, 64, 1001])
def test_counts_sum_to_n_and_are_off_by_less_than_one(k, n):
    for _ in range(20):
        p = RNG.dirichlet(np.ones(k))
        counts = mixture_counts(p, n)
        assert counts.sum() == n and (abs(counts - n * p) < 1).all() and (counts >= 0).all()
    assert mixture_counts([0.5, 0.25, 0.25], 4).tolist() == [2, 1, 1] and mixture_counts([0.1] * 10, 10).tolist() == [1] * 10


def test_a_pool_is_read_to_its_end_before_it_is_read_again():
    pools, taken, seen = [range(3), range(7), range(11)], np.zeros(3, int), [[], [], []]
    for t in range(12):
        p = RNG.dirichlet(np.ones(3))
        chosen, rows = mixture_indices(p, 10, pools, 5, taken)
        for i, row in zip(chosen, rows): seen[i].append(row)
        assert np.array_equal(np.bincount(chosen, minlength=3), mixture_counts(p, 10))
        taken += mixture_counts(p, 10)
        for i, pool in enumerate(pools): assert np.ptp(np.bincount(seen[i], minlength=len(pool))) <= 1
    a, b = (mixture_indices([0.2, 0.3, 0.5], 50, pools, seed) for seed in (1, 2))
    assert not np.array_equal(a[0], b[0]) and np.array_equal(a[0], mixture_indices([0.2, 0.3, 0.5], 50, pools, 1)[0])
    assert mixture_indices([1.0, 0.0], 4, [range(9), []], 0)[0].tolist() == [0] * 4 # an empty pool that is not asked for


@pytest.mark.parametrize("targets, reduce", [(None, "sum"), (None, "mean"), ([1], "mean"), ([0, 2], "sum")])
def test_the_formula(targets, reduce):
    A, prior, losses = RNG.random((4, 3)), RNG.dirichlet(np.ones(4)), RNG.random((6, 3))
    policy, columns = SkillIt(A, 0.7, 3, prior, reduce, targets), targets or [0, 1, 2]
    for t in range(7):
        rows = losses[max(0, t - 3):t] if t else np.ones((1, 3))
        L = rows.sum(0) / (len(rows) if reduce == "mean" else 1)
        w = np.array([prior[i] * np.exp(0.7 * sum(A[i, j] * L[j] for j in columns)) for i in range(4)])
        assert np.allclose(policy.p, w / w.sum())
        if t < 6: policy.update(losses[t])


def test_columns_of_a_target_are_a_graph_of_their_own():
    A, losses = RNG.random((4, 4)), RNG.random((3, 4))
    whole, part = SkillIt(A, targets=[2]), SkillIt(A[:, [2]])
    for row in losses: assert np.allclose(whole.update(row), part.update(row[[2]]))


def test_the_past_can_be_asked_for_and_corrected():
    policy, losses = SkillIt(np.eye(3), 1.0, 2), RNG.random((5, 3))
    for row in losses: policy.update(row)
    other = SkillIt(np.eye(3), 1.0, 2)
    for t in range(5):
        assert np.array_equal(other.p, policy.at(t))
        other.update(losses[t])
    policy.update(losses[4], t=1) # the second round again: what came after is forgotten
    assert len(policy.history) == 2 and np.array_equal(policy.history[1], losses[4])


def test_save_and_resume(tmp_path):
    policy = SkillIt(RNG.random((3, 2)), 0.3, 2, [0.2, 0.3, 0.5], "mean", [1])
    for row in RNG.random((4, 2)): policy.update(row)
    policy.save(tmp_path / "p.json")
    again = SkillIt(policy.A, 0.3, 2, [0.2, 0.3, 0.5], "mean", [1]).resume(tmp_path / "p.json")
    assert np.array_equal(again.p, policy.p) and np.array_equal(again.history, policy.history) # to the last bit
    for other in (SkillIt(policy.A, 0.4, 2, [0.2, 0.3, 0.5], "mean", [1]), uniform(3)):
        with pytest.raises(ValueError, match="another|wanted those of"): other.resume(tmp_path / "p.json")
    fixed = curriculum([1, 0], 4)
    fixed.update([1.0, 2.0])
    fixed.save(tmp_path / "c.json")
    assert curriculum([1, 0], 4).resume(tmp_path / "c.json").p.tolist() == fixed.p.tolist() == [0, 1]


def test_fixed_policies():
    assert proportional([1, 3]).p.tolist() == [0.25, 0.75] and only([0, 2], 4).p.tolist() == [0.5, 0, 0.5, 0]
    shares = sum(curriculum([2, 0, 1], 9).at(t) for t in range(9))
    assert shares.tolist() == [3, 3, 3] and curriculum([2, 0, 1], 9).at(0).tolist() == [0, 0, 1]


@pytest.mark.parametrize("pool", [torch.arange(12.0)[:, None], TensorDataset(torch.arange(12.0)[:, None], torch.zeros(12)), list(np.arange(12.0)[:, None]), Dataset.from_dict({"x": [[float(i)] for i in range(12)]}).with_format("torch")])
def test_kinds_of_pools(pool):
    mixer = Mixer([pool, pool], uniform(2), batch=6, batches_per_round=2)
    values = lambda b: (b["x"] if isinstance(b, dict) else b[0] if isinstance(b, list) else b).flatten().tolist()
    seen = sum((values(mixer[i]) for i in range(4)), [])
    assert sorted(seen) == sorted(2 * list(map(float, range(12)))) # two rounds of twelve records: each pool once
    assert values(mixer[1]) == values(mixer[1]) and mixer.fingerprint == Mixer([pool, pool], uniform(2), 6, 2).fingerprint
    assert mixer.fingerprint != Mixer([pool, pool], uniform(2), 6, 2, seed=1).fingerprint != Mixer([pool, pool], only([0], 2), 6, 2, seed=1).fingerprint


def squared(model, rows): return (model(rows[:, :1]) - rows[:, 1:]).pow(2).mean()


def test_losses_of_skills_do_not_depend_on_the_batch_nor_change_the_model():
    torch.manual_seed(0)
    model, pools = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1)), [torch.randn(7, 2), torch.randn(30, 2)]
    one, two = (skill_losses(model, squared, pools, batch) for batch in (4, 64))
    assert np.allclose(one, two) and model.training and np.allclose(one, [squared(model.eval(), p).item() for p in pools], atol=1e-6)
    with pytest.raises(ValueError, match=r"held_out\[1\]"): skill_losses(model, squared, [pools[0], []])


def test_training_in_rounds_hears_and_mixes(tmp_path):
    torch.manual_seed(0)
    pools = [torch.cat([x := torch.randn(40, 1), a * x], 1) for a in (0.0, 5.0)]
    policy, start = SkillIt(np.eye(2), 0.1, 1), nn.Linear(1, 1)
    run = train_with_sampler(copy.deepcopy(start), squared, pools, pools, policy, 3, 4, batch=8, lr=0.1, folder=tmp_path, accumulate=2, progress=False)
    heard = [[row["skill 0"], row["skill 1"]] for row in run.history if "skill 0" in row]
    assert np.allclose(heard, policy.history) and len(heard) == 3 and [row["step"] for row in run.history if "skill 0" in row] == [4, 8, 12]
    assert policy.at(1)[1] > 0.6 and json.loads((tmp_path / "policy.json").read_text())["history"] == [row.tolist() for row in policy.history]
    again = train_with_sampler(copy.deepcopy(start), squared, pools, pools, SkillIt(np.eye(2), 0.1, 1), 3, 4, batch=8, lr=0.1, folder=tmp_path, accumulate=2, progress=False)
    assert again.history == run.history
    with pytest.raises(ValueError, match="wanted those of"):
        train_with_sampler(start, squared, pools, pools, SkillIt(np.eye(2), 0.2, 1), 3, 4, batch=8, folder=tmp_path, accumulate=2, progress=False)


def test_streams_go_on_where_they_were():
    streams = [[f"{i}{n}" for n in range(5)] for i in range(2)]
    mixed = Interleaved(streams, proportional([1, 3]), seed=3)
    whole = list(itertools.islice(mixed, 40))
    assert all(record == f"{i}{n % 5}" for i in range(2) for n, (_, record) in enumerate(r for r in whole if r[0] == i))
    for cut in (0, 7, 23):
        first = Interleaved(streams, proportional([1, 3]), seed=3)
        head = list(itertools.islice(first, cut))
        assert head + list(itertools.islice(Interleaved(streams, proportional([1, 3]), 3, first.drawn), 40 - cut)) == whole
    for bad in ([[], [1]], [iter([1]), iter([2])]):
        with pytest.raises(ValueError, match="gave no record"): list(itertools.islice(Interleaved(bad, uniform(2)), 50))


def test_graphs():
    found = {(0,): np.array([1.0, 2]), (1,): np.array([3.0, 1]), (0, 1): np.array([0.5, 3])}
    assert graph_from_losses(found).tolist() == [[1, 0], [0.5, 1]] # data of 1 helps 0: row 1, column 0
    assert graph_from_losses(found, unit=[10, 10]).tolist() == [[1, 0], [0.05, 1]] and graph_from_losses(found, least=0.5).tolist() == np.eye(2).tolist()
    single = {(): np.array([2.0, 2, 2]), (0,): np.array([1.0, 2, 3]), (1,): np.array([2.0, 0, 1])}
    assert graph_from_losses(single).tolist() == [[0.5, 0, 0], [0, 1, 0.5]] # three evaluation skills
    trained = []
    A = learn_graph(lambda s: trained.append(s) or s, lambda s: np.array([1 / (1 + len(s))] * 4), 4)
    assert trained == graph_runs(4) and len(trained) == 4 + 6 and A.shape == (4, 4)
    with pytest.raises(ValueError, match=r"\(0, 1\)"): graph_from_losses({(0,): found[0,], (1,): found[1,]})
    with pytest.raises(ValueError, match="mode"): graph_runs(3, "triple")


def test_side_by_side_is_one_by_one_and_nothing_but_the_policy_differs():
    def race(policies):
        torch.manual_seed(7)
        return side_by_side(Staircase(torch.Generator().manual_seed(7), d=10, width=8), policies, 2, steps=3, batch=8, lr=1e-2, seed=0)
    both = race({"a": uniform(7), "b": only([6], 7), "again": uniform(7)})
    assert np.array_equal(both["a"], both["again"]) and np.allclose(both["b"], race({"b": only([6], 7)})["b"], atol=1e-3)
    assert both["a"].shape == (2, 7) and not np.array_equal(both["a"], both["b"])


def test_the_experiment_has_what_its_claims_ask_for(monkeypatch):
    monkeypatch.setattr(skills, "graph_beside", lambda world, *a, **k: np.eye(world.k))
    values = skills.skill_it(0, SCALES["tiny"])
    assert {arm for c in skills.skill_it.claims for arm in (c.a, c.b)} <= set(values) and values["learned graph"] == pytest.approx(values["identity graph"], abs=1e-6)


def test_texts_of_a_source():
    texts = domain_texts("library_docs")
    assert "sklearn" in texts and min(map(len, texts.values())) >= 200 and list(texts) == sorted(texts)


def test_lego():
    g = torch.Generator().manual_seed(0)
    for k in (1, 2, 12, 26):
        for depth in {1, k}:
            for r in lego(20, k, depth, g):
                assert solve_lego(r["text"]) == r["answer"] and r["skill"] == depth - 1 and r["text"].count("=") == k + 1
    for k, depth in ((27, 1), (3, 4), (3, 0)):
        with pytest.raises(ValueError, match="depth"): lego(1, k, depth, g)


@pytest.mark.parametrize("settings, word", [
    (dict(A=[[1, -1], [0, 1]]), "A: got -1"), (dict(A=[1, 2]), r"shape \(2,\)"), (dict(A=[[np.nan]]), "A"), (dict(A=np.eye(2), eta=-1), "eta"), (dict(A=np.eye(2), eta=np.inf), "eta"),
    (dict(A=np.eye(2), window=0), "window"), (dict(A=np.eye(2), prior=[0.5, 0.6]), "prior"), (dict(A=np.eye(2), prior=[1.0]), "prior"), (dict(A=np.eye(2), reduce="max"), "reduce"),
    (dict(A=np.eye(2), targets=[2]), "targets"), (dict(A=np.eye(2), targets=[]), "targets")])
def test_settings_that_are_refused(settings, word):
    with pytest.raises(ValueError, match=word): SkillIt(**settings)


def test_what_else_is_refused():
    policy = SkillIt(np.eye(2))
    for losses in ([1.0], [1.0, np.nan], [np.inf, 0.0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="losses"): policy.update(losses)
    with pytest.raises(ValueError, match="t: got 3"): policy.update([1.0, 1.0], t=3)
    with pytest.raises(ValueError, match="t: got 1"): policy.at(1)
    with pytest.raises(ValueError, match="sum to 1"): mixture_counts([0.5, 0.4], 10)
    with pytest.raises(ValueError, match="2 shares"): mixture_indices([0.5, 0.5], 4, [range(3)], 0)
    with pytest.raises(ValueError, match=r"pools\[1\] is empty"): mixture_indices([0.5, 0.5], 4, [range(3), []], 0)
    with pytest.raises(ValueError, match="pools"): Mixer([[1]], uniform(2), 1, 1)
    with pytest.raises(ValueError, match="batch"): Mixer([[1], [1]], uniform(2), 0, 1)
    with pytest.raises(ValueError, match="streams"): Interleaved([[1]], uniform(2))
    with pytest.raises(ValueError, match=r"rows\[1\]"): Schedule([[0.5, 0.5], [1.0, 1.0]])
    with pytest.raises(ValueError, match="held_out"): train_with_sampler(nn.Linear(1, 1), squared, [[1], [1]], [[1]], uniform(2), 1, 1)
    with pytest.raises(ValueError, match="k: got 5"): staircase(3, 4, 5, torch.Generator())
