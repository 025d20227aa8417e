"""Nothing is lost: five programs are killed at random moments and before every step that changes a disk. What a reader finds is the old or the new,
and running the program again ends where an undisturbed run ends. `PTBOOK_KILLS` sets how many random kills each program gets (50 take some minutes)."""
import itertools
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

KILLS = int(os.environ.get("PTBOOK_KILLS", 20))


# The programs. `prepare` makes what they read and the old output, `work` writes the new one over it, `outputs` is what a reader finds.

class Fit:
    "Checkpoints of a small run. It has no old output; whatever step is found must be that of an undisturbed run."
    def __init__(self):
        import torch
        torch.set_num_threads(1)

    def prepare(self, folder, new): pass

    def work(self, folder):
        from test_train import loss, net, quiet, rows
        quiet(net(), loss, rows(), 6, folder=folder/"run", save_every=2)

    def steps(self, folder):
        "All checkpoints of an undisturbed run."
        from functools import partial
        from ptbook.basics import checkpoints
        checkpoints.write_checkpoint = partial(checkpoints.write_checkpoint, keep=100)
        self.work(folder)

    def outputs(self, folder):
        from safetensors.torch import load_file
        found = {}
        for path in sorted((folder/"run").glob("[!.]*")):
            state = json.loads((path/"state.json").read_text())
            tensors = {f"{name} {key}": t.numpy().tobytes() for name in ("model", "optimizer") for key, t in load_file(path/f"{name}.safetensors").items()}
            found[path.name] = {k: v for k, v in state.items() if k != "seconds"} | tensors
        return found


class Merge:
    "A model folder that takes another one's place."
    def __init__(self):
        import torch
        torch.set_num_threads(1)

    def prepare(self, folder, new):
        import torch
        from safetensors.torch import save_file
        for i in range(3):
            model = folder/f"m{i}"
            model.mkdir()
            g = torch.Generator().manual_seed(i)
            save_file({f"w{j}": torch.randn(150_000, generator=g) for j in range(6)}, model/"model.safetensors", {"format": "pt"})
            (model/"config.json").write_text('{"model_type": "x"}')
            (model/"vocab.json").write_text('{"a": 0}')
        if not new: shutil.copytree(folder/"m0", folder/"out")

    def work(self, folder):
        from ptbook.merge.files import merge_files
        merge_files([folder/f"m{i}" for i in range(3)], folder/"out", overwrite=True, progress=False, threads=1)

    def outputs(self, folder): return {"out": {p.name: p.read_bytes() for p in (folder/"out").iterdir()}}


class Select:
    "Documents, reasons and page over those of another draw."
    def prepare(self, folder, new):
        rows = [json.dumps({"text": f"{i} " + "word " * (i % 7), "n": i}) for i in range(150)]
        (folder/"in.jsonl").write_text("\n".join(rows))
        if not new: self.work(folder, seed=1)

    def work(self, folder, seed=0):
        from ptbook.curate import report
        report.histogram = lambda selection: f"<img alt='{len(selection.kept)}'>" # drawing would take longer than all the rest
        report.select_files(folder/"in.jsonl", folder/"out.parquet", "random", 0.3, seed=seed)

    def outputs(self, folder): return {p.name: p.read_bytes() for p in folder.glob("out.*")}


def toy(seed, scale):
    time.sleep(0.005)
    return {"a": seed + float(os.environ["KEPT_ADD"]), "b": float(seed)}


class Run:
    "A result over one that other code gave. Its seeds run in the process itself or in two that are forked."
    jobs = 1
    def __init__(self):
        import torch
        from ptbook.basics.claims import claim, experiment
        torch.set_num_threads(1)
        self.toy = experiment("toy", chapter="no.chapter", metric="points")(toy)
        claim(self.toy, "a", ">", "b")

    def prepare(self, folder, new):
        if not new: self.work(folder, add=2)

    def work(self, folder, add=1):
        from joblib import parallel_config
        from ptbook.basics.claims import run
        os.environ["KEPT_ADD"] = str(add)
        with parallel_config(backend="multiprocessing"): run(self.toy, "tiny", jobs=self.jobs, progress=False, folder=folder/"results")

    def outputs(self, folder):
        found = {p.name: json.loads(p.read_text()) for p in folder.glob("results/[!.]*")}
        for p in folder.glob("results/.partial/*/[!.]*"): json.loads(p.read_text())
        return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in found.items()}


class Refresh:
    "A notebook over itself. Starting a kernel takes a second and writing takes milliseconds: most kills are aimed at what comes after the kernel."
    kernel = False
    def prepare(self, folder, new):
        import nbformat
        cells = [nbformat.v4.new_code_cell(f"print('{i} ' * {300 * i})", id=f"cell{i}") for i in range(9)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder/"book.ipynb")

    def work(self, folder):
        from ptbook.press import refresh
        if not self.kernel: refresh.run_cells = self.ran
        refresh.refresh_file(folder/"book.ipynb", "tiny", progress=False)

    def ran(self, path, scale, progress):
        "What the kernel gives for this notebook."
        import nbformat
        nb = nbformat.read(path, as_version=4)
        for i, cell in enumerate(nb.cells):
            if i: cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{i} " * 300 * i + "\n")]
            else: cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="\n")]
            cell.execution_count = i + 1
        return nb

    def outputs(self, folder): return {p.name: p.read_bytes() for p in folder.glob("[!.]*")}


