"""Stored logits: identities of the loss, views that come again, files that are whole or named as damaged."""
import os
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from ptbook.basics.claims import as_scale
from ptbook.basics.train import fit
from ptbook.distill import stored_logits as sl
from ptbook.distill.stored_logits import (
    CorruptStore, Draws, DuplicateRecords, ForeignStore, IncompleteStore, Layout, LogitStore, OtherAugmentation, OtherStore, SeededAugment, StoredBatches, StoreError,
    TruncatedStore, densify, part_path, record_seeds, soft_ce, sparse_ce, sparse_loss, sparsify, store_logits, write_part)


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor: return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wild(x):
    "All three generators."
    return torch.rot90(x, random.randrange(4), (-2, -1)) * float(np.random.uniform(0.5, 1.5)) + torch.randn(x.shape)


def gentle(x, draws): return x * (0.5 + draws.uniform(1, 1, 1)) + 0.1 * draws.normal(*x.shape[1:])


ONE, BATCHED = SeededAugment(wild, "wild"), SeededAugment(gentle, "gentle", batched=True)


def linear(classes: int = 12, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


@pytest.fixture
def images(): return torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stored(images, tmp_path): return store_logits(linear(), images, BATCHED, tmp_path / "s", epochs=3, k=4, part=40, batch=7)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_all_kept_is_all(shape):
    logits = random_logits(*shape, 40)
    assert (densify(*sparsify(logits, 40), 40) - logits.softmax(-1)).abs().max() < 5e-4


@pytest.mark.parametrize("k", [1, 2, 7, 39])
def test_rows_sum_to_one_and_the_top_is_as_it_was(k):
    logits = random_logits(50, 40)
    idx, val = sparsify(logits, k)
    dense = densify(idx, val, 40)
    assert torch.allclose(dense.sum(-1), torch.ones(50), atol=2e-3) and (dense >= 0).all()
    assert torch.equal(dense.gather(-1, idx), val.float()) and torch.equal(idx, logits.topk(k).indices)


def test_one_kept_is_label_smoothing():
    logits, target = random_logits(9, 12), random_logits(9, 12).argmax(-1)
    student = random_logits(9, 12, seed=1)
    idx, val = sparsify(logits, 1)
    for i in range(9):
        epsilon = (1 - val[i].float().item()) * 12 / 11
        assert sparse_ce(student[i:i + 1], idx[i:i + 1], val[i:i + 1]).item() == pytest.approx(F.cross_entropy(student[i:i + 1], target[i:i + 1], label_smoothing=epsilon).item(), abs=1e-5)


@pytest.mark.parametrize("k", [1, 3, 11, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sparse_loss_is_the_dense_one(k, dtype):
    student = random_logits(4, 6, 12, seed=1).to(dtype).requires_grad_()
    idx, val = sparsify(random_logits(4, 6, 12), k)
    for v in (val, (val.float() * 1.01).half()): # and with a sum above one
        dense, sparse = F.cross_entropy(student.float().flatten(0, 1), densify(idx, v, 12).flatten(0, 1)), sparse_ce(student, idx, v)
        a, b = (torch.autograd.grad(loss, student, retain_graph=True)[0].float() for loss in (dense, sparse))
        assert torch.allclose(dense, sparse, atol=1e-5) and torch.allclose(a, b, atol=1e-6 if dtype == torch.float32 else 1e-3)
        assert torch.allclose(soft_ce(student, densify(idx, v, 12)), dense, atol=1e-5)


def test_huge_logits_stay_finite():
    student = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = sparse_ce(student, torch.tensor([[0]]), torch.tensor([[1.0]]).half())
    loss.backward()
    assert loss.item() == 0 and student.grad.isfinite().all()


def test_no_dense_target_is_built():
    student = torch.zeros(4, 30000)
    idx, val = sparsify(random_logits(4, 30000), 10)
    made = []
    with torch.autograd.profiler.profile(profile_memory=True) as p: sparse_ce(student, idx, val)
    for event in p.function_events: made.append(event.name)
    assert not {"aten::scatter", "aten::scatter_", "aten::log_softmax", "aten::_log_softmax"} & set(made) and "aten::gather" in made


@pytest.mark.parametrize("k", [0, -1, 13])
def test_k_must_fit(k):
    with pytest.raises(ValueError, match="k: got"): sparsify(random_logits(2, 12), k)


def test_bad_numbers_are_refused():
    for bad in (float("nan"), float("inf")):
        logits = random_logits(2, 12)
        logits[1, 3] = bad
        with pytest.raises(ValueError, match="finite"): sparsify(logits, 3)
    with pytest.raises(ValueError, match="probabilities"): sparsify(torch.full((2, 3), 5.0), 2, probs=True)
    idx, val = sparsify(random_logits(2, 12), 3)
    with pytest.raises(ValueError, match="idx"): densify(idx, val, 2)
    with pytest.raises(ValueError, match="places"): densify(idx + 9, val, 12)
    with pytest.raises(ValueError, match="shapes"): sparse_ce(torch.zeros(3, 12), idx, val)
    with pytest.raises(ValueError, match="shapes"): sparse_ce(torch.zeros(2, 2), idx, val)


@pytest.mark.parametrize("augment", [ONE, BATCHED], ids=["one", "batched"])
def test_a_view_is_its_seeds_alone(augment, images):
    seeds = record_seeds(np.arange(30), np.zeros(30, int))
    together = augment(images, seeds)
    order = np.random.default_rng(0).permutation(30)[:13]
    assert torch.equal(augment(images[order], seeds[order]), together[order])
    assert torch.equal(augment(images[3], int(seeds[3])), together[3])
    assert not torch.equal(augment(images[3], int(seeds[4])), together[3])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 64])
def test_the_strong_views_do_not_see_their_company(n):
    x, seeds = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)), record_seeds(np.arange(64), np.ones(64, int))
    augment = SeededAugment(sl.strong, "strong", batched=True)
    assert torch.equal(augment(x[:n], seeds[:n]), augment(x, seeds)[:n])


