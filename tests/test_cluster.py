"What the chapter on many runs cannot show: two nodes and the death of one, bad addresses, what is left behind, Ctrl-C."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from ptbook.basics import cluster as module
from ptbook.basics.claims import claim, experiment, run
from ptbook.basics.cluster import SweepFailed, alone, as_jobs, check_address, on_cluster, outcomes, sweep

NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20, "include_log_monitor": False}


@pytest.fixture(scope="module")
def two():
    "A cluster of two nodes with a core each, and this process connected to it."
    folder = tempfile.mkdtemp(prefix="ptbook-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder), patch.setenv("RAY_USAGE_STATS_ENABLED", "0"), patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        module._quick_start(folder)
        import ray
        from ray.cluster_utils import Cluster
        made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "no_monitor": True}, shutdown_at_exit=True)
        try:
            made.add_node(**NODE)
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__]) # as a notebook's functions are sent
            with on_cluster(made.address): yield made
        finally:
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def marks(tmp_path, monkeypatch):
    "A folder for marks, whose name travels as a setting."
    monkeypatch.setenv("PTBOOK_TEST", str(tmp_path / "marks"))
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def mark(point):
    "Leave a mark that a point began, and on which node."
    import ray
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
    (Path(os.environ["PTBOOK_TEST"]) / f"{point}-{node}-{time.time_ns()}").touch()
    return node


def begun(folder): return Counter(int(p.name.split("-")[0]) for p in folder.iterdir())
def nodes(folder): return {p.name.split("-")[1] for p in folder.iterdir()}


def drawing():
    "An experiment that is no module's."
    def draws(seed, scale):
        mark(seed)
        time.sleep(0.3)
        a = torch.randn(64, 64)
        return {"torch": (a @ a).sum().item(), "numpy": float(np.linalg.norm(np.random.randn(200, 200) @ np.random.randn(200, 200))), "threads": torch.get_num_threads()}
    made = experiment("draws", chapter="no.such_chapter", metric="points")(draws)
    claim(made, "torch", ">", "numpy", primary=True)
    return made


def same(a, b, aside=("seconds", "machine")):
    a, b = ({k: v for k, v in json.loads(path.read_text("utf-8")).items() if k not in aside} for path in (a, b))
    return a == b


# addresses

@pytest.mark.parametrize("address", ["", "cluster", "host", "host:", "http://host:80", "host:port", "ray://host", "a b:1", ":6379"])
def test_bad_addresses(address):
    with pytest.raises(ValueError, match="wanted local, auto, host:6379 or ray://host:10001"): check_address(address)


def test_addresses():
    assert check_address("local") is check_address("auto") is None
    assert check_address("head:6379") == ("head", 6379) and check_address("ray://10.0.0.7:10001") == ("10.0.0.7", 10001) and check_address("[::1]:6379") == ("::1", 6379)


@pytest.mark.parametrize("kind", ["closed", "silent", "other", "no port"])
def test_nobody_there_is_said_soon(kind, monkeypatch):
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        if kind != "closed": line.listen()
        if kind == "other": threading.Thread(target=lambda: line.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True).start()
        port = 99999 if kind == "no port" else line.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(ConnectionError, match=f"nothing to connect to at 127.0.0.1:{port}"):
            with on_cluster(f"127.0.0.1:{port}"): pass
        assert time.monotonic() - began < 10


