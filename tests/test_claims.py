"""What the chapter on claims cannot show: bad input, failing seeds, dying workers, runs that are not saved."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from scipy import stats

from ptbook.basics import claims, results
from ptbook.basics.claims import SCALES, Experiment, as_scale, claim, experiment, parse_seeds, run, verdict
from ptbook.basics.results import Report, SeedFailed, load_results, results_folder

CHAPTER = "no.such_chapter"


def note(seed):
    "Leave a mark that a seed was run, and count the marks."
    folder = Path(os.environ["PTBOOK_TEST"])
    (folder / f"{seed}-{time.monotonic_ns()}-{os.getpid()}").touch()
    return len(list(folder.glob(f"{seed}-*")))


def marks(folder, seed): return len(list(Path(folder).glob(f"{seed}-*")))


@experiment("draws", chapter=CHAPTER, metric="points")
def draws(seed, scale):
    a = torch.randn(64, 64)
    return {"torch": (a @ a).sum().item(), "numpy": float(np.linalg.norm(np.random.randn(200, 200) @ np.random.randn(200, 200))),
            "random": random.random(), "threads": torch.get_num_threads()}


claim(draws, "torch", ">", "numpy", primary=True)


@experiment("fails", chapter=CHAPTER, metric="points")
def fails(seed, scale):
    note(seed)
    if seed == 1 and not os.environ.get("PTBOOK_TEST_MENDED"): raise LookupError("the cupboard is bare")
    return {"a": seed + 1, "b": seed}


@experiment("exits", chapter=CHAPTER, metric="points")
def exits(seed, scale):
    note(seed)
    if seed == 1: sys.exit(3)
    return {"a": 1.0}


@experiment("dies", chapter=CHAPTER, metric="points")
def dies(seed, scale):
    times = note(seed)
    if seed == 2 and not os.environ.get("PTBOOK_TEST_MENDED"): os.kill(os.getpid(), signal.SIGKILL)
    if seed == 3 and times == 1: os._exit(7)
    return {"a": seed + 1, "b": seed}


@experiment("values", chapter=CHAPTER, metric="points")
def values(seed, scale):
    kind = os.environ["PTBOOK_TEST_KIND"]
    if seed == 0: return {"a": 1, "b": 0}
    return {"nan": {"a": float("nan"), "b": 0}, "inf": {"a": np.inf, "b": 0}, "text": {"a": "much", "b": 0}, "none": None,
            "less": {"a": 1}, "more": {"a": 1, "b": 0, "c": 0}}[kind]


@experiment("sourced", chapter=CHAPTER, metric="points", sources=("here", "there"))
def sourced(seed, scale, source="here"): return {"a": len(source), "b": scale.pick(tiny=1, book=2)}


@pytest.fixture
def marked(tmp_path, monkeypatch):
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("PTBOOK_TEST", str(tmp_path / "marks"))
    return tmp_path


# scales, seeds, arguments

def test_scales(monkeypatch):
    assert [SCALES[s].seeds for s in ("tiny", "book", "full")] == [(0, 1), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)]
    assert SCALES["full"].pick(tiny=1, book=2) == 2 and SCALES["full"].pick(tiny=1) == 1 and SCALES["full"].pick(book=2, full=None) is None
    with pytest.raises(ValueError, match="wanted book="): SCALES["book"].pick(tiny=1)
    monkeypatch.delenv("PTBOOK_SCALE", raising=False)
    assert as_scale().name == "book"
    monkeypatch.setenv("PTBOOK_SCALE", "tiny")
    assert as_scale().name == "tiny" and as_scale("full").name == "full"
    with pytest.raises(ValueError, match="'huge', wanted one of tiny, book, full"): as_scale("huge")


def test_seeds():
    assert parse_seeds("0:5") == (0, 1, 2, 3, 4) and parse_seeds("3") == (3,) == parse_seeds(3) and parse_seeds("0,2,4") == (0, 2, 4)
    assert parse_seeds(range(2)) == (0, 1) and parse_seeds(np.arange(2)) == (0, 1)


@pytest.mark.parametrize("bad", ["5:0", "", "-1", "a", "0:", ":", "1:2:3", "0,,1", "1,1", "1.5", [], [-1], [0.5], [1, 0.5], ["x"], None, -3, "3:3"])
def test_bad_seeds(bad):
    with pytest.raises(ValueError, match=r'wanted "0:5"'): parse_seeds(bad)


@pytest.mark.parametrize("arguments, words", [({"scale": "huge"}, "huge"), ({"seeds": "5:0"}, "5:0"), ({"jobs": 0}, "jobs"), ({"jobs": "two"}, "jobs"),
                                              ({"source": "elsewhere"}, "elsewhere.*here, there")])
def test_bad_arguments(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words): run(sourced, folder=tmp_path, progress=False, **{"jobs": 1, **arguments})
    assert not list(tmp_path.iterdir())


def test_bad_names_and_claims():
    with pytest.raises(ValueError, match="a/b"): experiment("a/b", chapter=CHAPTER, metric="points")
    with pytest.raises(ValueError, match=r"\.\./x"): experiment("a", chapter=CHAPTER, metric="points", sources=["../x"])
    for given in ({}, {"chapter": CHAPTER}, {"metric": "points"}):
        with pytest.raises(TypeError, match="missing"): experiment("a", **given)
    with pytest.raises(ValueError, match="=="): claim(draws, "a", "==", "b")
    with pytest.raises(ValueError, match="times=nan"): claim(draws, "a", ">", "b", times=float("nan"))
    assert len(draws.claims) == 1


def test_claim_texts():
    exp = experiment("texts", chapter=CHAPTER, metric="points")(lambda seed, scale: {})
    texts = [claim(exp, "a", ">", "b"), claim(exp, "a", "<", "b", times=0.5), claim(exp, "a", ">=", "b", margin=0.01),
             claim(exp, "a", "<=", "b", margin=0.01), claim(exp, "a", ">", "b", margin=-2), claim(exp, "a", "<", "b", margin=-2)]
    assert [c.text for c in texts] == ["a > b", "a < 0.5 × b", "a ≥ b − 0.01", "a ≤ b + 0.01", "a > b + 2", "a < b − 2"]
    claim(exp, "a", ">", "b", primary=True)  # the cell run again
    assert len(exp.claims) == 6 and exp.claims[-1].primary


# verdicts

def test_interval_is_scipys():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 30):
        a, b = rng.normal(size=(2, n)) + [[1], [0]]
        theirs, ours = stats.ttest_rel(a, b).confidence_interval(0.95), verdict(a, ">", b)
        assert np.allclose([ours.low, ours.high, ours.effect], [theirs.low, theirs.high, (a - b).mean()], atol=1e-12)
        p = stats.ttest_rel(a, b).pvalue
        assert (ours.verdict != "undecided") == (p < 0.05)


@pytest.mark.parametrize("op", [">", "<", ">=", "<="])
def test_false_support_at_no_effect(op):
    a, b = np.random.default_rng(1).normal(size=(2, 2000, 5))
    found = [verdict(x, op, y).verdict for x, y in zip(a, b)]
    assert 0.015 <= found.count("supported") / 2000 <= 0.03 and 0.015 <= found.count("contradicted") / 2000 <= 0.035


def test_margin_and_times_move_the_threshold():
    rng = np.random.default_rng(2)
    at_margin = rng.normal(size=(2000, 5)) - 0.5  # true difference exactly −margin
    assert np.mean([verdict(d, ">=", np.zeros(5), margin=0.5).verdict == "supported" for d in at_margin]) <= 0.03
    assert np.mean([verdict(-d, "<=", np.zeros(5), margin=0.5).verdict == "supported" for d in at_margin]) <= 0.03
    assert verdict([4, 4.1, 3.9], "<", [10, 10, 10], times=0.5).verdict == "supported"
    assert verdict([4, 4.1, 3.9], "<", [10, 10, 10], times=0.3).verdict == "contradicted"


def test_verdict_limits():
    same = [0.3] * 5
    assert verdict([1], ">", [0]) == claims.Verdict("undecided", 1.0, None, None)
    assert [verdict(same, op, same).verdict for op in (">", ">=", "<", "<=")] == ["undecided", "supported", "undecided", "supported"]
    assert verdict(same, ">", [0.1] * 5, times=3) == claims.Verdict("undecided", 0.0, 0.0, 0.0)  # 0.3 - 3 * 0.1 is 5.6e-17
    assert verdict([0.29] * 5, ">=", same, margin=0.01).verdict == "supported" and verdict([0.28] * 5, ">=", same, margin=0.01).verdict == "contradicted"
    assert verdict([2] * 5, ">", [1] * 5) == claims.Verdict("supported", 1.0, 1.0, 1.0)


@pytest.mark.parametrize("a, b", [([1, np.nan], [0, 0]), ([1, 2], [np.inf, 0]), ([1, 2], [1]), ([], []), ([[1]], [[2]]), ([1e308, 1], [-1e308, 0])])
def test_verdict_refuses(a, b):
    with pytest.raises(ValueError, match="verdict: "): verdict(a, ">", b)


# runs

def test_same_numbers_whatever_the_jobs(tmp_path):
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    before, threads = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()), torch.get_num_threads()
    one = run(draws, "book", jobs=1, progress=False, folder=tmp_path / "one")
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()
    assert torch.get_num_threads() == threads and one.arms["threads"] == [1] * 5 and len(set(one.arms["torch"])) == 5
    two = run(draws, "book", jobs=2, progress=False, folder=tmp_path / "two")
    with joblib.parallel_config(backend="threading"): three = run(draws, "book", jobs=2, progress=False)  # one after the other: threads share generators
    with joblib.parallel_config(backend="multiprocessing"): four = run(draws, "book", jobs=2, progress=False)  # has no stream of results, like Ray's
    assert one.arms == two.arms == three.arms == four.arms
    assert run(draws, "book", seeds="4,1", jobs=1, progress=False).arms["random"] == [one.arms["random"][4], one.arms["random"][1]]


def test_a_seed_that_raises(marked, monkeypatch):
    with pytest.raises(SeedFailed, match=r"(?s)seed 1 failed.*LookupError: the cupboard is bare.*Seeds 0, 2, 3, 4 are kept") as e:
        run(fails, "book", jobs=2, progress=False, folder=marked / "results")
    assert list(e.value.failed) == [1] and "in fails\n" in e.value.failed[1] and not load_results(marked / "results")
    monkeypatch.setenv("PTBOOK_TEST_MENDED", "1")
    report = run(fails, "book", jobs=1, progress=False, folder=marked / "results")
    assert [marks(marked / "marks", s) for s in range(5)] == [1, 2, 1, 1, 1] and report.arms == {"a": [1, 2, 3, 4, 5], "b": [0, 1, 2, 3, 4]}
    assert [p.name for p in (marked / "results").rglob("*") if p.is_file()] == ["fails.book.json"]


def test_a_seed_that_exits(marked):
    with pytest.raises(SeedFailed, match="SystemExit: 3"): run(exits, "tiny", jobs=1, progress=False, folder=marked / "results")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_worker_that_dies(marked, monkeypatch):
    with pytest.raises(SeedFailed, match=r"(?s)dies: seed 2 failed.*SIGKILL.*Seeds 0, 1, 3, 4 are kept") as e:
        run(dies, "book", jobs=2, progress=False, folder=marked / "results")
    assert list(e.value.failed) == [2]  # seed 3 died once and was well when tried again
    before = [marks(marked / "marks", s) for s in range(5)]
    monkeypatch.setenv("PTBOOK_TEST_MENDED", "1")
    report = run(dies, "book", jobs=2, progress=False, folder=marked / "results")
    assert [marks(marked / "marks", s) for s in range(5)] == [before[0], before[1], before[2] + 1, before[3], before[4]]
    assert report.arms["b"] == [0, 1, 2, 3, 4]


SCRIPT = """
import os, sys, pathlib
from ptbook.basics.claims import experiment, claim, run
marks = pathlib.Path(sys.argv[1]); jobs = int(sys.argv[2])
def helper(seed): (marks / f"{seed}-{os.getpid()}").touch(); return seed * 0.5
@experiment("script", chapter="no.such_chapter", metric="points")
def script(seed, scale):
    if seed == 3 and not (marks / "mended").exists(): (marks / "mended").touch(); os._exit(9)
    return {"a": helper(seed), "b": -1}
