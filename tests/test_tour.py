"What the notebook of the tour cannot show: the reader's own text in every form, texts that are too small, pages that cannot be written."
import json
import os
import re

import pytest
import torch

from ptbook.press import tour as module
from ptbook.press.tour import BLOCK, STOPS, Tour, all_stops, as_text, choose, coloured, cores, deduplicate, lines_of, page, read, spread_over, tour, write_page


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("PTBOOK_SCALE", "tiny")
    monkeypatch.setitem(module.SIZES, "hidden_size", 16)
    monkeypatch.setitem(module.SIZES, "layers", 1)


def prose(n, start=0):
    return [f"Document {i} speaks of the number {i * i} at length.\nIts line {i + 7} is unlike any other line here, of {i * 31} words.\n" for i in range(start, start + n)]


def test_the_readers_own_text_becomes_a_page(tmp_path, capsys):
    source, out = tmp_path / "notes.txt", tmp_path / "page.html"
    source.write_text("".join(prose(60)), encoding="utf-8")
    threads = torch.get_num_threads()
    life = tour(source, out, progress=True)
    assert torch.get_num_threads() == threads
    assert len(life.sections) == len(all_stops()) and set(life.bits) == {"the newborn", "the model", "uniform", "unigram", "bz2", "xz"}
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"<[^>]*\s(?:src|href)=[\"']?(?!data:|[\"'])", text) and "prefers-color-scheme" in text
    assert f"{life.bits['the model']:.3f}" in text and "notes.txt" in text
    told = capsys.readouterr().out
    assert all(f"{i}. {s.title}" in told for i, s in enumerate(life.sections, 1)) and as_text(life) in told
    assert list(tmp_path.iterdir()) == [source, out] or sorted(tmp_path.iterdir()) == sorted([source, out])
    ids = re.findall(r'class="ptbook-explore" id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) == 2


@pytest.mark.parametrize("form", ["folder", "jsonl", "parquet"])
def test_forms_of_text(tmp_path, form):
    documents = prose(60)
    if form == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        for i, document in enumerate(documents): (path / f"{i:02}.txt").write_text(document)
    elif form == "jsonl":
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    else:
        import pandas
        path = tmp_path / "text.parquet"
        pandas.DataFrame({"text": documents}).to_parquet(path)
    name, train, held_out = read(path)
    assert name == path.name and set(train) | set(held_out) <= set(documents) and not set(train) & set(held_out)
    told = {line for d in train for line in lines_of(d)}
    assert not any(line in told for d in held_out for line in lines_of(d))


def test_repeats_never_cross_over(tmp_path):
    path = tmp_path / "text.jsonl"
    documents = prose(40) * 3
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    _, train, held_out = read(path)
    assert len(train) == len(set(train)) and not set(train) & set(held_out)


def test_text_too_short_and_text_of_one_repeated_document(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A few words.\n" * 20)
    with pytest.raises(ValueError, match=rf"short\.txt.*too short.*{8 * BLOCK}"): tour(path, tmp_path / "x.html")
    same = tmp_path / "same.jsonl"
    same.write_text((json.dumps({"text": "Always the same document, again and again. " * 100}) + "\n") * 50)
    with pytest.raises(ValueError, match="too short"): read(same)
    assert not (tmp_path / "x.html").exists()


def test_a_small_text_has_a_small_held_out_set(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("".join(prose(30)))
    life = Tour(path)
    choose(life)
    assert 1 <= len(life.test) <= 3 and len(life.blocks) >= 8 and life.test.shape[1] == BLOCK


def test_missing_and_unreadable_text(tmp_path):
    with pytest.raises(FileNotFoundError): tour(tmp_path / "nothing.txt", tmp_path / "x.html")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe" * 5000)
    with pytest.raises(ValueError, match="UTF-8"): tour(bad, tmp_path / "x.html")


@pytest.mark.parametrize("out", ["folder", "no/such/folder/x.html"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, out):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(module, "all_stops", lambda: [lambda life: pytest.fail("the work had begun")])
    with pytest.raises(ValueError, match="out="): tour(out=tmp_path / out)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_bad_seconds(tmp_path, seconds):
    with pytest.raises(ValueError, match="seconds"): tour(out=tmp_path / "x.html", seconds=seconds)


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    write_page(out, "old")
    def broken(*_): raise OSError("no space left on device")
    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError): write_page(out, "new")
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_a_later_stop_only_needs_to_join_the_list(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("".join(prose(60)))
    monkeypatch.setattr(module, "all_stops", lambda: [*STOPS[:2], lambda life: module.Section("Adapt", "one line", f"<p>{len(life.train)}</p>")])
    life = tour(path, tmp_path / "x.html", progress=False)
    assert "<h2>3. Adapt</h2>" in page(life)


def test_text_on_the_page_is_escaped():
    shown = coloured("a<é", [1.0, 2.0, 3.0, 4.0])
    assert "&lt;" in shown and 'title="7.0 bits">é' in shown # two bytes, one character
    assert "<script>" not in module.quote("<script>\x00")


def test_spread_over_stays_within_the_limit():
    documents = [f"{i:04}" * 10 for i in range(1000)]
    kept = spread_over(documents, 4000)
    assert 3900 <= sum(map(len, kept)) <= 4000 and kept == sorted(kept)
    assert max(b - a for a, b in zip([int(k[:4]) for k in kept], [int(k[:4]) for k in kept[1:]])) < 40 # from all over
    assert spread_over(["é" * 100], 51) == ["é" * 25] # cut between characters
    assert spread_over(documents, 10**9) == documents


def test_deduplicate_leaves_out_blank_documents():
    assert deduplicate(["", "  \n", "a"], set()) == ["a"]


def test_cores_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= cores() <= os.cpu_count()
