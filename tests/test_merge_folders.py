"What `tests/test_merge_files.py` does not reach of a model folder."
import pytest

from ptbook.merge.folders import LIMIT, MergeError, inside, read_json, vocabulary


def test_json_that_is_no_object_or_too_large(tmp_path):
    (tmp_path/"list.json").write_text("[]")
    (tmp_path/"broken.json").write_bytes(b"{\xff")
    with (tmp_path/"large.json").open("wb") as file: file.truncate(LIMIT + 1)
    for name in ("list", "broken", "large", "none"):
        with pytest.raises(MergeError, match=name): read_json(tmp_path/f"{name}.json")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", 3, None])
def test_names_that_are_no_names(tmp_path, name):
    with pytest.raises(MergeError): inside(tmp_path, name)


def test_words_added_later_count(tmp_path):
    assert vocabulary(tmp_path) is None
    (tmp_path/"vocab.txt").write_text("a\nb\n")
    (tmp_path/"added_tokens.json").write_text('{"c": 2}')
    assert vocabulary(tmp_path) == {"a": 0, "b": 1, "c": 2}
