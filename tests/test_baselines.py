"The baselines: probabilities are probabilities, and a score depends on its text alone."
import numpy as np
import pytest
import torch
from torch import nn

from ptbook.curate.baselines import RULES, Heuristics, NgramModel, Perplexity, Random

TEXTS = [" ".join(np.random.default_rng(i).choice(["the", "of", "cat", "dog", "runs", "."], 80)) for i in range(30)] + ["", " ", "one"]


class Bigram(nn.Module):
    "A causal model that looks at one byte."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(260, 260)
    def forward(self, ids): return self.table(ids)


@pytest.mark.parametrize("scorer", [Random(3), Heuristics(), NgramModel(TEXTS[:10]), Perplexity(Bigram())], ids=lambda s: type(s).__name__)
def test_a_score_depends_on_its_text_alone(scorer):
    together = scorer(TEXTS)
    assert together.shape == (len(TEXTS),) and not np.isnan(together).any()
    assert np.array_equal(together, np.concatenate([scorer([t]) for t in TEXTS])) and np.array_equal(scorer(TEXTS[::-1])[::-1], together)


def test_chance_is_uniform_and_seeded():
    draws = Random(5)([str(i) for i in range(4000)])
    assert np.allclose(np.histogram(draws, 10, (0, 1))[0] / 4000, 0.1, atol=0.03)
    assert Random(5)(["A  b"]) == Random(5)(["a b"]) != Random(6)(["a b"])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_chances_add_up_to_one(n):
    model = NgramModel(["a b c a b a", "c c b"], n=n, words=500)
    for before in ("a b", "b", "", "never seen"):
        chance = lambda word: 2.0 ** model.log2_probabilities([f"{before} {word}"])[0][-1]
        assert sum(map(chance, "abc")) + 497 * chance("unknown") == pytest.approx(1, abs=1e-5)


def test_more_context_fits_better():
    text = "a b c d e f g h " * 40
    bits = [-NgramModel([text], n=n)([text])[0] for n in (1, 2, 3)]
    assert bits[0] > 2.9 > 0.5 > bits[1] >= bits[2]


def test_crowded_buckets_stay_probabilities():
    texts = [" ".join(f"w{i * j % 401}" for j in range(200)) for i in range(1, 60)]
    assert (NgramModel(texts, n=3, buckets=64).log2_probabilities(texts)[0] <= 1e-6).all()


def test_each_rule_can_fail():
    good = "It is said that the reader of a book will have to turn with care to the page that was meant by it. " * 4
    assert all(Heuristics().passed(good).values())
    broken = ["too short", "a b c d e f g " * 20, "# the of " * 30, "\n".join(["- the words of and"] * 20), "\n".join(["the words of and ..."] * 20), "12 34 the of " * 30, "kein kleines englisches Wort steht hier " * 10]
    for text, rule in zip(broken, RULES): assert not Heuristics().passed(text)[rule], rule


def test_bad_input():
    with pytest.raises(ValueError, match="n: got 0"): NgramModel(["a"], n=0)
    with pytest.raises(ValueError, match="without words"): NgramModel(["", " "])
    with pytest.raises(ValueError, match="length: got 1"): Perplexity(Bigram(), length=1)
