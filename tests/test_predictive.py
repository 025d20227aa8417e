import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ptbook.basics.models import Transformer, style
from ptbook.curate import predictive as P


def tiny_lm(seed=0, vocab_size=30, max_length=64):
    torch.manual_seed(seed)
    return Transformer(style("llama", vocab_size=vocab_size, hidden_size=16, layers=1, heads=2, max_length=max_length)).eval()


def documents(seed=0, sizes=(2, 7, 40, 64, 130), vocab_size=30):
    return [torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed + n)) for n in sizes]


@pytest.mark.parametrize("n,block,stride", [(2, 5, 2), (5, 5, 4), (6, 5, 4), (23, 8, 3), (24, 8, 1), (100, 64, 32)])
def test_every_token_is_counted_once_and_windows_end_with_the_document(n, block, stride):
    made = P.windows(n, block, stride)
    assert sorted(t for s, e, f in made for t in range(f, e)) == list(range(1, n))
    assert all(e - s <= block and s < f < e for s, e, f in made) and made[-1][1] == n and sum(e == n for _, e, _ in made) == 1


def test_a_window_as_long_as_the_document_changes_nothing_and_longer_context_does():
    model, docs = tiny_lm(), documents(sizes=(40,))
    whole = P.document_nll(model, docs, 40, 20)
    assert torch.allclose(whole, P.document_nll(model, docs, 400, 7)) and not torch.allclose(whole, P.document_nll(model, docs, 10, 9), atol=1e-4)


def test_losses_depend_on_the_document_alone_and_leave_the_model_alone():
    model, docs = tiny_lm().train(), documents()
    together = P.document_nll(model, docs, 64, 32, batch=3)
    alone = torch.cat([P.document_nll(model, [doc.tolist()], 64, 32) for doc in docs])
    assert together.dtype == torch.float64 and torch.allclose(together, alone, atol=1e-4) and model.training
    assert P.document_nll(model, []).shape == (0,)


def test_a_uniform_model_pays_the_logarithm_of_its_vocabulary():
    class Uniform(nn.Module):
        def forward(self, ids): return torch.zeros(*ids.shape, 30)
    docs = documents()
    assert torch.allclose(P.document_nll(Uniform(), docs, 16, 8), torch.tensor([(len(d) - 1) * np.log(30) for d in docs]), atol=1e-3)


def test_strength_is_a_count_of_pairs():
    rng = np.random.default_rng(0)
    losses, scores = rng.integers(4, size=(300, 5)).astype(float), np.array([0.3, 0.1, 0.1, 0.7, 0.5])
    pairs = [(i, j) for i in range(5) for j in range(5) if scores[i] < scores[j]]
    assert len(pairs) == 9
    assert np.allclose(P.predictive_strength(torch.tensor(losses), scores), [sum(row[i] > row[j] for i, j in pairs) / 9 for row in losses])
    assert (P.predictive_strength(np.ones((2, 5)), scores) == 0).all() # the same loss tells nothing


def test_order_of_models_does_not_matter():
    rng = np.random.default_rng(1)
    losses, scores, order = rng.normal(size=(50, 6)), rng.normal(size=6), rng.permutation(6)
    assert np.array_equal(P.predictive_strength(losses, scores), P.predictive_strength(losses[:, order], scores[order]))


def test_labels_are_balanced_and_apart():
    for strength, count in ((np.array([1.0, 1.0, 1.0, 0.2]), None), (np.linspace(0, 1, 10), 3), (np.full(6, 0.5), 2), (np.linspace(0, 1, 5), 4)):
        good, bad = P.label_by_strength(strength, count)
        assert len(good) == len(bad) > 0 and not set(good) & set(bad) and strength[good].min() >= strength[bad].max()
    for strength in ([0.9, 0.5], [1.0, 1.0], []):
        with pytest.raises(ValueError, match="strength"): P.label_by_strength(np.array(strength))


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 0.99, 1.0])
def test_the_threshold_holds_the_share_of_characters_and_no_document_more(keep):
    rng = np.random.default_rng(2)
    scores, lengths = rng.normal(size=500), rng.integers(1, 1000, 500)
    kept = scores >= (t := P.length_quantile_threshold(scores, lengths, keep))
    assert lengths[kept].sum() >= keep * lengths.sum() * (1 - 1e-9) > lengths[scores > t].sum() * (1 - 1e-6) or keep == 1.0
    assert kept.all() == (keep == 1.0)


def sentences(words, n, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, 16)) for _ in range(n)]


def mixed():
    sea, bread = ["wave", "salt", "anchor", "tide", "gull", "harbour"], ["flour", "oven", "crust", "yeast", "dough", "knead"]
    return sentences(sea, 80, 0) + sentences(bread, 80, 1), sentences(sea, 20, 2), sentences(sea, 30, 3), sentences(bread, 30, 4)


def test_without_checkpoints_the_wanted_kind_comes_first_and_twice_the_same():
    pool, target, good, bad = mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = P.predictive_for(pool, target, k=2, steps=12, models=4, seed=1000)
        again = P.predictive_for(pool, target, k=2, steps=12, models=4, seed=1000)
    assert scorer(good).min() > scorer(bad).max() and np.allclose(scorer(good), again(good))
    copy = pickle.loads(pickle.dumps(scorer))
    assert np.array_equal(copy(good), scorer(good)) and scorer(good).dtype == np.float64 and np.array_equal(scorer(good[:1]), scorer(good)[:1])


