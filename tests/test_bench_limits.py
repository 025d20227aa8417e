"Limits, counted work, growth, and the step of a GPT-2: what must hold of the instruments, whatever the machine."
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ptbook.basics.models import Transformer, style
from ptbook.press import bench, bench_limits, cli
from ptbook.press.bench_limits import (Limits, Reached, Throughput, Work, disk, flops, gpt2_small_throughput, grow, growth, limit_works, limits_of, model_flops, next_token_loss, peak_of, product, reach, reading,
                                       roofline, step_work, triad, turns, where_time_goes)


def test_turns_go_to_and_fro_and_the_first_calls_do_not_count():
    order = []
    times = turns({name: lambda name=name: order.append(name) for name in "AB"}, repetitions=3)
    assert "".join(order) == "AB" + "AB" + "BA" + "AB" and all(t.shape == (3,) and (t >= 0).all() for t in times.values())
    with pytest.raises(ValueError, match="repetitions"): turns({"A": int}, repetitions=0)


@pytest.mark.parametrize("m, k, n", [(1, 7, 3), (16, 8, 32)])
def test_a_linear_layer_costs_what_it_should(m, k, n):
    layer, x = nn.Linear(k, n), torch.randn(m, k, requires_grad=True)
    assert flops(lambda: layer(x)) == 2 * m * n * k
    out = layer(x).sum()
    assert flops(lambda: out.backward()) == 2 * 2 * m * n * k


def test_attention_on_a_cpu_is_counted():
    q = torch.randn(2, 3, 8, 4)
    assert flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 3) * 8 * 8 * 4


def test_a_models_operations_are_six_per_weight_and_token_and_the_attention():
    c, batch = style("gpt2", vocab_size=50, hidden_size=16, layers=2, heads=2, max_length=12), 3
    weights = sum(p.numel() for n, p in Transformer(c).named_parameters() if p.ndim == 2 and "positions" not in n)
    assert model_flops(c, batch, 12) == 6 * weights * batch * 12 + 3 * c.layers * 2 * 2 * batch * 12 * 12 * c.hidden_size


def test_a_steps_bytes_are_ten_times_the_weights_and_twice_what_is_kept():
    model, x = nn.Linear(8, 4, bias=False), torch.randn(5, 8)
    work = step_work("x", model, lambda: model(x).square().sum(), int, x)
    kept = 5 * 4 * 4 # the output, which the square keeps
    assert work.bytes == 10 * 32 * 4 + 2 * kept and work.flops == 2 * 2 * 5 * 8 * 4 and model.weight.grad is None # inputs need no gradient


def test_the_triad_and_the_sum_move_the_bytes_they_say():
    for work, arrays in ((triad(1000), 3), (reading(1000), 1)):
        assert work.bytes == arrays * 4 * 1000
        work.run()
    a = triad(8).run()
    assert torch.equal(a, torch.full((8,), 3.0)) and reading(8).run() == 8


def test_a_product_is_as_long_as_asked():
    assert product(10, least=1e5).flops == 50 * 2000 and product(1000, least=1).flops == 2e9 and product(8, torch.float64, least=1).bytes == 3 * 64 * 8


def test_the_disk_is_written_and_read_whole(tmp_path):
    works = disk(tmp_path, (2 << 20) + 5)
    assert {w.bytes for w in works.values()} == {2 << 20}
    for name in ("write", "read", "cached"): works[name].run()
    assert (tmp_path/"disk.bin").stat().st_size == 2 << 20


def test_limits_are_the_best_and_a_gap_is_measured_from_the_nearer():
    reached = {w.name: Reached(w, np.array(t)) for w, t in ((Work("product, n=8", int, 100), [2.0, 1.0]), (Work("product, n=16", int, 300), [2.0, 4.0]), (Work("triad", int, 1, 40), [4.0, 8.0]), (Work("else", int, 1e9), [1.0]))}
    limits = limits_of(reached)
    assert limits == Limits(150.0, 10.0, {8: 100.0, 16: 150.0}) and limits.ridge == 15
    assert Reached(Work("a", int, flops=300, bytes=10), np.array([9.0, 4.0, 1.0])).gap(limits) == 2.0
    assert Reached(Work("b", int, flops=1, bytes=100), np.array([30.0])).gap(limits) == 3.0


def test_limits_are_measured_and_drawn():
    works = limit_works((16, 32), 1 << 10)
    found = reach(works, repetitions=2)
    limits = limits_of(found)
    assert set(limits.products) == {16, 32} and 0 < limits.bandwidth < 1e13 and 0 < limits.peak < 1e15
    ax = roofline(found.values(), limits, "a roof")
    roof = ax.lines[0].get_xydata()
    assert np.allclose(roof[:, 1] * 1e9, np.minimum(limits.peak, roof[:, 0] * limits.bandwidth)) and {w.name for w in works} <= {t.get_text() for t in ax.texts}


def test_the_shares_of_time_are_shares():
    a = torch.randn(200, 200)
    def f(): return (a @ a).relu()
    shares = where_time_goes(f)
    assert sum(shares.values()) == pytest.approx(1, abs=0.05) and min(shares.values()) >= 0 and shares["products"] > 0.3 and shares["attention"] == 0


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 3.0])
def test_a_known_exponent_is_recovered(exponent):
    x = np.array([1, 2, 4, 8, 16, 32])
    exact = growth(x, 0.002 * x ** exponent)
    assert exact.exponent == pytest.approx(exponent, abs=1e-9) and exact.constant == pytest.approx(0.002) and exact(4) == pytest.approx(0.002 * 4 ** exponent)
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        noisy = growth(x, 0.002 * x ** exponent * np.exp(0.1 * rng.standard_normal((5, 6))))
        held += noisy.low <= exponent <= noisy.high
    assert 0.9 < held / 200 < 0.99 # a 95 % interval


