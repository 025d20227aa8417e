"What the chapter on whole files cannot show: links, permissions, devices, other machines' drafts, systems without the exchange, many writers at once."
import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from ptbook.basics import whole
from ptbook.basics.whole import HOST, MOST, SILENCE, discard, sweep, whole_file, whole_files, whole_folder


def names(folder): return sorted(p.name for p in folder.iterdir())
def mode(path): return stat.S_IMODE(path.stat().st_mode)


def left_over(folder, name="x", host=HOST, age=0.0):
    "A draft whose writer is no more."
    place = folder/f".{name}.0123abcd.draft"
    (place/"new").mkdir(parents=True)
    (place/"writer").write_bytes(host)
    (place/"new"/name).write_text("half")
    for path in (*place.rglob("*"), place): os.utime(path, (time.time() - age,) * 2)
    return place


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_on_an_error_nothing_has_happened(tmp_path, error):
    (tmp_path/"a").write_text("old")
    with pytest.raises(type(error) if isinstance(error, OSError) else error), whole_files(tmp_path/"a", tmp_path/"b") as (a, b):
        a.write_text("new"), b.write_text("new")
        raise error
    with pytest.raises(FileNotFoundError), whole_files(tmp_path/"a", tmp_path/"b") as (a, b): a.write_text("new") # b was forgotten
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path/"c") as place: (place/"x").write_text(str(1 / 0))
    assert names(tmp_path) == ["a"] and (tmp_path/"a").read_text() == "old"


def test_folders_above_are_made_and_names_are_kept(tmp_path):
    with whole_file(tmp_path/"deep/er/a.txt.gz") as place: place.write_text(place.name)
    with whole_folder(tmp_path/"deep/er/still/b") as place: (place/"x").mkdir()
    assert (tmp_path/"deep/er/a.txt.gz").read_text() == "a.txt.gz" and names(tmp_path/"deep/er") == ["a.txt.gz", "still"] and names(tmp_path/"deep/er/still/b") == ["x"]
    with whole_file(tmp_path/("n" * 250)) as place: place.write_text("long")
    assert len(names(tmp_path)) == 2


def test_a_relative_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole_file("a") as place: place.write_text("x")
    with whole_folder("b") as place: pass
    assert names(tmp_path) == ["a", "b"]


def test_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        def private(place):
            place.write_text("x")
            place.chmod(0o600) # as safetensors does
        with whole_file(tmp_path/"a") as place: private(place)
        assert mode(tmp_path/"a") == 0o640
        (tmp_path/"a").chmod(0o604)
        with whole_file(tmp_path/"a") as place: private(place)
        assert mode(tmp_path/"a") == 0o604
        with whole_folder(tmp_path/"b") as place: private(place/"x")
        assert mode(tmp_path/"b") == 0o750 and mode(tmp_path/"b/x") == 0o640
        (tmp_path/"b").chmod(0o700)
        with whole_folder(tmp_path/"b", overwrite=True) as place: private(place/"x")
        assert mode(tmp_path/"b") == 0o700
    finally: os.umask(before)


def test_links_are_not_followed(tmp_path):
    (tmp_path/"outside").mkdir()
    (tmp_path/"outside/x").write_text("mine")
    (tmp_path/"outside/x").chmod(0o600)
    (tmp_path/"link").symlink_to(tmp_path/"outside/x")
    with whole_file(tmp_path/"link") as place: place.write_text("new")
    assert not (tmp_path/"link").is_symlink() and (tmp_path/"outside/x").read_text() == "mine" and mode(tmp_path/"link") != 0o600
    (tmp_path/"folder").symlink_to(tmp_path/"outside")
    with pytest.raises(FileExistsError), whole_folder(tmp_path/"folder", overwrite=True): pass
    with whole_folder(tmp_path/"new") as place: (place/"out").symlink_to(tmp_path/"outside/x")
    assert mode(tmp_path/"outside/x") == 0o600 and (tmp_path/"new/out").is_symlink()
    draft = left_over(tmp_path)
    (draft/"new/out").symlink_to(tmp_path/"outside")
    (tmp_path/".y.0123abcd.draft").symlink_to(tmp_path/"outside")
    sweep(tmp_path)
    assert not draft.exists() and names(tmp_path/"outside") == ["x"]


