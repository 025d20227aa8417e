"What the chapter cannot show: bad input, damaged mirrors, processes without a network, fingerprints under many layouts."
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Image, Value

from ptbook.basics import files, sources
from ptbook.basics.embedded import EMBEDDED
from ptbook.basics.sources import CATALOGUE, SourceUnavailable, fingerprint, load, places, provenance, recording


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "No mirror, no network."
    monkeypatch.delenv("PTBOOK_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    "A folder that PTBOOK_DATA names, and a function that puts tables into it."
    root = tmp_path / "mirror"
    root.mkdir()
    monkeypatch.setenv("PTBOOK_DATA", str(root))

    def put(name, **splits):
        (root / name).mkdir(exist_ok=True)
        for split, part in splits.items():
            (part if isinstance(part, Dataset) else Dataset.from_dict(part)).to_parquet(root / name / f"{split}.parquet")
        return root / name
    return put


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- mirror

def test_mirror_comes_first_and_is_named(mirror):
    mirror("digits", train={"text": ["a"]}, test={"text": ["b"]})
    mirror("my_own_set", train={"text": ["c"]}, extra={"text": ["d"]})
    assert load("digits")["train"]["text"][:] == ["a"] and places("digits") == ["mirror", "embedded"]
    assert provenance(load("my_own_set")) | {"fingerprint": 0} == {
        "name": "my_own_set", "place": "mirror", "rows": {"extra": 1, "train": 1}, "fingerprint": 0}


def test_images_become_pil(mirror):
    from PIL.Image import Image as Picture
    features = Features({"image": Image(), "label": ClassLabel(names=["no", "yes"])})
    part = Dataset.from_dict({"image": [np.full((4, 5), 7, np.uint8)], "label": [1]}, features=features)
    mirror("pictures", train=part)
    row = load("pictures")["train"][0]
    assert isinstance(row["image"], Picture) and row["image"].size == (5, 4) and np.asarray(row["image"]).max() == 7


def test_sound_is_decoded_when_a_row_is_read(mirror):
    features = Features({"audio": Audio(decode=False)})
    data = {"audio": [{"bytes": b"fLaC, not WAV", "path": "x.flac"}]}
    pq.write_table(pa.table(data, schema=features.arrow_schema), mirror("sounds") / "train.parquet")
    part = load("sounds")["train"]
    with pytest.raises(ValueError, match="fLaC"):
        part[0]


@pytest.mark.parametrize("damage", ["empty", "cut", "cut page", "text", "missing", "dangling"])
def test_a_damaged_mirror_is_an_error_and_no_other_place_is_asked(mirror, damage):
    folder = mirror("digits", train={"text": ["a" * 1000]}, test={"text": ["b"]})
    path = folder / "test.parquet"
    whole = path.read_bytes()
    if damage in ("missing", "dangling"):
        path.unlink()
        if damage == "dangling":
            path.symlink_to(folder / "nowhere.parquet")
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-30], "cut page": whole[:4] + whole[60:], "text": b"PAR1 no"}[damage])
    with pytest.raises((ValueError, FileNotFoundError), match="test.parquet"):
        load("digits")


def test_an_empty_mirror_folder_is_incomplete(mirror):
    folder = mirror("strange")
    with pytest.raises(FileNotFoundError, match="strange"):
        load("strange")
    assert folder.is_dir()


@pytest.mark.skipif("PTBOOK_DATA" not in os.environ, reason="PTBOOK_DATA names no mirror")
def test_the_whole_mirror_loads(monkeypatch):
    root = REAL_MIRROR
    monkeypatch.setenv("PTBOOK_DATA", root)
    names = sorted(n for n in os.listdir(root) if os.path.isdir(os.path.join(root, n)))
    assert names
    for name in names:
        ds = load(name)
        row = next(iter(ds.values()))[0]
        assert provenance(ds)["place"] == "mirror" and row
        if name in CATALOGUE:
            assert CATALOGUE[name].rows == {s: len(part) for s, part in ds.items()}
            assert {c for part in ds.values() for c in part.column_names} == set(CATALOGUE[name].fields)
        for column, feature in next(iter(ds.values())).features.items():
            if isinstance(feature, Image):
                assert np.asarray(row[column]).ndim in (2, 3)
            if isinstance(feature, Audio):
                assert row[column]["array"].ndim == 1 and row[column]["sampling_rate"] > 0


REAL_MIRROR = os.environ.get("PTBOOK_DATA", "") # before any fixture takes it away


# ---- the catalogue