def test_without_ray(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'ptbook\[scale\]'"):
        with on_cluster("local"): pass
    with pytest.raises(RuntimeError, match=r"pip install 'ptbook\[scale\]'"): sweep(lambda x: x, [{"x": 1}], cluster="local", progress=False)


def test_no_address_changes_nothing():
    before = dict(os.environ)
    with on_cluster(None): assert dict(os.environ) == before


# sweeps on this machine

def train(lr, seed): # numbers that depend on the generators and on threads
    w = torch.randn(300, 300)
    for _ in range(3): w = w - lr * (w @ w) / 300
    return {"loss": w.norm().item(), "weights": {"w": w[:2]}, "drawn": np.random.rand(), "curve": (1, np.float32(0.5)), "none": None}


POINTS = [{"lr": lr, "seed": seed} for lr in (0.1, 0.2) for seed in (0, 1)]


def alike(a, b):
    return all(torch.equal(x["weights"]["w"], y["weights"]["w"]) and {**x, "weights": 0} == {**y, "weights": 0} for x, y in zip(a, b, strict=True))


def test_a_sweep_is_the_same_whatever_the_jobs():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two = (sweep(train, POINTS, jobs=jobs, progress=False) for jobs in (1, 2))
    assert alike(one, two) and torch.equal(state, torch.get_rng_state())
    assert one[0]["curve"] == [1, 0.5] and len({r["drawn"] for r in one}) == 2 and one[0]["drawn"] == one[2]["drawn"]
    with alone(1): assert train(0.1, 1)["loss"] == one[1]["loss"]
    assert alike(sweep(train, POINTS[::-1], jobs=1, progress=False)[::-1], one)


def test_finished_points_are_kept(tmp_path, marks):
    def fails(lr, seed):
        mark(seed)
        if seed == 1 and not (Path(os.environ["PTBOOK_TEST"]).parent / "mended").exists(): raise LookupError("the cupboard is bare")
        return {"lr": lr, "w": torch.ones(2)}
    points = [{"lr": 0.1, "seed": s} for s in range(3)]
    with pytest.raises(SweepFailed, match=r'(?s)1 of 3 points failed\n\{"lr": 0.1, "seed": 1\}: LookupError: the cupboard is bare.*in fails') as e:
        sweep(fails, points, jobs=1, progress=False, folder=tmp_path / "kept")
    assert list(e.value.failed) == [1] and e.value.results[1] is None and e.value.results[2]["lr"] == 0.1
    (tmp_path / "mended").touch()
    done = sweep(fails, points, jobs=1, progress=False, folder=tmp_path / "kept")
    assert begun(marks) == {0: 1, 1: 2, 2: 1} and [r["lr"] for r in done] == [0.1] * 3 and torch.equal(done[0]["w"], torch.ones(2))
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 3 and all(f.suffix == ".safetensors" for f in files)
    files[0].write_bytes(files[0].read_bytes()[:20])  # what cannot be read is run again
    sweep(fails, points, jobs=1, progress=False, folder=tmp_path / "kept")
    assert sum(begun(marks).values()) == 5
    sweep(lambda lr, seed: mark(seed), points, jobs=1, progress=False, folder=tmp_path / "kept")  # another function: its own results
    assert sum(begun(marks).values()) == 8


@pytest.mark.parametrize("points", [[{"x": object()}], [{"x": torch.ones(1)}], ["abc"], [1]])
def test_points_that_are_none(points):
    with pytest.raises((ValueError, TypeError)): sweep(lambda x: x, points, jobs=1, progress=False)


@pytest.mark.parametrize("result, words", [(object(), "returned a object"), ({1: 2}, "names as keys"), ({"a": {1, 2}}, "returned a set")])
def test_results_that_cannot_be_written(result, words):
    with pytest.raises(SweepFailed, match=words): sweep(lambda x: result, [{"x": 1}], jobs=1, progress=False)


def test_no_points(): assert sweep(train, [], progress=False) == [] and sweep(train, [], cluster="host:1", progress=False) == []


@pytest.mark.parametrize("jobs", [0, "two", -1])
def test_bad_jobs(jobs):
    with pytest.raises(ValueError, match="jobs"): as_jobs(jobs)
    with pytest.raises(ValueError, match="jobs"): sweep(train, POINTS, jobs=jobs, progress=False)


# two nodes

def test_seeds_run_on_both_nodes_and_the_result_is_the_local_one(two, marks, tmp_path):
    exp = drawing()
    there = run(exp, "book", progress=False, folder=tmp_path / "there", cluster="auto")
    assert begun(marks) == dict.fromkeys(range(5), 1) and len(nodes(marks)) == 2 and "here" not in nodes(marks)
    here = run(exp, "book", jobs=2, progress=False, folder=tmp_path / "here") # in processes that are new too: the result names the libraries that were loaded
    assert there.arms == here.arms and there.arms["threads"] == [1] * 5
    assert same(*(tmp_path / where / "draws.book.json" for where in ("there", "here")))


def test_a_sweep_on_both_nodes(two, marks):
    def task(lr, seed):
        time.sleep(0.3)
        return {**train(lr, seed), "node": mark(seed)}
    there = sweep(task, POINTS, cluster="auto", progress=False)
    assert len({r.pop("node") for r in there}) == 2 and alike(there, sweep(train, POINTS, jobs=1, progress=False))
    began = time.monotonic()
    sweep(task, POINTS[:3], cluster="auto", jobs=1, progress=False)
    assert time.monotonic() - began > 0.9  # one at a time


def test_what_fails_there_is_named_and_the_others_are_kept(two, tmp_path):
    def task(seed):
        if seed == 1: raise LookupError("the cupboard is bare")
        if seed == 2: os._exit(9)
        return seed
    with pytest.raises(SweepFailed, match=r'(?s)"seed": 1\}: LookupError.*"seed": 2\}: its worker process died 3 times') as e:
        sweep(task, [{"seed": s} for s in range(5)], cluster="auto", progress=False, folder=tmp_path)
    assert list(e.value.failed) == [1, 2] and e.value.results == [0, None, None, 3, 4] and len(list(tmp_path.iterdir())) == 3


def test_another_ptbook_is_refused(two, monkeypatch):
    monkeypatch.setattr(module, "library_code", lambda: "0123456789abcdef")
    (_, outcome), = outcomes(lambda point: {}, [0], cluster=True)
    assert "another ptbook" in outcome["error"] and "install the same" in outcome["error"]


def test_what_a_cluster_cannot_do(two):
    with pytest.raises(ValueError, match="no GPU"): sweep(train, POINTS, cluster="auto", gpus=1, progress=False)
    lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be sent"): sweep(lambda x: lock, [{"x": 1}], cluster="auto", progress=False)
    for address in ("local", two.address):
        with pytest.raises(ValueError, match="connected to a cluster already"):
            with on_cluster(address): pass


def test_settings_travel(two, monkeypatch):
    def task(x): return os.environ.get("PTBOOK_ANSWER")
    monkeypatch.setenv("PTBOOK_ANSWER", "42")
    assert sweep(task, [{"x": i} for i in range(4)], cluster="auto", progress=False) == ["42"] * 4
    monkeypatch.delenv("PTBOOK_ANSWER")
    assert sweep(task, [{"x": i} for i in range(4)], cluster="auto", progress=False) == [None] * 4


def test_a_node_dies_in_mid_run(two, marks, monkeypatch):
    import ray
    before = {n["NodeID"] for n in ray.nodes()}
    third = two.add_node(**NODE)
    victim, = {n["NodeID"] for n in ray.nodes() if n["Alive"]} - before
    monkeypatch.setenv("PTBOOK_VICTIM", victim)
    def draws(seed, scale): # the first seed on the third node never ends by itself; the last of the others wait for it to begin
        victim, folder = os.environ["PTBOOK_VICTIM"], Path(os.environ["PTBOOK_TEST"])
        if mark(seed) == victim: time.sleep(300)
        while victim != "none" and seed > 3 and not any(victim in p.name for p in folder.iterdir()): time.sleep(0.05)
        return {"a": torch.randn(64).sum().item()}
    exp = experiment("dies", chapter="no.such_chapter", metric="points")(draws)
    def kill():
        while not any(victim in p.name for p in marks.iterdir()): time.sleep(0.02)
        third.kill_raylet()
    threading.Thread(target=kill, daemon=True).start()
    there = run(exp, "book", seeds=range(8), progress=False, cluster="auto")
    there_begun, on_it = begun(marks), [int(p.name.split("-")[0]) for p in marks.iterdir() if victim in p.name]
    assert len(on_it) == 1 and there_begun == {seed: 1 + (seed in on_it) for seed in range(8)} # what ran there, and nothing else, ran twice
    monkeypatch.setenv("PTBOOK_VICTIM", "none")
    assert there.arms == run(exp, "book", seeds=range(8), jobs=1, progress=False).arms


# a cluster of one's own

def left(): return set(Path("/tmp").glob("ptbook-*")) | ({Path.home() / ".ray"} & set(Path.home().iterdir()))


def ptbook(*args):
    done = subprocess.run([sys.executable, "-c", "from ptbook.press.cli import main; main()", "run", "qwen25", "--scale", "tiny", "--json", *args],
                          env={**os.environ, "TQDM_DISABLE": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_command_on_a_cluster_of_its_own():
    before = left()
    (there, err), (here, _) = ptbook("--cluster", "local"), ptbook("--jobs", "1")
    assert not err.strip() and left() == before
    there, here = json.loads(there), json.loads(here)
    assert there.pop("seconds") > 0 < here.pop("seconds") and there == here


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs ignore it, and hand that on
from ptbook.basics.claims import experiment
import ptbook.press.cli as cli
marks = Path(os.environ["PTBOOK_TEST"])
@experiment("script", chapter="no.such_chapter", metric="points")
def script(seed, scale):
    with open(marks / f"{seed}-{time.time_ns()}", "w") as file: file.write(str(os.getpid()))
    time.sleep(0.2 if seed < 2 or (marks / "go").exists() else 60)
    return {"a": seed}
cli.find = lambda slug: script
cli.main(["run", "script", "--seeds", "0:4", *sys.argv[1:]])
"""


def family(pid): return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
def addresses(processes): return {c.laddr.ip for p in processes if p.is_running() for c in p.net_connections("tcp") if c.status == "LISTEN"}


def test_ctrl_c_keeps_the_finished_seeds_and_leaves_nothing(tmp_path, marks):
    before = left()
    (tmp_path / "script.py").write_text(SCRIPT)
    go = lambda *args: subprocess.Popen([sys.executable, tmp_path / "script.py", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                        env={**os.environ, "PTBOOK_RESULTS": str(tmp_path)}, start_new_session=True)
    first = go("--cluster", "local")
    try:
        deadline = time.monotonic() + 150
        while len(list(tmp_path.rglob("seed-*.json"))) < 2 or not {2, 3} & set(begun(marks)):
            assert first.poll() is None and time.monotonic() < deadline, first.communicate(timeout=5)
            time.sleep(0.1)
        started = family(first.pid)
        assert len(started) > 3 and addresses(started) and all(ip.replace("::ffff:", "").startswith("127.") or ip == "::1" for ip in addresses(started))
        os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to the whole group
        out, err = first.communicate(timeout=90)
        assert first.returncode == 130 and err.strip().splitlines()[-1] == "ptbook: interrupted" and "Traceback" not in err, err
        gone, alive = psutil.wait_procs(started, timeout=10)
        assert not alive and left() == before
    finally:
        for p in family(first.pid) if first.poll() is None else []: p.kill()
    (marks / "go").touch()
    second = go("--jobs", "1", "--json")
    out, err = second.communicate(timeout=90)
    assert second.returncode == 0 and json.loads(out)["arms"] == {"a": [0, 1, 2, 3]}, err
    (marks / "go").unlink()
    assert begun(marks)[0] == begun(marks)[1] == 1
