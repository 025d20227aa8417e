"Files from strangers: whatever is in them, a reader reads what they say or refuses by name, soon, in little memory, and touches nothing else."
import gzip
import json
import math
import os
import shutil
import struct
import zlib
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

def encoder_folder(path: Path) -> Path:
    import tokenizers, transformers
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "-": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="-").save_pretrained(model_folder(path))
    return path

def picture(path: Path, kind: str = "PNG", size: tuple = (24, 16)) -> Path:
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(math.prod(size), dtype=np.uint8).reshape(size[::-1])).save(path, kind)
    return path

def losses(path: Path) -> Path:
    from ptbook.curate.skills import SkillIt
    policy = SkillIt(np.eye(3))
    for row in ([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]): policy.update(row)
    policy.save(path)
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
    "encoder": (encoder_folder, {n: "json" for n in ("config.json", "tokenizer.json", "tokenizer_config.json")} | {"model.safetensors": "safetensors"}, "encoder"),
    "picture": (picture, {"": "bytes"}, "a.png"), "picture: bytes": (lambda p: picture(p, "TIFF"), {"": "bytes"}, "a.tiff"),
    "shards": (lambda p: model_folder(p, True), {"model-0.safetensors": "safetensors", "model-1.safetensors": "safetensors"}, "shards"), "losses": (losses, {"": "json"}, "policy.json"),
    "result": (lambda p: write(p, RESULT), {"": "json"}, "s.book.json"), "results": (lambda p: write(p/"s.book.json", RESULT).parent, {"s.book.json": "json"}, "results"),
    "kept seeds": (lambda p: write(p/"seed-0.json", SEED).parent, {"seed-0.json": "json"}, "seeds"),
    "embedded cache": (cache_folder, {"made.parquet": "bytes"}, "caches"), "papers": (book_folder, {"papers.tsv": "bytes"}, "book"),
    "site: plan": (book_folder, {"_quarto.yml": "bytes", "settings.ini": "bytes", "nbs/01_x/y.ipynb": "json"}, "planned"), "site: pages": (book_folder, {"nbs/01_x/y.ipynb": "json"}, "paged"),
    "site: check": (site_folder, {"a.html": "bytes"}, "site"), "readme": (lambda p: write(p, NOTEBOOK), {"": "json"}, "index.ipynb"), "refresh": (lambda p: write(p, NOTEBOOK), {"": "json"}, "chapter.ipynb"),
    "run folder": (run_folder, {"plan.json": "json", "report.json": "json", "tables/000000.parquet": "bytes", "decisions/000000.parquet": "bytes"}, "run")}
SLOW = {"from_hf": 25, "language model": 25, "encoder": 8, "select": 4, "adapter": 25, "merge": 25} # inputs in `make test`, where it is not the usual number
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
    assert reader in ("refresh", "embedded cache") or after == before, (reader, what, {p for p in {*before, *after} if before.get(p) != after.get(p)})
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


# Faults that no chance would find

MB = 1 << 20

def bomb_gz(path: Path, start: bytes, fill: bytes, megabytes: int, end: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", 6) as file:
        file.write(start)
        for _ in range(megabytes): file.write(fill * (MB // len(fill)))
        file.write(end)
    return path

def sparse(path: Path, size: int = 10 ** 12) -> Path:
    write(path, b"")
    os.truncate(path, size)
    return path

def columns(path: Path, n: int = 40_000) -> Path: return write(path, "\n".join(json.dumps({"text": "a", f"k{i}": 0}) for i in range(n)))

def one_text_many_times(path: Path, nested: bool = False, times: int = 300_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "a" * 300_000
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), [text])
    pq.write_table(pa.table({"text": column if not nested else ["a"] * times} | ({"deep": pa.StructArray.from_arrays([column], ["a"])} if nested else {})), path, store_schema=False)
    return path

def inflating(path: Path) -> Path: # a dictionary of one text that is 300 MiB large once it is inflated
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(["a" * (300 * MB), "b"])}), path, compression="zstd")
    return path

