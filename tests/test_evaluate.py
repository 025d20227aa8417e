"Evaluate: bad input, half precision, Hugging Face outputs, brute-force references. What can be read is shown in the notebook."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ptbook.basics.evaluate import (bits_per_byte, byte_baselines, calibration_bins, calibration_error, cka, effective_rank, evaluating,
                                    features, knn_accuracy, linear_probe)


class Uniform(nn.Module):
    def __init__(self, vocab_size, wrap=False):
        super().__init__()
        self.vocab_size, self.wrap = vocab_size, wrap
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        assert not self.training and not torch.is_grad_enabled()
        logits = self.dropout(torch.ones(*ids.shape, self.vocab_size))
        return SimpleNamespace(logits=logits) if self.wrap else logits


@pytest.mark.parametrize("vocab_size", [2, 260, 5000])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_uniform_model_needs_log2_of_the_vocabulary(vocab_size, wrap, batch):
    model = Uniform(vocab_size, wrap)
    blocks = torch.randint(0, vocab_size, (7, 5))
    assert math.isclose(bits_per_byte(model, blocks, batch=batch), math.log2(vocab_size), rel_tol=1e-6)
    assert math.isclose(bits_per_byte(model, blocks, bytes_per_token=4.0), math.log2(vocab_size) / 4, rel_tol=1e-6)
    assert model.training and model.dropout.training


def test_hugging_face_loss():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    ids = torch.randint(0, 260, (4, 32))
    wanted = model.eval()(ids, labels=ids).loss.item() / math.log(2)
    assert math.isclose(bits_per_byte(model, ids), wanted, rel_tol=1e-5) and not model.training
    with pytest.raises(ValueError, match="largest id is 300"): bits_per_byte(model, torch.full((2, 8), 300))
    assert features(model, ids, "transformer.h.0").shape == (4, 32, 16)  # a block that may return a tuple


def test_half_precision_is_measured_in_single():
    torch.manual_seed(0)
    model = nn.Embedding(50, 50)
    blocks = torch.randint(0, 50, (8, 20))
    full = bits_per_byte(model, blocks)
    assert math.isclose(bits_per_byte(model.bfloat16(), blocks), full, rel_tol=1e-2)


def test_ignored_targets_are_left_out():
    logits = torch.zeros(4, 4)
    logits[:, 3] = 5.0
    model = nn.Embedding.from_pretrained(logits)
    blocks = torch.tensor([[0, 1, 3, 3], [3, 2, 3, 3]])
    expected = -torch.log_softmax(logits[0], 0)[[1, 2]].mean().item() / math.log(2)
    assert math.isclose(bits_per_byte(model, blocks, ignore=3), expected, rel_tol=1e-6)
    with pytest.raises(ValueError, match="nothing is left"): bits_per_byte(model, torch.full((2, 4), 3), ignore=3)


@pytest.mark.parametrize("blocks, message", [(torch.zeros(4, dtype=torch.long), "shape"), (torch.zeros(4, 1, dtype=torch.long), "shape"),
                                             (torch.zeros(0, 8, dtype=torch.long), "shape"), (torch.full((2, 4), 9), "largest id is 9")])
def test_bits_per_byte_bad_input(blocks, message):
    with pytest.raises(ValueError, match=message): bits_per_byte(Uniform(9), blocks)


@pytest.mark.parametrize("options", [{"batch": 0}, {"bytes_per_token": 0.0}, {"bytes_per_token": float("nan")}])
def test_bits_per_byte_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))): bits_per_byte(Uniform(9), torch.zeros(2, 4, dtype=torch.long), **options)


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    with pytest.raises(RuntimeError), evaluating(model): raise RuntimeError
    assert model.training and model[0].training and not model[1].training and torch.is_grad_enabled()


def test_baselines():
    noise = np.random.default_rng(0).bytes(20_000)
    bits = byte_baselines(noise[:10_000], noise[10_000:])
    assert bits["uniform"] == 8 and 7.9 < bits["unigram"] < 8.3 and min(bits["bz2"], bits["xz"]) > 7.9  # noise cannot be compressed
    assert byte_baselines(noise, noise[:10_000])["xz"] < 0.5  # seen before
    assert math.isclose(byte_baselines(b"aab", b"a")["unigram"], -math.log2(3 / 259))
    with pytest.raises(ValueError, match="window is 0"): byte_baselines(b"abc", b"abc", window=0)
    assert byte_baselines(noise, noise[:10_000], window=10_000)["xz"] > 7.9  # seen, but before the window
    with pytest.raises(ValueError, match="test is empty"): byte_baselines(b"abc", b"")
    with pytest.raises(TypeError, match="train is a str"): byte_baselines("abc", b"abc")


