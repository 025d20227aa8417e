"Text: bad input, equality across processes, speed of packing. What can be read is shown in the notebook."
import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ptbook.basics.text import ByteTokenizer, Stream, check_ids, pack, permutation, train_bpe

tokenizer = ByteTokenizer()


@pytest.mark.parametrize("raw", [b"", bytes(range(256)), b"\xff\xfe\x80 not utf-8 \xc3", "naïve 🙂\x00\r\n".encode()])
def test_bytes_round_trip(raw):
    ids = tokenizer.encode(raw)
    assert ids.dtype == np.int64 and tokenizer.to_bytes(ids) == raw
    assert tokenizer.to_bytes(torch.from_numpy(ids)) == tokenizer.to_bytes(ids.tolist()) == raw


def test_specials_are_dropped_and_distinct():
    specials = [tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask]
    assert sorted(specials) == list(range(256, tokenizer.vocab_size))
    assert tokenizer.decode([specials[1], 104, *specials, 105]) == "hi"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("ids, message", [([260], "largest id is 260"), ([-1], "smallest id is -1"), ([1.5], "want integers"), ([True], "want integers")])
def test_ids_outside_the_vocabulary(ids, message):
    with pytest.raises(ValueError, match=message): tokenizer.decode(ids)


def test_encode_refuses_other_types():
    with pytest.raises(TypeError, match="int"): tokenizer.encode(5)
    with pytest.raises(ValueError): tokenizer.encode("\ud800")  # half a surrogate pair is not text


def test_check_ids_names_what_is_needed():
    check_ids(torch.arange(10), 10)
    check_ids([], 10)
    with pytest.raises(ValueError, match="at least 10 ids"): check_ids(torch.arange(10), 9)


def test_bpe_bad_input():
    with pytest.raises(ValueError, match="259"): train_bpe(["some text"], 259)
    with pytest.raises(ValueError, match="no text"): train_bpe(["", ""], 300)
    with pytest.raises(TypeError, match="one string"): train_bpe("some text", 300)


@pytest.mark.parametrize("documents, length, message", [
    ([], 8, "empty"), ([[]], 8, "empty"), ([[1, 2]], 8, "3 tokens .* needs 8"), ([[1.0, 2.0]], 2, "float64"), ([["a"]], 2, "want integer"),
    ([1, 2, 3], 2, "flat sequence"), ([[[1, 2]]], 2, "flat sequence"), (["text"], 2, "encode it first"), ([b"text"], 2, "encode it first"), ([[1, 2, 3]], 1, "length is 1")])
def test_pack_bad_input(documents, length, message):
    with pytest.raises(ValueError, match=message): pack(documents, length, 258)


@pytest.mark.parametrize("seed", range(20))
def test_pack_loses_nothing(seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 256, rng.integers(0, 40)) for _ in range(rng.integers(1, 30))]
    documents.append(np.arange(50, dtype=np.uint8))
    length = int(rng.integers(2, 20))
    blocks = pack(iter(documents), length, 258)
    wanted = [i for d in documents for i in (*d.tolist(), 258)]
    tape = blocks.flatten().tolist()
    assert blocks.dtype == torch.int64 and blocks.shape[1] == length
    assert tape[:len(wanted)] == wanted
    assert set(tape[len(wanted):]) <= {258} and len(tape) - len(wanted) < length


def test_pack_exact_fit_has_no_filler():
    assert pack([[1, 2, 3], [4, 5, 6]], 4, 9).tolist() == [[1, 2, 3, 9], [4, 5, 6, 9]]


def test_pack_is_fast():
    text = np.random.default_rng(0).bytes(5_000_000)
    start = time.process_time()
    pack([tokenizer.encode(text[i:i + 500]) for i in range(0, len(text), 500)], 256, tokenizer.eos)
    assert time.process_time() - start < 2  # 0.1 s on an idle core


