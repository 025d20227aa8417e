"""Many machines: the selection of the one-process call, whatever the cut, whatever the kill, and nothing begun that cannot be ended."""
import copy
import decimal
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ptbook.basics.whole import HOST
from ptbook.curate.ngrams import HashedNgrams, importance
from ptbook.curate.records import Files, select

pytest.importorskip("datatrove", reason="pip install 'ptbook[scale]'")
from ptbook.curate import pipeline as chapter
from ptbook.curate.pipeline import Plan, collect, pipelines, read_tables, run_local

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WORDS = "a graph has edges and nodes of many kinds with weights in them".split()


class Ties:
    "Few values, many equal scores."
    def __call__(self, texts): return np.array([len(text) % 7 for text in texts], float)


def corpus(folder: Path, files: int = 9) -> Path:
    "JSON lines, gzipped or not, Parquet, text; copies across files, and everything that can be wrong with one."
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, rng.integers(1, 30))), "n": int(i)} for i in range(20 * files + 10)]
    folder.mkdir(parents=True)
    for k in range(files):
        part = rows[20 * k:20 * k + 30]
        lines = "".join(json.dumps(row) + "\n" for row in part).encode()
        if k % 3 == 0: (folder/f"{k}.jsonl").write_bytes(lines)
        if k % 3 == 1: (folder/f"{k}.jsonl.gz").write_bytes(gzip.compress(lines))
        if k % 3 == 2: pq.write_table(pa.Table.from_pylist(part), folder/f"{k}.parquet")
    (folder/"cut.parquet").write_bytes((folder/"2.parquet").read_bytes()[:-30])
    (folder/"cut.jsonl.gz").write_bytes((folder/"1.jsonl.gz").read_bytes()[:-100])
    (folder/"bad.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": " "}\n{"text": 3}\n[1]\n{"text": "good"}\n')
    (folder/"empty.jsonl").write_bytes(b"")
    (folder/"z").mkdir()
    for name, text in (("a.txt", "A graph"), ("b.txt", "has edges"), ("c.jpg", "JFIF")): (folder/"z"/name).write_text(text)
    return folder


def go(stages, order=1) -> None:
    "Every task in this process, one after the other, as any executor would."
    for stage in stages:
        for rank in range(stage.tasks)[::order]:
            data = None
            for step in copy.deepcopy(stage.steps): data = step(data, rank, stage.tasks)
            for _ in data: pass


def same(a, b) -> bool:
    return np.array_equal(a.reasons, b.reasons) and np.array_equal(a.scores, b.scores, equal_nan=True) and np.array_equal(a.sizes, b.sizes) and (a.line == b.line or a.line != a.line and b.line != b.line)


def rows(records) -> list: return [(r.text, dict(r.row)) for r in records]
def contents(out: Path) -> dict: return {p.relative_to(out).as_posix(): p.read_bytes() for f in ("tables", "decisions", "log", "kept") for p in sorted((out/f).iterdir())}


@pytest.mark.parametrize("keep, more, tasks, together, order", [
    (0.1, {}, 1, 1 << 26, 1), (0.1, {}, 4, 1, -1), (0.5, dict(by="characters"), 40, 1500, 1), (1.0, dict(duplicates=None), 1, 1, 1), (0.001, {}, 3, 4000, -1), (0.3, dict(target=["a graph has edges"], longest=60), 4, 1, 1)])
def test_the_selection_is_that_of_one_process(tmp_path, keep, more, tasks, together, order):
    source, out = corpus(tmp_path/"in"), tmp_path/"out"
    go(pipelines(source, out, Ties(), keep, tasks=tasks, together=together, **more), order)
    one = select(Files(source), Ties(), keep, **more)
    assert same(collect(out), one) and rows(Files(out/"kept")) == rows(one.take(Files(source)))
    log = pa.concat_tables([pq.read_table(p) for p in sorted((out/"log").iterdir())]).to_pylist()
    read = list(Files(source))
    assert [(line["place"], line["reason"], line["problem"]) for line in log] == [(r.place, one.reason(i), r.problem) for i, r in enumerate(read)]
    assert [line["score"] for line in log] == pytest.approx(one.scores.tolist(), nan_ok=True)


def test_one_file_and_none(tmp_path):
    (tmp_path/"book.txt").write_text("first\n\nsecond one\n\nthird")
    go(pipelines(tmp_path/"book.txt", tmp_path/"out", Ties(), 0.4))
    one = select(Files(tmp_path/"book.txt"), Ties(), 0.4)
    assert same(collect(tmp_path/"out"), one) and [r.text for r in Files(tmp_path/"out"/"kept")] == [r.text for r in one.take(Files(tmp_path/"book.txt"))]
    (tmp_path/"nothing").mkdir()
    go(pipelines(tmp_path/"nothing", tmp_path/"none", Ties()))
    assert len(collect(tmp_path/"none").reasons) == 0


