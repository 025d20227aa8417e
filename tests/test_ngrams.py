"Hashed n-grams: what a loop over words gives, for any text, alone or in company."
import random
import re
import time

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from ptbook.curate import ngrams
from ptbook.curate.ngrams import HashedNgramClassifier, HashedNgrams, gumbel_top, importance, ngram_hashes, to_fasttext_lines, word_hashes

PATTERN = re.compile(r"\w+|[^\w\s]+")


def mess(seed: int, n: int = 200) -> list[str]:
    "Random texts of random characters from all over Unicode."
    draw = random.Random(seed)
    pieces = ["the", "The", "cat", " ", "  ", "\n", "\t", "\u00a0", "\u2003", "'", "--", "é", "ß", "İ", "Σ", "ς", "数据", "🙂", "_", "9", "\x00", "\x1f", "\ud800", "\u0301", "…"]
    return ["".join(draw.choice(pieces) for _ in range(draw.randrange(60))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(4))
def test_words_are_those_of_the_pattern(seed):
    texts = mess(seed)
    hashes, offsets = word_hashes(texts)
    names: dict[int, str] = {}
    for i, text in enumerate(texts):
        words = PATTERN.findall(text.lower())
        mine = hashes[offsets[i]:offsets[i + 1]].tolist()
        assert len(mine) == len(words)
        for h, word in zip(mine, words): assert names.setdefault(h, word) == word # one word per hash
    assert len(set(names.values())) == len(names) # one hash per word


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_document_is_the_same_alone(n):
    texts = mess(7, 60)
    hashes, offsets = ngram_hashes(texts, n)
    for i, text in enumerate(texts): assert np.array_equal(ngram_hashes([text], n)[0], hashes[offsets[i]:offsets[i + 1]])
    assert ngram_hashes([], n)[1].tolist() == [0]


def test_blocks_do_not_show(monkeypatch):
    texts = [" ".join(f"w{i * j % 97}" for j in range(500)) for i in range(40)]
    whole = ngram_hashes(texts, 2)
    monkeypatch.setattr(ngrams, "_BLOCK", 2048)
    assert all(np.array_equal(a, b) for a, b in zip(whole, ngram_hashes(texts, 2)))


def test_a_huge_document_takes_linear_time():
    def seconds(n: int) -> float:
        text = "some words of a log file " * n
        start = time.perf_counter()
        word_hashes([text])
        return time.perf_counter() - start
    seconds(1000)
    assert seconds(400_000) < 40 * max(seconds(40_000), 0.02)


def test_counts_are_those_of_scikit_learn():
    texts = ["to be or not to be", "that is the question", "", "to be"]
    theirs = CountVectorizer(token_pattern=PATTERN.pattern, ngram_range=(1, 2)).fit_transform(texts)
    mine = HashedNgrams(2**20).counts(texts)
    assert sorted(theirs.sum(0).A1.tolist()) == sorted(mine.sum(0).A1[mine.sum(0).A1 > 0].tolist()) and np.array_equal(theirs.sum(1), mine.sum(1))


def test_importance_is_a_ratio_of_chances():
    scorer = importance(["a a a b"], ["a b b b"], HashedNgrams(2**16, n=(1,)), smooth=1e-12)
    assert np.allclose(scorer(["a", "b", "a b", ""]), [np.log(1 / 3), np.log(3), 0, 0], atol=1e-6)
    summed = importance(["a a a b"], ["a b b b"], HashedNgrams(2**16, n=(1,)), smooth=1e-12, per_ngram=False)
    assert np.allclose(summed(["b b b"]), 3 * np.log(3))
    swapped = importance(["a b b b"], ["a a a b"], HashedNgrams(2**16, n=(1,)), smooth=1e-12)
    assert np.allclose(swapped(["a b b"]), -scorer(["a b b"]))


def test_gumbel_top_draws_in_proportion():
    log_weights = np.log(np.array([8.0, 4.0, 2.0, 1.0, 1.0]))
    drawn = np.bincount([gumbel_top(log_weights, 1, seed)[0] for seed in range(4000)], minlength=5) / 4000
    assert np.allclose(drawn, np.exp(log_weights) / 16, atol=0.03)
    assert gumbel_top(log_weights, 5).tolist() == [0, 1, 2, 3, 4] and len(gumbel_top(log_weights, 0)) == 0


def test_the_classifier_is_logistic_regression():
    texts, labels = ["good good text", "fine text", "bad words", "bad bad"] * 5, [1, 1, 0, 0] * 5
    mine = HashedNgramClassifier(2**12, C=10.0).fit(texts, labels)
    theirs = LogisticRegression(C=10.0, max_iter=200).fit(mine.shares(texts), labels)
    assert np.allclose(mine(texts), theirs.decision_function(mine.shares(texts))) and np.isfinite(mine([""])).all()


@pytest.mark.parametrize("wrong, said", [
    (lambda: HashedNgrams(0), "dim: got 0"), (lambda: HashedNgrams(10, ()), "n: got ()"), (lambda: ngram_hashes(["a"], -1), "n: got -1"),
    (lambda: importance([""], ["a"]), "pool: got 1 documents"), (lambda: importance(["a"], []), "target: got 0 documents"), (lambda: importance(["a"], ["a"], smooth=0), "smooth: got 0"),
    (lambda: gumbel_top(np.zeros(3), 4), "n: got 4"), (lambda: HashedNgramClassifier()(["a"]), "not been fitted"),
    (lambda: HashedNgramClassifier().fit(["a", "b"], [1, 1]), "labels: got [1]"), (lambda: HashedNgramClassifier().fit(["a"], [1, 0]), "labels: got 2"),
    (lambda: list(to_fasttext_lines(["a"], [])), "labels: got 0")])
def test_bad_input(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)): wrong()
