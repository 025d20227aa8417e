"Files from strangers: whatever is in them, a reader reads what they say or refuses by name, soon, in little memory, and touches nothing else."
import gzip
import json
import math
import os
import shutil
import struct
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
from hostile import Child

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", 0)) # per reader; 0: as many as `make test` has time for
TALLY: dict[str, Counter] = defaultdict(Counter) # reader -> outcome -> inputs


# What is whole before it is spoilt: for each reader, what it is asked for and which files of it are spoilt in which way.

def write(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else json.dumps(data).encode())
    return path

ROWS = [{"text": f"line {i}: naïve, \"quoted\" text\n of a document", "n": i, "x": i / 3, "deep": {"a": [i, None]}, "on": i % 2 == 0} for i in range(40)]
LINES = "\n".join(map(json.dumps, ROWS))

def table(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [r["text"] for r in ROWS], "n": [r["n"] for r in ROWS], "deep": [r["deep"] for r in ROWS], "bytes": [b"\x00\xff"] * 40}), path, row_group_size=15)
    return path

def wav(path: Path) -> Path: return write(path, b"RIFF" + struct.pack("<I", 36 + 64) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 2, 8000, 32000, 4, 16) + b"data" + struct.pack("<I", 64) + bytes(range(64)))

def text_folder(path: Path) -> Path:
    for name in ("a.txt", "b/c.md", "b/d.bin"): write(path/name, f"text of {name}\n\nand more of it\n" * 5)
    return path

def mixed_folder(path: Path) -> Path:
    write(path/"a.jsonl", LINES), write(path/"b.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)), table(path/"c.parquet"), write(path/"d.txt", "some text of a file\n" * 9)
    return path

def adapter_folder(path: Path) -> Path:
    from ptbook.adapt.adapter_files import save
    from ptbook.adapt.adapters import adapt
    from ptbook.adapt.lora import LoRA
    return save(adapt(hostile.small_bert(), LoRA(r=2), ["query"], train_also=["cls"]), path)

def model_folder(path: Path, shards: bool = False) -> Path:
    from safetensors.torch import load_file, save_file
    hostile.small_bert().save_pretrained(path)
    if not shards: return path
    held = load_file(path/"model.safetensors")
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(held)}
    for file in set(where.values()): save_file({name: held[name] for name in held if where[name] == file}, path/file, metadata={"format": "pt"})
    write(path/"model.safetensors.index.json", {"metadata": {"total_size": sum(t.nbytes for t in held.values())}, "weight_map": where})
    (path/"model.safetensors").unlink()
    return path