class Killed(BaseException): pass


@pytest.mark.parametrize("after", [False, True])
def test_dying_at_any_file_changes_nothing(tmp_path, monkeypatch, after):
    source, rename = corpus(tmp_path/"in", files=3), os.replace
    begin = lambda out: go(pipelines(source, out, Ties(), 0.3, tasks=3, together=1))
    begin(tmp_path/"calm")
    calm, n, lives = contents(tmp_path/"calm"), 0, 0
    while True: # die at the n-th file that would be renamed, before or after it is, then once more somewhere else, then live
        out = tmp_path/f"out{n}"
        for moment in (n, n // 2):
            left = [moment]
            def dying(a, b):
                left[0] -= 1
                if left[0] < 0:
                    if after: rename(a, b)
                    raise Killed
                rename(a, b)
            monkeypatch.setattr(os, "replace", dying)
            try: begin(out)
            except Killed: lives += 1
        monkeypatch.setattr(os, "replace", rename)
        begin(out)
        assert contents(out) == calm, n
        if left[0] >= 0: break
        n += 4
    assert lives > 2 * n // 4 >= 10


SCRIPT = """
import sys, time
import numpy as np
from ptbook.curate.pipeline import run_local

class Slow:
    def __call__(self, texts):
        time.sleep(0.004 * len(texts))
        return np.array([len(text) % 7 for text in texts], float)

if __name__ == "__main__": run_local(sys.argv[1], sys.argv[2], Slow(), 0.3, together=1, tasks=5, workers=int(sys.argv[3]))
"""


def test_killed_for_real_with_all_its_processes(tmp_path):
    source, out, rng = corpus(tmp_path/"in"), tmp_path/"out", np.random.default_rng(0)
    (tmp_path/"choose.py").write_text(SCRIPT)
    go(pipelines(source, tmp_path/"calm", Ties(), 0.3, together=1, tasks=5))
    calm, kills = contents(tmp_path/"calm"), 0
    for moment, workers in ((rng.integers(1, 16), 2), (rng.integers(17, 64), 1), (10**9, 1)): # of 4 x 16 files
        process = subprocess.Popen([sys.executable, tmp_path/"choose.py", source, out, str(workers)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            if len(list(out.glob("*/0*"))) >= moment: os.killpg(process.pid, signal.SIGKILL)
            time.sleep(rng.uniform(0.001, 0.02))
        kills += process.returncode == -signal.SIGKILL
    assert process.returncode == 0, process.stderr.read().decode()[-2000:]
    assert kills >= 1 and contents(out) == calm and same(collect(out), select(Files(source), Ties(), 0.3))


SBATCH = """#!/bin/bash
script="${@: -1}"
grep -q merge_stats "$script" && { echo "job 2"; exit 0; }
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for i in $(seq 0 "$n"); do SLURM_ARRAY_TASK_ID=$i bash "$script" >> "$SLURM_SAID" 2>&1 || exit 1; done
echo "job 1"
"""


def test_a_stand_in_for_slurm_runs_the_same_stages(tmp_path, monkeypatch):
    from datatrove.executor import SlurmPipelineExecutor
    source, out, bin = corpus(tmp_path/"in"), tmp_path/"out", tmp_path/"bin"
    bin.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", '#!/bin/bash\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (bin/name).write_text(script)
        (bin/name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    monkeypatch.setenv("SLURM_SAID", str(tmp_path/"said.txt"))
    texts = [r.text for r in Files(source) if r.text]
    scorer, job = importance(texts, texts[:20], HashedNgrams(500)), None
    for stage in pipelines(source, out, scorer, 0.2, tasks=3, together=1):
        job = SlurmPipelineExecutor(stage.steps, stage.tasks, time="1:00", partition="cpu", job_name=stage.name, logging_dir=stage.logs, depends=job, tasks_per_job=3)
    job.run()
    assert same(collect(out), select(Files(source), scorer, 0.2)), (tmp_path/"said.txt").read_text()[-3000:]


def test_columns_come_out_as_they_went_in(tmp_path):
    source = tmp_path/"in"
    source.mkdir()
    table = pa.table({"when": pa.array([datetime(2020, 1, 2), None], pa.timestamp("us")), "text": pa.array(["one", "two"], pa.large_string()), "price": pa.array([decimal.Decimal("1.50"), None]),
                      "kind": pa.array(["x", "y"]).dictionary_encode(), "tags": pa.array([[{"a": 1}], []]), "raw": pa.array([b"\xff", b""]), "small": pa.array([1, 2], pa.int8())})
    pq.write_table(table, source/"a.parquet")
    (source/"b.jsonl").write_text('{"odd": "\\ud800", "text": "three", "big": 123456789012345678901, "x": 0.1}\n{"text": "four", "x": "not a number"}\n')
    go(pipelines(source, tmp_path/"out", Ties(), 1.0))
    assert pq.read_table(tmp_path/"out"/"kept"/"000000.parquet").equals(table)
    assert rows(Files(tmp_path/"out"/"kept")) == rows(Files(source))


def test_results_are_not_mixed(tmp_path):
    source, out = corpus(tmp_path/"in"), tmp_path/"out"
    go(pipelines(source, out, Ties(), 0.3)[:1])
    class Other(Ties):
        def __call__(self, texts): return super().__call__(texts) + 1e-3
    for word, call in (("keep", lambda: pipelines(source, out, Ties(), 0.2)), ("by", lambda: pipelines(source, out, Ties(), 0.3, by="characters")), ("target", lambda: pipelines(source, out, Ties(), 0.3, target=["a"])),
                       ("scorer", lambda: pipelines(source, out, Other(), 0.3)), ("shards", lambda: pipelines(source, out, Ties(), 0.3, together=1)), ("something else", lambda: pipelines(source, tmp_path, Ties(), 0.3))):
        with pytest.raises(ValueError, match=f"folder_out: .*{word}"): call()
    left = out/"tables"/".000000.parquet.0123abcd.draft"
    (left/"new").mkdir(parents=True)
    for name, content in (("writer", HOST), ("new/half", b"half")): (left/name).write_bytes(content)
    pipelines(source, out, Ties(), 0.3, tasks=2) # as many tasks as you like
    assert not left.exists()
    with open(source/"0.jsonl", "a") as file: file.write('{"text": "late"}\n')
    with pytest.raises(ValueError, match="shards"): pipelines(source, out, Ties(), 0.3)


def test_what_changes_on_the_way_is_told(tmp_path):
    source, out = corpus(tmp_path/"in"), tmp_path/"out"
    score, decide, take = pipelines(source, out, Ties(), 0.3, together=1, tasks=2)
    for stage, folder in ((decide, "tables"), (take, None)):
        with pytest.raises(FileNotFoundError, match=folder): go([stage])
    go([score])
    (out/"tables"/"000003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 16 shards are missing, the first is 000003"): go([decide])
    go([score, decide])
    with pytest.raises(FileNotFoundError, match="take"): collect(out)
    class Drop(chapter.PipelineStep):
        def run(self, data, rank=0, world_size=1): yield from (d for d in data if len(d.text) % 2)
    with pytest.raises(ValueError, match="shard 0: got .* wanted the 30"): go([take._replace(steps=[take.steps[0], Drop(), *take.steps[1:]])])
    file = source/"0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"0\.jsonl: got .* bytes"): go([take])
    file.write_bytes(whole)
    go([take])
    assert same(collect(out), select(Files(source), Ties(), 0.3))


def test_what_is_refused_at_the_door(tmp_path):
    source = corpus(tmp_path/"in")
    class Short:
        def __call__(self, texts): return np.zeros(len(texts) + 1)
    for word, more in (("keep", dict(keep=0)), ("by", dict(by="words")), ("duplicates", dict(duplicates="near")), ("column", dict(text="body")), ("tasks", dict(tasks=0)), ("scorer", dict(scorer=Short()))):
        with pytest.raises(ValueError, match=word): pipelines(source, tmp_path/"out", **(dict(scorer=Ties()) | more))
    for inside in (source, source/"out"):
        with pytest.raises(ValueError, match="outside"): pipelines(source, inside, Ties())
    with pytest.raises(FileNotFoundError): run_local(tmp_path/"nowhere", tmp_path/"out", Ties())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    with pytest.raises(FileNotFoundError): Plan.load(tmp_path)


def test_a_scorer_that_fails_leaves_what_was_done(tmp_path):
    source, out = corpus(tmp_path/"in"), tmp_path/"out"
    class Fails:
        calls = 0
        def __call__(self, texts):
            Fails.calls += 1
            if Fails.calls > 4: raise RuntimeError("out of memory")
            return Ties()(texts)
    with pytest.raises(RuntimeError, match="out of memory"): go(pipelines(source, out, Fails(), 0.3, together=1, tasks=16))
    assert 0 < len(list((out/"tables").iterdir())) < 16
    go(pipelines(source, out, Ties(), 0.3, together=1, tasks=4))
    assert same(collect(out), select(Files(source), Ties(), 0.3)) and len(read_tables(out)[1]) == 16


def test_without_datatrove_it_can_be_imported_but_not_used(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"text": "one"}\n')
    code = """
import sys
sys.modules.update(dict.fromkeys(("datatrove", "datatrove.data", "datatrove.pipeline.base")))
from ptbook.curate.pipeline import ScoreStep, run_local
for call in (lambda: ScoreStep(len), lambda: run_local(sys.argv[1], sys.argv[1] + "/../out", len)):
    try: call()
    except ImportError as error: print(error)
"""
    (tmp_path/"in").mkdir()
    done = subprocess.run([sys.executable, "-c", code, tmp_path/"in"], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'ptbook[scale]'") == 2 and not (tmp_path/"out").exists()
