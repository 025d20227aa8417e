"The benchmark of stored logits: both sides do the same work, and its rows are rows."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ptbook.press import bench, bench_distill
from ptbook.press.bench_distill import epoch_pair, kept_by_top, thousand, vit


def test_both_epochs_do_the_same_work(tmp_path):
    ours, theirs = (train() for train in epoch_pair(tmp_path, steps=3, batch=4, width=16, k=1000))
    assert np.allclose(ours, theirs, rtol=0, atol=2e-3) and len(set(ours)) == 3


def test_the_teacher_is_eight_times_the_student():
    student, teacher = (sum(p.numel() for block in vit(w, l).encoder.blocks for p in block.parameters() if p.ndim == 2) for w, l in ((96, 2), (96, 16)))
    assert teacher == 8 * student


def test_the_best_teacher_is_the_posterior():
    teacher, x, y = thousand(300, 5)
    centres = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0))
    posterior = (-torch.cdist(x.double(), centres.double()).square() / 2 / 1.05 ** 2).softmax(-1)
    assert torch.allclose(teacher(x).softmax(-1).double(), posterior, atol=1e-4)
    assert F.cross_entropy(teacher(x), y) < F.cross_entropy(1.3 * teacher(x), y)


def test_bytes_are_those_on_the_disk(tmp_path):
    worth = kept_by_top(tmp_path, k=16, n=400, steps=3)
    assert worth["bytes"] == pytest.approx(68, abs=1) and worth["bytes"] / 4000 <= 0.02 and 0 <= worth["mass"] <= 1.001


def test_rows(monkeypatch):
    monkeypatch.setattr(bench_distill, "alternate", lambda *a, **k: (1.0, 4.0))
    monkeypatch.setattr(bench_distill, "epoch_pair", lambda folder: (None, None))
    monkeypatch.setattr(bench_distill, "kept_by_top", lambda folder: {"mass": 0.9, "stored": 0.5, "online": 0.5, "teacher": 0.6, "bytes": 68.0})
    rows = [f(2) for f in (bench_distill.stored_epoch, bench_distill.stored_bytes)]
    assert [r["ratio"] for r in rows] == [0.25, 0.017] and [r["target"] for r in rows] == [0.35, 0.02] and [r["unit"] for r in rows] == ["ms", "bytes"]
    assert {bench_distill.stored_epoch, bench_distill.stored_bytes} <= set(bench.BENCHMARKS["distill"]) and "2 of 2 targets met" in bench.bench_text(rows)
