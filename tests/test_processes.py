"What the chapter on processes cannot show in a notebook: launchers, kills, full disks, checkpoints that change hands, other people's models."
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ptbook.basics import checkpoints as module
from ptbook.basics.checkpoints import CheckpointError, Pieces, checkpoints, load_weights, read_tensors, weights
from ptbook.basics.claims import claim, experiment, run, world
from ptbook.basics.evaluate import bits_per_byte
from ptbook.basics.processes import Shares, config, on_processes, shared_batches
from ptbook.basics.train import Interrupted, fit
from ptbook.press import cli

torch.set_num_threads(1)
HERE = Path(__file__).parent
IDS = torch.randint(0, 50, (400, 6), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    "Tied, with a frozen block, buffers of every kind, dropout, and rows that no number of processes divides."
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm, self.head, self.drop = nn.Embedding(50, 9), nn.LayerNorm(9), nn.Linear(9, 50, bias=False), nn.Dropout(0.1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 9)) for _ in range(3))
        self.head.weight = self.embed.weight
        self.blocks[0].requires_grad_(False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, ids):
        x = self.drop(self.embed(ids))
        for block in self.blocks: x = x + block(x)
        return self.head(self.norm(x)) * self.scale[0] * self.hidden[0]


def rows(batch=4): return IDS[:400 // batch * batch].view(-1, batch, 6)
def loss(model, ids): return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(accumulate=1, folder=None, steps=20, loss=loss, **settings):
    "The run of this file, and what is to be compared: losses, gradient norms, weights."
    model = Net()
    run = fit(model, loss, rows(), steps, lr=1e-2, accumulate=accumulate, folder=folder, progress=False, **settings)
    assert run.model is model and model.head.weight is model.embed.weight and not hasattr(model.embed.weight, "to_local")
    assert [row["step"] for row in run.history] == list(range(1, steps + 1))
    return run.losses.tolist(), [row["grad_norm"] for row in run.history], {name: t.clone() for name, t in model.state_dict().items()}, run.history


@pytest.fixture(scope="module")
def one(): return train(4)


def same(a, b, tolerance=1e-5):
    "The same run, but for the order in which numbers were added: float32 rounds at 6e-8 of a number, losses are about 6, and 20 steps carry it on."
    assert max(abs(x - y) for mine, theirs in zip(a[:2], b[:2]) for x, y in zip(mine, theirs, strict=True)) < tolerance
    assert a[2].keys() == b[2].keys() and all(torch.allclose(a[2][name].float(), b[2][name].float(), atol=tolerance) for name in a[2])


# The same run

@pytest.mark.parametrize("n, fsdp", [(2, False), (2, True), (4, False), (4, True)])
def test_the_same_global_batch_is_the_same_run(one, n, fsdp):
    found = on_processes(train, n, 4 // n, fsdp=fsdp)
    same(found[0], one)
    for other in found[1:]:
        assert other[3] == found[0][3] and all(torch.equal(other[2][name], t) for name, t in found[0][2].items())
    for name in ("blocks.0.0.weight", "scale", "flag"): assert torch.equal(found[0][2][name], one[2][name])


class Still:
    "Batches with a fingerprint of their own."
    fingerprint = "still"
    def __getitem__(self, index): return rows(8)[index % 50]


def dry(seed=0):
    "The net without dropout, which would draw anew in each share."
    model = Net(seed)
    model.drop.p = 0.0
    return model


def test_shares_of_a_batch_are_the_batch():
    "Under `shared_batches` the stream's batch is the global one; in one process as many micro-batches are the same run."
    quick = partial(fit, loss=loss, steps=20, lr=1e-2, progress=False)
    def work():
        with shared_batches(): return quick(dry(), batches=Still()).losses.tolist()
    alone = quick(dry(), batches=Still()).losses.tolist()
    for found in (*on_processes(work, 2, fsdp=True), quick(dry(), batches=Shares(Still(), 2), accumulate=2).losses.tolist()):
        assert max(abs(a - b) for a, b in zip(found, alone, strict=True)) < 1e-5


def test_shares_that_cannot_be_equal_are_refused():
    pair = Shares([{"x": torch.arange(6), "temperature": 2.0, "y": (torch.arange(6.0), torch.tensor(1))}], 3)
    assert pair[4]["x"].tolist() == [2, 3] and pair[4]["y"][0].tolist() == [2, 3] and pair[4]["temperature"] == 2.0 and pair[4]["y"][1] == 1
    with pytest.raises(ValueError, match="6 rows: wanted a multiple of 4"): Shares([torch.arange(6)], 4)[0]
    with pytest.raises(ValueError, match="holds a str: wanted tensors"): Shares([["a", "b"]], 2)[0]


def several(folder):
    "Fits one after the other in one group, with evaluation between steps and saves; half precision; other people's models."
    import transformers
    measured = lambda model: {"bits": bits_per_byte(model, IDS[:32])}
    watched = train(1, folder / "watched", evaluate=measured, eval_every=3, save_every=4)
    plain = train(1, evaluate=measured)
    assert watched[0] == plain[0] and watched[3][-1]["bits"] == plain[3][-1]["bits"]
    half = train(1, precision="bf16")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0))
    theirs = fit(gpt2, lambda model, ids: model(ids, labels=ids).loss, rows(), 5, progress=False)
    again = train(1, folder / "watched", evaluate=measured, eval_every=3, save_every=4) # finished: returned as it is
    assert again[3] == watched[3] and all(torch.equal(t, again[2][name]) for name, t in watched[2].items())
    return watched[:3], half[:3], theirs.losses.tolist(), [p.name for p in checkpoints(folder / "watched")]


