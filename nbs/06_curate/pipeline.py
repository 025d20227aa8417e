# %% [markdown]
# # Choosing on many machines
#
# > Score in a thousand tasks, draw one line in one of them, take in a thousand again: the very selection of the one-process call, whatever is killed on the way.

# %%
#| default_exp curate.pipeline

# %% [markdown]
# `select` of [the last chapter](records.ipynb) reads some megabytes per second, most of which its scorer needs. A terabyte then takes days, and the work must go to many machines. [`datatrove`](https://github.com/huggingface/datatrove) (Penedo et al., 2023) is how the large open corpora were made: a *pipeline* is a list of *steps*, an *executor* runs it as many *tasks*, on this machine, on a Slurm cluster or on Ray, and each task takes its share of the files.
#
# Scores are easy to share out, since a score depends on its text alone. **The line is not**: the best tenth of a corpus is not the best tenth of every shard. So there are two readings with one small step between them:
#
# 1. **score** (many tasks): read a shard, judge every record, write 25 bytes for each;
# 2. **decide** (one task): put those tables one after the other, mark copies, draw the line;
# 3. **take** (many tasks): read the shard again, write what was kept, and for every record the reason.
#
# What makes this a chapter is the word *very* above. The result shall be the same documents, in the same order, with the same reasons, as one process would give, even if machines die in the middle.

# %%
#| export
import gzip
import hashlib
import itertools
import json
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ptbook.curate.records import REASONS, Files, Judged, Overlap, Scorer, Selection, batches, decide, joined, judge, text_keys

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
except ImportError as missing:
    why = str(missing)
    class PipelineStep:
        "Stands in for datatrove's."
        def __init__(self): raise ImportError(f"ptbook.curate.pipeline runs on datatrove: pip install 'ptbook[scale]' ({why})")

# %%
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import matplotlib.pyplot as plt
from loguru import logger

from ptbook.basics.show import colour, figure, use_style
from ptbook.basics.sources import load
from ptbook.curate.ngrams import importance
from ptbook.curate.records import select

use_style()
logger.disable("datatrove") # it tells much; the same stands in the log of each task
tiny = os.environ.get("PTBOOK_SCALE") == "tiny"

# %% [markdown]
# ## Why not a line per shard?
#
# Real shards differ. Here is a corpus of nine, one for each Python library whose docstrings the book holds, and someone who wants text about graphs. What share of each shard is kept if one line is drawn for all, and what if each shard draws its own?

# %%
table = load("library_docs")["train"].to_list()
scorer = importance([row["text"] for row in table[::10]], [row["text"] for row in table if "graph" in row["text"].lower()][:40])
domains = sorted({row["domain"] for row in table})
shards = {domain: [row for row in table if row["domain"] == domain] for domain in domains}
corpus = [row for shard in shards.values() for row in shard]
chosen = select(corpus, scorer, keep=0.1)
of = np.array([row["domain"] for row in corpus])
together = {d: (chosen.reasons[of == d] == 0).mean() for d in domains}
apart = {d: select(shards[d], scorer, keep=0.1).counts["kept"] / len(shards[d]) for d in domains}
assert max(together.values()) > 0.3 > 0.11 > max(apart.values())

# %%
#| code-fold: true
order = sorted(domains, key=together.get)
fig, ax = figure("A line of its own keeps as much of a bad shard as of a good one", "share of the shard that is kept", size=(7.2, 4.2))
ax.hlines(range(len(order)), [apart[d] for d in order], [together[d] for d in order], color="#bbbbbb", linewidth=2, zorder=1)
ax.plot([apart[d] for d in order], range(len(order)), linestyle="", marker="o", color="#999999", label="one line per shard")
ax.plot([together[d] for d in order], range(len(order)), linestyle="", marker="D", color="#0072B2", label="one line for all")
ax.set_yticks(range(len(order)), [f"{d} ({len(shards[d])})" for d in order])
ax.legend(loc="lower right")
plt.show()


# %% [markdown]
# ## A plan
#
# Every task of every stage must cut the corpus in the same way. So the cut is made once and written down. A shard is the unit of work: one Parquet file, or some other files that follow each other and are small. Shards are numbered in the order of the corpus, and that order decides which of two copies is the first.