class Seen(Dataset):
    def __init__(self, images, augment): self.images, self.augment = images, augment
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.augment(self.images[i], 100 + i)


@pytest.mark.parametrize("augment", [ONE, BATCHED], ids=["one", "batched"])
def test_workers_see_the_same(augment, images):
    here = augment(images, np.arange(100, 130))
    there = torch.cat(list(DataLoader(Seen(images, augment), batch_size=4, num_workers=2)))
    assert torch.equal(here, there)


def test_nobody_elses_dice_are_touched(images):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    ONE(images[0], 7)
    with pytest.raises(ZeroDivisionError): SeededAugment(lambda x: 1 / 0, "broken")(images[0], 7)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_seeds_are_checked(images):
    for wrong in (np.array([1, 2]), np.array([-1] * 30), np.array([1 << 31] * 30), np.ones(30)):
        with pytest.raises(ValueError, match="seed"): ONE(images, wrong)
    with pytest.raises(ValueError, match="version"): SeededAugment(wild, "")


def test_draws_are_what_they_say():
    drawn = Draws(np.arange(4000))
    u, g = drawn.uniform(3, 2), drawn.normal(5)
    assert u.shape == (4000, 3, 2) and 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
    assert abs(g.mean()) < 0.02 and abs(g.std() - 1) < 0.02 and abs(torch.corrcoef(torch.cat([u.flatten(1), g], 1).T) - torch.eye(11)).max() < 0.08
    again = Draws(np.array([17]))
    assert torch.equal(again.uniform(3, 2)[0], u[17]) and torch.equal(again.normal(5)[0], g[17])


def test_record_seeds_differ():
    sample, epoch = (a.ravel() for a in np.meshgrid(np.arange(300), np.arange(50)))
    seeds = record_seeds(sample, epoch)
    assert seeds.dtype == np.int32 and seeds.min() >= 0 and len(set(seeds.tolist())) > 14990
    assert (record_seeds(sample, epoch, 1) != seeds).mean() > 0.999