PROGRAMS = {kind.__name__.lower(): kind for kind in (Fit, Merge, Select, Run, Refresh)}


# Children and how they end

class Clock:
    "Moments that a child notes and its parent reads: begin, first draft, last draft put away, end."
    def __init__(self): self.at = np.frombuffer(mmap.mmap(-1, 32), dtype=np.float64)
    def note(self, i): self.at[i] = time.monotonic()
    @property
    def phase(self): return "after" if self.at[3] else "during" if self.at[1] else "before"


def start(work, clock, before=lambda: None) -> int:
    "Fork a child that leads a process group of its own."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2) if "PTBOOK_KILLS_SHOW" not in os.environ else (): os.dup2(quiet, stream)
        from ptbook.basics import whole
        begun, away = whole._begun, whole._away
        def noted_begun(path):
            if not clock.at[1]: clock.note(1)
            return begun(path)
        def noted_away(place):
            try: away(place)
            finally: clock.note(2)
        whole._begun, whole._away = noted_begun, noted_away
        before()
        clock.note(0)
        work()
        clock.note(3)
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(code)


def end(pid) -> int: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calmly(work) -> Clock:
    clock = Clock()
    assert end(start(work, clock)) == 0
    return clock


def import_what_it_imports(work, told):
    "Import here what a child imported on the way, so that the next ones need not."
    calmly(lambda: (work(), told.write_text("\n".join(sys.modules))))
    for name in told.read_text().splitlines():
        with suppress(Exception): import_module(name)


def killed_after(work, seconds, since) -> Clock:
    "Kill the child and all its processes so many seconds after it began to work (since=0) or to write (since=1)."
    clock = Clock()
    pid = start(work, clock)
    while not clock.at[since]: time.sleep(0.0002)
    while time.monotonic() < clock.at[since] + seconds: time.sleep(0.0002)
    os.killpg(pid, signal.SIGKILL)
    end(pid)
    while alive(pid): time.sleep(0.001)
    return clock


def alive(group) -> bool:
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.copyfile"} # audit events, before the fact


def dying_at(moment, folder):
    "Die before the step of that number: a file opened for writing, a folder made, a name given or taken, or anything brought to the disk."
    from ptbook.basics import whole
    left = iter(range(moment, -1, -1))
    def step(*_):
        if next(left) == 0: os._exit(77)
    def heard(event, args):
        ours = any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(str(folder)) for a in args)
        within = event in ("os.remove", "os.rmdir") and args[1] != -1 # by rmtree, relative to a folder
        if event in CHANGES and (ours or within) or event == "open" and ours and args[2] & (os.O_WRONLY | os.O_RDWR): step()
    fsync, exchanged = os.fsync, whole._exchanged
    os.fsync = lambda handle: (step(), fsync(handle))[1]
    whole._exchanged = lambda *names: (step(), exchanged(*names))[1]
    sys.addaudithook(heard)


# What is said of an end

class Judge:
    "Knows the old and the new output of a program, and what each may be in between."
    def __init__(self, program, place):
        self.program, self.place = program, place
        self.template, calm = place/"template", place/"calm"
        for folder, new in ((calm, True), (self.template, False)):
            (place/"work").mkdir()
            calmly(lambda: program.prepare(place/"work", new))
            (place/"work").rename(folder)
        import_what_it_imports(lambda: program.work(self.fresh()), place/"modules")
        self.old = program.outputs(self.template)
        folder = self.fresh()
        self.clock = calmly(lambda: program.work(folder))
        self.new = self.known = program.outputs(folder)
        if isinstance(program, Fit):
            calmly(lambda: program.steps(calm))
            self.known = program.outputs(calm)
            assert len(self.known) == 3 and self.new.items() <= self.known.items()
        assert self.new and self.old != self.new and not self.litter(folder)

    def fresh(self):
        "The old state again, always in the same place, since some outputs name what they were made from."
        folder = self.place/"work"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.template, folder)
        return folder

    def litter(self, folder): return [p for p in folder.rglob(".*")]

    def verdict(self, folder) -> str:
        "old, new, between (each output whole, not all of one age), or what is wrong."
        try: found = self.program.outputs(folder)
        except Exception as error: return f"half: {error!r}"
        if found == self.new: return "new"
        if found == self.old: return "old"
        if not self.old.keys() <= found.keys() <= self.known.keys() | self.old.keys(): return f"half: {sorted(found)}"
        wrong = [name for name, content in found.items() if content not in (self.old.get(name), self.known.get(name))]
        return f"half: {wrong}" if wrong else "between"

    def again(self, folder) -> bool:
        "Whether the program, run again, ends as if nothing had been, and nothing is left over."
        calmly(lambda: self.program.work(folder))
        found = self.program.outputs(folder)
        older = isinstance(self.program, Fit) and self.new.items() <= found.items() <= self.known.items() # a checkpoint whose time had come
        return (found == self.new or older) and not self.litter(folder)