# %%
#| export
@dataclass(frozen=True)
class Plan:
    "What is read and how it is cut; every task of every stage goes by it."
    folder: str # or one file
    text: str # the column that holds the text
    shards: list[list[list]] # per shard and file: path, bytes
    settings: dict[str, Any] # what else the selection depends on
    probe: list[float] # scores of the first texts: by them the scorer is known again

    @classmethod
    def load(cls, out: str | os.PathLike) -> "Plan":
        "The plan of a folder of results. Raises FileNotFoundError if there is none."
        return cls(**json.loads((Path(out)/"plan.json").read_text(encoding="utf-8")))

    def suffix(self, shard: int) -> str:
        "As what the kept documents of a shard are written: Parquet stays Parquet, all else becomes JSON lines."
        return ".parquet" if Path(self.shards[shard][0][0]).suffix.lower() == ".parquet" else ".jsonl.gz"

    def file(self, out: str | os.PathLike, folder: str, shard: int) -> Path:
        "Where something about a shard is written."
        return Path(out)/folder/f"{shard:06d}{self.suffix(shard) if folder == 'kept' else '.parquet'}"

def cut(
    files: Files,
    together: int, # bytes, up to which files share a shard
) -> list[list[list]]: # per shard and file: path, bytes
    "The files in their order, a Parquet file alone, others together while they are small."
    shards, size = [], 0
    for path in files.paths():
        alone, more = path.suffix.lower() == ".parquet", path.stat().st_size
        if alone or not shards or size + more > together:
            shards.append([])
            size = 0
        shards[-1].append([str(path), more])
        size = math.inf if alone else size + more
    return shards


# %% [markdown]
# The accidents of the last chapter, spread over nine shards: copies across shards, a line that is not UTF-8, a Parquet file without its end, a file whose compression breaks off, blank texts.