def test_one_encoder_per_model_and_texts_that_are_too_short():
    pool, target, good, bad = mixed()
    small = P.byte_models(pool, [0] * 80 + [1] * 80, steps=12, seed=1000)
    score = -P.bits_per_byte_of(small, target)
    assert np.array_equal(score, -P.bits_per_byte_of(small, [*target, "", "x"]))
    encode = P.ByteTokenizer().encode
    one = P.predictive(small, score, ["", *pool, "x"], encode, fallback=0.1)
    each = P.predictive(small, score, pool, [lambda text: encode(text).tolist()] * 6, fallback=0.1)
    assert np.allclose(one(good), each(good), atol=1e-6) and one(good).mean() > one(bad).mean()
    with pytest.raises(ValueError, match="encode"): P.predictive(small, score, pool, [encode] * 5)


def test_a_fallback_is_said_aloud():
    rng = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="strongest 10%"): assert P.positives(rng.random(300), 0.1) == 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert P.positives(np.r_[np.ones(3), rng.random(297)], 0.1) == 3


def test_mixtures_of_unlike_amounts():
    shares = P.unlike_mixtures(6, 9, seed=3)
    assert shares.shape == (6, 9) and np.allclose(shares.sum(1), 1) and shares.min() > 0
    for wrong in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match="shares"): P.Mixture([torch.zeros(3, 4), torch.ones(3, 4)], wrong, 2)
    with pytest.raises(ValueError, match="shares"): P.Mixture([torch.zeros(3, 4), torch.ones(0, 4)], [1, 1], 2)
    assert P.Mixture([torch.zeros(3, 4), torch.ones(0, 4)], [1, 0], 8)[0].sum() == 0


def test_byte_blocks_lose_nothing():
    texts = ["ab" * 100, "", "é"]
    flat = P.byte_blocks(texts, 16)
    assert flat.shape[1] == 16 and bytes(flat.flatten().tolist()).decode().rstrip("\n") == "\n\n".join(texts).rstrip("\n")


def test_the_world_is_what_it_says():
    world = P.markov_world(1000, docs=600)
    assert np.array_equal(np.bincount(world.domain), [60, 60, 150, 150, 90, 90]) and np.allclose(world.shares.sum(1), 1) and world.shares.min() > 0
    assert np.allclose(world.shares[:, :2].sum(1), P.LEVELS) and world.useful.sum() == 120 and len(world.texts) == len(world.pool) == 600
    cycles = world.pool[torch.from_numpy(world.domain == 4)]
    assert torch.equal(cycles[:, :8], cycles[:, 8:16]) and not torch.equal(world.bench[:50], world.test[:50])
    assert torch.equal(world.pool, P.markov_world(1000, docs=600).pool) and not torch.equal(world.pool, P.markov_world(1001, docs=600).pool)


def test_the_control_has_half_of_the_pairs():
    scores = np.arange(6.0)
    for seed in range(20):
        other = P.unrelated(scores, np.random.default_rng(seed))
        assert sorted(other) == sorted(scores) and P.predictive_strength(-other[None], scores)[0] * 15 in (7, 8)
    with pytest.raises(ValueError, match="scores"): P.unrelated(scores[:3], np.random.default_rng(0))


def test_every_arm_keeps_as_many():
    world = P.markov_world(1000, docs=600)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = P.selections(world, P.read_world(world, 1000, 10), 1000)
    assert {len(rows) for rows in kept.values()} == {90} and all(len(set(rows)) == 90 for rows in kept.values())
    assert world.useful[kept["oracle"]].all()


def test_what_is_refused():
    model, docs = tiny_lm(), documents()
    with pytest.raises(ValueError, match="document 1 has 1 tokens"): P.document_nll(model, [docs[0], docs[1][:1]])
    with pytest.raises(ValueError, match="vocab_size"): P.document_nll(model, [torch.tensor([1, 30])])
    for stride in (0, 8, 9):
        with pytest.raises(ValueError, match="stride"): P.document_nll(model, docs, 8, stride)
    with pytest.raises(ValueError, match="losses"): P.predictive_strength(np.ones(3), [1, 2, 3])
    for keep in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="keep"): P.length_quantile_threshold(np.ones(2), [1, 1], keep)
    with pytest.raises(ValueError, match="lengths"): P.length_quantile_threshold(np.ones(2), [0, 0])
    with pytest.raises(ValueError, match="lengths"): P.length_quantile_threshold(np.ones(2), [1])
    for pool, target in (([], ["text"]), (["text", "more"], []), (["text", "more"], ["x"]), (["text", "more"], "text"), ("text", ["text"])):
        with pytest.raises(ValueError, match="texts"): P.predictive_for(pool, target)
    with pytest.raises(ValueError, match="domains"): P.predictive_for(["text", "more"], ["text"], [1])
    with pytest.raises(ValueError, match="texts"): P.learn_strength(["a"], np.ones(2))
