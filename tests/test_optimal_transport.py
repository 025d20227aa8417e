"""Selection by the gradient of optimal transport: what the chapter does not show already."""
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from ptbook.basics.claims import as_scale
from ptbook.basics.sources import SourceUnavailable
from ptbook.curate import optimal_transport as ot
from ptbook.curate.ngrams import HashedNgrams


def points(n, k=6, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    kinds = ot.domains(rng)
    return kinds.write(ot.deal((0.5, 0.02, 0.24, 0.24), 300, rng), 30, rng), kinds.write(ot.deal((0.7, 0.3, 0, 0), 50, rng), 30, rng)


@pytest.fixture(scope="module")
def scorer(texts): return ot.transport(*texts, idf=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.02, 0.5])
def test_f_is_the_closed_form_of_g_even_where_it_has_not_converged(dtype, eps):
    C = ot.cosine_cost(ot.unit(points(40)), ot.unit(points(15, seed=1))).to(dtype)
    b = torch.arange(1.0, 16).to(dtype) / 120
    for rounds in (1, 3, 500):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            f, g, info = ot.sinkhorn_potentials(C, b=b, eps=eps, max_iter=rounds, tol=1e-5)
        assert f.dtype == g.dtype == dtype and torch.equal(f, ot.c_transform(C, g, b, eps)) and info.iterations <= rounds
    plan = b * ((f[:, None] + g - C) / eps).exp() / 40
    assert (plan.sum(1) - 1 / 40).abs().max() < 1e-6 and (plan.sum(0) - b).abs().sum() < 1e-4


def test_the_error_is_the_mass_at_the_wrong_targets():
    C = ot.cosine_cost(ot.unit(points(40)), ot.unit(points(15, seed=1)))
    with pytest.warns(RuntimeWarning, match="misplaced"): f, g, info = ot.sinkhorn_potentials(C, max_iter=2, tol=1e-9)
    wrong = (((f[:, None] + g - C) / 0.02).exp() / 600).sum(0) - 1 / 15
    assert not info.converged and info.error == pytest.approx(wrong.abs().sum().item(), rel=1e-6)


