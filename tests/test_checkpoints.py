"What the checkpoints chapter cannot show in a notebook: kills within `fit`, full disks, folders that cannot be had, other runs' checkpoints."
import os
import resource
import signal
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ptbook.basics import checkpoints as module
from ptbook.basics.checkpoints import Batches, CheckpointError, Keeper, checkpoints, find_checkpoint, identity, last_good, load_weights, weights, write_checkpoint
from ptbook.basics.train import fit

sys.path.insert(0, os.path.dirname(__file__))
from test_train import exit_code, in_child, loss, net, never, quiet, rows, same_weights  # noqa: E402  the same small run


# Kills and the disk

def test_killed_in_the_middle_of_a_write_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    def work():
        real, calls = module.save_file, []
        def save_file(tensors, path):
            calls.append(path)
            real(tensors, path)
            if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL) # second checkpoint, both files written, state.json not
        module.save_file = save_file
        quiet(net(), loss, rows(), 20, folder=tmp_path, save_every=5)
    assert exit_code(in_child(work)) == -signal.SIGKILL
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000005"]
    assert len(list(tmp_path.glob(".step-000010.*.draft"))) == 1
    done = quiet(net(), loss, rows(), 20, folder=tmp_path, save_every=5)
    assert same_weights(done.model, quiet(net(), loss, rows(), 20).model)


def test_a_folder_that_is_gone_is_named_and_not_made_up(tmp_path):
    with pytest.raises(CheckpointError, match="step 3: no checkpoint could be written.*there is no checkpoint yet"):
        write_checkpoint(tmp_path / "gone", 3, {"model.safetensors": weights(net())}, {})
    assert not (tmp_path / "gone").exists() and last_good(None) == "no checkpoints were asked for"


def test_only_the_newest_are_kept(tmp_path):
    for step in (8, 9, 10, 1_000_000): write_checkpoint(tmp_path, step, {"model.safetensors": weights(net())}, {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000010", "step-1000000"], "by number, not by letter"
    assert len(list(tmp_path.iterdir())) == 2


def test_disk_full_keeps_the_old_checkpoint(tmp_path):
    "The kernel refuses to let any file grow; the last good checkpoint is named and goes on to the same end."
    def work():
        def filling(model, ids):
            if len(checkpoints(tmp_path)) == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            return loss(model, ids)
        filling.__qualname__ = "loss"
        try: quiet(net(), filling, rows(), 20, folder=tmp_path, save_every=5)
        except CheckpointError as error:
            assert "step 10" in str(error) and "File too large" in str(error)
            assert f"the last good checkpoint is {tmp_path / 'step-000005'}" in str(error)
            assert len(error.run.history) == 10
            return 7
    assert exit_code(in_child(work)) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]
    done = quiet(net(), loss, rows(), 20, folder=tmp_path, save_every=5)
    assert same_weights(done.model, quiet(net(), loss, rows(), 20).model)


# Folders

def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="folder=.*file.*wanted a folder, and this is a file"): fit(net(), never, rows(), 5, folder=tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be|can be written"): fit(net(), never, rows(), 5, folder=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc, where nobody can write, not even root")
@pytest.mark.parametrize("folder", ["/proc/run", "/proc"])
def test_a_folder_that_cannot_be_written_is_refused(folder):
    with pytest.raises(ValueError, match=f"folder='{folder}': wanted a folder that can be written"): fit(net(), never, rows(), 5, folder=folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ValueError, match="can be written"): fit(net(), never, rows(), 5, folder=tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    quiet(net(), loss, rows(), 10, folder=tmp_path)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        file = tmp_path / "step-000010" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:100])
        with pytest.raises(ValueError, match="step-000010 cannot be read"): quiet(net(), loss, rows(), 10, folder=tmp_path)
        file.write_bytes(whole)
    assert len(quiet(net(), loss, rows(), 10, folder=tmp_path).history) == 10


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-by-step").mkdir()
    quiet(net(), loss, rows(), 10, folder=tmp_path, save_every=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-000009", "step-000010", "step-by-step"]


# Another run

@pytest.mark.parametrize("change, message", [
    (dict(lr=0.003), r"lr was 0.01, now 0.003"),
    (dict(steps=11), r"steps was 10, now 11"),
    (dict(schedule="wsd"), r"schedule was cosine, now wsd"),
    (dict(schedule=lambda step: 1.0), r"schedule was cosine, now function"),
    (dict(clip=None), r"clip was 1.0, now None"),
    (dict(seed=1), r"seed was 0, now 1"),
    (dict(model=net(width=9)), r"parameter 0.weight was float32 \[50, 8\], now float32 \[50, 9\]"),
    (dict(model=nn.Sequential(*net(), nn.Linear(50, 50))), r"parameter 4.bias was absent, now float32 \[50\]"),
    (dict(model=net(seed=1)), r"other initial weights"),
    (dict(batches=rows(seed=2)), r"fingerprint of the batches was"),
    (dict(loss=never), r"loss was loss, now never"),
])
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, change, message):
    run = dict(model=net(), loss=loss, batches=rows(), steps=10, folder=tmp_path)
    quiet(**run)
    with pytest.raises(ValueError, match=message): quiet(**(run | dict(model=net()) | change))
    assert len(quiet(**run).history) == 10, "and the run itself still stands"


def test_a_keeper_resumes_its_own_run_and_no_other(tmp_path):
    def keeper(seed):
        model = net(seed=seed)
        return Keeper(tmp_path, {"lr": 0.1}, model, torch.optim.AdamW(model.parameters()), Batches(rows()), Accelerator(cpu=True))
    keeper(0).save([{"step": 1, "loss": 1.0}], 2.0)
    assert keeper(0).resume() == ([{"step": 1, "loss": 1.0}], 2.0)
    with pytest.raises(ValueError, match="other initial weights"): keeper(1).resume()
    assert find_checkpoint(tmp_path, identity({"lr": 0.1}, net(), Batches(rows())))[0].name == "step-000001"


# Weights

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[:3])

    def forward(self, ids): return self.head(self.embed(ids))


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    done = quiet(Tied(), loss, rows(), 10, folder=tmp_path)
    again = load_weights(Tied(), checkpoints(tmp_path)[-1])
    assert again.head.weight is again.embed.weight and same_weights(again, done.model)


def test_state_that_is_no_tensor_is_refused_by_name():
    Stateful = type("Stateful", (nn.Linear,), {"get_extra_state": lambda self: {"anything": 1}, "set_extra_state": lambda self, state: None})
    with pytest.raises(TypeError, match="state '_extra_state' is a dict: wanted tensors only"): weights(Stateful(2, 2))


def test_weights_of_another_model_change_nothing(tmp_path):
    path, other = write_checkpoint(tmp_path, 1, {"model.safetensors": weights(net())}, {}), net(width=9)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=r"of another model: parameter 0.weight was float32 \[50, 8\], now float32 \[50, 9\]"): load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))