claim(script, "a", ">", "b")
print(run(script, "book", jobs=jobs, progress=False, folder=marks / "results").arms["a"])
"""


def test_the_whole_run_dies_and_goes_on(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    go = lambda: subprocess.run([sys.executable, tmp_path / "script.py", tmp_path, "1"], capture_output=True, text=True)
    assert go().returncode == 9
    done = go()
    assert done.stdout.strip() == "[0.0, 0.5, 1.0, 1.5, 2.0]", done.stderr
    assert [marks(tmp_path, s) for s in range(5)] == [1] * 5


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupted_run_goes_on(tmp_path):
    body = SCRIPT.replace("os._exit(9)", "os.kill(os.getpid(), signal.SIGINT)").replace("import os", "import os, signal", 1)
    (tmp_path / "script.py").write_text(body)
    go = lambda: subprocess.run([sys.executable, tmp_path / "script.py", tmp_path, "1"], capture_output=True, text=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a job in the background of a shell would be deaf to it
    assert "KeyboardInterrupt" in go().stderr and go().stdout.strip() == "[0.0, 0.5, 1.0, 1.5, 2.0]"
    assert [marks(tmp_path, s) for s in range(5)] == [1] * 5


def test_the_data_travel_with_the_result(tmp_path):
    from ptbook.basics.sources import load
    loads = experiment("loads", chapter=CHAPTER, metric="rows")(lambda seed, scale: {"rows": len(load("wine")["train"])})
    report = run(loads, "tiny", jobs=1, progress=False, folder=tmp_path)
    assert [(d["name"], d["place"]) for d in report.data] == [("wine", "embedded")] and report.data[0]["fingerprint"] in load_results(tmp_path)[0].data[0]["fingerprint"]


@pytest.mark.parametrize("kind, words", [("nan", "arm 'a' of 'values' is nan at seed 1"), ("inf", "arm 'a' .* inf at seed 1"), ("text", "arm 'a' .* 'much' at seed 1"),
                                         ("none", "returned None at seed 1"), ("less", "arm 'b' .* missing at seed 1"), ("more", "arm 'c' .* missing at seed 0")])
def test_values_that_are_none(kind, words, monkeypatch, tmp_path):
    monkeypatch.setenv("PTBOOK_TEST_KIND", kind)
    with pytest.raises(ValueError, match=words): run(values, "tiny", jobs=1, progress=False, folder=tmp_path)
    assert not load_results(tmp_path)


def test_a_claim_about_no_arm(tmp_path):
    exp = experiment("texts", chapter=CHAPTER, metric="points")(lambda seed, scale: {"a": 1})
    claim(exp, "a", ">", "ghost")
    with pytest.raises(ValueError, match="'ghost' of 'texts' is missing at seed 0"): run(exp, "tiny", jobs=1, progress=False, folder=tmp_path)


def test_sources(tmp_path):
    assert run(sourced, "tiny", jobs=1, progress=False, folder=tmp_path).arms == {"a": [4, 4], "b": [1, 1]}
    assert run(sourced, "tiny", source="there", jobs=1, progress=False, folder=tmp_path).arms["a"] == [5, 5]
    assert {p.name for p in tmp_path.glob("*.json")} == {"sourced.tiny.json", "sourced.tiny.there.json"}


# what is kept

def test_the_result_file(tmp_path):
    report = run(draws, "tiny", jobs=1, progress=False, folder=tmp_path)
    record = json.loads((tmp_path / "draws.tiny.json").read_text("utf-8"))
    assert set(record) == {"slug", "chapter", "metric", "scale", "source", "seeds", "seconds", "arms", "claims", "data", "versions", "machine", "code"}
    assert set(record["claims"][0]) == {"text", "primary", "verdict", "effect", "low", "high"} and {"python", "torch", "numpy"} <= set(record["versions"])
    assert {k: record[k] for k in report.to_dict()} == report.to_dict() and set(record["machine"]) == {"system", "processor", "cores"}
    again = load_results(tmp_path)[0]
    assert isinstance(again, Report) and again.to_dict() == report.to_dict()
    assert "torch > numpy" in str(again) and "torch &gt; numpy" in again._repr_html_() and "undecided" in str(again) or "contradicted" in str(again)


def test_other_seeds_are_not_saved(tmp_path):
    report = run(draws, "tiny", seeds="7", jobs=1, progress=False, folder=tmp_path)
    assert "Not saved" in report.note and not list(tmp_path.glob("*.json")) and report.claims[0]["low"] is None and "–" in str(report)


def test_a_toy_never_reaches_the_book(monkeypatch):
    monkeypatch.delenv("PTBOOK_RESULTS", raising=False)
    before = set(results_folder(writing=True).rglob("*"))
    assert "Not saved: ptbook.no.such_chapter" in run(draws, "book", jobs=1, progress=False).note
    assert set(results_folder(writing=True).rglob("*")) == before


def test_a_tiny_run_is_kept_only_where_it_is_asked_for(monkeypatch, tmp_path):
    def chapters_own(seed, scale): return {"a": seed}
    chapters_own.__module__ = "ptbook.basics.results"  # as if the module held it
    exp = experiment("own", chapter="basics.results", metric="points")(chapters_own)
    monkeypatch.delenv("PTBOOK_RESULTS", raising=False)
    monkeypatch.setattr(claims, "results_folder", lambda writing=False: tmp_path / "book")
    assert "Not saved: the scale tiny is for tests" in run(exp, "tiny", jobs=1, progress=False).note and not list(tmp_path.rglob("*.json"))
    assert run(exp, "tiny", jobs=1, progress=False, folder=tmp_path / "mine").note == "Saved as own.tiny.json."
    assert run(exp, "book", jobs=1, progress=False).note == "Saved as own.book.json."
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*.json"))] == ["book/own.book.json", "mine/own.tiny.json"]
    monkeypatch.undo()
    monkeypatch.setenv("PTBOOK_RESULTS", str(tmp_path / "readers"))
    assert "Not saved" in run(exp, "tiny", jobs=1, progress=False).note and not list((tmp_path / "readers").rglob("*.json"))


def test_results_go_where_the_setting_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PTBOOK_RESULTS", str(tmp_path))
    assert results_folder() == tmp_path and "Saved" in run(draws, "book", jobs=1, progress=False).note and (tmp_path / "draws.book.json").exists()


def test_a_folder_that_cannot_be_written(marked):
    (marked / "results").write_text("a file")
    with pytest.raises(OSError): run(fails, "book", jobs=1, progress=False, folder=marked / "results")
    assert not marks(marked / "marks", 0)  # found before any work was done


def test_a_disk_that_fills_loses_nothing(marked, monkeypatch):
    monkeypatch.setenv("PTBOOK_TEST_MENDED", "1")
    run(fails, "tiny", jobs=1, progress=False, folder=marked / "results")
    before, write = (marked / "results" / "fails.tiny.json").read_text(), results.write_json
    def full(path, record):
        if path.name == "fails.tiny.json": raise OSError(28, "No space left on device")
        write(path, record)
    monkeypatch.setattr(results, "write_json", full)
    with pytest.raises(OSError, match="No space"): run(fails, "tiny", jobs=1, progress=False, folder=marked / "results")
    assert (marked / "results" / "fails.tiny.json").read_text() == before and marks(marked / "marks", 0) == 2
    monkeypatch.setattr(results, "write_json", write)
    run(fails, "tiny", jobs=1, progress=False, folder=marked / "results")
    assert marks(marked / "marks", 0) == 2  # the seeds were kept


class NeverLoads:
    "Can be sent, and not be read."
    def __reduce__(self): return int, ("not a number",)


@pytest.mark.parametrize("held", [threading.Lock(), NeverLoads()], ids=["cannot be sent", "cannot be read"])
def test_an_experiment_that_cannot_travel_runs_here(held, tmp_path):
    made = Experiment(lambda seed, scale: {"a": float(seed), "b": float(held is None)}, "stays", "nowhere.chapter", "unit")
    report = run(made, "tiny", jobs=2, progress=False, folder=tmp_path)
    assert report.arms == {"a": [0.0, 1.0], "b": [0.0, 0.0]}


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_workers_end_with_their_program(tmp_path):
    "Also if it is killed, and cannot tell them."
    (tmp_path / "script.py").write_text(f"""
import os, time
from pathlib import Path
from ptbook.basics.claims import experiment, run
def slow(seed, scale):
    Path({str(tmp_path)!r}, f"pid-{{os.getpid()}}").touch()
    time.sleep(60)
if __name__ == "__main__": run(experiment("slow", chapter="tests.none", metric="points")(slow), "tiny", jobs=2, progress=False, folder={str(tmp_path / "results")!r})
""")
    program = subprocess.Popen([sys.executable, tmp_path / "script.py"], start_new_session=True)
    try:
        until = lambda done: any(done() or time.sleep(0.2) for _ in range(300))
        workers = lambda: [int(p.name[4:]) for p in tmp_path.glob("pid-*")]
        assert until(lambda: len(workers()) == 2)
        program.kill(), program.wait()
        assert until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers()))
    finally:
        for pid in [program.pid, *workers()]:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
