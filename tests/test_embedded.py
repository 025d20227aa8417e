"What the chapter cannot show: every set against its description, builds that must repeat, caches that cannot be used."
import numpy as np
import pyarrow as pa
import pytest

from ptbook.basics import embedded
from ptbook.basics.sources import CATALOGUE, load, places, provenance


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "No mirror, no network."
    monkeypatch.delenv("PTBOOK_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", [n for n, s in CATALOGUE.items() if s.build])
def test_embedded_sets_are_as_the_catalogue_says(name):
    ds, source = load(name), CATALOGUE[name]
    assert list(ds) == ["train", "test"] and "embedded" in places(name)
    assert tuple(ds["train"].column_names) == source.fields == tuple(ds["test"].column_names)
    assert source.rows is None or source.rows == {s: len(part) for s, part in ds.items()}
    assert all(len(part) > 0 for part in ds.values())
    assert provenance(ds) == provenance(load(name)) and provenance(ds)["place"] == "embedded"
    if "text" in source.fields:
        assert all(t.strip() for part in ds.values() for t in part["text"])
        assert not set(ds["train"]["text"]) & set(ds["test"]["text"])


def test_code_without_its_docstring_still_parses():
    import ast
    part = load("code_docstrings")["test"]
    for row in part:
        assert ast.get_docstring(ast.parse(row["text"]).body[0]) is not None and ast.parse(row["code"])
    assert not any(d in c for d, c in zip(part["docstring"], part["code"]) if len(d) > 60)


def test_library_docs_covers_every_library_once(tmp_path, monkeypatch):
    ds = load("library_docs")
    both = [*ds["train"]["text"], *ds["test"]["text"]]
    assert set(ds["train"]["domain"]) == set(ds["test"]["domain"]) == set(embedded.LIBRARIES)
    assert len(both) == len(set(both)) and 2e6 < sum(len(t) for t in both) < 6e6
    files = [{n.split(":")[0] for n in part["name"]} for part in ds.values()]
    assert not files[0] & files[1]


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits
    ds = load("digits")
    first = np.asarray(ds["train"][0]["image"])
    assert first.shape == (8, 8) and np.array_equal(first, 15 * load_digits().images[0])
    assert ds["train"].features["label"].names == [str(i) for i in range(10)]


def test_a_read_only_cache_is_a_warning(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("PTBOOK_CACHE", str(file))
    def small(): return pa.table({"text": ["a"]})
    with pytest.warns(UserWarning, match="could not be written"):
        assert embedded.cached(small)().num_rows == 1


def test_a_cache_is_read_once_built_and_rebuilt_when_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("PTBOOK_CACHE", str(tmp_path))
    built = []
    def slow():
        built.append(1)
        return pa.table({"text": ["a", "b"], "split": ["train", "test"]})
    assert embedded.cached(slow)().equals(embedded.cached(slow)()) and len(built) == 1
    embedded.cached(slow, "numpy")()
    assert len(built) == 2 and len(list(tmp_path.iterdir())) == 2 # other packages, another file
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert embedded.cached(slow)().num_rows == 2 and len(built) == 3


def test_a_cache_depends_on_the_code_that_reads_files(monkeypatch):
    before = embedded._cache_path(embedded.library_docs, ())
    def _docstrings(path): return []
    monkeypatch.setattr(embedded, "_docstrings", _docstrings)
    assert embedded._cache_path(embedded.library_docs, ()) != before


@pytest.mark.parametrize("name", ["digits", "wine", "pydocs", "stdlib_code", "glyphs"])
def test_building_twice_gives_the_same_table(name):
    assert embedded.EMBEDDED[name].build().equals(embedded.EMBEDDED[name].build())


def test_nothing_is_executed_and_templates_are_passed_over(tmp_path):
    good, template, latin = tmp_path / "good.py", tmp_path / "template.py", tmp_path / "latin.py"
    good.write_text('"A module."\nraise SystemExit("executed")\ndef f():\n    "A function."\n')
    template.write_text("{% if x %}"), latin.write_bytes(b"'caf\xe9'")
    assert embedded._docstrings(good) == [("", "A module."), ("f", "A function.")]
    assert embedded._docstrings(template) == [] == embedded._docstrings(latin)


def test_a_function_that_is_only_its_docstring_gives_no_pair():
    for source in ('def f():\n    "Only this."\n', 'def f(): "One line."; return 1\n', 'def f():\n    "Two."; return 1\n'):
        (_, node, _), = embedded._definitions(source)
        assert embedded._without_docstring(source.split("\n"), node) is None


def test_the_typefaces_of_the_test_are_not_in_training():
    part = embedded.by_split(embedded.glyphs())
    assert set(part["test"]["font"].to_pylist()) == set(embedded.TEST_FONTS)
    assert set(part["train"]["font"].to_pylist()) == set(embedded.FONTS) - set(embedded.TEST_FONTS)
    assert all(sum(row["bytes"][-784:]) > 0 for row in part["train"]["image"].to_pylist()) # no empty picture
