"The benchmark beside peft compares the same with the same, and says so when it cannot."
import sys

import pytest
import torch

from ptbook.press import bench_adapt
from ptbook.press.bench import BENCHMARKS, PeerMissing
from ptbook.press.bench_adapt import TARGETS, base_model, lora_pair, lora_rows, next_loss


@pytest.mark.parametrize("style", TARGETS)
def test_the_pair_learns_the_same_numbers(style):
    for targets in TARGETS[style]:
        pair = lora_pair(base_model(style, 32, 1), targets, r=2)
        ids = torch.randint(1000, (2, 8), generator=torch.Generator().manual_seed(0))
        losses = [next_loss(m, ids) for m in pair]
        assert abs(losses[0] - losses[1]) < 1e-5
        counts = {sum(p.numel() for p in m.parameters() if p.requires_grad) for m in pair}
        assert len(counts) == 1 and counts.pop() > 0


def test_two_that_differ_are_not_compared(monkeypatch):
    from ptbook.adapt.lora import LoRA
    monkeypatch.setattr(LoRA, "scale", lambda self, r, alpha: 1.5 * alpha / r)
    with pytest.raises(RuntimeError, match="apart"): lora_pair(base_model("bert", 32, 1), ["query"])


def test_without_a_peer_there_is_nothing_to_compare(monkeypatch):
    monkeypatch.setattr(bench_adapt, "find_spec", lambda name: None)
    with pytest.raises(PeerMissing, match="peft"): lora_pair(base_model("bert", 32, 1), ["query"])


def test_rows():
    rows = lora_rows("llama", 2, 2, 8, 32, 1)
    assert [r["unit"] for r in rows] == ["ms", "MB", "ms", "MB"] and all(r["ours"] > 0 and r["ratio"] == r["ours"] / r["theirs"] for r in rows)
    assert len(BENCHMARKS["adapt"]) == 2
