"Near-duplicates: what the notebook does not show."
import numpy as np
import pytest

from ptbook.curate.duplicates import (EMPTY, SignatureIndex, clusters, exact_duplicates, jaccard, jaccard_estimate, lsh_bands, minhash, near_duplicates,
                                      recall_precision, shingles, true_pairs)


def prose(count: int, words: int = 60, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{k}" for k in rng.integers(5000, size=words)) for _ in range(count)]


def with_copies(count: int = 200) -> list[str]:
    texts = prose(count)
    return texts + [" ".join(text.split()[:30] + ["other"] + text.split()[31:]) for text in texts[::4]]


def test_signature_is_of_the_text_alone():
    texts = ["", *prose(40), "one", "two words", "!!", "naïve Ünïcode ÇA VA bien", "tail " * 3000]
    whole = minhash(texts)
    order = np.random.default_rng(1).permutation(len(texts))
    assert np.array_equal(minhash([texts[i] for i in order]), whole[order])
    assert np.array_equal(np.concatenate([minhash(texts[:7]), minhash(texts[7:])]), whole)
    assert np.array_equal(minhash(texts, 33), whole[:, :33]) # fewer numbers are the first of more
    assert whole.dtype == np.uint32 and not np.array_equal(minhash(texts, seed=1), whole)


def test_a_long_document_among_short_ones():
    long = " ".join(prose(1, 200_000)) # more shingles than one block
    assert np.array_equal(minhash(["a b c", long, "a b c"]), np.concatenate([minhash(["a b c"]), minhash([long]), minhash(["a b c"])]))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_document_with_words_has_a_shingle(n):
    texts = ["", " \n", "a", "a b", "a b c d e", "a b c d e f g", "", "z"]
    counts = np.diff(shingles(texts, n)[1])
    assert counts.tolist() == [max(len(t.split()) - n + 1, min(len(t.split()), 1)) for t in texts]
    for i, text in enumerate(texts): # the same shingles as alone
        hashes, offsets = shingles(texts, n)
        assert np.array_equal(hashes[offsets[i]:offsets[i + 1]], shingles([text], n)[0])


def test_estimate_is_unbiased_for_small_and_large_sets():
    for words in (4, 40, 400):
        one, other = prose(2, words, seed=words)
        half = " ".join(one.split()[:words // 2] + other.split()[words // 2:])
        true, k = jaccard(one, half, 1), 40_000
        measured = jaccard_estimate(*minhash([one, half], k, n=1))
        assert abs(measured - true) < 4.5 * (true * (1 - true) / k) ** 0.5


def test_same_answer_for_blocks_streams_and_processes():
    texts = with_copies()
    whole = near_duplicates(texts)
    index = SignatureIndex()
    for start in range(0, len(texts), 17): index.add(minhash(texts[start:start + 17]))
    assert np.array_equal(index.first(), whole) and np.array_equal(near_duplicates(iter(texts), jobs=2), whole)
    index.add(minhash(texts)) # and it goes on
    assert np.array_equal(index.first()[len(texts):], whole)


def test_finds_the_copies_and_nothing_else():
    texts = with_copies()
    assert recall_precision(near_duplicates(texts, 0.7), true_pairs(texts, 0.7)) == (1.0, 1.0, 50, 50)


def test_true_pairs_is_every_pair():
    texts = [t for text in prose(12, 12) for t in (text, text + " more", text + " more words than that")] + ["", ""]
    slow = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)) if jaccard(texts[i], texts[j]) >= 0.6]
    assert sorted(map(tuple, true_pairs(texts, 0.6).tolist())) == slow


def test_ten_thousand_copies_are_no_quadratic_affair():
    index = SignatureIndex()
    index.add(np.repeat(minhash(prose(1)), 10_000, axis=0))
    assert len(index.pairs()) < 20_000 and not index.first().any()


def test_leftover_numbers_judge_too():
    a = np.arange(103, dtype=np.uint32)[None]
    for leftover, together in ((True, [0, 0]), (False, [0, 1])):
        index = SignatureIndex(0.7, 103)
        assert index.bands * index.rows == 100
        b = a.copy()
        b[:, :30] = 7_000 # 70 of 100 agree, and the threshold is 72.1 of 103
        if not leftover: b[:, 100:] = 7_000
        index.add(np.concatenate([a, b]))
        assert index.first().tolist() == together


def test_nothing_at_all():
    assert near_duplicates([]).shape == (0,) and near_duplicates(["", " ", ""]).tolist() == [0, 1, 2] and near_duplicates(["a", "A", "a b"]).tolist() == [0, 0, 2]
    assert minhash([]).shape == (0, 128) and (minhash([""]) == EMPTY).all() and true_pairs([]).shape == (0, 2) and true_pairs(["", ""]).shape == (0, 2)
    assert recall_precision(np.arange(3), np.empty((0, 2), np.int64)) == (1.0, 1.0, 0, 0) and clusters(np.empty((0, 2), np.int64), 0).shape == (0,)


def test_lone_surrogates_and_normalising():
    assert exact_duplicates(["\ud800", "x", "\ud800"]).tolist() == [0, 1, 0] and exact_duplicates(["A  b", "a B\n"], normalise=True).tolist() == [0, 0]


@pytest.mark.parametrize("call, said", [
    (lambda: near_duplicates("one text"), "wanted documents"),
    (lambda: near_duplicates(["a", None]), "NoneType as document 1"),
    (lambda: exact_duplicates([b"a"]), "bytes as document 0"),
    (lambda: near_duplicates(["a"], threshold=0), "threshold: got 0"),
    (lambda: near_duplicates(["a"], threshold=1.5), "threshold: got 1.5"),
    (lambda: near_duplicates(["a"], threshold=float("nan")), "threshold: got nan"),
    (lambda: lsh_bands(0.05, 8), "permutations: got 8"),
    (lambda: lsh_bands(0.5, 0), "permutations: got 0"),
    (lambda: minhash(["a"], permutations=0), "permutations: got 0"),
    (lambda: minhash(["a"], n=0), "n: got 0"),
    (lambda: true_pairs(["a"], 2), "threshold: got 2"),
    (lambda: SignatureIndex().add(np.zeros((3, 64), np.uint32)), r"\(documents, 128\)"),
    (lambda: SignatureIndex().add(np.zeros((3, 128))), "float64"),
    (lambda: recall_precision(np.arange(3), np.array([[0, 3]])), "wanted 0 ... 2"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError, match=said): call()