def test_the_catalogue_holds_every_embedded_set_and_its_interface():
    assert [n for n, s in CATALOGUE.items() if s.build] == list(EMBEDDED) == list(CATALOGUE)[:len(EMBEDDED)]
    assert all(s.name == name and s.fields and s.licence and (s.build or s.rows) for name, s in CATALOGUE.items())
    assert "decode_wav" in sources.__all__ and sources.decode_wav is files.decode_wav


# ---- nowhere

def test_unavailable_names_three_places_and_what_to_do():
    with pytest.raises(SourceUnavailable) as caught:
        load("mnist")
    for word in ("Mirror", "PTBOOK_DATA", "Embedded", "Hub", "ylecun/mnist", "What to do", "HF_HUB_OFFLINE"):
        assert word in str(caught.value)
    assert places("mnist") == []


def test_a_mirror_that_is_no_folder_is_said_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PTBOOK_DATA", str(tmp_path / "nothing"))
    with pytest.raises(SourceUnavailable, match="is not a folder"):
        load("sst2")


def test_a_broken_builder_is_named(monkeypatch):
    def build(): raise ImportError("no fonts here")
    monkeypatch.setitem(CATALOGUE, "glyphs", sources.Source("glyphs", "", "", (), build=build))
    with pytest.raises(SourceUnavailable, match="no fonts here") as caught:
        load("glyphs")
    assert isinstance(caught.value.__cause__, ImportError)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(SourceUnavailable, match="mnist"):
        load("mnits")
    with pytest.raises(SourceUnavailable, match="not in the catalogue"):
        load("zzzzzzzz")
    assert places("zzzzzzzz") == []


@pytest.mark.parametrize("name", [None, 3, "", ["mnist"]])
def test_names_must_be_names(name):
    with pytest.raises(TypeError, match="name must be"):
        load(name)


@pytest.mark.parametrize("name", ["..", "../mnist", "a/b", "/nowhere/at/all", "corpus.txt", "~/nowhere.parquet"])
def test_paths_that_do_not_exist(name, mirror, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "here" / "x", "").parent)
    with pytest.raises((FileNotFoundError, ValueError)):
        load(name)