def two_folders(path: Path) -> Path:
    for name in "ab": write(model_folder(path/name)/"vocab.json", {"a": 0, "b": 1}), write(path/name/"tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": 1 + (name == "b")}]})
    write(path/"b/tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []})
    return path

def checkpoint_folder(path: Path) -> Path:
    import torch
    path.mkdir()
    keeper = hostile.keeper(path)
    keeper.model(torch.zeros(2, dtype=torch.long)).sum().backward()
    keeper.optimizer.step()
    keeper.save([{"step": 1, "loss": 1.0}], 2.0)
    return path

def store_folder(path: Path) -> Path:
    import torch
    from ptbook.distill.stored_logits import Layout, write_part
    layout = Layout(20, 2, 3, 10, "ab" * 32, part=25)
    for number in range(layout.parts):
        n = len(layout.range(number))
        write_part(path, layout, number, np.arange(n, dtype=np.int32), torch.arange(3).expand(n, 3), torch.full((n, 3), 0.25), [0.5] * 8)
    return path

def causal_folder(path: Path) -> Path:
    import tokenizers, transformers
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(path)
    return path

RESULT = {"slug": "s", "chapter": "c", "metric": "m", "scale": "book", "source": None, "seeds": [0, 1], "seconds": 1.5, "arms": {"a": [1.0, 2.0], "b": [0.5, 1]},
          "claims": [{"text": "a > b", "primary": True, "verdict": "undecided", "effect": 0.5, "low": -1.0, "high": 2.0}], "data": [{"name": "d", "place": "embedded", "fingerprint": "0"}],
          "versions": {"torch": "2"}, "machine": {"cores": 2}, "code": "0"}
SEED = {"seed": 0, "values": {"a": 1.0, "b": 2.0}, "data": [{"name": "d"}], "versions": {"torch": "2"}, "seconds": 1.0}
NOTEBOOK = {"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title\n", "\n", "> A sentence.\n", "\n", "See [a paper](https://arxiv.org/abs/1)."]},
                      {"cell_type": "code", "id": "b", "metadata": {"tags": []}, "execution_count": 1, "source": ["#| fig-alt: words\n", "1 + 1"], "outputs": [
                          {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": ["2"], "image/png": "iVBORw0KGgo="}}, {"output_type": "stream", "name": "stdout", "text": ["targets met\n"]}]}],
            "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}

def book_folder(path: Path) -> Path:
    write(path/"nbs/01_x/y.ipynb", NOTEBOOK), write(path/"settings.ini", "[DEFAULT]\nlib_name = ptbook\ngit_url = https://github.com/a/b\nbranch = main\n")
    write(path/"_quarto.yml", "project: {output-dir: _docs, render: ['nbs/**/*.ipynb', 'nbs/*/*.ipynb']}\nwebsite: {title: t, site-url: 'https://a.b/c', sidebar: {contents: [nbs/01_x/y.ipynb, {section: S, contents: [{href: ledger.md, text: L}]}]}}\n")
    write(path/"papers.tsv", "no\tslug\ttitle\tchapter\n1\ta\tA title\t01_x/y\n2\tb\tB\t01_x/z\n")
    return path

def run_folder(path: Path) -> Path:
    from ptbook.curate.baselines import Random
    from ptbook.curate.pipeline import run_local
    source = mixed_folder(path.with_name(f"{path.name}-source"))
    run_local(source, path, Random(0), 0.5)
    shutil.rmtree(path/"logs"), shutil.rmtree(source)
    return path

def cache_folder(path: Path) -> Path:
    pq.write_table(pa.table({"text": ["kept"] * 9, "split": ["train"] * 9}), write(path/"made.parquet", b""))
    return path

def site_folder(path: Path) -> Path:
    write(path/"a.html", '<!doctype html><html lang="en"><head><title>t</title></head><body><h1>t</h1><a href="b/c.html#x">c</a><img src="d.png" alt="d"></body></html>')
    write(path/"b/c.html", '<!doctype html><html lang="en"><head><title>t</title></head><body><h1 id="x">t</h1></body></html>')
    return path

GOOD = { # reader -> how to make what it reads, and the files that are spoilt
    "text": (lambda p: write(p, "Some text.\r\n\nNaïve Ünïcode.\n" * 9), {"": "bytes"}, "a.txt"), "jsonl": (lambda p: write(p, LINES), {"": "lines"}, "a.jsonl"),
    "csv": (lambda p: write(p, "text,n,x\n" + "\n".join(f'"a, {i} ""b""",{i},{i / 3}' for i in range(30))), {"": "bytes"}, "a.csv"), "parquet": (table, {"": "bytes"}, "a.parquet"),
    "folder": (text_folder, {"a.txt": "bytes", "b/d.bin": "bytes"}, "texts"), "load": (table, {"": "bytes"}, "l.parquet"),
    "mirror": (lambda p: table(p/"train.parquet").parent, {"train.parquet": "bytes"}, "mine"), "wav": (wav, {"": "bytes"}, "a.wav"),
    "records: jsonl": (lambda p: write(p, LINES), {"": "lines"}, "r.jsonl"), "records: jsonl.gz": (lambda p: write(p, gzip.compress(LINES.encode(), mtime=0)), {"": "bytes"}, "r.jsonl.gz"),
    "records: parquet": (table, {"": "bytes"}, "r.parquet"), "records: text": (lambda p: write(p, "a\nb\n\nc ü\n" * 9), {"": "bytes"}, "r.txt"),
    "records: folder": (mixed_folder, {name: "bytes" for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")}, "mixed"), "select": (mixed_folder, {"a.jsonl": "lines", "c.parquet": "bytes"}, "selected"),
    "adapter": (adapter_folder, {"adapter_config.json": "json", "adapter_model.safetensors": "safetensors"}, "adapter"),
    "merge": (model_folder, {"config.json": "json", "model.safetensors": "safetensors"}, "merged"), "merge: two folders": (two_folders, {f"{d}/{n}": "json" for d in "ab" for n in ("config.json", "vocab.json", "tokenizer.json")}, "two"),
    "checkpoint": (checkpoint_folder, {"step-000001/state.json": "json", "step-000001/model.safetensors": "safetensors", "step-000001/optimizer.safetensors": "safetensors"}, "kept"),
    "checkpoint: weights": (lambda p: checkpoint_folder(p.with_name("w")) / "step-000001", {"model.safetensors": "safetensors"}, "w0"),
    "stored logits": (store_folder, {"part-00000000.logits": "bytes", "part-00000001.logits": "bytes"}, "store"),
    "from_hf": (lambda p: model_folder(p, True), {"config.json": "json", "model.safetensors.index.json": "json", "model-0.safetensors": "safetensors"}, "bert"),
    "language model": (causal_folder, {n: "json" for n in ("config.json", "tokenizer.json", "tokenizer_config.json")} | {"model.safetensors": "safetensors"}, "causal"),
    "result": (lambda p: write(p, RESULT), {"": "json"}, "s.book.json"), "results": (lambda p: write(p/"s.book.json", RESULT).parent, {"s.book.json": "json"}, "results"),
    "kept seeds": (lambda p: write(p/"seed-0.json", SEED).parent, {"seed-0.json": "json"}, "seeds"),
    "embedded cache": (cache_folder, {"made.parquet": "bytes"}, "caches"), "papers": (book_folder, {"papers.tsv": "bytes"}, "book"),
    "site: plan": (book_folder, {"_quarto.yml": "bytes", "settings.ini": "bytes", "nbs/01_x/y.ipynb": "json"}, "planned"), "site: pages": (book_folder, {"nbs/01_x/y.ipynb": "json"}, "paged"),
    "site: check": (site_folder, {"a.html": "bytes"}, "site"), "readme": (lambda p: write(p, NOTEBOOK), {"": "json"}, "index.ipynb"), "refresh": (lambda p: write(p, NOTEBOOK), {"": "json"}, "chapter.ipynb"),
    "run folder": (run_folder, {"plan.json": "json", "report.json": "json", "tables/000000.parquet": "bytes", "decisions/000000.parquet": "bytes"}, "run")}
SLOW = {"from_hf": 12, "language model": 12, "select": 12, "adapter": 20, "merge": 20} # inputs in `make test`, where it is not the usual number
USUAL = 30


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path: return tmp_path_factory.mktemp("hostile")

@pytest.fixture(scope="session")
def child(home):
    (home/"child").mkdir()
    child = Child(home/"child")
    yield child
    if child.process: child.stop()
    if place := os.environ.get("PTBOOK_FAULTS"): Path(place).write_text(json.dumps({reader: dict(outcomes) for reader, outcomes in TALLY.items()}, indent=1))

@pytest.fixture(scope="session")
def whole(home):
    made = {}
    def get(reader: str) -> Path:
        if reader not in made:
            make, _, name = GOOD[reader]
            (home/"good"/reader.replace(": ", "-")).mkdir(parents=True)
            made[reader] = make(home/"good"/reader.replace(": ", "-")/name)
        return made[reader]
    return get


def surroundings(folder: Path) -> dict[str, tuple]:
    return {p.relative_to(folder).as_posix(): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*") if not p.is_dir()}

def hold(child: Child, reader: str, path: Path, what: str = "") -> dict:
    "The property."
    around = path.parent
    before = surroundings(around)
    told = child.ask(reader, path)
    after = surroundings(around)
    for p in (set(after) - set(before)): os.unlink(around/p)
    TALLY[reader][told["outcome"] if told["outcome"] == "read" else told.get("error", told["outcome"])] += 1
    assert told["outcome"] in ("read", "refused"), (reader, what, told)
    assert not told["touched"], (reader, what, told)
    assert told["seconds"] < hostile.SECONDS and told["megabytes"] < hostile.MEMORY >> 20, (reader, what, told)
    assert reader == "refresh" or after == before, (reader, what, {p for p in {*before, *after} if before.get(p) != after.get(p)})
    return told


# Spoiling

NUMBERS = ["-1", "0", "1e400", "NaN", "-Infinity", "1" * 5000, str(2 ** 31), str(2 ** 60), str(2 ** 63), str(2 ** 64), str(10 ** 30), "0.5", "true", "null"]
VALUES = [None, True, -1, 0, 3, 10 ** 12, 2 ** 60, 2 ** 63, 2 ** 64, -2 ** 63, 10 ** 30, 0.5, 1e300, math.inf, math.nan, "", "a", "\ud800", "\0", "../../etc/passwd", "/etc/passwd", "x" * 1000, "(a+)+$", [], [[]], [1], ["a"], {}, {"": ""}, {"a": {"b": []}}, [None] * 100, "DEEP"]
BYTES = [b"", b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xed\xa0\x80", b"\n", b"\r", b'"', b"{", b"[" * 3000, b"{\"a\":" * 3000, b"\xef\xbb\xbf", b",", b"\t", b"<", b"&", b"../", *map(str.encode, NUMBERS)]

def places(value, at=()):
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else (): yield from places(inner, (*at, key))

def spoilt_value(value, at: tuple, how: str, new):
    "The JSON value with one of its parts changed, removed or doubled."
    if not at: return new
    value = dict(value) if isinstance(value, dict) else list(value)
    if len(at) > 1: value[at[0]] = spoilt_value(value[at[0]], at[1:], how, new)
    elif how == "remove": del value[at[0]]
    elif how == "more" and isinstance(value, list): value.insert(at[0], value[at[0]])
    elif how == "more": value["more"] = new
    else: value[at[0]] = new
    return value

def as_json(value) -> bytes: return json.dumps(value).replace('"DEEP"', "[" * 100_000 + "]" * 100_000).encode()

@st.composite
def spoilt_json(draw, good: bytes) -> bytes:
    value = json.loads(good)
    for _ in range(draw(st.integers(1, 3))):
        value = spoilt_value(value, draw(st.sampled_from(list(places(value)))), draw(st.sampled_from(["change", "change", "remove", "more"])), draw(st.sampled_from(VALUES)))
    return as_json(value)

@st.composite
def spoilt_bytes(draw, good: bytes) -> bytes:
    data = good
    for _ in range(draw(st.integers(1, 4))):
        at, how = draw(st.integers(0, len(data))), draw(st.sampled_from(["cut", "flip", "flip", "put", "insert", "insert", "delete", "double", "number"]))
        if how == "cut": data = data[:at]
        elif how == "flip" and at < len(data): data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1:]
        elif how in ("put", "insert"): data = data[:at] + (new := draw(st.sampled_from(BYTES) | st.binary(max_size=20))) + data[at + (len(new) if how == "put" else 0):]
        elif how == "delete": data = data[:at] + data[at + draw(st.integers(1, 100)):]
        elif how == "double": data = data[:at] + data[at:at + 200] * draw(st.integers(2, 50)) + data[at + 200:]
        elif how == "number" and (digits := [i for i, c in enumerate(data[:20_000]) if chr(c).isdigit()]): data = data[:(i := draw(st.sampled_from(digits)))] + draw(st.sampled_from(NUMBERS)).encode() + data[i + 1:]
    return data

@st.composite
def spoilt_lines(draw, good: bytes) -> bytes:
    lines = good.split(b"\n")
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(lines) - 1))
        with_json = lines[i][:1] == b"{" and draw(st.booleans())
        try: lines[i] = draw(spoilt_json(lines[i])) if with_json else draw(spoilt_bytes(lines[i]))
        except (ValueError, RecursionError): pass # it was spoilt before
    return b"\n".join(lines)

@st.composite
def spoilt_safetensors(draw, good: bytes) -> bytes:
    how, length = draw(st.sampled_from(["bytes", "header", "header", "length"])), struct.unpack("<Q", good[:8])[0]
    if how == "bytes": return draw(spoilt_bytes(good))
    if how == "length": return struct.pack("<Q", draw(st.sampled_from([0, 1, length - 1, length + 1, 10 ** 8, 2 ** 32, 2 ** 60, 2 ** 63, 2 ** 64 - 1]))) + good[8:]
    header = draw(spoilt_json(good[8:8 + length]))
    return struct.pack("<Q", len(header)) + header + good[8 + length:]

SPOIL = {"bytes": spoilt_bytes, "json": lambda good: spoilt_json(good) | spoilt_json(good) | spoilt_bytes(good), "lines": spoilt_lines, "safetensors": spoilt_safetensors}


@pytest.mark.parametrize("reader", GOOD)
def test_what_is_whole_is_read(reader, child, whole):
    told = hold(child, reader, whole(reader))
    assert told["outcome"] == "read", told


@pytest.mark.parametrize("reader", GOOD)
def test_what_is_spoilt_is_read_or_refused_by_name(reader, child, whole):
    path, kinds = whole(reader), GOOD[reader][1]
    good = {file: (path/file if file else path).read_bytes() for file in kinds}
    @settings(max_examples=EXAMPLES or SLOW.get(reader, USUAL), derandomize=not EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=bool(EXAMPLES))
    @given(st.data())
    def property(data):
        file = data.draw(st.sampled_from(list(kinds)))
        data = data.draw(SPOIL[kinds[file]](good[file]))
        try:
            (path/file if file else path).write_bytes(data)
            hold(child, reader, path, f"{file}: {data[:3000]!r}")
        finally: (path/file if file else path).write_bytes(good[file])
    property()
