"""What the chapter on results cannot show: files that are spoiled, folders of other places, code that changes under a result."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ptbook
from ptbook.basics import results
from ptbook.basics.results import (Report, check_values, code_hash, forget_seeds, function_hash, gather, is_exported, kept_seeds, load_results,
                                   module_source, read_report, results_folder, save_report, stale, versions, write_json)

CLAIM = {"text": "a > b", "primary": True, "verdict": "undecided", "effect": 0.5, "low": None, "high": None}
NAME = "toy.book.json"


def report(**changes):
    return Report(**{"slug": "toy", "chapter": "no.such_chapter", "metric": "points", "scale": "book", "source": None, "seeds": [0, 1], "seconds": 0.1,
                     "arms": {"a": [1.0, 2.0], "b": [0.1 + 0.2, 1 / 3]}, "claims": [CLAIM], "data": [{"name": "wine", "place": "embedded", "fingerprint": "0123456789abcdef"}],
                     "versions": {"python": "3"}, "machine": {"cores": 2}, "code": "0" * 16} | changes)


# writing and reading

def test_what_is_written_is_read(tmp_path):
    assert save_report(report(note="not kept"), tmp_path) == NAME and save_report(report(source="wine"), tmp_path) == "toy.book.wine.json"
    assert load_results(tmp_path) == [report(), report(source="wine")]  # floats to the last bit
    record = json.loads((tmp_path / NAME).read_text("utf-8"))
    assert set(record) == {"slug", "chapter", "metric", "scale", "source", "seeds", "seconds", "arms", "claims", "data", "versions", "machine", "code"}
    assert {k: record[k] for k in report().to_dict()} == report().to_dict()


def test_a_report_is_shown():
    shown = report()
    assert "a > b" in str(shown) and "a &gt; b" in shown._repr_html_() and "wine (embedded, 0123456789ab)" in str(shown)
    assert "made by the experiment" in str(report(data=[], claims=[])) and "<b>" not in report(note="<b>")._repr_html_()


@pytest.mark.parametrize("spoil", [lambda r: "", lambda r: "[]", lambda r: "3", lambda r: json.dumps(r)[:-9], lambda r: json.dumps({k: v for k, v in r.items() if k != "arms"}),
                                   lambda r: json.dumps(r | {"arms": {"a": [1]}}), lambda r: json.dumps(r | {"arms": {}}), lambda r: json.dumps(r | {"arms": [[1, 2]]}),
                                   lambda r: json.dumps(r | {"arms": {"a": [1, float("nan")]}}), lambda r: json.dumps(r).replace("2.0", "1e999"),
                                   lambda r: json.dumps(r | {"arms": {"a": [1, "x"]}}), lambda r: json.dumps(r | {"claims": [{"text": "a > b"}]}),
                                   lambda r: json.dumps(r | {"claims": [CLAIM | {"opinion": "nice"}]}), lambda r: json.dumps(r | {"claims": [3]}), lambda r: json.dumps(r | {"extra": 1})])
def test_a_malformed_file_is_named(spoil, tmp_path):
    path = tmp_path / save_report(report(), tmp_path)
    path.write_text(spoil(json.loads(path.read_text("utf-8"))))
    for reader in (load_results, stale, lambda folder: read_report(folder / NAME)):
        with pytest.raises(ValueError, match=f"{NAME} is not a result file"): reader(tmp_path)


def test_a_folder_without_results(tmp_path):
    assert load_results(tmp_path) == [] == stale(tmp_path) == load_results(tmp_path / "nowhere")


@pytest.mark.parametrize("bad", [{"a": math.nan}, {"a": np.float32(1)}, {"a": object()}])
def test_a_file_is_replaced_whole_or_not_at_all(bad, tmp_path):
    write_json(tmp_path / "deep/er/a.json", {"a": "ä"})
    with pytest.raises((TypeError, ValueError)): write_json(tmp_path / "deep/er/a.json", bad)
    assert json.loads((tmp_path / "deep/er/a.json").read_text("utf-8")) == {"a": "ä"} and len(list((tmp_path / "deep/er").iterdir())) == 1


def test_a_move_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    save_report(report(), tmp_path)
    def full(source, target): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"): save_report(report(seconds=9.0), tmp_path)
    assert load_results(tmp_path) == [report()] and [p.name for p in tmp_path.iterdir()] == [NAME]


# folders

def test_results_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PTBOOK_RESULTS", str(tmp_path))
    assert results_folder() == results_folder(writing=True) == tmp_path
    monkeypatch.delenv("PTBOOK_RESULTS")
    monkeypatch.setattr(ptbook, "__file__", str(tmp_path / "site-packages/ptbook/__init__.py"))
    assert results_folder() == tmp_path / "site-packages/ptbook/_book/results" and results_folder(writing=True) == Path("results")
    (tmp_path / "site-packages/settings.ini").parent.mkdir()
    (tmp_path / "site-packages/settings.ini").touch()
    assert results_folder() == results_folder(writing=True) == tmp_path / "site-packages/results"


def test_finished_seeds(tmp_path):
    where = tmp_path / ".partial" / "toy"
    assert kept_seeds(None, [0, 1]) == {} == kept_seeds(where, [0, 1])
    whole = {"seed": 0, "values": {"a": 0.1 + 0.2}, "data": [], "versions": {}}
    write_json(where / "seed-0.json", whole)
    write_json(where / "seed-1.json", {"seed": 7, "values": {"a": 1}})  # of another seed
    write_json(where / "seed-2.json", {"seed": 2})
    (where / "seed-3.json").write_text("[")
    (where / "other").touch()
    assert kept_seeds(where, range(9)) == {0: whole}
    forget_seeds(where, range(9))
    assert [p.name for p in where.iterdir()] == ["other"]  # not ours: left alone


# seeds put together

@pytest.mark.parametrize("values, words", [(None, "returned None at seed 1"), ({}, "returned {} at seed 1"), ({"b": 1}, "arm 'a' of 'toy' is missing at seed 1; got b"),
                                           ({"a": math.inf}, "arm 'a' .* inf at seed 1"), ({"a": "much"}, "arm 'a' .* 'much' at seed 1"), ({"a": [1, 2]}, "arm 'a'")])
def test_values_that_are_none(values, words):
    with pytest.raises(ValueError, match=words): check_values("toy", 1, values, wanted=["a"])


def test_seeds_are_gathered_in_their_order():
    outcome = lambda seed, arms="ab": {"seed": seed, "values": {arm: float(seed) for arm in arms}, "data": [{"name": "wine"}], "versions": {"python": "3"}}
    found = gather("toy", [outcome(4), outcome(1)])
    assert found["seeds"] == [4, 1] and found["arms"] == {"a": [4, 1], "b": [4, 1]} and found["data"] == [{"name": "wine"}]
    assert set(found["machine"]) == {"system", "processor", "cores"} and {"python", "numpy"} <= set(versions())
    with pytest.raises(ValueError, match="arm 'b' of 'toy' is missing at seed 1"): gather("toy", [outcome(4), outcome(1, "a")])
    with pytest.raises(ValueError, match="arm 'c' of 'toy' is missing at seed 4"): gather("toy", [outcome(4), outcome(1, "abc")])


# code

def test_stale(tmp_path, monkeypatch):
    save_report(report(), tmp_path)
    assert stale(tmp_path) == [NAME]  # no such chapter
    save_report(report(code=None), tmp_path)
    assert stale(tmp_path) == [NAME]  # nothing vouches for it
    save_report(report(chapter="basics.claims", code=code_hash("basics.claims")), tmp_path)
    assert stale(tmp_path) == []
    source = module_source("basics.claims")
    monkeypatch.setattr(results, "module_source", lambda chapter: source.replace("\n\n", "\n\n# prose\n\n"))
    assert stale(tmp_path) == []
    monkeypatch.setattr(results, "module_source", lambda chapter: source.replace("0.95", "0.90"))
    assert stale(tmp_path) == [NAME]


def test_no_such_module():
    assert module_source("no.such_chapter") is None and module_source("ptbook.basics.results") == Path(results.__file__).read_text("utf-8")
    with pytest.raises(ValueError, match="there is no module 'no.such_chapter' in ptbook"): code_hash("no.such_chapter")


def test_what_the_module_holds_may_be_vouched_for():
    assert is_exported(gather, "basics.results") and function_hash(gather, "basics.results") == code_hash("basics.results")
    assert not is_exported(report, "basics.results") and not is_exported(gather, "no.such_chapter") and not is_exported(len, "basics.results")
    assert function_hash(report, "basics.results") not in (None, code_hash("basics.results"))
    assert function_hash(lambda seed, held=(n for n in "abc"): held, "basics.results") is None  # a generator cannot be sent


def test_results_rest_on_little():
    code = "import sys, ptbook.basics.results; print(*[m for m in ('torch', 'pandas', 'matplotlib', 'ptbook.basics.claims') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