def random_kills(judge, kills) -> dict:
    "Every second moment is drawn from the whole run, the others from the time between the first draft and the last."
    begin, first, last, done = judge.clock.at
    rng, row = np.random.default_rng(0), dict.fromkeys("before during after in_draft old new between again".split(), 0) | {"half": []}
    for i in range(kills):
        folder, writing = judge.fresh(), i % 2
        if isinstance(judge.program, Run): judge.program.jobs = 2 if i % 10 == 9 else 1 # a pool takes its time to begin
        clock = killed_after(lambda: judge.program.work(folder), rng.uniform(0, last - first if writing else 1.05 * (done - begin)), writing)
        verdict = judge.verdict(folder)
        row[clock.phase] += 1
        row["in_draft"] += bool(list(folder.rglob(".*.draft")))
        if verdict in row: row[verdict] += 1
        else: row["half"].append(f"kill {i}: {verdict}")
        row["again"] += judge.again(folder)
    return row


def every_step(judge) -> dict:
    "Die before the first step, before the second, until one lives."
    row = dict.fromkeys("steps old new between again".split(), 0) | {"half": []}
    for moment in itertools.count():
        folder = judge.fresh()
        code = end(start(lambda: judge.program.work(folder), Clock(), lambda: dying_at(moment, folder)))
        assert code in (0, 77), code
        if code == 0: return row
        verdict = judge.verdict(folder)
        row["steps"] += 1
        if verdict in row: row[verdict] += 1
        else: row["half"].append(f"step {moment}: {verdict}")
        row["again"] += judge.again(folder)


def main(name, kills):
    "In a process of its own, which has imported everything once and has no threads."
    program = PROGRAMS[name]()
    with tempfile.TemporaryDirectory() as place:
        judge = Judge(program, Path(place))
        began = time.monotonic()
        random = random_kills(judge, kills)
        between = time.monotonic()
        steps = every_step(judge)
    print(json.dumps({"random": random, "steps": steps, "seconds": [round(between - began, 1), round(time.monotonic() - between, 1)],
                      "clock": (judge.clock.at - judge.clock.at[0]).round(3).tolist()}))


def ask(name, kills=KILLS) -> dict:
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, name, str(kills)], capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def note(path, told):
    "Add to the record of what was tried."
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | told, indent=1))


@pytest.mark.parametrize("name", PROGRAMS)
def test_killed_at_any_moment_the_old_or_the_new(name):
    told = ask(name)
    random, steps = told["random"], told["steps"]
    if place := os.environ.get("PTBOOK_KILLED"): note(Path(place), {name: told})
    assert not random["half"] and not steps["half"]
    assert random["during"] >= KILLS // 5 and random["in_draft"] >= KILLS // 10, "too few kills fell into the writing to show anything"
    assert steps["steps"] >= 12 and steps["old"] + steps["between"] > 0 and steps["new"] > 0
    assert random["again"] == KILLS and steps["again"] == steps["steps"]


SEEDS = """
import sys, time
from pathlib import Path
from ptbook.basics.claims import claim, experiment, run

def slow(seed, scale):
    Path(sys.argv[1], f"begun-{seed}").touch()
    time.sleep(60)
    return {"a": 1.0 + seed, "b": 0.0}

slow = experiment("slow", chapter="no.chapter", metric="points")(slow)
claim(slow, "a", ">", "b")
if __name__ == "__main__": run(slow, "tiny", jobs=2, progress=False, folder=sys.argv[1])
"""
CELL = """
import sys, nbformat
from pathlib import Path
from ptbook.press.refresh import refresh_file

place = Path(sys.argv[1])
cell = nbformat.v4.new_code_cell(f"import pathlib, time\\npathlib.Path({str(place)!r}, 'begun-0').touch()\\ntime.sleep(60)")
nbformat.write(nbformat.v4.new_notebook(cells=[cell]), place/"book.ipynb")
refresh_file(place/"book.ipynb", "tiny")
"""


def marked(token) -> list:
    "Processes that were started with a word in their environment."
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if token in (place/"environ").read_bytes(): found.append(place.name)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("script, begun, kill", [(SEEDS, 2, os.killpg), (CELL, 1, os.killpg), (CELL, 1, os.kill)], ids=["seeds with the group", "kernel with the group", "kernel without"])
def test_no_worker_and_no_kernel_outlives_its_program(tmp_path, script, begun, kill):
    (tmp_path/"program.py").write_text(script)
    token = f"{tmp_path}:{begun}"
    process = subprocess.Popen([sys.executable, "-W", "ignore", tmp_path/"program.py", tmp_path], start_new_session=True, env=os.environ | {"KEPT": token, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("begun-*"))) < begun:
        assert process.poll() is None
        time.sleep(0.02)
    assert len(marked(token.encode())) > begun
    kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while (left := marked(token.encode())) and time.monotonic() < until: time.sleep(0.05)
    assert not left


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]))