def test_fit_after_fit_evaluation_half_precision_and_a_transformers_model(tmp_path):
    from transformers import GPT2LMHeadModel # once, before the forks
    torch.manual_seed(0)
    for name in ("ddp", "fsdp"): (tmp_path / name).mkdir()
    ddp, fsdp = (on_processes(several, 2, tmp_path / name, fsdp=name == "fsdp")[0] for name in ("ddp", "fsdp"))
    same(fsdp[0], ddp[0])
    same(fsdp[1], ddp[1], 0.05) # bf16 keeps 8 bits, 0.4 % of a number
    assert fsdp[1][0] != fsdp[0][0] and max(abs(a - b) for a, b in zip(fsdp[2], ddp[2], strict=True)) < 1e-5
    assert fsdp[3] == ddp[3] == ["step-000016", "step-000020"]


# Checkpoints

@pytest.fixture(scope="module")
def halfway(tmp_path_factory, one):
    "Folders of the same run, left after step 16: by one process, two that copy, and two that shard."
    made = {}
    for name, n, fsdp in (("one", 1, False), ("ddp", 2, False), ("fsdp", 2, True)):
        made[name] = tmp_path_factory.mktemp(name)
        settings = dict(save_every=8)
        train(4, made[name], **settings) if n == 1 else on_processes(partial(train, **settings), n, 4 // n, made[name], fsdp=fsdp)
        if name != "one": assert {p.name for p in checkpoints(made[name])[-1].iterdir()} >= {"state.json"}
        (made[name] / "last").mkdir()
        checkpoints(made[name])[-1].rename(made[name] / "last" / "step-000020")
    return made


@pytest.mark.parametrize("left, n, fsdp", [("fsdp", 1, False), ("fsdp", 4, False), ("fsdp", 4, True), ("fsdp", 2, True), ("one", 2, True), ("ddp", 4, True), ("ddp", 1, False)])
def test_a_checkpoint_goes_on_in_other_hands(tmp_path, halfway, one, left, n, fsdp):
    folder = tmp_path / "run"
    shutil.copytree(halfway[left], folder)
    shutil.rmtree(folder / "last")
    calls = []
    def counted(model, ids):
        calls.append(1)
        return loss(model, ids)
    counted.__qualname__ = "loss"
    def resumed(accumulate):
        found = train(accumulate, folder, loss=counted, save_every=8)
        assert len(calls) == 4 * accumulate, "only four steps were left"
        return found
    found = [resumed(4)] if n == 1 else on_processes(resumed, n, 4 // n, fsdp=fsdp)
    same(found[0], one)
    kept = read_tensors(checkpoints(folder)[-1])
    assert all(torch.equal(kept[name], found[0][2][name]) for name in kept) and {"embed.weight", "scale", "flag"} <= kept.keys() and "head.weight" not in kept


def test_with_another_global_batch_it_is_another_run(tmp_path, halfway):
    shutil.copytree(halfway["fsdp"], tmp_path / "run")
    with pytest.raises(ValueError, match="micro-batches per update was 4, now 1"): train(1, tmp_path / "run")
    def work():
        try: train(1, tmp_path / "run")
        except ValueError as error: return str(error)
    assert all("micro-batches per update was 4, now 2" in said for said in on_processes(work, 2, fsdp=True))


def test_each_process_writes_its_own_rows_and_nothing_else(halfway):
    path = halfway["fsdp"] / "last" / "step-000020"
    files = [f"{kind}-0000{i}-of-00002.safetensors" for kind in ("model", "optimizer") for i in (1, 2)]
    assert sorted(p.name for p in path.iterdir()) == [*files, "state.json"]
    sizes = [(path / file).stat().st_size for file in files]
    assert max(sizes[:2]) < 1.5 * min(sizes[:2]) and max(sizes[2:]) < 1.5 * min(sizes[2:])
    model = load_weights(Net(seed=5), path)
    assert model.head.weight is model.embed.weight
    pieces = Pieces(path)
    assert all(torch.equal(pieces.rows("embed.weight", a, 7), model.embed.weight[a : a + 7]) for a in (0, 20, 24, 25, 43))
    assert json.loads((path / "state.json").read_text())["processes"] == 2


def test_torch_reads_the_shards_as_its_own(halfway):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    path = halfway["fsdp"] / "last" / "step-000020"
    mine = read_tensors(path)
    theirs = {name: torch.zeros_like(t) for name, t in mine.items() if t.ndim}
    folder = path.parent / "model only"
    folder.mkdir()
    for file in path.glob("model-*"): shutil.copy(file, folder)
    dcp.load(theirs, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(t, mine[name]) for name, t in theirs.items())


def test_a_lost_shard_is_named(tmp_path, halfway):
    shutil.copytree(halfway["fsdp"] / "last" / "step-000020", tmp_path / "step-000020")
    (tmp_path / "step-000020" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="holds 1 of the 2 files of its model"): load_weights(Net(), tmp_path / "step-000020")
    with pytest.raises(ValueError, match="step-000020 cannot be read"): train(4, tmp_path)


# Kills, disks, Ctrl-C

def kill_once(mark):
    "SIGKILL to this process, the first time."
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_in_the_middle_of_its_shard_leaves_no_half_checkpoint(tmp_path, one):
    def work():
        real, calls = module.save_file, []
        def save_file(*args, **kwargs):
            real(*args, **kwargs)
            calls.append(1)
            if os.environ["RANK"] == "1" and len(calls) == 4: kill_once(tmp_path / "killed") # of the second checkpoint both files are written
        module.save_file = save_file
        return train(2, tmp_path, save_every=8)
    for found in on_processes(work, 2, fsdp=True, restarts=1): same(found, one)
    assert (tmp_path / "killed").exists() and not list(tmp_path.glob(".step-*")), "debris is swept out"


def test_a_full_disk_in_one_process_stops_all(tmp_path):
    def work():
        def filling(model, ids):
            if os.environ["RANK"] == "1" and checkpoints(tmp_path): resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            return loss(model, ids)
        filling.__qualname__ = "loss"
        try: train(2, tmp_path, loss=filling, save_every=8)
        except CheckpointError as error: return str(error), len(error.run.history), type(error.run.model.embed.weight).__name__
    for text, steps, kind in on_processes(work, 2, fsdp=True):
        assert "step 16" in text and "File too large" in text and f"the last good checkpoint is {tmp_path / 'step-000008'}" in text
        assert steps == 16 and kind == "Parameter"
    assert [p.name for p in tmp_path.iterdir()] == ["step-000008"]


def test_ctrl_c_in_one_process_stops_all_at_the_same_step(tmp_path, one):
    def work():
        def pressed(model, ids):
            pressed.calls += 1
            if os.environ["RANK"] == "1" and pressed.calls == 11: os.kill(os.getpid(), signal.SIGINT)
            return loss(model, ids)
        pressed.calls, pressed.__qualname__ = 0, "loss"
        signal.signal(signal.SIGINT, signal.default_int_handler) # a test run in the background ignores it
        try: train(2, tmp_path, loss=pressed)
        except Interrupted as error: return len(error.run.history), weights(error.run.model)["embed.weight"].clone()
    (steps, first), (others, second) = on_processes(work, 2, fsdp=True)
    assert steps == others < 20 and torch.equal(first, second)
    assert checkpoints(tmp_path)[-1].name == f"step-{steps:06d}"
    same(train(4, tmp_path), one)


# Launchers

SCRIPT = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from test_processes import *
rank, size, here = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
def deadly(model, ids):
    deadly.calls += 1
    if sys.argv[2:] and rank == 1 and deadly.calls == 13 * 4 // size: kill_once(here / "killed")
    return loss(model, ids)
deadly.calls, deadly.__qualname__ = 0, "loss"
found = train(4 // size, here / "run", loss=deadly, save_every=5)
torch.distributed.barrier()
(here / f"found{{rank}}.json").write_text(json.dumps(found[3]))
"""
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]


def launched(command, **env):
    "What a launcher returned and wrote; nothing survives it."
    process = subprocess.Popen([str(part) for part in command], env=ENV | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try: out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate() # the launcher ends its workers
            time.sleep(5)
            process.kill()
    return process.returncode, out, err


def histories(folder, n): return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(n)]


def test_torchrun_starts_again_from_the_last_checkpoint_when_a_worker_is_killed(tmp_path, one):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, _, err = launched([*TORCHRUN, "--nproc-per-node", 2, "--max-restarts", 1, tmp_path / "script.py", tmp_path, "kill"], ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert code == 0, err[-3000:]
    assert (tmp_path / "killed").exists()
    for history in histories(tmp_path, 2):
        assert [row["step"] for row in history] == list(range(1, 21))
        assert max(abs(row["loss"] - value) for row, value in zip(history, one[0], strict=True)) < 1e-5


@pytest.mark.parametrize("name, n", [("ddp", 2), ("fsdp", 4)])
def test_accelerate_launch_with_the_configurations_of_the_package(tmp_path, one, name, n):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config(name), "--num_processes", n, tmp_path / "script.py", tmp_path]
    code, _, err = launched(command)
    assert code == 0, err[-3000:]
    for history in histories(tmp_path, n): assert max(abs(row["loss"] - value) for row, value in zip(history, one[0], strict=True)) < 1e-5
    stored = {p.name.partition("-")[0].partition(".")[0] for p in checkpoints(tmp_path / "run")[-1].glob("*.safetensors")}
    assert stored == {"model", "optimizer"} and bool(list(checkpoints(tmp_path / "run")[-1].glob("model-*"))) == (name == "fsdp")


# Experiments

@experiment("bigger", chapter="basics.nowhere", metric="nats")
def bigger(seed, scale):
    if os.environ.get("FAIL") and seed == 1 and world()[0] == 1: raise MemoryError("this one's device is full")
    return {name: fit(dry(), loss, Still(), 10, lr=lr, seed=seed, progress=False).losses[-1] for name, lr in (("fast", 1e-2), ("slow", 1e-3))}
claim(bigger, "fast", "<", "slow", primary=True)


def spoken(folder):
    "`ptbook run` as a launcher starts it: what it printed, and how it ended."
    cli.find = lambda slug: bigger
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patched:
        patched.setenv("PTBOOK_RESULTS", str(folder))
        patched.setattr(cli, "clean_stdout", nullcontext)
        cli.main(["run", "bigger", "--scale", "book", "--seeds", "0:3", "--json"])
    return out.getvalue(), end.value.code


def test_an_experiment_under_a_launcher_measures_what_one_process_measures(tmp_path):
    (first, code), (second, _) = on_processes(spoken, 2, tmp_path, fsdp=True)
    alone = run(bigger, "book", seeds="0:3", folder=tmp_path, jobs=1, progress=False)
    found = json.loads(first)
    assert code == 0 and second == "", "the first process speaks"
    assert all(abs(a - b) < 1e-5 for arm in alone.arms for a, b in zip(alone.arms[arm], found["arms"][arm], strict=True))


def test_a_seed_that_fails_in_one_process_ends_the_run_and_the_others_are_kept(tmp_path, monkeypatch):
    work = partial(run, bigger, "tiny", folder=tmp_path, progress=False)
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(RuntimeError, match="bigger: seed 1 failed"): on_processes(work, 2) # of the one that failed, or of the one that lost it
    assert [p.name for p in tmp_path.rglob("seed-*")] == ["seed-0.json"]
    monkeypatch.delenv("FAIL")
    first, second = on_processes(work, 2)
    assert first.note == "Saved as bigger.tiny.json." and first.machine["processes"] == 2 and not second.note and second.arms == first.arms
    assert [p.name for p in tmp_path.iterdir()] == ["bigger.tiny.json"]
    alone = run(bigger, "tiny", folder=tmp_path / "alone", jobs=1, progress=False)
    assert "processes" not in alone.machine and all(abs(a - b) < 1e-5 for arm in alone.arms for a, b in zip(alone.arms[arm], first.arms[arm], strict=True))


# The launcher for notebooks

def test_a_failure_is_shown_and_nothing_is_left_running(tmp_path):
    def work():
        (tmp_path / os.environ["RANK"]).write_text(str(os.getpid()))
        if os.environ["RANK"] == "1": raise ArithmeticError("of all things")
        train(1, steps=10_000)
    with pytest.raises(RuntimeError, match="of all things"): on_processes(work, 2)
    for rank in "01":
        with pytest.raises(ProcessLookupError): os.kill(int((tmp_path / rank).read_text()), 0)
    assert "RANK" not in os.environ and train(1, steps=2)[0], "and this process goes on as it was"


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="n=0"): on_processes(print, 0)
    with pytest.raises(ValueError, match="config='dpp': wanted ddp or fsdp"): config("dpp")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="used the GPU already"): on_processes(print, 2)


@pytest.mark.parametrize("setting, message", [(dict(FSDP_VERSION="1"), "fsdp_version=1: wanted 2"), (dict(FSDP_ACTIVATION_CHECKPOINTING="true"), "fsdp_activation_checkpointing=True")])
def test_settings_of_accelerate_that_fit_does_not_follow_are_refused(setting, message):
    def work():
        os.environ.update(setting)
        try: train(1)
        except ValueError as error: return str(error)
    assert message in on_processes(work, 1, fsdp=True)[0]


def test_one_process_of_fsdp_is_one_process(one):
    same(on_processes(train, 1, 4, fsdp=True)[0], one)