def nulls(path: Path, rows: int = 300_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema := pa.schema({"text": pa.null(), "n": pa.int8()})) as file:
        part = pa.table([pa.nulls(rows // 30), pa.nulls(rows // 30, pa.int8())], schema)
        for _ in range(30): file.write_table(part)
    return path

def put(table: pa.Table, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path

def odd_names(path: Path) -> Path:
    for name in (b"new\nline.txt", b"sur\xffrogate.txt", b"-rf.txt", "ü.txt".encode(), b"<b>.txt", b"a" * 200 + b".txt"): write(path/os.fsdecode(name), "some text of this file\n" * 9)
    return path

def loops(path: Path) -> Path:
    write(path/"a.txt", "text of a file\n" * 9)
    for name, target in (("round", path), ("self.txt", path/"self.txt"), ("up", path/".."), ("out.txt", "/etc/passwd"), ("b/back", path)): (path/name).parent.mkdir(exist_ok=True) or (path/name).symlink_to(target)
    os.mkfifo(path/"pipe.txt"), os.mkfifo(path/"pipe.jsonl")
    return path

def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path

def changed(make, file: str, change):
    def made(path: Path) -> Path:
        make(path)
        held = (path/file).read_bytes() if (path/file).exists() else b""
        (path/file).unlink(missing_ok=True)
        new = change(held, path)
        if new is not None: (path/file).write_bytes(new if isinstance(new, bytes) else json.dumps(new).encode())
        return path
    return made

def config(make, file: str = "config.json", **new): return changed(make, file, lambda held, _: json.loads(held) | new)
def elsewhere(make, file: str, target: str = "/etc/passwd"): return changed(make, file, lambda _, path: (path/file).symlink_to(target))
def piped(make, file: str): return changed(make, file, lambda _, path: os.mkfifo(path/file))
def endless(make, file: str): return changed(make, file, lambda _, path: sparse(path/file) and None)
def header(make, file: str, change):
    def rewritten(held, _):
        n = struct.unpack("<Q", held[:8])[0]
        new = json.dumps(change(json.loads(held[8:8 + n]))).encode()
        return struct.pack("<Q", len(new)) + new + held[8 + n:]
    return changed(make, file, rewritten)
def every(**new): return lambda head: {name: entry | new if name != "__metadata__" else entry for name, entry in head.items()}
def sharded(path: Path) -> Path: return model_folder(path, True)
def index(**where): return changed(sharded, "model.safetensors.index.json", lambda held, path: {"weight_map": {name: where["to"].replace("PATH", str(path.parent)) for name in json.loads(held)["weight_map"]}})

def png(width: int, height: int) -> bytes: # the head of a picture, and nothing after it
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))

BACK = "(([a-z])+.)+[A-Z]([a-z])+$" # takes time that doubles with every letter
DEEP = ["[" * n + "1" + "]" * n for n in (90, 400, 970, 990, 1_000, 100_000)]
FAULTS = {
    "text: a terabyte of nothing": ("text", lambda p: sparse(p/"a.txt"), "refused"), "text: a pipe": ("text", lambda p: pipe(p/"a.txt"), "refused"), "text: a device": ("text", lambda p: Path("/dev/zero"), "refused"),
    "jsonl: a pipe": ("jsonl", lambda p: pipe(p/"a.jsonl"), "refused"), "jsonl: rows without a common column": ("jsonl", lambda p: columns(p/"a.jsonl"), "refused"), "jsonl: a terabyte": ("jsonl", lambda p: sparse(p/"a.jsonl"), "refused"),
    "jsonl: one key twice": ("jsonl", lambda p: write(p/"a.jsonl", '{"text": "one", "text": "two"}\n{"text": "three"}'), "read"), "jsonl: a number of a million digits": ("jsonl", lambda p: write(p/"a.jsonl", '{"text": "a", "n": ' + "9" * 10 ** 6 + "}"), "refused"),
    "jsonl: no number": ("jsonl", lambda p: write(p/"a.jsonl", '{"text": "a b", "n": NaN}\n{"text": "c d", "n": 1e400}'), "read"), "jsonl: lines of nothing": ("jsonl", lambda p: write(p/"a.jsonl", "\n" * 5 * MB), "refused"),
    **{f"jsonl: {len(d)} brackets": ("jsonl", lambda p, d=d: write(p/"a.jsonl", '{"text": "a b", "d": ' + d + '}\n{"text": "c"}'), "read" if len(d) < 200 else "refused") for d in DEEP},
    **{f"records: {len(d)} brackets": ("select", lambda p, d=d: write(p/"a.jsonl", ('{"text": "a b c d e", "d": ' + d + ', "domain": ' + d + "}\n") * 3 + '{"text": "c d"}').parent/"a.jsonl", "read") for d in DEEP},
    "csv: a row of a million cells": ("csv", lambda p: write(p/"a.csv", "text\n" + "," * 10 ** 6), "any"), "csv: a quote without end": ("csv", lambda p: write(p/"a.csv", 'text\n"' + "a\n" * MB), "any"), "csv: two columns of one name": ("csv", lambda p: write(p/"a.csv", "text,text\na,b\nc,d"), "read"),
    "parquet: one text 300,000 times": ("parquet", lambda p: one_text_many_times(p/"a.parquet"), "refused"), "parquet: the same in a structure": ("parquet", lambda p: one_text_many_times(p/"a.parquet", True), "refused"),
    "parquet: a page that inflates": ("parquet", lambda p: inflating(p/"a.parquet"), "refused"), "parquet: 300 million times nothing": ("parquet", lambda p: nulls(p/"a.parquet"), "refused"), "parquet: a footer beyond the file": ("parquet", lambda p: write(p/"a.parquet", b"PAR1" + b"x" * 50 + struct.pack("<I", 2 ** 31 - 1) + b"PAR1"), "refused"),
    "load: features that are none": ("load", lambda p: put(pa.table({"text": ["a b", "c d"]}).replace_schema_metadata({"huggingface": '{"info": {"features": {"text": {"_type": "Evil"}}}}'}), p/"a.parquet"), "any"),
    "parquet: text that is not UTF-8": ("parquet", lambda p: put(pa.table({"text": pa.array([b"\xff\xfe", b"ab"]).view(pa.string())}), p/"a.parquet"), "refused"), "parquet: two columns of one name": ("parquet", lambda p: put(pa.table([["a"], ["b"]], ["text", "text"]), p/"a.parquet"), "refused"),
    "records: one text 3,000 times": ("records: parquet", lambda p: one_text_many_times(p/"a.parquet", times=3000), "read"), "records: a page that inflates": ("records: parquet", lambda p: inflating(p/"a.parquet"), "read"),
    "records: a gibibyte in a megabyte": ("records: jsonl.gz", lambda p: bomb_gz(p/"a.jsonl.gz", b'{"text": "a b"}\n', b" " * 1023 + b"\n", 1100, b'{"text": "c d"}\n'), "read"), "records: a line without end": ("records: jsonl.gz", lambda p: bomb_gz(p/"a.jsonl.gz", b'{"text": "', b"a", 1100), "read"),
    "records: a line of lists": ("records: jsonl", lambda p: write(p/"a.jsonl", b'{"text": "a", "x": [' + b"[]," * (20 * MB) + b"[]]}"), "read"), "records: text without a blank line": ("records: text", lambda p: write(p/"a.txt", (b"line of text\n" * (MB // 13)) * 300), "read"),
    "records: a terabyte of text": ("records: folder", lambda p: sparse(p/"in/a.txt").parent, "read"), "folder: odd names": ("folder", lambda p: odd_names(p/"in"), "read"), "records: odd names": ("records: folder", lambda p: odd_names(p/"in"), "read"), "select: odd names": ("select", lambda p: odd_names(p/"in"), "read"),
    "folder: loops, links and pipes": ("folder", lambda p: loops(p/"in"), "read"), "records: loops, links and pipes": ("records: folder", lambda p: loops(p/"in"), "read"), "wav: two gigabytes are declared": ("wav", lambda p: write(p/"a.wav", wav(p/"b.wav").read_bytes()[:40] + struct.pack("<I", 2 ** 31) + b"ab"), "any"),
    "adapter: a pattern that never ends": ("adapter", config(adapter_folder, "adapter_config.json", target_modules=BACK), "refused"), "adapter: a pattern that is fine": ("adapter", config(adapter_folder, "adapter_config.json", target_modules=".*(?<!x)query"), "read"),
    "adapter: a rank without end": ("adapter", config(adapter_folder, "adapter_config.json", r=10 ** 400), "refused"), "adapter: no number": ("adapter", config(adapter_folder, "adapter_config.json", lora_alpha=math.nan), "refused"), "adapter: a pattern of ranks": ("adapter", config(adapter_folder, "adapter_config.json", rank_pattern={"query": "3"}), "refused"),
    "adapter: weights from elsewhere": ("adapter", elsewhere(adapter_folder, "adapter_model.safetensors"), "refused"), "adapter: settings from elsewhere": ("adapter", elsewhere(adapter_folder, "adapter_config.json"), "refused"), "adapter: a pipe": ("adapter", piped(adapter_folder, "adapter_model.safetensors"), "refused"), "adapter: piped settings": ("adapter", piped(adapter_folder, "adapter_config.json"), "refused"),
    **{f"{reader}: {what}": (reader, how(make), "refused") for reader, make, file in (("merge", model_folder, "model.safetensors"), ("from_hf", model_folder, "model.safetensors"), ("language model", causal_folder, "model.safetensors"), ("adapter", adapter_folder, "adapter_model.safetensors"),
        ("checkpoint", checkpoint_folder, "step-000001/model.safetensors"), ("checkpoint", checkpoint_folder, "step-000001/optimizer.safetensors")) for what, how in {
        f"{file} overlaps": lambda make, file=file: header(make, file, every(data_offsets=[0, 12])), f"{file} lies beyond": lambda make, file=file: header(make, file, every(data_offsets=[2 ** 40, 2 ** 40 + 12])), f"{file} is negative": lambda make, file=file: header(make, file, every(data_offsets=[-12, 0])),
        f"{file} is huge": lambda make, file=file: header(make, file, every(shape=[2 ** 31, 2 ** 31])), f"{file} is a terabyte": lambda make, file=file: endless(make, file), f"{file} is a pipe": lambda make, file=file: piped(make, file)}.items()},
    **{f"{reader}: an index that leads to {to}": (reader, index(to=to), "refused") for reader in ("merge", "from_hf") for to in ("../../etc/passwd", "/etc/passwd", "PATH/x.safetensors", "", ".", "a\0b")}, "from_hf: a shard that is a pipe": ("from_hf", piped(sharded, "model-0.safetensors"), "refused"), "merge: a shard that is a pipe": ("merge", piped(sharded, "model-0.safetensors"), "refused"),
    "from_hf: an index that is no map": ("from_hf", changed(sharded, "model.safetensors.index.json", lambda *_: {"weight_map": ["a"]}), "refused"), "from_hf: a link": ("from_hf", elsewhere(model_folder, "model.safetensors"), "refused"), "from_hf: an adapter beside it": ("from_hf", changed(model_folder, "adapter_config.json", lambda *_: {"base_model_name_or_path": "/etc"}), "refused"),
    **{f"from_hf: {key} of a billion": ("from_hf", config(model_folder, **{key: 10 ** 9}), "refused") for key in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings", "type_vocab_size")},
    **{f"language model: {key} of a billion": ("language model", config(causal_folder, **{key: 10 ** 9}), "refused") for key in ("n_layer", "n_embd", "vocab_size", "n_positions")}, "language model: a tokenizer that is a pipe": ("language model", piped(causal_folder, "tokenizer.json"), "refused"),
    "checkpoint: a state that is a pipe": ("checkpoint", piped(checkpoint_folder, "step-000001/state.json"), "refused"), "result: a pipe": ("result", lambda p: pipe(p/"s.json"), "refused"), "result: deep": ("result", lambda p: write(p/"s.json", DEEP[-1]), "refused"), "kept seeds: a pipe": ("kept seeds", lambda p: pipe(p/"in/seed-0.json").parent, "read"),
    "picture: PostScript": ("picture", lambda p: write(p/"a.eps", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"), "refused"), "picture: a pipe": ("picture", lambda p: pipe(p/"a.png"), "refused"), "picture: a folder": ("picture", lambda p: text_folder(p/"a.png"), "refused"),
    "picture: a billion pixels": ("picture", lambda p: write(p/"a.png", png(40_000, 25_000)), "refused"), "picture: none of its pixels": ("picture", lambda p: write(p/"a.png", png(9, 9)), "refused"),
    "stored logits: a part that is a pipe": ("stored logits", piped(store_folder, "part-00000000.logits"), "refused"), "losses: a pipe": ("losses", lambda p: pipe(p/"policy.json"), "refused"), "losses: not enough": ("losses", lambda p: write(p/"policy.json", json.loads(losses(p/"good.json").read_text()) | {"history": [[1.0]]}), "refused"),
    "shards: a link": ("shards", elsewhere(sharded, "model-0.safetensors"), "refused"), "shards: a pipe": ("shards", piped(sharded, "model-0.safetensors"), "refused"), "encoder: more tokens than vectors": ("encoder", changed(encoder_folder, "tokenizer.json", lambda held, _: held.replace(b'"b": 1', b'"b": 77')), "refused"),
    "embedded cache: another table": ("embedded cache", lambda p: put(pa.table({"a": [1]}), p/"in/made.parquet").parent, "read"), "embedded cache: a pipe": ("embedded cache", lambda p: pipe(p/"in/made.parquet").parent, "read"), 
    **{f"{reader}: nbformat {n}": (reader, lambda p, n=n: write(p/"a.ipynb", NOTEBOOK | {"nbformat": n, "worksheets": [{"cells": []}]}), "refused") for reader in ("readme", "refresh") for n in (2, 3, 5, 99, "4", None)}, "refresh: a pipe": ("readme", lambda p: pipe(p/"a.ipynb"), "refused"),
    **{f"{reader}: a cell without {key}": (reader, lambda p, key=key: write(p/"a.ipynb", NOTEBOOK | {"cells": [{k: v for k, v in NOTEBOOK["cells"][1].items() if k != key}]}), "refused") for reader in ("readme", "refresh") for key in ("cell_type", "source", "outputs")}}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_made_on_purpose(fault, child, tmp_path):
    reader, make, wanted = FAULTS[fault]
    told = hold(child, reader, make(tmp_path/"given"), fault)
    assert wanted == "any" or told["outcome"] == wanted, (fault, told)


# Nothing unpickles

class Evil:
    "Unpickled, it leaves a file behind."
    def __init__(self, canary: Path): self.canary = canary
    def __reduce__(self): return Path.touch, (self.canary,)

PICKLED = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "model.pkl", "0.npy", "state.npz", "model.pt", "trainer_state.bin", "tokenizer.pickle", "stats.pickle")

def poisoned(path: Path, canary: Path, instead: tuple[str, ...] = ()) -> Path:
    "A folder with pickles beside everything in it, and in the place of its weights."
    import pickle
    for at in [path, *(p for p in path.rglob("*") if p.is_dir())]:
        for name in PICKLED: write(at/name, pickle.dumps(Evil(canary)))
    for name in instead: write(path/name, pickle.dumps(Evil(canary)))
    return path

@pytest.mark.parametrize("instead", [False, True], ids=["beside", "instead"])
@pytest.mark.parametrize("reader", [reader for reader, (_, kinds, _) in GOOD.items() if "" not in kinds])
def test_a_pickle_stays_a_pickle(reader, instead, child, tmp_path):
    make, kinds, name = GOOD[reader]
    path = make(tmp_path/name)
    weights = [file for file in kinds if file.endswith((".safetensors", ".parquet", ".gz", ".logits"))] if instead else []
    told = hold(child, reader, poisoned(path, tmp_path/"canary", tuple(weights)), "pickles")
    assert not (tmp_path/"canary").exists() and told["outcome"] == ("refused" if any(w.endswith((".safetensors", ".logits")) for w in weights) else told["outcome"])


@pytest.mark.parametrize("reader, make", [("from_hf", model_folder), ("language model", causal_folder)])
@pytest.mark.parametrize("kind", ["bert", "strange"])
def test_code_that_a_model_brings_is_not_run(reader, make, kind, child, tmp_path):
    path = make(tmp_path/"model")
    said = json.loads((path/"config.json").read_text())
    write(path/"config.json", said | {"model_type": said["model_type"] if kind == "bert" else kind, "auto_map": {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoTokenizer")}})
    if (path/"tokenizer_config.json").exists(): write(path/"tokenizer_config.json", json.loads((path/"tokenizer_config.json").read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    write(path/"evil.py", f"open({str(tmp_path/'canary')!r}, 'w')\nclass Evil: pass\n")
    assert hold(child, reader, path, "code")["outcome"] == ("read" if kind == "bert" else "refused") and not (tmp_path/"canary").exists()


def test_the_guard_itself(child, tmp_path):
    "What reads a pickle is seen."
    import pickle
    (tmp_path/"a.pickle").write_bytes(pickle.dumps(Evil(tmp_path/"canary")))
    assert child.ask("unsafe", tmp_path/"a.pickle")["touched"] and (tmp_path/"canary").exists()