def test_growth_refuses_what_is_no_line():
    for x, y in (([1], [[1.0]]), ([1, 1], [[1.0, 2.0]]), ([1, 2], [[1.0, 2.0, 3.0]]), ([0, 1], [[1.0, 2.0]]), ([1, 2], [[1.0, -2.0]])):
        with pytest.raises(ValueError, match="x, seconds"): growth(x, np.array(y))
    assert grow(lambda n: lambda: sum(range(n)), (10, 20), 3).shape == (3, 2)


def test_utilisation_of_a_known_timing():
    told = Throughput(tokens=2048.0, flops=3e12, peak=10e12, told=12e12, seconds=0.5, device="a card")
    assert told.mfu == pytest.approx(0.3) and "2,048 tokens per second on a card: 30%" in str(told) and "25% of the data sheet's 12" in str(told)


def test_a_small_gpt2_is_timed_by_the_same_code(monkeypatch):
    steps = []
    real = bench_limits.fit
    monkeypatch.setattr(bench_limits, "fit", lambda *a, **k: steps.append(a[3]) or real(*a, **k))
    monkeypatch.setattr(bench_limits, "peak_of", lambda device, dtype, sizes: (1e13 if dtype == torch.bfloat16 else 1e12, None))
    sizes = dict(vocab_size=64, hidden_size=16, layers=1, heads=2)
    found = gpt2_small_throughput(batch=2, length=8, steps=3, warm=2, compiled=False, **sizes)
    assert steps == [5] and found.tokens == pytest.approx(16 / found.seconds) and found.peak == 1e13
    assert found.flops * found.seconds == pytest.approx(model_flops(style("gpt2", max_length=8, **sizes), 2, 8))


def test_a_peak_is_measured_in_any_type():
    assert all(0 < peak_of("cpu", dtype, (16, 32), 1)[0] < 1e15 for dtype in (torch.float32, torch.bfloat16)) and peak_of("cpu", torch.float32, (16,), 1)[1] is None


def test_without_a_gpu_the_set_says_so(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop: cli.main(["bench", "gpu", "--json"])
    out, err = capfd.readouterr()
    assert stop.value.code == 1 and out == "" and "there is no GPU here" in err.splitlines()[-1]


def test_with_a_gpu_the_row_is_the_gap_to_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_limits, "gpt2_small_throughput", lambda **k: Throughput(1000.0, 4e12, 8e12, None, 0.25, "a card"))
    r = bench.bench("gpu")[0]
    assert r["ratio"] == pytest.approx(2.0) and r["ours"] == 250 and r["target"] == 2.5 and "50%" in r["peer"]


# What is kept

@pytest.fixture
def kept(tmp_path, monkeypatch):
    "Two sets that take no time, one of which lacks a peer; what is kept lies in a folder of its own."
    def good(repetitions: int = 8) -> dict:
        "something."
        return bench.row("good", "numpy; and more", (0.001, 0.002), target=0.8)
    def lacking(repetitions: int = 8) -> dict:
        "something else."
        raise bench.PeerMissing("no peer")
    monkeypatch.setattr(bench, "BENCHMARKS", {"basics": [good], "adapt": [good, lacking]})
    monkeypatch.setattr(bench, "ELSEWHERE", {"adapt": "json"}) # any module that is there
    monkeypatch.setenv("PTBOOK_RESULTS", str(tmp_path))
    return tmp_path/"speed"


def test_a_set_is_kept_whole_or_as_it_was(kept, capfd):
    with pytest.raises(SystemExit): cli.main(["bench", "all", "--save", "--repetitions", "3", "--json"])
    out, err = capfd.readouterr()
    assert len(json.loads(out)) == 2 and [p.name for p in kept.iterdir()] == ["basics.json"] and "kept in" in err
    record = bench.kept_rows()["basics"]
    assert record["rows"] == json.loads(out)[:1] and record["repetitions"] == 3 and record["versions"]["numpy"] == np.__version__
    assert record["machine"]["cores"] >= 1 and {"press.bench", "basics.models", "basics.train"} <= set(record["code"]) and not bench.changed(record)


def test_nothing_is_kept_unasked(kept):
    with pytest.raises(SystemExit): cli.main(["bench", "basics"])
    assert not kept.exists() and bench.kept_rows() == {}


def test_what_has_changed_is_named(kept):
    path = bench.keep_rows("basics", [bench.row("x", "y", (1.0, 2.0), 1.0)], 1.0)
    record = json.loads(path.read_text())
    record["code"] |= {"basics.models": "0", "basics.gone": "1"}
    path.write_text(json.dumps(record))
    assert sorted(bench.changed(bench.kept_rows()["basics"])) == ["basics.gone", "basics.models"]


def test_a_benchmark_started_as_a_program_names_its_modules():
    assert "merge.files" in bench.BY_NAME["merge"] and {"merge.files", "merge.methods", "press.bench_merge"} <= set(bench.at_work("press.bench_merge", *bench.BY_NAME["merge"]))


def test_measurements_are_no_results_of_experiments(kept):
    from ptbook.basics.results import load_results, stale
    bench.keep_rows("basics", [bench.row("x", "y", (1.0, 2.0), 1.0)], 1.0)
    assert load_results() == [] and stale() == [] and math.isfinite(bench.kept_rows()["basics"]["seconds"])