def test_features_errors_and_hooks():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model.add_module("unused", nn.Identity())
    model.forward = lambda x: model[1](model[0](x))
    x = torch.randn(10, 3)
    assert torch.equal(features(model, x, "1", batch=3), model[1](model[0](x)).detach())
    assert torch.equal(features(model, x, ""), model[1](model[0](x)).detach())  # the whole model
    with pytest.raises(KeyError, match="near names: unused"): features(model, x, "unusde")
    with pytest.raises(ValueError, match="not called"): features(model, x, "unused")
    assert not any(m._forward_hooks for m in model.modules()) and model.training


def test_knn_against_brute_force():
    rng = np.random.default_rng(0)
    x, y, u, v = rng.normal(size=(60, 5)), rng.integers(0, 3, 60), rng.normal(size=(40, 5)), rng.integers(0, 3, 40)
    cosine = (u / np.linalg.norm(u, axis=1, keepdims=True)) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    votes = [np.bincount(y[row[:5]], minlength=3).argmax() for row in np.argsort(-cosine, 1)]
    assert knn_accuracy(x, y, u, v, k=5) == (votes == v).mean()
    assert knn_accuracy(x.reshape(60, 5, 1), y, x, y, k=1) == 1
    for k in (0, 61):
        with pytest.raises(ValueError, match=f"k is {k}"): knn_accuracy(x, y, u, v, k=k)


@pytest.mark.parametrize("measure", [knn_accuracy, linear_probe])
def test_probes_bad_input(measure):
    x, y = np.ones((9, 2)), np.arange(9) % 3
    for args, message in [((x, y[:5], x, y), "labels of train_x"), ((x, y, x, y[:, None]), "labels of test_x"), ((x[:, 0], y, x, y), "train_x has shape"),
                          ((x * np.nan, y, x, y), "train_x holds values"), ((np.zeros((0, 2)), y[:0], x, y), "train_x has shape")]:
        with pytest.raises(ValueError, match=message): measure(*args)
    with pytest.raises(ValueError, match="want"): linear_probe(x[:4], np.arange(4), x, y)


def test_linear_probe_does_not_move_with_units():
    rng = np.random.default_rng(1)
    y = np.arange(120) % 3
    x = rng.normal(size=(120, 4)) + y[:, None]
    scores = {linear_probe(x[:60] * s + 5, y[:60], x[60:] * s + 5, y[60:]) for s in (1e-4, 1, 1e4)}
    assert len(scores) == 1 and scores.pop() > 0.5


def test_cka_both_ways_and_bad_input():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 8)), rng.normal(size=(30, 12))
    wide = np.c_[y, np.zeros((30, 40))]  # more columns than rows: computed from Gram matrices
    assert math.isclose(cka(x, y), cka(x, wide)) and math.isclose(cka(x, y), cka(y, x)) and math.isclose(cka(x, x), 1)
    assert math.isclose(cka(torch.tensor(x).bfloat16(), torch.tensor(x).float()), 1, rel_tol=1e-3)
    with pytest.raises(ValueError, match="30 rows and y 29"): cka(x, y[:29])
    with pytest.raises(ValueError, match="the same"): cka(np.ones((5, 2)), x[:5])


def test_effective_rank():
    assert math.isclose(effective_rank(np.eye(5) * 3), 5) and math.isclose(effective_rank(np.ones((5, 4))), 1, rel_tol=1e-6)
    with pytest.raises(ValueError, match="zero"): effective_rank(np.zeros((3, 3)))


def test_calibration():
    probs = np.full((100, 4), 0.25)
    assert calibration_error(probs, np.arange(100) % 4) < 1e-12  # undecided, and right a quarter of the time
    assert calibration_error(np.eye(4)[[1] * 10], np.zeros(10, int)) == 1  # certain and wrong
    assert sum(n for n, _, _ in calibration_bins(probs, np.zeros(100, int), bins=7)) == 100
    for bad, message in [(np.full((3, 2), 0.6), "softmax"), (np.array([[1.5, -0.5]] * 3), "softmax")]:
        with pytest.raises(ValueError, match=message): calibration_error(bad, np.zeros(3, int))
    with pytest.raises(ValueError, match="bins is 0"): calibration_error(probs, np.zeros(100, int), bins=0)
    with pytest.raises(ValueError, match="labels"): calibration_error(probs, np.zeros(99, int))
