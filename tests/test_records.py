"Choosing records: every record has one reason, whatever lies in the files."
import gzip
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from ptbook.curate import records
from ptbook.curate.baselines import Random
from ptbook.curate.records import REASONS, Files, Overlap, Record, highest, select, text_keys

LENGTH = lambda texts: np.array([len(t) for t in texts], float)


def chosen(*args, **settings):
    "A selection without its warnings."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select(*args, **settings)


def pool(folder: Path, n: int = 300) -> Path:
    "Shards of every kind, with all that goes wrong."
    folder.mkdir()
    texts = [f"document {i} " + "word " * (i % 17) for i in range(n)]
    third = n // 3
    (folder/"a.jsonl").write_bytes(b"\n".join(json.dumps({"text": t, "n": i}).encode() for i, t in enumerate(texts[:third])) + b'\n{"text": "caf\xe9"}\n{"text": "cut')
    (folder/"b.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in texts[third:2 * third]).encode()))
    pq.write_table(pa.table({"text": [*texts[2 * third:], None, "nul\0", "   ", texts[0].upper()]}), folder/"c.parquet", row_group_size=50)
    (folder/"d.txt").write_text("a document of its own")
    (folder/"e.parquet").write_bytes((folder/"c.parquet").read_bytes()[:200])
    (folder/"f.bin").write_bytes(b"\x00\x01")
    return folder


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("by", ["documents", "characters"])
def test_the_books_balance(tmp_path, keep, by):
    files = Files(pool(tmp_path/"pool"))
    done, read = chosen(files, LENGTH, keep, by=by), list(files)
    assert sum(done.counts.values()) == len(read) == len(done.reasons) == len(done.scores)
    assert done.counts["unreadable"] == sum(r.text is None for r in read) == 6 and done.counts["blank"] == 1 and done.counts["duplicate"] == 1
    judged = done.reasons <= 1
    share = done.sizes[done.kept].sum() / done.sizes[judged].sum() if by == "characters" else len(done.kept) / judged.sum()
    assert keep - 0.02 < share <= keep + 0.01 if by == "characters" else abs(share - keep) <= 0.5 / judged.sum() + 1e-9
    assert done.line == done.scores[done.kept].min() and done.line >= done.scores[done.reasons == 1].max(initial=-np.inf)


def test_batches_do_not_show(tmp_path, monkeypatch):
    files = Files(pool(tmp_path/"pool"))
    whole = chosen(files, Random(), 0.3)
    cut = records._batches
    monkeypatch.setattr(records, "_batches", lambda stream: cut(stream, most=7, characters=100))
    again = chosen(files, Random(), 0.3)
    assert np.array_equal(whole.reasons, again.reasons) and np.array_equal(whole.scores, again.scores, equal_nan=True)


def test_any_kind_of_records_gives_the_same(tmp_path):
    rows = [{"text": f"row {i} " * (i % 9 + 1), "domain": "even" if i % 2 == 0 else "odd"} for i in range(200)]
    (tmp_path/"rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/"rows.parquet")
    kinds = [rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset(num_shards=3), Files(tmp_path/"rows.jsonl"), Files(tmp_path/"rows.parquet"), (r for r in rows)]
    kept = [select(kind, LENGTH, 0.2).kept.tolist() for kind in kinds]
    assert all(k == kept[0] for k in kept) and len(kept[0]) == 40
    assert {r.domain for r in Files(tmp_path/"rows.parquet")} == {"even", "odd"}


def test_everything_is_a_copy():
    done = select([{"text": "the same"}] * 500, LENGTH, 0.5)
    assert done.counts["duplicate"] == 499 and done.counts["kept"] + done.counts["below the line"] == 1
    assert select([{"text": "the same"}] * 500, LENGTH, 0.5, duplicates=None).counts["kept"] == 250


def test_nothing_can_be_kept():
    assert select([], LENGTH, 0.5).counts == dict.fromkeys(REASONS, 0)
    done = select([{"text": " "}, {"text": ""}], LENGTH, 1.0)
    assert done.counts["blank"] == 2 and np.isnan(done.line)


def test_a_document_of_fifty_megabytes(tmp_path):
    (tmp_path/"big.jsonl").write_text(json.dumps({"text": "many words " * 4_600_000}) + "\n" + json.dumps({"text": "small"}))
    done = select(Files(tmp_path/"big.jsonl"), LENGTH, 1.0)
    assert [done.reason(0), done.reason(1)] == ["too long", "kept"]
    assert select(Files(tmp_path/"big.jsonl"), LENGTH, 1.0, longest=10**8).counts["kept"] == 2


def test_a_line_without_end_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LINE", 1000)
    (tmp_path/"a.jsonl").write_text('{"text": "one"}\n' + '{"text": "' + "x" * 5000 + '"}\n{"text": "two"}\n')
    assert [r.text for r in Files(tmp_path/"a.jsonl")] == ["one", None, "two"]


def test_the_target_is_left_out():
    target = ["the quick brown fox jumps over the lazy dog and runs away", "short target"]
    rows = [{"text": t} for t in ("THE quick  brown fox jumps over the lazy dog and runs away", "short target", "short targets", "another text about a quick fox")]
    with pytest.warns(UserWarning, match="2 of 4 records overlap the target"): done = select(rows, LENGTH, 1.0, target=target)
    assert [done.reason(i) for i in range(4)] == ["overlaps the target"] * 2 + ["kept"] * 2
    assert not Overlap(target)(["", "a b c"]).any()


def test_the_same_files_again(tmp_path):
    files = Files(pool(tmp_path/"pool"))
    done = chosen(files, LENGTH, 0.1)
    assert [r.text for r in done.take(files)] == [r.text for i, r in enumerate(files) if done.reasons[i] == 0]
    for other in (list(files)[:-1], [*files, Record("one more")]):
        with pytest.raises(ValueError, match="wanted the"): list(done.take(other))


def test_damaged_rows_of_parquet_are_counted(tmp_path):
    path = tmp_path/"a.parquet"
    texts = [f"{i} " + "".join(map(chr, np.random.default_rng(i).integers(97, 123, 300))) for i in range(400)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd", use_dictionary=False)
    where = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[where.data_page_offset + 60:where.data_page_offset + where.total_compressed_size - 10] = bytes(where.total_compressed_size - 70)
    path.write_bytes(data)
    read = list(Files(path))
    assert len(read) == 400 and [r.text for r in read[:100]] == texts[:100] and [r.text for r in read[200:]] == texts[200:] and sum(r.text is None for r in read) == 100


def test_links_are_not_followed(tmp_path):
    (tmp_path/"outside.txt").write_text("secret")
    (tmp_path/"in").mkdir()
    (tmp_path/"in"/"a.txt").write_text("open")
    (tmp_path/"in"/"b.txt").symlink_to(tmp_path/"outside.txt")
    assert [r.text for r in Files(tmp_path/"in")] == ["open"]


def test_keys_do_not_collide():
    texts = [f"{a} {b}" for a in range(300) for b in range(100)]
    assert len(np.unique(text_keys(texts))) == len(texts) and len(np.unique(text_keys(["a a b", "a b a", "a b", "b a", "aab", ""]))) == 6


def test_the_share_is_of_what_was_judged():
    assert len(highest(np.arange(7.0), 0.5)) == round(3.5) and highest(np.array([2.0, -np.inf, 1.0]), 1.0).tolist() == [0, 1, 2]
    sizes = np.array([5, 5, 10])
    assert highest(np.array([1.0, 2.0, 3.0]), 0.75, sizes).tolist() == [1, 2] and highest(np.array([1.0, 2.0, 3.0]), 0.4, sizes).tolist() == []


@pytest.mark.parametrize("keep", [0, -1, 1.0001, float("nan"), float("inf")])
def test_a_share_that_is_none(keep):
    with pytest.raises(ValueError, match="keep: got"): select([{"text": "a"}], LENGTH, keep)


@pytest.mark.parametrize("scorer, said", [(lambda t: np.full(len(t), np.nan), "not a number"), (lambda t: np.zeros(len(t) + 1), "wanted one each"), (lambda t: np.zeros((len(t), 2)), "wanted one each")])
def test_a_scorer_that_is_none(scorer, said):
    with pytest.raises(ValueError, match=said): select([{"text": "a"}, {"text": "b"}], scorer, 0.5)


def test_no_text_column():
    with pytest.raises(ValueError, match="no column 'text'; it has 'body'"): select([{"body": "a"}], LENGTH, 0.5)
    with pytest.raises(ValueError, match=re.escape("by: got 'weight'")): select([{"text": "a"}], LENGTH, 0.5, by="weight")