def test_no_socket_is_opened_when_offline(tmp_path):
    script = """
import socket
def refuse(*a, **k): raise SystemExit("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from ptbook.basics.sources import load, SourceUnavailable
for name in ("mnist", "tiny_shakespeare", "xquad_en"):
    try: load(name)
    except SourceUnavailable as error: assert "Hub" in str(error)
    else: raise SystemExit("loaded " + name)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=120)


def test_the_hub_is_asked_with_id_and_config(monkeypatch):
    import datasets
    from huggingface_hub import constants
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked = []
    def answer(*where):
        asked.append(where)
        return DatasetDict({"validation": Dataset.from_dict({"id": ["a"]})})
    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert provenance(load("xquad_en"))["place"] == "hub" and asked == [("google/xquad", "xquad.en")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1") # set after the library was imported: still not asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE is set"):
        load("xquad_en")
    assert len(asked) == 1


# ---- a name or a path

def test_a_catalogue_name_is_not_shadowed_by_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "digits" / "a.txt", "some text"), write(tmp_path / "digits" / "b.txt", "more text")
    monkeypatch.chdir(tmp_path)
    assert provenance(load("digits"))["place"] == "embedded"
    assert provenance(load("./digits"))["place"] == provenance(load(tmp_path / "digits"))["place"] == "file"


# ---- fingerprints

def one(table): return DatasetDict({"train": Dataset(table)})


@pytest.mark.parametrize("column", [
    ["a", None, "", "b\u00e9"], [1, None, 3, 4], [1.5, float("nan"), None, 0.0], [True, False, None, True], [[1, 2], [], None, [3]],
    [["a"], None, ["b", None], []], [{"x": 1, "y": "a"}, {"x": None, "y": "b"}, None, {"x": 2, "y": None}], [b"\0", b"", None, b"\xff"]])
def test_layout_does_not_matter_and_content_does(column):
    table = pa.table({"c": column})
    same = [pa.concat_tables([table[:1], table[1:]]), pa.concat_tables([table[:2], table])[2:], pa.table({"c": pa.array(column)})]
    assert {fingerprint(one(t)) for t in same} == {fingerprint(one(table))}
    assert fingerprint(one(table)) == fingerprint(DatasetDict({"train": Dataset(table.take([3, 2, 1, 0])).select([3, 2, 1, 0])}))
    other = [table.take([1, 0, 2, 3]), table[:3], table.rename_columns(["d"]), table.take([0, 0, 2, 3])]
    assert len({fingerprint(one(t)) for t in [table, *other]}) == 5


def test_borders_classes_and_wide_offsets():
    assert fingerprint(one(pa.table({"c": ["ab", "c"]}))) != fingerprint(one(pa.table({"c": ["a", "bc"]})))
    assert fingerprint(one(pa.table({"c": ["ab"]}))) == fingerprint(one(pa.table({"c": pa.array(["ab"], pa.large_string())})))
    def labelled(names):
        return DatasetDict({"train": Dataset.from_dict({"y": [0, 1]}, features=Features({"y": ClassLabel(names=names)}))})
    assert fingerprint(labelled(["cat", "dog"])) != fingerprint(labelled(["dog", "cat"]))
    assert fingerprint(DatasetDict({"train": Dataset.from_dict({"c": ["a"]})})) != fingerprint(DatasetDict({"test": Dataset.from_dict({"c": ["a"]})}))


def test_the_path_of_an_image_is_no_content():
    def at(path, data=b"P5 1 1 255\n\x07"):
        return DatasetDict({"train": Dataset.from_dict({"image": [{"bytes": data, "path": path}]}, features=Features({"image": Image()}))})
    assert fingerprint(at("/home/a/x.png")) == fingerprint(at(None)) != fingerprint(at(None, b"P5 1 1 255\n\x08"))
    gaps = [DatasetDict({"train": Dataset(pa.table({"image": [{"bytes": b"a", "path": p}, None, {"bytes": None, "path": q}]}))})
            for p, q in (("x", "y"), ("z", "y"), ("x", "z"))]
    assert fingerprint(gaps[0]) == fingerprint(gaps[1]) != fingerprint(gaps[2])


def test_every_kind_of_value_has_a_fingerprint():
    import datetime as d
    import decimal
    from datasets import Array2D
    columns = [[d.date(2020, 1, 1), None], [d.time(1, 2), None], [d.timedelta(1), None], [d.datetime(2020, 1, 1), None], [decimal.Decimal("1.50"), None],
               pa.array([b"abc", None], pa.binary(3)), pa.array([[1, 2], None], pa.list_(pa.float32(), 2)), pa.array(["a", "b"]).dictionary_encode(),
               pa.array([np.float16(1), None]), pa.array([None, None])]
    seen = []
    for column in columns:
        table = pa.table({"x": column})
        seen.append(fingerprint(one(table)))
        assert seen[-1] == fingerprint(one(pa.concat_tables([table, table[:0]]))) == fingerprint(one(pa.concat_tables([table, table])[2:]))
    assert len(set(seen)) == len(columns)
    def of(value): return fingerprint(DatasetDict({"train": Dataset.from_dict({"x": [[[1, 2], [3, value]]] * 2}, features=features)}))
    features = Features({"x": Array2D((2, 2), "float32")})
    assert of(4) == of(4.0) != of(5)


def test_the_algorithm_is_fixed():
    "These digits are on record with results: a change of the algorithm must be noticed."
    table = pa.table({"text": ["a", None, "\u00e9"], "n": [1, 2, None], "x": [[0.5], [], None], "t": pa.array([0, 1, 2], pa.timestamp("ms"))})
    assert fingerprint(one(table)) == "b7106bda45b8b59d"


def test_fingerprints_agree_between_processes():
    script = "from ptbook.basics.sources import *; print(provenance(load('digits'))['fingerprint'], provenance(load('pydocs'))['fingerprint'])"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=120, capture_output=True, text=True).stdout.split()
    assert out == [provenance(load(n))["fingerprint"] for n in ("digits", "pydocs")]


# ---- provenance

def test_recording_collects_once_and_nests():
    with recording() as outer:
        load("wine")
        with recording() as inner:
            load("wine"), load("diabetes")
    load("digits")
    assert [r["name"] for r in outer] == ["wine", "diabetes"] == [r["name"] for r in inner]
    with pytest.raises(SourceUnavailable), recording() as seen:
        load("mnist")
    assert seen == [] and sources._recordings == [] and json.loads(json.dumps(outer)) == outer


def test_what_was_changed_after_loading_is_said_so():
    import pickle
    ds = load("wine")
    assert provenance(pickle.loads(pickle.dumps(ds)))["place"] == "embedded"
    before = provenance(ds)
    ds["train"] = ds["train"].select(range(10))
    assert "changed" in provenance(ds)["place"] and provenance(ds)["fingerprint"] != before["fingerprint"]
    assert provenance(DatasetDict({"train": ds["train"]}))["place"] == "memory"
    with pytest.raises(TypeError, match="DatasetDict"):
        provenance(ds["train"])