def test_what_is_written_is_read(stored, images):
    assert [stored.layout.samples, stored.layout.epochs, stored.layout.k, stored.layout.n_classes, stored.layout.parts] == [30, 3, 4, 12, 3]
    teacher = linear().eval()
    for sample, epoch in ((0, 0), (29, 0), (9, 1), (10, 1), (29, 2)): # on both sides of a part's end
        seed, idx, val = stored.read(sample, epoch)
        assert seed == record_seeds(np.array([sample]), np.array([epoch]))[0]
        expected = sparsify(teacher(BATCHED(images[sample], int(seed))[None]), 4)
        assert torch.equal(idx, expected[0][0]) and (val - expected[1][0]).abs().max() < 1e-3
    seed, idx, val = stored.read(np.array([5, 29, 5]), np.array([2, 0, 2]))
    assert torch.equal(idx[0], idx[2]) and torch.equal(idx[1], stored.read(29, 0)[1]) and val.dtype == torch.float16
    assert stored.layout.bytes_per_sample == 20 and sum(f.stat().st_size for f in stored.folder.iterdir()) < 90 * 20 + 3 * 200
    assert isinstance(stored.part(0), np.memmap) and not stored.part(0).flags.writeable


@pytest.mark.parametrize("classes, size", [(65536, 2), (65537, 4)])
def test_places_are_as_wide_as_they_must_be(classes, size, tmp_path):
    layout = Layout(2, 1, 2, classes, "0" * 64)
    idx = torch.tensor([[classes - 1, 0], [3, classes - 2]])
    write_part(tmp_path, layout, 0, np.zeros(2, np.int32), idx, torch.full((2, 2), 0.25).half(), [0.0] * 8)
    assert torch.equal(LogitStore(tmp_path).read(np.arange(2))[1], idx) and layout.bytes_per_sample == layout.dtype.itemsize == 4 + 2 * (size + 2)


@pytest.mark.parametrize("sample, epoch", [(30, 0), (-1, 0), (0, 3), (0, -1), (1.5, 0)])
def test_a_key_that_is_not_there(stored, sample, epoch):
    with pytest.raises(KeyError, match="sample|epoch"): stored.read(sample, epoch)


def spoil(store: LogitStore, change, number: int = 0):
    path = part_path(store.folder, number)
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw))
    return store.folder


@pytest.mark.parametrize("change, error", [
    (lambda r: r[:-1], TruncatedStore), (lambda r: r + b"x", TruncatedStore), (lambda r: r[:60], TruncatedStore), (lambda r: b"", ForeignStore), (lambda r: b"PTL", ForeignStore),
    (lambda r: b"PK" + r[2:], ForeignStore), (lambda r: r[:8] + b"\x02" + r[9:], ForeignStore), (lambda r: r[:-3] + bytes([r[-3] ^ 4]) + r[-2:], CorruptStore)])
def test_damage_has_a_name(stored, change, error):
    folder = spoil(stored, change)
    with pytest.raises(error, match="part-00000000"): LogitStore(folder).read(0, 0)


def test_every_bit_of_the_header_counts(stored):
    path = part_path(stored.folder, 0)
    raw = path.read_bytes()
    for at in range(sl._HEADER.size):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
        with pytest.raises(StoreError): LogitStore(stored.folder).read(0, 0)
    path.write_bytes(raw)
    LogitStore(stored.folder).read(0, 0)


@pytest.mark.parametrize("fields", [dict(samples=(1 << 40)), dict(k=(1 << 31) - 1, n_classes=(1 << 31) - 1), dict(k=50), dict(k=0), dict(samples=0), dict(positions=(1 << 24) - 1), dict(epochs=1 << 20), dict(part=1 << 31), dict(number=9)])
def test_a_hostile_header_costs_no_memory(stored, fields):
    "A header that was made to be believed: its checksum is right."
    layout = stored.layout
    f = dict(samples=layout.samples, epochs=layout.epochs, k=layout.k, n_classes=layout.n_classes, positions=0, part=layout.part, number=0) | fields
    body = sl._HEADER.pack(sl.MAGIC, 1, 0, *f.values(), bytes(32), *[0.0] * 8, 0)
    spoil(stored, lambda r: body[:12] + struct.pack("<I", zlib.crc32(body[16:])) + body[16:] + r[sl._HEADER.size:])
    tracemalloc.start()
    try:
        with pytest.raises(StoreError): LogitStore(stored.folder).read(0, 0)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally: tracemalloc.stop()


def test_records_that_make_no_sense_are_found_though_the_checksum_is_right(stored):
    def forged(r):
        rows = np.frombuffer(bytes(r[sl._HEADER.size:]), stored.layout.dtype).copy()
        rows["idx"][3, 1] = 60000
        return sl._header(stored.layout, 0, [0.0] * 8, zlib.crc32(rows.tobytes())) + rows.tobytes()
    folder = spoil(stored, forged)
    with pytest.raises(CorruptStore, match="classes"): LogitStore(folder).read(0, 0)