def test_a_source_or_target_without_mass_plays_no_part():
    C = ot.cosine_cost(ot.unit(points(12)), ot.unit(points(9, seed=1)))
    a, b = torch.full((12,), 1 / 11).double(), torch.full((9,), 1 / 8).double()
    a[3], b[5] = 0, 0
    f, g, _ = ot.sinkhorn_potentials(C, a, b, eps=0.2, max_iter=5000, tol=1e-7)
    rows, cols = torch.arange(12) != 3, torch.arange(9) != 5
    f2, g2, _ = ot.sinkhorn_potentials(C[rows][:, cols], eps=0.2, max_iter=5000, tol=1e-7)
    assert torch.isfinite(f).all() and torch.allclose(f[rows] - f[0], f2 - f2[0], atol=1e-6) and torch.allclose(g[cols] + f[0], g2 + f2[0], atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_chunks_change_memory_only(chunk):
    x, y = points(40), points(15, seed=1)
    assert torch.allclose(ot.ot_scores(x, y, chunk=chunk), ot.ot_scores(x, y), atol=1e-9)


def test_scores_sum_to_zero_and_do_not_know_the_length_of_vectors():
    x, y = points(40), points(15, seed=1)
    s = ot.ot_scores(x, y)
    assert abs(s.sum().item()) < 1e-9 and torch.allclose(ot.ot_scores(x * 3, y * 0.1), s, atol=1e-9)
    others = torch.stack([torch.cat([s[:i], s[i + 1:]]).mean() for i in range(40)])
    f = ot.sinkhorn_potentials(ot.cosine_cost(ot.unit(x), ot.unit(y)), tol=1e-3)[0]
    assert torch.allclose(s, f - torch.stack([torch.cat([f[:i], f[i + 1:]]).mean() for i in range(40)]), atol=1e-12) and torch.allclose(others, -s / 39, atol=1e-12)
    assert torch.allclose(ot.ot_scores(x.float().numpy(), y.float().numpy()), s, atol=1e-3)


def test_one_target_text_is_its_nearest_neighbours():
    x, y = points(40), points(1, seed=1)
    assert ot.select(ot.ot_scores(x, y), 5).tolist() == ot.select_nn(x, y, 5).tolist() == ot.select_nn(x, y, 5, mean=True).tolist()


def test_a_text_is_scored_by_itself(scorer, texts):
    pool, target = texts
    scores = scorer(pool)
    assert scores.dtype == np.float64 and scores.shape == (300,) and np.isfinite(scores).all()
    assert np.array_equal(scorer(pool[::-1])[::-1], scores)
    for n in (1, 2, 3, 33, 299): assert np.array_equal(scorer(pool[:n]), scores[:n])
    assert np.array_equal(replace(scorer, chunk=17)(pool), scores)
    assert scorer([]).shape == (0,) and np.isfinite(scorer(["", "words never seen"])).all()
    assert abs(scores.mean()) < 1e-9 and np.array_equal(ot.transport(*texts, idf=False)(pool), scores)
    assert np.array_equal(ot.transport(pool, target, idf=False, seed=1)(pool[:2]), ot.transport(pool, target, idf=False, seed=1)(pool)[:2])


def test_any_embedding_serves(texts):
    features = HashedNgrams(dim=64, n=(1,))
    embed = lambda t: features.counts(t).toarray()
    scorer = ot.transport(*texts, embed=embed)
    assert np.allclose(scorer(texts[0]), -ot.ot_scores(embed(texts[0]), embed(texts[1])).numpy(), atol=1e-9)


def test_a_draw_bounds_what_is_solved_and_few_texts_will_do(texts):
    pool, target = texts
    scorer = ot.transport(pool, target, most=40)
    assert scorer.n == 40 and len(scorer.target) == 40 and scorer(pool).shape == (300,)
    assert np.array_equal(scorer(pool), ot.transport(pool, target, most=40)(pool)) and not np.array_equal(scorer(pool), ot.transport(pool, target, seed=1, most=40)(pool))
    assert np.isfinite(ot.transport(pool[:2], target[:1])(pool)).all()


def test_selections():
    assert ot.select(torch.tensor([2.0, 1.0, 1.0, 0.0]), 3).tolist() == [3, 1, 2]
    a = ot.select_random(50, 50, seed=3)
    assert sorted(a.tolist()) == list(range(50)) and a.tolist() != ot.select_random(50, 50, seed=4).tolist()
    for n in (0, 5):
        with pytest.raises(ValueError, match="n: got"): ot.select(torch.zeros(4), n)


def test_what_the_arms_may_choose():
    w = ot.markov_world(3, as_scale("tiny"))
    assert np.bincount(w.labels).tolist() == [700, 10, 150, 140] and w.wanted == (14, 6, 0, 0)
    picked = ot.choices(w, 3)
    assert all(len(set(p.tolist())) == 20 and p.dtype == torch.int64 for p in picked.values())
    assert np.bincount(w.labels[picked["distribution match"]], minlength=4).tolist() == [14, 6, 0, 0]
    assert w.pool_ids.max() < w.vocabulary and len(w.past) == 300 and w.test.shape == (100, 40)


def test_the_world():
    rng = np.random.default_rng(0)
    kinds = ot.domains(rng)
    [text] = kinds.write(np.array([2]), 500, rng)
    follows = {}
    words = text.split()
    for a, b in zip(words, words[1:]): follows.setdefault(a, set()).add(b)
    assert len(follows) <= 40 and max(map(len, follows.values())) <= 4
    with pytest.raises(ValueError, match="shares"): ot.deal((0.5, 0.4), 10, rng)
    assert ot.ids_of(["a b, c a", "b"], {"a": 0, "b": 1}, 5).tolist() == [[0, 1, 0, 0, 1], [1] * 5]
    with pytest.raises(ValueError, match="number 1"): ot.ids_of(["a", "z"], {"a": 0}, 3)


def test_news_says_when_it_is_not_there(monkeypatch):
    monkeypatch.delenv("PTBOOK_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailable): ot.news_world(0, as_scale("tiny"))


def test_the_model_does_not_look_ahead():
    torch.manual_seed(0)
    model, ids = ot.WordModel(20), torch.randint(20, (3, 9))
    other = ids.clone()
    other[:, 5:] = 7
    assert torch.equal(model(ids)[:, :5], model(other)[:, :5]) and not torch.equal(model(ids)[:, 5:], model(other)[:, 5:])


def test_a_warm_up_leaves_the_model_and_mixes_two_kinds():
    torch.manual_seed(0)
    model, ids = ot.WordModel(20), torch.randint(20, (30, 9))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    warm = [ot.warm_up(model, ids[:10], *rest, steps=3, seed=1) for rest in ((), (ids[10:], 1.0), (ids[10:], 0.25))]
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in warm]
    assert torch.allclose(weights[0], weights[1], atol=1e-6) and not torch.allclose(weights[0], weights[2], atol=1e-4)
    with pytest.raises(ValueError, match="replay"): ot.warm_up(model, ids, ids[:, :5])
    for lam in (0, 1.5, -1):
        with pytest.raises(ValueError, match="lam"): ot.warm_up(model, ids, ids, lam)


@pytest.mark.parametrize("change, word", [
    (dict(eps=0), "eps"), (dict(eps=-1), "eps"), (dict(max_iter=0), "max_iter"), (dict(a=torch.ones(4)), "a: got"),
    (dict(b=torch.tensor([0.5, 0.6, -0.1])), "b: got"), (dict(b=torch.ones(4) / 4), "b: got"), (dict(C=torch.zeros(0, 3)), "C: got"),
    (dict(C=torch.full((4, 3), torch.nan)), "C: got"), (dict(C=torch.zeros(4)), "C: got")])
def test_what_sinkhorn_refuses(change, word):
    with pytest.raises(ValueError, match=word): ot.sinkhorn_potentials(**{"C": torch.zeros(4, 3)} | change)


def test_what_scores_refuse(texts):
    x, y = points(10), points(4)
    for pool, target, word in ((x[:0], y, "pool"), (x, y[:0], "target"), (x, y[:, :3], "width 3"), (x * torch.nan, y, "row 0"), (x[0], y, "pool"), (x[:1], y, "2 or more")):
        with pytest.raises(ValueError, match=word): ot.ot_scores(pool, target)
    for pool, target in ((texts[0][:1], texts[1]), (texts[0], [])):
        with pytest.raises(ValueError, match="pool, target"): ot.transport(pool, target)
    with pytest.raises(ValueError, match="k: got 51"): ot.lsa(texts[1], k=51)
    with pytest.raises(ValueError, match="eps"): ot.transport(*texts, eps=0)
