"What the training chapter cannot show in a notebook: kills, signals, two processes and bad input."
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn

from ptbook.basics.checkpoints import CheckpointError, checkpoints, load_weights
from ptbook.basics.train import Interrupted, NonFiniteLoss, fit

torch.set_num_threads(1)
STEPS = 60


def net(width=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(50, width), nn.Dropout(0.2), nn.LayerNorm(width), nn.Linear(width, 50))


def rows(batch=4, n=40, seed=1):
    ids = torch.randint(0, 50, (n * 4, 6), generator=torch.Generator().manual_seed(seed))
    return ids.view(-1, batch, 6)


def loss(model, ids):
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def slow_loss(model, ids):
    time.sleep(0.01)
    return loss(model, ids)


slow_loss.__qualname__ = "loss"
quiet = partial(fit, lr=1e-2, progress=False)


def never(model, ids): raise AssertionError("training began")


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def in_child(work):
    "Run `work` in a forked process, which exits with what it returns."
    pid = os.fork()
    if pid: return pid
    code = 99
    try:
        torch.set_num_threads(1)
        code = work() or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# Kills

def test_killed_at_any_moment_and_resumed_is_bit_equal(tmp_path):
    "SIGKILL at random moments, writes included: weights and history end as if nothing had happened."
    evaluate = lambda model: {"norm": float(model[0].weight.norm())}
    run = partial(quiet, steps=STEPS, batches=rows(), save_every=1, evaluate=evaluate, eval_every=7, folder=tmp_path)
    whole = quiet(net(), loss, rows(), STEPS, evaluate=evaluate, eval_every=7)
    chance, kills = random.Random(0), 0
    for _ in range(8):
        before = len(checkpoints(tmp_path)) and checkpoints(tmp_path)[-1].name
        child = in_child(lambda: run(net(), slow_loss) and 0)
        wait_for(lambda: len(checkpoints(tmp_path)) and checkpoints(tmp_path)[-1].name != before or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        kills += exit_code(child) == -signal.SIGKILL
        for path in checkpoints(tmp_path):
            assert {p.name for p in path.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}
            json.loads((path / "state.json").read_text())
            load_weights(net(), path)
    assert kills >= 6
    done = run(net(), loss)
    assert same_weights(done.model, whole.model)
    assert done.history == whole.history
    assert [p.name for p in checkpoints(tmp_path)] == [f"step-{STEPS - 1:06d}", f"step-{STEPS:06d}"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "strays are swept out"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_keeps_everything(tmp_path, number):
    "A real signal to a process in its loop; the run is then resumed to the same end."
    def work():
        before = signal.getsignal(signal.SIGINT)
        model = net()
        try: quiet(model, slow_loss, rows(), STEPS, folder=tmp_path / "run", save_every=20)
        except KeyboardInterrupt as stop:
            assert isinstance(stop, Interrupted) and signal.getsignal(signal.SIGINT) == before
            last = checkpoints(tmp_path / "run")[-1]
            assert f"step {len(stop.run.history)} of {STEPS}" in str(stop) and str(last) in str(stop)
            assert last.name == f"step-{len(stop.run.history):06d}" and stop.run.model is model
            again = quiet(model, loss, rows(), STEPS, folder=tmp_path / "run") # the same object, as in a notebook
            assert len(again.history) == STEPS
            return 7
    child = in_child(work)
    wait_for(lambda: checkpoints(tmp_path / "run"))
    os.kill(child, number)
    assert exit_code(child) == 7
    assert same_weights(load_weights(net(), checkpoints(tmp_path / "run")[-1]), quiet(net(), loss, rows(), STEPS).model)


def test_a_second_ctrl_c_interrupts_at_once():
    def work():
        def stuck(model, ids):
            for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        try: quiet(net(), stuck, rows(), 5)
        except Interrupted: return 1
        except KeyboardInterrupt: return 7
    assert exit_code(in_child(work)) == 7


def test_interrupted_without_a_folder_keeps_the_history():
    def stop(model, ids):
        if stop.calls == 4: os.kill(os.getpid(), signal.SIGINT)
        stop.calls += 1
        return loss(model, ids)
    stop.calls = 0
    with pytest.raises(Interrupted, match="step 5 of 20; no checkpoints were asked for") as caught: quiet(net(), stop, rows(), 20)
    assert len(caught.value.run.history) == 5


# Finished

def test_a_finished_run_is_returned_without_training(tmp_path):
    done = quiet(net(), loss, rows(), 10, folder=tmp_path)
    never.__qualname__ = "loss"
    try: again = quiet(net(), never, rows(), 10, folder=tmp_path)
    finally: never.__qualname__ = "never"
    assert same_weights(again.model, done.model) and again.history == done.history and again.seconds == pytest.approx(done.seconds, rel=0.5)


# Not finite

@pytest.mark.parametrize("what, spoil", [
    ("loss", lambda value: value * math.nan),
    ("loss", lambda value: value * math.inf),
    ("gradient", lambda value: value + 0 * (value - value).sqrt()),
])
def test_not_finite_stops_and_names_step_and_checkpoint(tmp_path, what, spoil):
    def bad(model, ids):
        bad.calls += 1
        return spoil(loss(model, ids)) if bad.calls > 7 else loss(model, ids)
    for folder, good in ((None, "no checkpoints were asked for"), (tmp_path / "late", "there is no checkpoint yet"), (tmp_path / "run", str(tmp_path / "run" / "step-000006"))):
        bad.calls = 0
        with pytest.raises(NonFiniteLoss, match=f"step 8: the {what} is not finite .*{good}") as caught:
            quiet(net(), bad, rows(), 20, folder=folder, save_every=None if folder is None else 3 if folder.name == "run" else 20)
        assert len(caught.value.run.history) == 8 and isinstance(caught.value, FloatingPointError)
    assert all(p.isfinite().all() for p in load_weights(net(), checkpoints(tmp_path / "run")[-1]).parameters())


# Processes, trackers, the caller's things

def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    "`accelerate launch` of two processes; resume is agreed on, and a full disk in the first process stops both."
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_train import *
from pathlib import Path
rank, here, bare = os.environ["RANK"], Path({str(tmp_path)!r}), lambda: nn.Sequential(*[m for m in net() if not isinstance(m, nn.Dropout)])
run = quiet(bare(), loss, rows(4), 20, folder=here / "run", save_every=8)
again = quiet(bare(), loss, rows(4), 20, folder=here / "run")
assert again.history == run.history and same_weights(again.model, run.model)
(here / f"losses{{rank}}.json").write_text(json.dumps([run.losses.tolist(), float(sum(p.double().sum() for p in run.model.parameters()))]))
if rank == "0": resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try: quiet(bare(), loss, rows(4), 20, folder=here / "full", save_every=5)
except CheckpointError as error:
    assert "step 5" in str(error) and len(error.run.history) == 5
    (here / f"refused{{rank}}").touch()
""")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0", str(script)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    bare = lambda: nn.Sequential(*[m for m in net() if not isinstance(m, nn.Dropout)])
    one = quiet(bare(), loss, rows(8), 20)
    first, second = (json.loads((tmp_path / f"losses{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "both processes hold the same run"
    assert max(abs(a - b) for a, b in zip(first[0], one.losses, strict=True)) < 1e-5
    assert (tmp_path / "refused0").exists() and (tmp_path / "refused1").exists()
    with pytest.raises(ValueError, match="micro-batches per update was 2, now 1"): quiet(bare(), loss, rows(4), 20, folder=tmp_path / "run")


def test_accumulating_two_equals_twice_the_batch():
    bare = lambda: nn.Sequential(*[m for m in net() if not isinstance(m, nn.Dropout)])
    one, two = quiet(bare(), loss, rows(8), 20), quiet(bare(), loss, rows(4), 20, accumulate=2)
    assert abs(one.losses - two.losses).max() < 1e-5


class Memory(GeneralTracker):
    name, requires_logging_directory = "memory", False
    def __init__(self): super().__init__(); self.rows, self.config, self.finished = [], None, False
    @property
    def tracker(self): return self.rows
    def store_init_configuration(self, values): self.config = values
    def log(self, values, step=None, **_): self.rows.append((step, values))
    def finish(self): self.finished = True


def test_trackers_get_settings_and_every_step():
    memory = Memory()
    run = quiet(net(), loss, rows(), 6, trackers=[memory], evaluate=lambda model: {"x": 2}, eval_every=3)
    assert memory.config["lr"] == "0.01" and memory.finished
    assert [v["loss"] for _, v in memory.rows if "loss" in v] == run.losses.tolist()
    assert [(s, v) for s, v in memory.rows if "x" in v] == [(3, {"x": 2.0}), (6, {"x": 2.0})]
    assert quiet(net(), loss, rows(), 6).losses.tolist() == run.losses.tolist(), "and a second fit works"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_callers_things_come_back(precision):
    model = net()
    model[1].eval()
    before, attributes, torch_state, python_state = [m.training for m in model.modules()], set(vars(model)), torch.get_rng_state(), random.getstate()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run = quiet(model, loss, rows(), 5, precision=precision, evaluate=lambda m: {"mode": float(m.training)})
    assert run.model is model and run.history[-1]["mode"] == 0
    assert [m.training for m in model.modules()] == before and set(vars(model)) == attributes
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert model(rows()[0]).dtype == torch.float32


def test_bf16_is_used_also_after_a_run_without_it():
    seen = []
    def watching(model, ids):
        handle = model[-1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        value = loss(model, ids)
        handle.remove()
        return value
    model = net()
    for precision in ("no", "bf16", "no"): quiet(model, watching, rows(), 1, precision=precision)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


def test_batches_of_dicts_and_tuples_and_a_loss_of_other_threads():
    import threading
    x, y = torch.randn(12, 3), torch.randint(0, 2, (12,))
    model, runs = nn.Linear(3, 2), []
    for batches, pick in (([{"x": x, "y": y}], lambda b: (b["x"], b["y"])), ([(x, y)], lambda b: b)):
        work = lambda: runs.append(quiet(nn.Linear(3, 2), lambda m, b: nn.functional.cross_entropy(m(pick(b)[0]), pick(b)[1]), batches, 3))
        thread = threading.Thread(target=work)
        thread.start(), thread.join()
    assert [len(run.history) for run in runs] == [3, 3]


# Bad input

@pytest.mark.parametrize("bad, message", [
    (dict(steps=0), "steps=0: wanted a whole number of at least 1"),
    (dict(steps=2.5), "steps=2.5"),
    (dict(lr=-1e-3), "lr=-0.001: wanted a finite learning rate above 0"),
    (dict(lr=0), "lr=0"),
    (dict(lr=math.nan), "lr=nan"),
    (dict(lr=math.inf), "lr=inf"),
    (dict(schedule="cosin"), "schedule='cosin': wanted one of constant, linear, cosine, wsd"),
    (dict(warmup=-1), "warmup=-1"),
    (dict(warmup=10), "warmup=10: wanted .* fewer steps than steps=10"),
    (dict(weight_decay=-0.1), "weight_decay=-0.1"),
    (dict(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
    (dict(clip=0), "clip=0"),
    (dict(clip=-1.0), "clip=-1.0"),
    (dict(accumulate=0), "accumulate=0"),
    (dict(precision="fp8"), "precision='fp8': wanted no, bf16 or fp16"),
    (dict(save_every=5), "save_every=5: wanted 1 or more, with a folder"),
    (dict(eval_every=5), "eval_every=5: wanted 1 or more, with evaluate"),
    (dict(trackers="nothing-of-the-kind"), "trackers='nothing-of-the-kind'"),
    (dict(batches=[]), "batches=.*wanted at least one batch"),
    (dict(model=nn.Linear(3, 2).requires_grad_(False)), "model='Linear': wanted at least one parameter with requires_grad"),
    (dict(loss=lambda m, b: m(b[:, :-1])), r"loss\(model, batch\)='torch.float32 of shape \(4, 5, 50\)': wanted a scalar"),
    (dict(loss=lambda m, b: 1.0), r"loss\(model, batch\)='float': wanted a scalar"),
    (dict(loss=lambda m, b: loss(m, b).detach()), r"without a gradient"),
])
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message): fit(**(dict(model=net(), loss=loss, batches=rows(), steps=10, progress=False) | bad))


def test_batches_without_an_index_are_refused():
    with pytest.raises(TypeError, match="batches=generator: wanted something with batches"): quiet(net(), loss, (b for b in rows()), 5)


def test_evaluate_must_give_a_dict():
    with pytest.raises(TypeError, match="evaluate.*gave float"): quiet(net(), loss, rows(), 5, evaluate=lambda model: 1.0)