def test_wrong_settings_are_named(stored, images, tmp_path):
    with pytest.raises(OtherStore, match="k is 4, wanted 5"): LogitStore(stored.folder, k=5)
    with pytest.raises(OtherStore, match="n_classes"): LogitStore(stored.folder, n_classes=10)
    with pytest.raises(FileNotFoundError): LogitStore(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IncompleteStore): LogitStore(tmp_path / "empty")
    with pytest.raises(OtherStore): store_logits(linear(), images, BATCHED, stored.folder, epochs=3, k=5, part=40)
    with pytest.raises(OtherStore): StoredBatches(stored, images[:20], BATCHED, 5)
    with pytest.raises(OtherAugmentation, match="gentle 2"): StoredBatches(stored, images, SeededAugment(gentle, "gentle 2", batched=True), 5)
    with pytest.raises(OtherAugmentation, match="changed"): StoredBatches(stored, images, SeededAugment(lambda x, d: gentle(x, d) * 1.1, "gentle", batched=True), 5)
    with pytest.raises(OtherAugmentation, match="other data"): StoredBatches(stored, images.flip(0), BATCHED, 5)


def test_missing_and_doubled_parts(stored):
    part_path(stored.folder, 1).rename(stored.folder / "part-00000007.logits")
    with pytest.raises(DuplicateRecords, match="part 1"): LogitStore(stored.folder)
    (stored.folder / "part-00000007.logits").unlink()
    with pytest.raises(IncompleteStore, match="sample 10, epoch 1"): LogitStore(stored.folder)
    (part_path(stored.folder, 1)).write_bytes(part_path(stored.folder, 0).read_bytes())
    with pytest.raises(DuplicateRecords, match="part 0"): LogitStore(stored.folder)
    with pytest.raises(DuplicateRecords): write_part(stored.folder, stored.layout, 0, np.zeros(40, np.int32), torch.zeros(40, 4), torch.zeros(40, 4), [0.0] * 8)


def test_bad_records_are_not_written(tmp_path):
    layout, idx, val = Layout(2, 1, 2, 12, "0" * 64), torch.tensor([[1, 2], [3, 4]]), torch.full((2, 2), 0.25).half()
    for i, v, s in ((idx + 9, val, [0, 0]), (idx * 0, val, [0, 0]), (-idx, val, [0, 0]), (idx, val * 5, [0, 0]), (idx, val * torch.nan, [0, 0]), (idx, val, [0]), (idx[:1], val, [0, 0]), (idx, val, [0, -1])):
        with pytest.raises(ValueError): write_part(tmp_path, layout, 0, np.array(s, np.int32), i, v, [0.0] * 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [dict(epochs=0), dict(k=13), dict(k=0), dict(part=0), dict(batch=0), dict(worker=(2, 2)), dict(seed=-1)])
def test_bad_settings(images, tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): store_logits(linear(), images, BATCHED, tmp_path / "s", **dict(epochs=2, k=3) | wrong)
    with pytest.raises(ValueError, match="data"): store_logits(linear(), images[:0], BATCHED, tmp_path / "s", epochs=2, k=3)


def test_workers_and_resuming_give_the_same_bytes(stored, images, tmp_path):
    make = lambda worker: store_logits(linear(), images, BATCHED, tmp_path / "w", epochs=3, k=4, part=40, batch=7, worker=worker)
    assert make((1, 2)) is None
    before = part_path(tmp_path / "w", 1).stat().st_mtime_ns
    again = make((0, 2))
    assert again.fingerprint == stored.fingerprint and part_path(again.folder, 1).stat().st_mtime_ns == before
    assert all(part_path(again.folder, i).read_bytes() == part_path(stored.folder, i).read_bytes() for i in range(3))


PROGRAM = """
import time, torch
from torch import nn
from ptbook.distill.stored_logits import SeededAugment, store_logits
class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.of = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    def forward(self, x): time.sleep(0.05); return self.of(x)
gentle = SeededAugment(lambda x, draws: x * (0.5 + draws.uniform(1, 1, 1)) + 0.1 * draws.normal(*x.shape[1:]), "gentle", batched=True)
print("ready", flush=True)
store_logits(Slow(), torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)), gentle, {folder!r}, epochs=3, k=4, part=40, batch=7)
"""


