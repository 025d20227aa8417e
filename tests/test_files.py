"What the chapter cannot show: every way in which a reader's own file can be wrong."
import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, Features, Value

from ptbook.basics.files import cut, decode_wav, read_own, split_rows, with_sound
from ptbook.basics.sources import load, provenance


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "No mirror, no network."
    monkeypatch.delenv("PTBOOK_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- the reader's own

def test_one_document_is_cut_once_and_loses_nothing(tmp_path):
    text = "".join(f"Line {i}: caf\u00e9, \u6f22\u5b57.\n" for i in range(300))
    ds = load(write(tmp_path / "a.txt", text))
    assert ds["train"]["text"][0] + ds["test"]["text"][0] == text
    assert ds["train"]["text"][0].endswith("\n") and 0.85 < len(ds["train"]["text"][0]) / len(text) <= 0.9
    assert provenance(ds)["name"] == "a.txt" and provenance(ds)["place"] == "file"
    assert provenance(load(write(tmp_path / "b" / "c.md", text)))["fingerprint"] == provenance(ds)["fingerprint"]


@pytest.mark.parametrize("text", ["ab", "  a b  ", "x" * 100, "\n\nab\n\n", "a\nb"])
def test_short_texts_have_both_splits(tmp_path, text):
    ds = load(write(tmp_path / "a.txt", text))
    assert ds["train"]["text"][0] + ds["test"]["text"][0] == text
    assert ds["train"]["text"][0].strip() and ds["test"]["text"][0].strip()


@pytest.mark.parametrize("content, said", [(b"", "no text"), (b" \n\t", "no text"), (b"x", "one character"), (b"fine \xff", "offset 5"),
                                           ("\u00e9".encode("utf-16"), "0xff at offset 0")])
def test_bad_text_files(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as caught:
        load(str(write(tmp_path / "bad.txt", content)))
    assert "bad.txt" in str(caught.value)


def test_a_folder_is_read_in_order_and_what_is_skipped_is_counted(tmp_path):
    folder = tmp_path / "folder"
    for i in range(12):
        write(folder / f"{i:02}.txt", f"document {i}")
    write(folder / "sub" / "code.py", "x = 1")
    write(folder / "sub" / "LICENSE", "no suffix, but text")
    write(folder / "photo.png", b"\x89PNG\0\0")
    write(folder / "latin.log", b"caf\xe9")
    write(folder / "empty.txt", "")
    write(folder / "rows.jsonl", "{}")
    write(folder / ".git" / "config", "hidden")
    write(tmp_path / "outside" / "secret.txt", "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "link.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    with pytest.warns(UserWarning, match="read 14 text files, skipped .*2 x binary file.*") as caught:
        ds = load(folder)
    said = str(caught[0].message)
    assert all(part in said for part in ("1 x empty file", "2 x symbolic link", "1 x table")), said
    assert ds["test"]["name"][:] == ["09.txt"] and len(ds["train"]) == 13 and "outside" not in "".join(ds["train"]["text"])
    (tmp_path / "moved").symlink_to(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert provenance(load(tmp_path / "moved"))["fingerprint"] == provenance(ds)["fingerprint"]


def test_small_and_empty_folders(tmp_path):
    write(tmp_path / "two" / "a.txt", "a"), write(tmp_path / "two" / "b.txt", "b")
    assert load(tmp_path / "two")["test"]["text"][:] == ["b"]
    write(tmp_path / "one" / "a.txt", "one two three")
    assert "".join(part["text"][0] for part in load(tmp_path / "one").values()) == "one two three"
    write(tmp_path / "none" / "a.bin", b"\0")
    with pytest.raises(ValueError, match="no text under .*none.*1 x binary"):
        load(tmp_path / "none")
    write(tmp_path / "bad" / "a.txt", b"\xc3(")
    with pytest.raises(ValueError, match="a.txt.*offset 0"):
        load(tmp_path / "bad")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_tables(tmp_path, suffix):
    path, rows = tmp_path / f"t{suffix}", [{"body": f"row {i}, with comma", "n": i} for i in range(20)]
    if suffix == ".jsonl":
        write(path, "\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\n\n")
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        write(path, "body,n\n" + "".join(f'"{r["body"]}",{r["n"]}\n' for r in rows))
    ds = load(str(path), column="body")
    assert ds["test"]["n"][:] == [9, 19] and ds["train"]["text"][0] == "row 0, with comma" and len(ds["train"]) == 18
    with pytest.raises(ValueError, match="'text'.*'body', 'n'") as caught:
        load(path)
    assert path.name in str(caught.value)
    with pytest.raises(ValueError, match="must hold text") as caught:
        load(path, column="n") if suffix != ".csv" else load(write(tmp_path / "p.jsonl", '{"text": 5}'))


@pytest.mark.parametrize("content, said", [
    ('{"text": "a"}\n{"text": \n', "line 2: malformed"), ('{"text": "a"}\n[1]\n', "line 2: wanted an object, got list"),
    ('{"text": "a"}\n\n{"txt": "b"}', "line 3: no column 'text'; it has 'txt'"), ('{"text": "a"}\n{"text": 7}', "line 2: .*must hold text, got 7"),
    (r'{"text": "\ud800"}', "line 1"), ("", "empty"), ('{"text": ""}\n{"text": null}', "no text in column"),
    ('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}', "mixes types")])
def test_bad_jsonl(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as caught:
        load(write(tmp_path / "bad.jsonl", content))
    assert "bad.jsonl" in str(caught.value)


def test_rows_without_text_are_counted(tmp_path):
    path = write(tmp_path / "gaps.jsonl", '{"text": "a", "k": 1}\n{"text": ""}\n{"text": null}\n{"text": "b", "extra": 2}\n')
    with pytest.warns(UserWarning, match="2 of 4 rows"):
        ds = load(path)
    assert ds["train"]["text"][:] == ["a"] and ds["test"]["extra"][:] == [2]


def test_bad_parquet_and_csv(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), whole)
    for name, content in (("zero.parquet", b""), ("cut.parquet", whole.read_bytes()[:-9])):
        with pytest.raises(ValueError, match=name):
            load(write(tmp_path / name, content))
    for name, content in (("zero.csv", b""), ("head.csv", b"text\n"), ("wide.csv", b"text\na\nb,c,d\n"), ("latin.csv", b"text\n\xe9\n")):
        with pytest.raises(ValueError, match=name):
            load(write(tmp_path / name, content))


def test_rows_are_cut_the_same_way_however_often(tmp_path):
    for n in (2, 9, 10, 11, 100):
        table = pa.table({"text": [f"row {i}" for i in range(n)]})
        parts = split_rows(table, tmp_path)
        both = [parts[s]["text"].to_pylist() for s in ("train", "test")]
        assert sorted(both[0] + both[1]) == sorted(table["text"].to_pylist()) and all(both)
        assert all(parts[s].equals(split_rows(table, tmp_path)[s]) for s in parts)
    with pytest.raises(ValueError, match="one character"):
        cut(" x ", tmp_path / "x.txt")


def test_a_missing_path_offers_the_names_it_was_given(tmp_path):
    with pytest.raises(FileNotFoundError, match="in the catalogue: digits"):
        read_own(tmp_path / "digitz", names=["digits", "wine"])
    with pytest.raises(FileNotFoundError) as caught:
        read_own(tmp_path / "digitz")
    assert "catalogue" not in str(caught.value)


@pytest.mark.skipif("not hasattr(__import__('os'), 'mkfifo')", reason="no special files here")
def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    import os
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_own(tmp_path / "pipe.txt")


# ---- sound

def wav(array, rate=8000):
    import io
    from scipy.io import wavfile
    file = io.BytesIO()
    wavfile.write(file, rate, array)
    return file.getvalue()


def test_sound_becomes_arrays_without_a_codec():
    wave = np.array([0, 2**14, -2**15, 2**15 - 1], np.int16)
    features = Features({"audio": Audio(decode=False), "label": Value("int64")})
    data = {"audio": [{"bytes": wav(wave), "path": "x.wav"}, {"bytes": wav(wave[:2]), "path": "y.wav"}], "label": [0, 1]}
    part = with_sound(Dataset(pa.table(data, schema=features.arrow_schema)))
    assert part[0]["audio"]["sampling_rate"] == 8000 and np.allclose(part[0]["audio"]["array"], [0, 0.5, -1, 1], atol=1e-4)
    assert [len(a["array"]) for a in part[:2]["audio"]] == [4, 2] == [len(a["array"]) for a in part["audio"]]
    assert part.map(lambda r: {"n": len(r["audio"]["array"])})["n"][:] == [4, 2]
    assert part.select([1])[0]["audio"]["array"].dtype == np.float32


@pytest.mark.parametrize("array", [np.array([0, 128, 255], np.uint8), np.array([0, 2**31 - 1], np.int32), np.array([0.0, 1.0], np.float32),
                                   np.zeros((3, 2), np.int16)])
def test_wav_formats(array):
    decoded = decode_wav(wav(array, 16000))
    assert decoded["array"].shape == array.shape and decoded["sampling_rate"] == 16000 and abs(decoded["array"]).max() <= 1


@pytest.mark.parametrize("data", [b"", b"fLaC....", wav(np.zeros(9, np.int16))[:20]])
def test_what_is_not_wav_is_refused(data):
    with pytest.raises(ValueError, match="not a WAV file"):
        decode_wav(data)
