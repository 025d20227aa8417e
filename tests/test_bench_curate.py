"The benchmark of choosing: both sides do the same work on the same documents, and its rows are rows."
import numpy as np
import pytest
from scipy.stats import spearmanr

from ptbook.basics.sources import load
from ptbook.curate.duplicates import near_duplicates, recall_precision, true_pairs
from ptbook.press import bench, bench_curate
from ptbook.press.bench_curate import bill_apart, data_selection, datasketch_first, documents, same_features


def test_documents_are_what_they_should_be():
    texts = list(documents(800, seed=3))
    assert texts == list(documents(800, seed=3)) != list(documents(800, seed=4)) and all(len(t) <= 1000 for t in texts)
    near = np.count_nonzero(near_duplicates(texts, threshold=0.3) != np.arange(800))
    assert 40 < near < 120 # one in ten is a changed copy


def test_both_find_the_copies():
    texts = list(documents(1500))
    truth = true_pairs(texts, 0.8)
    ours, theirs = (recall_precision(find(texts), truth) for find in (near_duplicates, datasketch_first))
    assert truth.size and min(ours.recall, ours.precision) > 0.8 and min(theirs.recall, theirs.precision) > 0.6


def test_both_weigh_alike(tmp_path):
    texts, target = list(documents(300)), load("pydocs")["train"]["text"][:20]
    assert spearmanr(same_features(texts, target)(texts), data_selection(texts, target, tmp_path)()).statistic > 0.7


def test_a_bill_is_of_a_process_of_its_own():
    bill = bill_apart("make", 50)
    assert bill["job"] == "make" and bill["n"] == 50 and bill["seconds"] > 0 and 50 < bill["megabytes"] < 4000


def test_rows(monkeypatch):
    monkeypatch.setattr(bench_curate, "DOCUMENTS", 200)
    monkeypatch.setattr(bench_curate, "alternate", lambda *a, **k: (1.0, 20.0))
    rows = [f(8) for f in (bench_curate.near_copies, bench_curate.importance_weights)]
    assert [r["ratio"] for r in rows] == [0.05, 0.05] and [r["target"] for r in rows] == [0.1, 0.5]
    assert {bench_curate.near_copies, bench_curate.importance_weights} <= set(bench.BENCHMARKS["curate"]) and "2 of 2 targets met" in bench.bench_text(rows)


def test_a_missing_peer_is_named(monkeypatch):
    import builtins
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("datasketch", "data_selection"): raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(bench.PeerMissing, match="pip install datasketch"): datasketch_first(["a"])
    with pytest.raises(bench.PeerMissing, match="pip install data-selection"): data_selection(["a"], ["a"], None)