@pytest.mark.parametrize("place", ["folder", "pipe"])
def test_what_is_no_file_is_refused(tmp_path, place):
    (tmp_path/"folder").mkdir()
    os.mkfifo(tmp_path/"pipe")
    with pytest.raises(FileExistsError, match=f"{place} is there and is no file"), whole_file(tmp_path/place): raise AssertionError("work began")
    with pytest.raises(FileExistsError, match="is there"), whole_folder(tmp_path/place): raise AssertionError("work began")
    assert names(tmp_path) == ["folder", "pipe"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(OSError), whole_folder(tmp_path/"a") as place:
        (place/"x").write_text("ours")
        (tmp_path/"a").mkdir()
        (tmp_path/"a/y").write_text("theirs")
    assert names(tmp_path) == ["a"] and names(tmp_path/"a") == ["y"]


def test_only_what_is_left_over_goes(tmp_path, monkeypatch):
    for host, age, stays in ((HOST, 0, False), (b"elsewhere", 0, True), (b"elsewhere", SILENCE + 60, False), (b"", 0, False)):
        draft = left_over(tmp_path, host=host, age=age)
        sweep(tmp_path)
        assert draft.exists() == stays, (host, age)
        if stays: draft.rename(tmp_path/"away"), whole.shutil.rmtree(tmp_path/"away")
    def locks(*_): raise OSError(95, "Operation not supported") # a disk without locks: the silence decides
    monkeypatch.setattr(whole.fcntl, "flock", locks)
    for age, stays in ((SILENCE + 60, False), (0, True)):
        draft = left_over(tmp_path, age=age)
        sweep(tmp_path)
        assert draft.exists() == stays
    with whole_file(tmp_path/"a") as place: place.write_text("x")
    assert (tmp_path/"a").read_text() == "x" and draft.exists()


def test_a_sweep_that_breaks_off_can_be_taken_up(tmp_path, monkeypatch):
    draft, remove = left_over(tmp_path), whole.shutil.rmtree
    def breaking(path):
        remove(path)
        raise OSError
    monkeypatch.setattr(whole.shutil, "rmtree", breaking)
    sweep(tmp_path)
    assert names(draft) == ["writer"] # the last to go, for a folder without it is taken for somebody else's
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_other_people_s_folders_stay(tmp_path):
    (tmp_path/".mine.draft").mkdir()
    (tmp_path/".mine.draft/letter").write_text("dear")
    (tmp_path/".file.draft").write_text("x")
    (tmp_path/".empty.0123abcd.draft").mkdir() # its writer was killed as it began
    sweep(tmp_path), sweep(tmp_path/"nowhere"), sweep(tmp_path/".file.draft")
    assert names(tmp_path) == [".file.draft", ".mine.draft"]


def test_a_writer_looks_at_a_bounded_number_of_drafts(tmp_path):
    for i in range(MOST + 10): left_over(tmp_path, f"x{i}")
    with whole_file(tmp_path/"a") as place: place.write_text("x")
    assert len(names(tmp_path)) == 11
    sweep(tmp_path)
    assert names(tmp_path) == ["a"]


def test_without_the_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_exchanged", lambda *names: False)
    for text in "ab":
        with whole_folder(tmp_path/"out", overwrite=True) as place: (place/"x").write_text(text)
        assert (tmp_path/"out/x").read_text() == text and names(tmp_path) == ["out"]
    rename, calls = os.rename, []
    def failing(a, b):
        calls.append(a)
        if len(calls) == 2: raise OSError(5, "Input/output error")
        rename(a, b)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), whole_folder(tmp_path/"out", overwrite=True) as place: (place/"x").write_text("c")
    assert (tmp_path/"out/x").read_text() == "b" and names(tmp_path) == ["out"]


def test_a_broken_exchange_is_completed(tmp_path):
    draft = left_over(tmp_path, "out") # killed between the two renames
    (draft/"old").mkdir()
    (draft/"new/out").unlink()
    (draft/"new/out").mkdir()
    (draft/"new/out/x").write_text("new")
    with pytest.raises(FileExistsError, match="already"), whole_folder(tmp_path/"out"): pass
    assert names(tmp_path) == ["out"] and (tmp_path/"out/x").read_text() == "new"


def test_discarding(tmp_path):
    (tmp_path/"a/b").mkdir(parents=True)
    discard(tmp_path/"a")
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError): discard(tmp_path/"a")
    assert names(tmp_path) == []


def test_many_writers_of_one_name(tmp_path):
    "Threads and processes sweep while others write, and nobody loses a draft."
    program = "import sys\nfrom pathlib import Path\nfrom ptbook.basics.whole import whole_file\nfor i in range(60):\n    with whole_file(sys.argv[1]) as p: p.write_text(sys.argv[2] * 5000)"
    processes = [subprocess.Popen([sys.executable, "-c", program, tmp_path/"a", letter]) for letter in "ab"]
    failed = []
    def write():
        try:
            for _ in range(60):
                with whole_file(tmp_path/"a") as place: place.write_text("c" * 5000)
        except BaseException as error: failed.append(error)
    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads: thread.start()
    while any(p.poll() is None for p in processes) or any(t.is_alive() for t in threads):
        sweep(tmp_path)
        if (tmp_path/"a").exists(): assert (tmp_path/"a").read_text() in [letter * 5000 for letter in "abc"]
    assert not failed and [p.returncode for p in processes] == [0, 0] and names(tmp_path) == ["a"]


def test_the_import_is_quick():
    program = "import sys; import ptbook.basics.whole; assert not {'torch', 'numpy', 'ctypes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
