"From files to files: what is written is whole, complete and the same every time."
import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ptbook.curate import report
from ptbook.curate.records import REASONS, Files, Record
from ptbook.curate.report import RowWriter, sample, select_files


def pool(folder: Path, shards: int = 6, rows: int = 120) -> Path:
    "Shards of JSON lines about three things, one line damaged."
    folder.mkdir()
    draw = random.Random(0)
    words = {"sea": "ship wave tide sail harbour".split(), "kitchen": "bread oven salt knife butter".split(), "sky": "cloud wind star bird rain".split()}
    for shard in range(shards):
        lines = []
        for i in range(rows):
            domain = draw.choice(sorted(words))
            lines.append(json.dumps({"text": f"{shard} {i} " + " ".join(draw.choices(words[domain] + ["the", "a", "of"], k=40)), "domain": domain, "n": i if i % 3 else str(i)}))
        (folder/f"{shard}.jsonl").write_text("\n".join(lines) + ('\n{"text": "cut' if shard == 2 else ""))
    (folder.parent/"target.txt").write_text("\n\n".join(" ".join(draw.choices(words["sea"], k=30)) for _ in range(20)))
    return folder


def quiet(*args, **settings) -> report.Written:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select_files(*args, **settings)


def test_kept_reasons_and_page_agree(tmp_path):
    made = quiet(pool(tmp_path/"pool"), tmp_path/"kept.parquet", target=tmp_path/"target.txt", keep=0.2)
    kept, reasons, page = pq.read_table(made.kept).to_pylist(), pq.read_table(made.reasons).to_pylist(), made.page.read_text()
    read = list(Files(tmp_path/"pool"))
    assert [r["place"] for r in reasons] == [r.place for r in read] and {r["reason"] for r in reasons} <= set(REASONS)
    above = [r for r in reasons if r["reason"] == "kept"]
    assert [k["selection_place"] for k in kept] == [r["place"] for r in above] and [k["selection_score"] for k in kept] == [r["score"] for r in above]
    assert {k["domain"] for k in kept} == {"sea"} and len(kept) == made.selection.counts["kept"] == 144
    assert f"{len(read):,} records were read: 144 kept" in page and "2.jsonl:121: malformed JSON" in html.unescape(page)
    assert sum(r["reason"] == "unreadable" for r in reasons) == 1 and [r["problem"] for r in reasons if r["problem"]] == [next(r.problem for r in read if r.problem)]


def test_the_same_every_time_and_in_any_file(tmp_path):
    folder = pool(tmp_path/"pool")
    one = quiet(folder, tmp_path/"a.parquet", target=tmp_path/"target.txt")
    two = quiet(folder, tmp_path/"b.parquet", target=tmp_path/"target.txt")
    assert one.kept.read_bytes() == two.kept.read_bytes() and one.reasons.read_bytes() == two.reasons.read_bytes()
    joined = [line for path in sorted(folder.iterdir(), reverse=True) for line in path.read_text().splitlines()]
    (tmp_path/"joined.jsonl").write_text("\n".join(joined))
    three = quiet(tmp_path/"joined.jsonl", tmp_path/"c.parquet", target=tmp_path/"target.txt")
    assert {r["text"] for r in pq.read_table(one.kept).to_pylist()} == {r["text"] for r in pq.read_table(three.kept).to_pylist()}


def test_the_page_is_safe_to_open(tmp_path):
    (tmp_path/"a.jsonl").write_text("\n".join(json.dumps({"text": f"<script>alert({i})</script> & more", "domain": "<b>"}) for i in range(30)))
    page = quiet(tmp_path/"a.jsonl", tmp_path/"k.parquet", "random", keep=0.5).page.read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page and not re.search(r'(src|href)="(?!data:)', page)


def test_out_may_not_be_what_is_read(tmp_path):
    made = quiet(pool(tmp_path/"pool"), tmp_path/"pool"/"kept.parquet", "random")
    with pytest.raises(ValueError, match="written over"): quiet(tmp_path/"pool", made.kept, "random")


def test_files_that_change_are_noticed(tmp_path, monkeypatch):
    folder = pool(tmp_path/"pool")
    real = report.select
    def and_then_one_more(*args, **settings):
        done = real(*args, **settings)
        with open(folder/"5.jsonl", "a") as file: file.write('\n{"text": "one more"}')
        return done
    monkeypatch.setattr(report, "select", and_then_one_more)
    with pytest.raises(ValueError, match="changed while it was read"): quiet(folder, tmp_path/"kept.parquet", "random")
    assert not [p for p in tmp_path.iterdir() if "kept" in p.name or p.name.startswith(".")]


def test_rows_of_any_shape(tmp_path):
    draw = random.Random(1)
    values = [None, 1, 2**70, 1.5, "text", True, [1, "a"], {"k": [1]}, {"k": {"l": None}}, []]
    rows = [{f"c{j}": draw.choice(values) for j in range(6) if draw.random() < 0.7} | {"text": str(i)} for i in range(200)]
    with RowWriter(tmp_path/"rows.parquet", chunk=7) as writer:
        for row in rows: writer.add(row)
    back = pq.read_table(tmp_path/"rows.parquet").to_pylist()
    assert [r["text"] for r in back] == [r["text"] for r in rows] and len(list(tmp_path.iterdir())) == 1
    for row, got in zip(rows, back):
        for name in row:
            said = got[name]
            assert said == row[name] or json.loads(said) == row[name], (name, row[name], said)


@pytest.mark.parametrize("nest", [lambda n: n, lambda n: [n], lambda n: {"of": n}])
def test_no_number_is_rounded(tmp_path, nest):
    numbers = [2**53 + 1, None, 0.5, 3]
    with RowWriter(tmp_path/"rows.parquet", chunk=1) as writer:
        for number in numbers: writer.add({"n": nest(number), "whole": 2**53 + 1, "few": 0.5 if number == 3 else 7})
    back = pq.read_table(tmp_path/"rows.parquet").to_pydict()
    assert [r if r is None else json.loads(r) for r in back["n"]] == [nest(number) for number in numbers]
    assert back["whole"] == [2**53 + 1] * 4 and back["few"] == [7.0, 7.0, 7.0, 0.5]


def test_a_sample_is_fair_and_repeatable():
    stream = [Record(f"text {i}") for i in range(3000)] + [Record(None), Record(" ")]
    drawn = sample(stream, 300)
    assert drawn == sample(random.Random(0).sample(stream, len(stream)), 300) and len(set(drawn)) == 300
    assert set(sample(stream, 100)) < set(drawn) and len(sample(stream, 10_000)) == 3000
    with pytest.raises(ValueError, match="no text"): sample([Record(" ")], 5)
