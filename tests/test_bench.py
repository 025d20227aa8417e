"Timing in turns, and what `ptbook bench` prints."
import gc
import json
import sys
import time

import pytest
import torch

from ptbook.press import bench, cli
from ptbook.press.ledger import UnknownName

KEYS = ["name", "peer", "ours", "theirs", "ratio", "target", "unit"]


@pytest.fixture
def stub(monkeypatch):
    "Two sets of benchmarks that take no time."
    @bench.benchmark("quick")
    def quick(repetitions: int = 8) -> dict:
        "something quick."
        print("a chatty benchmark")
        return bench.row("quick", "slow", (0.001, 0.002), target=0.8)
    def slow(repetitions: int = 8) -> dict:
        "something slow."
        return bench.row("slow", "quick", (0.002, 0.001), target=0.8)
    del bench.BENCHMARKS["quick"]
    monkeypatch.setattr(bench, "BENCHMARKS", {"quick": [quick], "slow": [slow]})
    monkeypatch.setattr(bench, "ELSEWHERE", {})


def main(*args: str) -> int:
    with pytest.raises(SystemExit) as stop: cli.main(["bench", *args])
    return stop.value.code


def test_who_goes_first_changes_and_the_first_calls_do_not_count():
    order = []
    def ours():
        order.append("A")
        if len(order) == 1: time.sleep(0.2) # a cold start
    ours_s, theirs_s = bench.alternate(ours, lambda: order.append("B"), repetitions=3, calls=2)
    assert "".join(order) == "AB" + "AABB" + "BBAA" + "AABB"
    assert ours_s < 0.1 and theirs_s < 0.1


def test_one_function_may_be_timed_against_itself():
    def f(): time.sleep(0.005)
    ours, theirs = bench.alternate(f, f, repetitions=5)
    assert 0.2 < ours / theirs < 5


def test_the_state_of_the_process_is_put_back():
    threads = torch.get_num_threads()
    with bench.undisturbed():
        assert torch.get_num_threads() == 1 and not gc.isenabled()
    assert torch.get_num_threads() == threads and gc.isenabled()
    with pytest.raises(ZeroDivisionError): bench.alternate(lambda: 1 / 0, lambda: None)
    assert torch.get_num_threads() == threads and gc.isenabled()


@pytest.mark.parametrize("wrong", [{"repetitions": 0}, {"calls": 0}])
def test_no_timings_no_answer(wrong):
    with pytest.raises(ValueError, match="at least 1"): bench.alternate(int, int, **wrong)


def test_json_is_one_list(stub, capfd):
    assert main("all", "--json") == 0
    out, err = capfd.readouterr()
    rows = json.loads(out)
    assert [list(r) for r in rows] == [KEYS, KEYS] and [r["ratio"] for r in rows] == [0.5, 2.0] and rows[0]["unit"] == "ms"
    assert "a chatty benchmark" in err and "something slow" in err


def test_a_missed_target_is_printed_and_is_no_failure(stub, capfd):
    assert main("slow") == 0
    out, _ = capfd.readouterr()
    assert "not met" in out and "2.00" in out and "0 of 1 targets met" in out


def test_unknown_sets_are_named(stub, capfd):
    assert main("quik") == 2
    assert "did you mean 'quick'" in capfd.readouterr().err
    with pytest.raises(UnknownName): bench.bench("fast")


def test_the_basics_are_registered_with_their_targets(monkeypatch):
    monkeypatch.setattr(bench, "time_step", lambda *a, **k: (1.0, 2.0))
    monkeypatch.setattr(bench, "alternate", lambda *a, **k: (1.0, 2.0))
    monkeypatch.setattr(bench, "loop_pair", lambda steps: (None, None))
    monkeypatch.setattr(bench, "generation_pair", lambda: (None, None))
    rows = bench.bench("basics")
    assert [r["target"] for r in rows] == [0.80, 0.90, 1.05, 0.70] and all(list(r) == KEYS for r in rows)


def test_both_sides_do_the_same_work():
    ours, theirs = bench.gpt2_pair(hidden_size=32, layers=1, heads=2, length=8)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert theirs.config._attn_implementation == "sdpa" and theirs.config.attn_pdrop == 0
    by_fit, by_hand = (train() for train in bench.loop_pair(steps=10))
    assert by_fit == pytest.approx(by_hand, abs=1e-6)
    a, b = (write() for write in bench.generation_pair(hidden_size=32, n=8))
    assert torch.equal(a, b) and a.shape == (1, 24)


def test_a_step_is_timed():
    seconds = bench.time_step(32, 1, 2, 8, 2, repetitions=1, calls=1)
    assert all(s > 0 for s in seconds)


def test_a_set_may_live_elsewhere_and_give_several_rows(stub, monkeypatch, capfd, tmp_path):
    (tmp_path/"far_away.py").write_text("from ptbook.press import bench\nbench.benchmark('far')(lambda n: [bench.row(x, 'y', (1, n), 0.5) for x in 'ab'])\nbench.BENCHMARKS['far'][0].__doc__ = 'far.'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench, "ELSEWHERE", {"far": "far_away"})
    assert len(bench.bench("quick")) == 1 and "far" not in bench.BENCHMARKS
    assert [r["name"] for r in bench.bench("far", repetitions=2)] == ["a", "b"]
    assert main("fra") == 2 and "far" in capfd.readouterr().err


def test_a_peer_that_is_not_there(stub, monkeypatch, capfd):
    def missing(repetitions: int = 8) -> dict:
        "something with a peer."
        raise bench.PeerMissing("the peer could not be installed: no network")
    monkeypatch.setitem(bench.BENCHMARKS, "missing", [missing])
    assert main("missing", "--json") == 1
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1] == "ptbook: the peer could not be installed: no network"
    assert main("all", "--json") == 0
    out, err = capfd.readouterr()
    assert len(json.loads(out)) == 2 and "no network" in err


def test_a_program_is_measured_apart(tmp_path, monkeypatch):
    from ptbook.press import bench_merge
    monkeypatch.setattr(bench_merge, "work_folder", lambda: tmp_path)
    held = bytearray(200 << 20)  # ours, and not the child's
    small, large = (bench_merge.measured([sys.executable, "-S", "-c", f"print(len(b'x' * {n} * 10**6))"]) for n in (1, 100))
    assert small.peak < 40 and 90 < large.peak - small.peak < 110 and large.said == "100000000\n" and len(held)
    with pytest.raises(RuntimeError, match="exit code 3: .*why"): bench_merge.measured([sys.executable, "-S", "-c", "print('why'); raise SystemExit(3)"])
    assert not list(tmp_path.iterdir())


def test_merges_are_compared_in_rounding_steps(tmp_path):
    from safetensors.torch import save_file

    from ptbook.press import bench_merge
    for name, value in (("a", 1.0), ("b", 1.0 + 1/128)):
        (tmp_path/name).mkdir()
        save_file({"w": torch.tensor([value, 3.0])}, tmp_path/name/"model.safetensors")
    assert bench_merge.largest_difference(tmp_path/"a", tmp_path/"b") == 1 and bench_merge.largest_difference(tmp_path/"a", tmp_path/"a") == 0
    models = bench_merge.make_models(tmp_path/"models", bench_merge.SMALL, count=1)
    assert [m.name for m in models] == ["base", "tuned0"] and bench_merge.disk_seconds(models, tmp_path/"out") > 0