def test_a_kill_leaves_whole_parts_or_none(stored, images, tmp_path):
    folder = tmp_path / "k"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(folder=str(folder))], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    end = time.monotonic() + 60
    while not part_path(folder, 0).exists() and process.poll() is None and time.monotonic() < end: time.sleep(0.01)
    process.send_signal(signal.SIGKILL), process.wait()
    with pytest.raises(IncompleteStore): LogitStore(folder)
    done = store_logits(linear(), images, BATCHED, folder, epochs=3, k=4, part=40, batch=7)
    assert done.fingerprint == stored.fingerprint


def test_a_draft_is_not_a_part(stored, monkeypatch, tmp_path, images):
    def fail(*_): raise OSError("disk full")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"): store_logits(linear(), images, BATCHED, tmp_path / "f", epochs=1, k=2)
    assert not list((tmp_path / "f").iterdir())


def test_batches_are_addressed_by_step(stored, images):
    batches = StoredBatches(stored, images, BATCHED, batch=8, seed=3)
    met = [key for step in range(11) for key in zip(*batches.keys(step))]
    assert len(set(met)) == len(met) == 88 and [e for _, e in met] == sorted(e for _, e in met)
    (x, idx, val), teacher = batches[4], linear().eval()
    assert (densify(idx, val, 12) - densify(*sparsify(teacher(x), 4), 12)).abs().max() < 2e-3 # the same views
    with pytest.raises(IndexError, match="store holds 3"): batches[11]
    again = StoredBatches(stored, images, BATCHED, batch=8, seed=3, again=True)
    assert torch.equal(again[4][0], x) and again.fingerprint != batches.fingerprint
    assert set(zip(*again.keys(11))) <= {(i, e) for i in range(30) for e in (0, 2)}


def test_the_student_becomes_the_teacher(images, tmp_path):
    teacher, student = linear(seed=1), linear(seed=2)
    batches = StoredBatches(store_logits(teacher, images, BATCHED, tmp_path, epochs=40, k=12), images, BATCHED, 30)
    fit(student, sparse_loss, batches, 40, lr=0.05, weight_decay=0.0, progress=False)
    p, q, untrained = (m.eval()(images).softmax(-1) for m in (teacher, student, linear(seed=2)))
    assert (p - q).abs().mean() < 0.5 * (p - untrained).abs().mean()


def test_a_hugging_face_teacher_keeps_its_mode(images, tmp_path):
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=7)).train()
    store = store_logits(vit, [(image, 0) for image in images], ONE, tmp_path, epochs=1, k=2) # a sequence of pairs, too
    batches = StoredBatches(store, images, ONE, 5)
    assert vit.training and all(p.grad is None for p in vit.parameters())
    assert sparse_loss(vit, batches[0]).requires_grad and store.layout.n_classes == 7


def test_tokens(tmp_path):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_positions=9, bos_token_id=0, eos_token_id=0)).eval()
    ids, plain = torch.randint(31, (6, 9)), SeededAugment(lambda x, d: x, "none", batched=True)
    store = store_logits(gpt2, ids, plain, tmp_path, epochs=1, k=5)
    assert store.layout.positions == 9 and store.layout.bytes_per_sample == 4 + 9 * 5 * 4
    x, idx, val = StoredBatches(store, ids, plain, 3)[0]
    assert (densify(idx, val, 31) - densify(*sparsify(gpt2(x).logits, 5), 31)).abs().max() < 2e-3
    assert sparse_loss(gpt2, (x, idx, val)).ndim == 0


def test_arms_at_the_smallest_scale(monkeypatch, tmp_path):
    monkeypatch.setenv("PTBOOK_CACHE", str(tmp_path))
    arms = sl.tinyvit(1000, as_scale("tiny"))
    assert {"hard labels", "hard labels, 30 % wrong", "online", "stored top-5", "stored top-5, stale", "stored top-1", "teacher"} == set(arms) and all(0 <= v <= 1 for v in arms.values())
    assert list(tmp_path.glob("stored_logits-*.safetensors"))