@pytest.mark.parametrize("n, batch", [(12, 5), (7, 7), (5, 3), (3, 8), (1, 4)])
def test_stream_is_the_formula(n, batch):
    x = torch.arange(n)
    stream = Stream(x, batch=batch, seed=2)
    for step in (0, 9, 1, 30, 2):
        wanted = [permutation(n, 2, p // n)[p % n].item() for p in range(step * batch, (step + 1) * batch)]
        assert stream[step].tolist() == wanted


@pytest.mark.parametrize("seed", range(10))
def test_workers_read_what_one_reads(seed):
    rng = np.random.default_rng(seed)
    n, small, workers = int(rng.integers(2, 50)), int(rng.integers(1, 9)), int(rng.integers(2, 5))
    x = torch.arange(n)
    many, one = Stream(x, batch=small, seed=seed), Stream(x, batch=small * workers, seed=seed)
    for step in rng.integers(0, 1000, 20):
        assert torch.equal(one[step], torch.cat([many[int(step) * workers + r] for r in range(workers)]))


def test_another_process_reads_the_same():
    code = ("import hashlib, torch; from ptbook.basics.text import Stream, train_bpe; s = Stream(torch.arange(100), batch=7, seed=5); "
            "t = train_bpe(['a fox saw the grapes, the grapes hung high'] * 3 + ['naïve 🙂'], 280); "
            "print(s[10**6].tolist(), s.fingerprint, hashlib.sha256(t.to_str().encode()).hexdigest())")
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    stream, bpe = Stream(torch.arange(100), batch=7, seed=5), train_bpe(["a fox saw the grapes, the grapes hung high"] * 3 + ["naïve 🙂"], 280)
    assert theirs == f"{stream[10**6].tolist()} {stream.fingerprint} {hashlib.sha256(bpe.to_str().encode()).hexdigest()}\n"


def test_order_is_fixed_for_ever():
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # a saved run depends on it


def test_stream_keeps_two_orders_and_is_a_finite_sequence():
    stream = Stream(torch.arange(10), torch.arange(10) * 2, batch=4)
    assert len(stream) == len(list(stream)) == 3
    for step in range(100):
        a, b = stream[step]
        assert torch.equal(a * 2, b)
    assert len(stream._orders) <= 2


@pytest.mark.parametrize("make, error, message", [
    (lambda: Stream(batch=2), ValueError, "no tensor"), (lambda: Stream(torch.zeros(0, 3), batch=2), ValueError, "no rows"),
    (lambda: Stream(torch.tensor(3), batch=2), ValueError, "no rows"), (lambda: Stream(torch.zeros(3), torch.zeros(4), batch=2), ValueError, r"\[3, 4\]"),
    (lambda: Stream(torch.zeros(3), batch=0), ValueError, "batch is 0"), (lambda: Stream(torch.zeros(3), batch=2, seed=-1), ValueError, "seed is -1"),
    (lambda: Stream(torch.zeros(3), batch=2)[-1], IndexError, "step is -1"), (lambda: Stream(torch.zeros(3), batch=2)[0.5], TypeError, "float"),
    (lambda: Stream(torch.zeros(3), batch=2)[0:2], TypeError, "slice")])
def test_stream_bad_input(make, error, message):
    with pytest.raises(error, match=message): make()


def test_fingerprint_sees_everything():
    x = torch.arange(12, dtype=torch.int64)
    prints = [Stream(*t, batch=b, seed=s).fingerprint for t, b, s in [
        ((x,), 2, 0), ((x,), 3, 0), ((x,), 2, 1), ((x.view(6, 2),), 2, 0), ((x.int(),), 2, 0), ((x.flip(0),), 2, 0), ((x, x), 2, 0), ((x.bfloat16(),), 2, 0)]]
    assert len(set(prints)) == len(prints)
    assert Stream(x.view(6, 2).T, batch=2).fingerprint == Stream(x.view(6, 2).T.contiguous(), batch=2).fingerprint