# %%
root = Path(tempfile.mkdtemp())
source = root/"corpus"
source.mkdir()
for d, rows in shards.items(): (source/f"{d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:120]), encoding="utf-8")
(source/"numpy.jsonl").open("ab").write(b'{"text": "caf\xe9"}\n{"text": " "}\n')
pq.write_table(pa.Table.from_pylist(shards["numpy"][60:160]), source/"p1.parquet") # 60 of them are copies
(source/"p2.parquet").write_bytes((source/"p1.parquet").read_bytes()[:-50])
(source/"scipy.jsonl.gz").write_bytes(gzip.compress((source/"scipy.jsonl").read_bytes())[:-2000])
(source/"scipy.jsonl").unlink()
names = [[Path(path).name for path, _ in shard] for shard in cut(Files(source), 250_000)]
assert sum(names, []) == [p.name for p in Files(source).paths()] and ["p1.parquet"] in names and ["p2.parquet"] in names
names


# %% [markdown]
# ## All or nothing
#
# A process can be killed between any two instructions. There is one thing on which a file system can be relied: to give a file another name happens wholly or not at all. So everything is written beside its place and then renamed, and *whether a file is there* is the one truth about what has been done. `datatrove` also marks tasks as complete; this only saves time.

# %%
#| export
@contextmanager
def replacing(
    path: Path, # existing or not
) -> Iterator[Path]: # where to write
    "A path to write to, which takes the other's place in one step if all went well, and is removed if not."
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as file: os.fsync(file.fileno())
        os.replace(beside, path)
    finally: beside.unlink(missing_ok=True)

def write_table(
    path: Path,
    **columns: Any, # arrays or lists
) -> None:
    "A Parquet file, all or nothing."
    with replacing(path) as beside: pq.write_table(pa.table(columns), beside)

def _line(row: dict) -> bytes:
    "A row as a line of JSON."
    try: return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError: return json.dumps(row).encode() + b"\n" # half of a surrogate pair in another column

@contextmanager
def _json_lines(path: Path) -> Iterator[Callable[[dict], Any]]: # writes a row
    "Gzipped JSON lines, all or nothing, and the same bytes every time."
    with replacing(path) as beside, open(beside, "wb") as raw:
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file: yield lambda row: file.write(_line(row))

@contextmanager
def _parquet_rows(path: Path, schema: pa.Schema) -> Iterator[Callable[[dict], Any]]: # writes a row
    "A Parquet file from rows, all or nothing."
    rows = []
    with replacing(path) as beside, pq.ParquetWriter(beside, schema) as file:
        def flush(most: int) -> None:
            if len(rows) > most: file.write_table(pa.Table.from_pylist(rows, schema)); rows.clear()
        def write(row: dict) -> None: rows.append(row); flush(999)
        yield write
        flush(0)


# %%
try:
    with _json_lines(root/"never.jsonl.gz") as write:
        write({"text": "half of the file"})
        raise KeyboardInterrupt
except KeyboardInterrupt: pass
assert sorted(p.name for p in root.iterdir()) == ["corpus"]
with _parquet_rows(root/"five.parquet", pa.schema({"text": pa.string()})) as write:
    for i in range(2500): write({"text": str(i)})
assert pq.read_table(root/"five.parquet")["text"].to_pylist() == [str(i) for i in range(2500)]


# %% [markdown]
# ## The steps
#
# `datatrove` has readers for the same files. Are they good enough to count with? We let its reader and ours read the shard with two bad lines and the one that breaks off.

# %%
#| export
class ReadShards(PipelineStep):
    """The records of a task's shards as documents, those that cannot be read too: without text, but with a `problem`.
    Shards that are done are passed over. Raises ValueError for a file that has changed since the plan was made."""
    name, type = "records", "📖 - READER"

    def __init__(self,
        out: str | os.PathLike, # the folder of results
        done: str, # where in it a file says that a shard is done
    ):
        super().__init__()
        self.out, self.done = str(out), done

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator["Document"]:
        plan = Plan.load(self.out)
        files = Files(plan.folder, plan.text)
        for shard in range(rank, len(plan.shards), world_size):
            if plan.file(self.out, self.done, shard).exists(): continue
            for path, size in plan.shards[shard]:
                if (now := os.path.getsize(path)) != size: raise ValueError(f"{path}: got {now} bytes, wanted the {size} that were planned: a file must not change during a selection")
                for record in files.records(Path(path)):
                    self.stat_update("unreadable" if record.problem else "read")
                    yield Document(record.text or "", record.place, metadata=dict(shard=shard, domain=record.domain, problem=record.problem, row=dict(record.row)))


# %%
from datatrove.pipeline.readers import JsonlReader

def count(step, bad):
    "Documents, and how it ended."
    n = 0
    try:
        for document in step.run(): n += bool(document.text) or bad
    except Exception as error: return n, type(error).__name__
    return n, "to the end"

damaged = root/"damaged"
damaged.mkdir()
for name in ("numpy.jsonl", "scipy.jsonl.gz"): (damaged/name).write_bytes((source/name).read_bytes())
(root/"plan.json").write_text(json.dumps(asdict(Plan(str(damaged), "text", cut(Files(damaged), 1), {}, []))))
theirs, ours = count(JsonlReader(str(damaged)), False), count(ReadShards(root, "tables"), True)
assert ours == (len(list(Files(damaged))), "to the end") and theirs[0] < ours[0]
f"JsonlReader: {theirs}; ReadShards: {ours}"


# %% [markdown]
# What cannot be read cannot be counted by theirs: a bad line is a message in a log, and a broken file ends the task. With ours, read = kept + left out + unreadable can hold.
#
# The scoring step is `judge` of the last chapter, batch by batch. It drops nothing, so that it can stand in any pipeline.

# %%
#| export
class ScoreStep(PipelineStep):
    "Gives every document its `score`, `text_key` and `reason` as metadata (the reason is `kept` as long as nothing speaks against it). It drops none."
    name, type = "score", "🔎 - SCORER"

    def __init__(self,
        scorer: Scorer, # goes to other processes by pickle: a function of a module or an object of a class
        target: Sequence[str] | None = None, # documents that must not be selected
        longest: int = 10_000_000, # characters
    ):
        super().__init__()
        self.scorer, self.longest, self.overlap = scorer, longest, None if target is None else Overlap(target)

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator["Document"]:
        for batch in batches(data or ()):
            with self.track_time("batch"): judged = judge([None if d.metadata.get("problem") else d.text for d in batch], self.scorer, self.overlap, self.longest)
            for document, reason, score, key in zip(batch, judged.reasons, judged.scores.tolist(), judged.keys.tolist()):
                document.metadata |= {"reason": REASONS[reason], "score": None if math.isnan(score) else score, "text_key": key}
                yield document


# %%
documents = [Document(text, str(i)) for i, text in enumerate(["A graph has edges.", "a GRAPH has  edges.", " ", "short one"])]
seen = [d.metadata for d in ScoreStep(scorer, target=["Short one"]).run(documents)]
assert [m["reason"] for m in seen] == ["kept", "kept", "blank", "overlaps the target"] and seen[0]["text_key"] == seen[1]["text_key"]
seen[0]


# %% [markdown]
# In a pipeline of your own, a fixed line is then one more filter: `ScoreStep(scorer), LambdaFilter(lambda d: d.metadata["score"] is not None and d.metadata["score"] > 0.3)`. To *find* the line, the scores of all shards must come together. What comes together are four numbers per record.
#
# The steps that write must also notice shards that nothing came from, for an empty shard is done too. They compare what passes with what should.

# %%
#| export
def _by_shard(documents: Iterator, out: str, done: str, rank: int, world_size: int) -> Iterator[tuple[Plan, int, Iterator]]:
    "The documents of each shard that was not done; none for a shard without."
    plan, groups = Plan.load(out), itertools.groupby(documents, key=lambda d: d.metadata["shard"])
    following = next(groups, None)
    for shard in range(rank, len(plan.shards), world_size):
        if following and following[0] == shard:
            yield plan, *following
            following = next(groups, None)
        elif not plan.file(out, done, shard).exists(): yield plan, shard, iter(())

class WriteTables(PipelineStep):
    "Four numbers per document, a file per shard."
    name, type = "tables", "💽 - WRITER"

    def __init__(self, out: str | os.PathLike):
        super().__init__()
        self.out = str(out)

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator["Document"]:
        for plan, shard, documents in _by_shard(data, self.out, "tables", rank, world_size):
            rows = []
            for d in documents:
                rows.append((REASONS.index(d.metadata["reason"]), math.nan if d.metadata["score"] is None else d.metadata["score"], len(d.text), d.metadata["text_key"]))
                yield d
            columns = zip(*rows) if rows else ((),) * 4
            write_table(plan.file(self.out, "tables", shard), **{name: np.array(column, dtype) for name, column, dtype in zip(Judged._fields, columns, _DTYPES)})

_DTYPES = (np.uint8, np.float64, np.int64, np.uint64) # of Judged

def read_tables(
    out: str | os.PathLike, # the folder of results
) -> tuple[Judged, np.ndarray]: # of all records in the order of the corpus; records per shard
    "What the first stage wrote. Raises FileNotFoundError if a shard is missing."
    plan = Plan.load(out)
    _complete(out, plan, "tables", "score")
    tables = [pq.read_table(plan.file(out, "tables", shard)) for shard in range(len(plan.shards))]
    return joined([Judged(*(t[name].to_numpy() for name in Judged._fields)) for t in tables]), np.array([len(t) for t in tables])

def _complete(out: str | os.PathLike, plan: Plan, folder: str, stage: str) -> None:
    "Raises FileNotFoundError if a shard is missing."
    missing = [shard for shard in range(len(plan.shards)) if not plan.file(out, folder, shard).exists()]
    if missing: raise FileNotFoundError(f"{Path(out)/folder}: {len(missing)} of {len(plan.shards)} shards are missing, the first is {missing[0]:06d}: run the stage {stage!r} again (with skip_completed=False if it thinks that it is complete)")


# %% [markdown]
# The second stage is `decide`, the function that `select` ends with. It sees the same numbers in the same order and so cannot but come to the same decisions.

# %%
#| export
class Decide(PipelineStep):
    "Copies and the line, for all shards at once; for a pipeline of one task."
    name, type = "decide", "📏 - DECISION"

    def __init__(self, out: str | os.PathLike, keep: float, by: str, duplicates: str | None):
        super().__init__()
        self.out, self.keep, self.by, self.duplicates = str(out), keep, by, duplicates

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator["Document"]:
        yield from data or ()
        if rank: return
        judged, lengths = read_tables(self.out)
        chosen, plan, ends = decide(judged, self.keep, by=self.by, duplicates=self.duplicates), Plan.load(self.out), np.cumsum(lengths)
        for shard, (start, end) in enumerate(zip(ends - lengths, ends)):
            write_table(plan.file(self.out, "decisions", shard), reasons=chosen.reasons[start:end], scores=chosen.scores[start:end])
        for reason, n in chosen.counts.items(): self.stat_update(reason, value=n)
        with replacing(Path(self.out)/"report.json") as beside: beside.write_text(json.dumps({"line": chosen.line, "read": len(chosen.reasons), **chosen.counts}))


# %% [markdown]
# The third stage reads again. `Take` holds every document against its decision, writes the log, and lets pass what was kept; `WriteKept` writes that. Parquet keeps its columns and their types, JSON its fields. The log of a shard is written before its documents are, so whoever finds the documents finds their log.

# %%
#| export
class Take(PipelineStep):
    "Lets pass what was kept and writes the reason of every document. Raises ValueError if a shard has other documents than when it was judged."
    name, type = "take", "🔻 - FILTER"

    def __init__(self, out: str | os.PathLike):
        super().__init__()
        self.out = str(out)

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator["Document"]:
        for plan, shard, documents in _by_shard(data, self.out, "kept", rank, world_size):
            decisions = pq.read_table(plan.file(self.out, "decisions", shard))
            reasons, scores, log = decisions["reasons"].to_pylist(), decisions["scores"].to_pylist(), []
            for n, d in enumerate(documents):
                if n == len(reasons): raise ValueError(f"shard {shard}: got more than the {n} documents that were judged")
                d.metadata |= {"reason": REASONS[reasons[n]], "score": scores[n]}
                log.append((d.id, d.metadata["domain"], d.metadata["reason"], scores[n], d.metadata["problem"]))
                self.stat_update(d.metadata["reason"])
                if reasons[n] == 0: yield d
            if len(log) != len(reasons): raise ValueError(f"shard {shard}: got {len(log)} documents, wanted the {len(reasons)} that were judged")
            write_table(plan.file(self.out, "log", shard), **dict(zip(("place", "domain", "reason", "score", "problem"), map(list, zip(*log)) if log else [[]] * 5)))

class WriteKept(PipelineStep):
    "Writes what comes as it was read, a file per shard, and lets it pass."
    name, type = "kept", "💽 - WRITER"

    def __init__(self, out: str | os.PathLike):
        super().__init__()
        self.out = str(out)

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator["Document"]:
        for plan, shard, documents in _by_shard(data, self.out, "kept", rank, world_size):
            with _writer(plan, self.out, shard) as write:
                for d in documents:
                    write({plan.text: d.text, **d.metadata["row"]})
                    yield d

def _writer(plan: Plan, out: str, shard: int) -> AbstractContextManager[Callable[[dict], Any]]:
    "Where the kept documents of a shard go."
    path = plan.file(out, "kept", shard)
    if path.suffix != ".parquet": return _json_lines(path)
    try: schema = pq.read_schema(plan.shards[shard][0][0])
    except (pa.ArrowException, OSError): schema = pa.schema({plan.text: pa.string()}) # nothing will come from it
    return _parquet_rows(path, schema)


# %% [markdown]
# ## The three stages
#
# One call makes the plan and the steps. It refuses at once what would fail after hours: a share outside (0, 1], a missing column, results inside the corpus. And it refuses to go on with results that were made with anything else: other files, other settings, or another scorer, which it knows by the scores of the first sixteen texts.

# %%
#| export
class Stage(NamedTuple):
    "What one executor runs."
    name: str
    steps: list[PipelineStep]
    tasks: int
    logs: str # the folder where the executor notes which tasks are complete

def pipelines(
    folder_in: str | os.PathLike, # a folder that every machine sees, or a file
    folder_out: str | os.PathLike, # the same folder again goes on where a run ended
    scorer: Scorer,
    keep: float = 0.1, # share, above 0 and up to 1
    *,
    by: Literal["documents", "characters"] = "documents", # what it is a share of
    text: str = "text", # the column that holds the text
    target: Sequence[str] | None = None, # documents that must not be selected
    duplicates: Literal["exact"] | None = "exact", # None: keep copies
    longest: int = 10_000_000, # characters; a longer document is left out
    together: int = 1 << 26, # bytes, up to which files share a shard; Parquet files never do
    tasks: int | None = None, # of the first and the third stage; None: one per shard, at most 1000
) -> list[Stage]: # to be run one after the other
    """The stages of a selection for an executor of datatrove. Raises ImportError without datatrove, ValueError for arguments that cannot be meant or
    that differ from those that the results were begun with, FileNotFoundError for a path that is not there."""
    source, out = Path(folder_in).expanduser().resolve(), Path(folder_out).expanduser().resolve()
    if duplicates not in ("exact", None): raise ValueError(f"duplicates: got {duplicates!r}, wanted 'exact' or None")
    decide(joined([]), keep, by=by) # refuses now what it would refuse later
    if out == source or source in out.parents: raise ValueError(f"folder_out: got {out}, wanted a folder outside {source}")
    if tasks is not None and tasks < 1: raise ValueError(f"tasks: got {tasks}, wanted 1 or more")
    first, second = [ReadShards(out, "tables"), ScoreStep(scorer, target, longest), WriteTables(out)], [Decide(out, keep, by, duplicates)]
    files = Files(source, text)
    goal = None if target is None else hashlib.sha256(text_keys(target).tobytes()).hexdigest()
    texts = list(itertools.islice((r.text for r in files if r.text and r.text.strip()), 16))
    plan = Plan(str(source), text, cut(files, together), dict(keep=keep, by=by, target=goal, duplicates=duplicates, longest=longest), judge(texts, scorer).scores.tolist())
    _settle(out, plan)
    n = tasks or max(1, min(1000, len(plan.shards)))
    stages = (("score", first, n), ("decide", second, 1), ("take", [ReadShards(out, "kept"), Take(out), WriteKept(out)], n))
    return [Stage(name, steps, m, str(out/"logs"/f"{name}-{m}")) for name, steps, m in stages]


# %%
#| export
def _settle(out: Path, plan: Plan) -> None:
    "Write the plan down, or hold it against the one that is there. Raises ValueError naming what differs."
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob("*/.*.tmp"): left.unlink() # by a process that was killed
    if not (out/"plan.json").exists():
        if strange := [p.name for p in out.iterdir() if not p.name.startswith(".")]: raise ValueError(f"folder_out: {out} holds something else ({strange[0]}), wanted an empty folder")
        with replacing(out/"plan.json") as beside: beside.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        return
    before = Plan.load(out)
    differ = [k for k in ("folder", "text", "shards") if getattr(before, k) != getattr(plan, k)] + [k for k, v in plan.settings.items() if before.settings[k] != v]
    if len(before.probe) != len(plan.probe) or not np.allclose(before.probe, plan.probe): differ.append("scorer")
    if differ: raise ValueError(f"folder_out: {out} was begun with other {', '.join(differ)}: go on with the same, or use another folder")

def collect(
    folder_out: str | os.PathLike, # of a run
) -> Selection:
    "The selection of a run that is complete. Raises FileNotFoundError if it is not."
    plan, out = Plan.load(folder_out), Path(folder_out)
    _complete(out, plan, "kept", "take")
    reasons = [pq.read_table(plan.file(out, "decisions", shard))["reasons"].to_numpy() for shard in range(len(plan.shards))]
    judged, report = read_tables(out)[0], json.loads((out/"report.json").read_text())
    return Selection(np.concatenate([judged.reasons[:0], *reasons]), judged.scores, judged.sizes, report["line"])

def run_local(
    folder_in: str | os.PathLike, # as for `pipelines`
    folder_out: str | os.PathLike, # results; its folder `kept` holds the documents, `log` the reasons
    scorer: Scorer,
    keep: float = 0.1, # share, above 0 and up to 1
    *,
    workers: int = 1, # processes; more than one need a script with `if __name__ == "__main__":`
    **options: Any, # as for `pipelines`
) -> Selection:
    "All three stages on this machine; called again after a kill, it goes on. Raises what `pipelines` raises."
    stages = pipelines(folder_in, folder_out, scorer, keep, **options)
    from datatrove.executor import LocalPipelineExecutor
    executor = None
    for stage in stages: executor = LocalPipelineExecutor(stage.steps, stage.tasks, min(workers, stage.tasks), stage.logs, executor)
    executor.run()
    return collect(folder_out)


# %% [markdown]
# Now the promise. The corpus of accidents, with few different scores so that there are many ties, and the same in one process: every reason, every score, the line, and the documents that were written, in their order and with all their fields.

# %%
class Coarse:
    "A scorer with few values and many ties."
    def __call__(self, texts): return np.array([len(text) // 400 for text in texts], float)

def rows(records): return [(r.text, dict(r.row)) for r in records]

warnings.simplefilter("ignore", UserWarning) # of unreadable records: here they are meant
for number, (keep, options, cutting) in enumerate(((0.1, {}, dict(tasks=3)), (0.3, dict(by="characters", target=[shards["torch"][0]["text"]]), dict(tasks=20, together=1)), (1.0, dict(duplicates=None), dict(tasks=1, together=300_000)))):
    many, one = run_local(source, root/f"out{number}", Coarse(), keep, **options, **cutting), select(Files(source), Coarse(), keep, **options)
    assert np.array_equal(many.reasons, one.reasons) and np.array_equal(many.scores, one.scores, equal_nan=True) and np.array_equal(many.sizes, one.sizes) and many.line == one.line
    assert rows(Files(root/f"out{number}"/"kept")) == rows(one.take(Files(source))) and sum(many.counts.values()) == len(list(Files(source)))
    print(keep, options.get("by", "documents"), many.counts)

# %% [markdown]
# Each record has its line in the log. And the folder cannot be taken for another selection.

# %%
log = pa.concat_tables([pq.read_table(path) for path in sorted((root/"out0"/"log").iterdir())])
assert log.num_rows == len(list(Files(source)))
for wrong, word in (((0.2, Coarse()), "keep"), ((0.1, scorer), "scorer")):
    try: pipelines(source, root/"out0", wrong[1], wrong[0])
    except ValueError as error: print(str(error).replace(str(root), "...")); assert word in str(error)
    else: raise AssertionError("this should have been refused")
log.filter(np.array(log["problem"]) != "").to_pandas()[["place", "reason", "problem"]]

# %% [markdown]
# ## Kill it
#
# A script of the kind that one would really run, with a scorer that takes its time. We look at the folder of results from outside and kill the script and all its processes when so and so many files are there, several times, and start it again each time. Which records will be there twice, and which not at all?

# %%
(root/"choose.py").write_text('''
import sys, time
import numpy as np
from ptbook.curate.pipeline import run_local

class Slow:
    def __call__(self, texts):
        time.sleep(0.003 * len(texts))
        return np.array([len(text) // 400 for text in texts], float)

if __name__ == "__main__": run_local(sys.argv[1], sys.argv[2], Slow(), 0.3, together=1, tasks=6, workers=int(sys.argv[3]))
''')

def watch(out, folder="", most=0, workers=1): # -> [seconds, tables, kept], and whether it was killed
    "Run the script until so many files are in a folder, then kill it; or to its end."
    begun, seen = time.perf_counter(), []
    process = subprocess.Popen([sys.executable, root/"choose.py", source, out, str(workers)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        number = {f: len(list((out/f).glob("0*"))) for f in ("tables", "kept")}
        seen.append((time.perf_counter() - begun, number["tables"], number["kept"]))
        if folder and number[folder] >= most:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.01)
    return seen, process.returncode == -signal.SIGKILL

killed = root/"killed"
moments = [("tables", 4)] if tiny else [("tables", 2), ("tables", 6), ("kept", 3)]
runs = [watch(killed, *moment) for moment in moments] + [watch(killed)]
assert runs[0][1] and not runs[-1][1]
calm = run_local(source, root/"calm", Coarse(), 0.3, together=1, tasks=6)
again = collect(killed)
assert np.array_equal(again.reasons, calm.reasons) and np.array_equal(again.scores, calm.scores, equal_nan=True)
assert all((killed/"kept"/p.name).read_bytes() == p.read_bytes() for p in (root/"calm"/"kept").iterdir())
assert [p.name for f in ("tables", "kept", "log") for p in sorted((killed/f).iterdir())] == [p.name for f in ("tables", "kept", "log") for p in sorted((root/"calm"/f).iterdir())]
f"{sum(k for _, k in runs)} kills; {len(again.kept)} of {len(again.reasons)} records kept, byte for byte those of a run in peace"

# %%
#| code-fold: true
fig, ax = figure(f"Killed {sum(k for _, k in runs)} times, and what is done stays done", "seconds of running, all starts together", "shards done", size=(7.2, 4.2))
start, line = 0.0, []
for seen, was_killed in runs:
    line += [(start + t, tables, kept) for t, tables, kept in seen]
    start = line[-1][0]
    if was_killed: ax.axvline(start, color="#D55E00", linestyle="--", linewidth=1.5, label="killed" if seen is runs[0][0] else None)
seconds, tables, kept = zip(*line)
ax.step(seconds, tables, where="post", color="#0072B2", linewidth=2.5, label="scored")
ax.step(seconds, kept, where="post", color="#009E73", linewidth=2.5, linestyle="-.", label="taken")
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# The flat piece after each kill is the interpreter that starts. What a killed process was writing is begun anew: at most one shard per process.
#
# ## For real
#
# On one machine:
#
# ```python
# from ptbook.curate.ngrams import importance
# from ptbook.curate.pipeline import run_local
#
# if __name__ == "__main__":
#     chosen = run_local("/data/fineweb", "/data/chosen", importance(sample, target), keep=0.1, by="characters", workers=32)
# ```
#
# On a Slurm cluster each stage is a job array that waits for the one before. Call the same script again after failures: complete tasks are passed over.
#
# ```python
# from datatrove.executor import SlurmPipelineExecutor
# from ptbook.curate.pipeline import pipelines
#
# job = None
# for stage in pipelines("/shared/fineweb", "/shared/chosen", scorer, keep=0.1, tasks=1000):
#     job = SlurmPipelineExecutor(stage.steps, stage.tasks, time="04:00:00", partition="cpu", mem_per_cpu_gb=4 if stage.tasks > 1 else 64,
#                                 job_name=stage.name, logging_dir=stage.logs, depends=job)
# job.run()
# ```
#
# The steps travel by pickle, and with them the scorer: this is why the scorers of this part are objects of classes and hold no lambda. There is no Slurm here, but the travel can be checked, and the script be read that would be handed to it.

# %%
import dill
from datatrove.executor import SlurmPipelineExecutor

stage = pipelines(source, root/"slurm", scorer, 0.1, tasks=6)[0]
job = SlurmPipelineExecutor(stage.steps, stage.tasks, time="04:00:00", partition="cpu", job_name=stage.name, logging_dir=stage.logs)
there = dill.loads(dill.dumps(job)).pipeline[1]
texts = [row["text"] for row in table[:20]]
assert np.array_equal(there.scorer(texts), scorer(texts))
print(job.get_launch_file_contents(job.get_sbatch_args(6), "srun -l -n 1 launch_pickled_pipeline .../executor.pik").replace(str(root.resolve()), "..."))

# %% [markdown]
# The tests go one step further: a stand-in for `sbatch` takes that script and runs its array, task by task, each in a process of its own, and the selection is again the same. On Ray it is the same loop with `RayPipelineExecutor(stage.steps, stage.tasks, logging_dir=stage.logs, depends=job)`; Ray is not installed here, and this line was not run.
#
# What would a terabyte cost? We time each stage on the docstrings, and count the bytes that the middle one needs.

# %%
import tracemalloc

(root/"all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
seconds = {}
for stage in pipelines(root/"all.jsonl", root/"timed", scorer, 0.1):
    begun, data = time.process_time(), None
    for step in stage.steps: data = step(data, 0, 1)
    for _ in data: pass
    seconds[stage.name] = time.process_time() - begun
megabytes, n = (root/"all.jsonl").stat().st_size / 1e6, 200_000
rng = np.random.default_rng(0)
big = Judged(np.zeros(n, np.uint8), rng.random(n), rng.integers(100, 10_000, n), rng.integers(0, 2**63, n).astype(np.uint64))
tracemalloc.start()
decide(big, 0.1)
per_record = tracemalloc.get_traced_memory()[1] / n + 25
tracemalloc.stop()
assert per_record < 200
f"1 TB in documents of 3 kB: {seconds['score'] / megabytes * 1e6 / 3600:.0f} core-hours to score, {seconds['take'] / megabytes * 1e6 / 3600:.0f} to take; {1e12 / 3000 * per_record / 1e9:.0f} GB of memory to decide ({per_record:.0f} bytes per record at the peak)"

# %% [markdown]
# That is for a scorer of hashed n-grams. Where a language model scores, the first stage needs a GPU per task and all else stays as it is; hand in an object that loads its model when it is first called, for it is pickled once per task.
#
# ## What did not carry over
#
# - **The line is drawn in one memory.** With some billions of documents the tables no longer fit; exercise 2 finds the line without bringing the scores together. FineWeb and its kin avoid the question: they fix a threshold on a sample and filter in one reading, and get about the share they want (exercise 3).
# - **Copies are exact ones**, up to case and spacing, found by a hash in the middle stage. Near-duplicates over many machines need the buckets of MinHash to be exchanged; `datatrove` has four steps for that, to be run before.
# - **Paths are paths.** Every machine must see the folders; `s3://` is for `datatrove`'s own readers, which, as seen above, do not count what they cannot read.
# - **Slurm and Ray were not there.** Slurm was tried with a stand-in, Ray not at all.
# - **A worker that dies alone** (the kernel ends it when memory is short) is not noticed by the local executor, which waits for it for ever. End the script and start it again; on Slurm the task fails, and is run again.
#
# ## Exercises
#
# **1.** You kept a third, and now want a tenth by characters. Must everything be scored again?
#
# <details><summary>A solution</summary>
#
# No: the tables do not depend on `keep`, `by` or `duplicates`. Only the middle stage does, and it takes no time.
#
# </details>

# %%
#| code-fold: true
judged, lengths = read_tables(killed)
other = decide(judged, 0.1, by="characters")
assert np.array_equal(other.reasons, select(Files(source), Coarse(), 0.1, by="characters").reasons)
other.counts

# %% [markdown]
# **2.** Find the line if no process may hold all scores: a shard only answers how many of its scores are at least x.
#
# <details><summary>A solution</summary>
#
# Halve the interval of possible lines. Positive doubles are ordered like their bits, so at most 64 questions are needed to find it to the last bit; each is one number per shard. Copies must be marked before, and ties at the line be settled after.
#
# </details>

# %%
#| code-fold: true
scores = [part[~np.isnan(part)] for part in np.split(np.array([0.5, *rng.lognormal(size=999)]), [100, 150, 700])]
wanted, low, high, questions = 100, 0, np.float64(np.inf).view(np.int64), 0
while high - low > 1:
    middle, questions = low + (high - low) // 2, questions + 1
    if sum(int((part >= np.int64(middle).view(np.float64)).sum()) for part in scores) >= wanted: low = middle
    else: high = middle
line = np.int64(low).view(np.float64)
assert line == np.sort(np.concatenate(scores))[-wanted]
f"the line {line:.6f} after {questions} questions to {len(scores)} shards"

# %% [markdown]
# **3.** How far off is a threshold that is fixed on a few shards? Take the line from three of the nine libraries and look at the share that is kept of all. Then take it from a third of the *documents*.
#
# <details><summary>A solution</summary>
#
# Shards differ, so that three of them are not a small corpus. A third of the documents, drawn at random, is.
#
# </details>

# %%
#| code-fold: true
every = scorer([row["text"] for row in corpus])
def share(of_sample): return float((every >= np.quantile(every[of_sample], 0.9)).mean())
three = [share(np.isin(of, trio)) for trio in itertools.combinations(domains, 3)]
third = [share(np.random.default_rng(seed).random(len(every)) < 1/3) for seed in range(len(three))]
assert np.ptp(third) < np.ptp(three)
f"wanted 10 %; three shards: {min(three):.1%} to {max(three):.1%}; a third of the documents: {min(third):.1%} to {max(third):.1%}"
