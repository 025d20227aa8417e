"What `ptbook` says, to a reader and to a program, when all is well and when it is not."
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ptbook.press import cli, ledger

PROGRAM = [sys.executable, "-c", "from ptbook.press.cli import main; main()"]
LEDGER_KEYS = ["slug", "title", "chapter", "claim", "verdict", "effect", "low", "high", "source", "scale"]

# A chapter that is not in the book: the paper `t3` is, its chapter is put where every process finds it.
CHAPTER = '''
import os, time
from ptbook.basics.claims import Scale, claim, experiment

@experiment("t3", chapter="embodied.touch", metric="accuracy", sources=("wine",))
def touch(seed: int, scale: Scale, source: str | None = None) -> dict[str, float]:
    print("a chatty experiment")
    os.system("echo a chatty program")
    if os.environ.get("SLEEP"):
        open(os.environ["SLEEP"], "w").close()
        time.sleep(30)
    if os.environ.get("FAIL") == str(seed): 1 / 0
    if os.environ.get("NAN") == str(seed): return {"touch": float("nan"), "no touch": 0.0}
    sign = -1 if source else 1
    return {"touch": sign * (1 + 0.1 * seed), "no touch": 0.01 * seed}

claim(touch, "touch", ">", "no touch", primary=True)
claim(touch, "touch", ">", "no touch", times=1000.0)
'''


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    "An environment in which the chapter exists and results go to a folder of their own."
    room = tmp_path/"rooms/embodied"
    room.mkdir(parents=True)
    (room/"__init__.py").write_text("")
    (room/"touch.py").write_text(CHAPTER)
    (tmp_path/"rooms/sitecustomize.py").write_text(f"import ptbook; ptbook.__path__.append({str(tmp_path/'rooms')!r})\n")
    path = os.pathsep.join([str(tmp_path/"rooms"), str(Path(cli.__file__).parents[2])])
    return os.environ | {"PYTHONPATH": path, "PTBOOK_RESULTS": str(tmp_path/"results"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def ptbook(*args: str, env: dict[str, str] | None = None, rc: int = 0) -> subprocess.CompletedProcess:
    "Run the program and check how it exits."
    done = subprocess.run([*PROGRAM, *args], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == rc, f"exit code {done.returncode}, wanted {rc}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def ask(env, tmp_path, monkeypatch, capfd):
    "The same within this process, which has torch loaded already."
    import ptbook as package
    for name in ("PTBOOK_RESULTS", "COLUMNS"): monkeypatch.setenv(name, env[name])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path/"rooms")])
    forget = lambda: [sys.modules.pop(name, None) for name in ("ptbook.embodied.touch", "ptbook.embodied")]
    forget()
    def ask(*args: str, rc: int = 0, **settings: str):
        with monkeypatch.context() as inside:
            for name, value in settings.items(): inside.setenv(name, value)
            with pytest.raises(SystemExit) as stop: cli.main(list(args))
        out, err = capfd.readouterr()
        assert stop.value.code == rc, f"exit code {stop.value.code}, wanted {rc}\n{out}\n{err}"
        return subprocess.CompletedProcess(args, rc, out, err)
    yield ask
    forget()


def test_help_lists_every_command_and_loads_nothing_heavy(ask):
    said = ptbook("--help")
    for command in ("chapters", "run", "tour", "sources", "ledger", "lab", "refresh", "bench", "merge", "select"):
        assert re.search(rf"^  {command} +\S", said.stdout, re.M), command
        assert ask(command, "-h").stdout.startswith(f"Usage: ptbook {command}")
    assert "Examples:" in said.stdout and not said.stderr and said.stdout == ask().stdout
    loaded = subprocess.run([sys.executable, "-c", "import sys, ptbook.press.cli; print(*sys.modules)"], capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "matplotlib", "datasets", "transformers", "rich", "nbformat"} & set(loaded)


def test_help_is_quick():
    spent = []
    for _ in range(3): # processor time, which a busy machine does not stretch
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ptbook("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


def test_version():
    import ptbook as package
    assert ptbook("--version").stdout == f"ptbook {package.__version__}\n"


def check_report(said):
    report = json.loads(said.stdout)
    assert list(report) == ["slug", "scale", "source", "seeds", "seconds", "arms", "claims"]
    assert [list(c) for c in report["claims"]] == [["text", "primary", "verdict", "effect", "low", "high"]] * 2
    assert (report["slug"], report["scale"], report["source"], report["seeds"]) == ("t3", "tiny", None, [0, 1, 2])
    assert report["arms"] == {"touch": [1.0, 1.1, 1.2], "no touch": [0.0, 0.01, 0.02]}
    assert report["claims"][0]["verdict"] == "supported" and report["claims"][0]["primary"]
    assert said.stdout.count("\n") == 1


def test_run_json_is_one_object_and_nothing_else(ask):
    said = ask("run", "t3", "--scale", "tiny", "--seeds", "0:3", "--jobs", "1", "--json")
    check_report(said)
    assert "a chatty experiment" in said.stderr and "a chatty program" in said.stderr


def test_what_worker_processes_print_stays_out_of_the_json(env):
    check_report(ptbook("run", "t3", "--scale", "tiny", "--seeds", "0:3", "--jobs", "2", "--json", env=env))


def test_run_prints_arms_seeds_verdicts_and_seconds(ask):
    said = ask("run", "t3", "--scale", "tiny", "--jobs", "1").stdout
    for part in ("touch", "no touch", "seed 0", "seed 1", "supported", "primary"): assert part in said
    assert re.search(r"\d s\b", said)


def test_a_seed_that_fails_is_named_and_the_others_are_kept(ask):
    said = ask("run", "t3", "--scale", "tiny", "--jobs", "1", "--json", FAIL="1", rc=1)
    assert said.stdout == "" and "seed 1" in said.stderr and "ZeroDivisionError" in said.stderr and "1 / 0" in said.stderr
    again = json.loads(ask("run", "t3", "--scale", "tiny", "--jobs", "1", "--json").stdout)
    assert again["arms"]["touch"] == [1.0, 1.1]


def test_a_value_that_is_not_a_number_fails_the_run(ask):
    said = ask("run", "t3", "--scale", "tiny", "--jobs", "1", "--json", NAN="0", rc=1)
    assert said.stdout == "" and "'touch'" in said.stderr and "seed 0" in said.stderr


@pytest.mark.parametrize("request_, words", [
    (["run", "t33"], ["'t33'", "'t3'"]),
    (["run", "model_soup"], ["'model_soups'"]),
    (["run", "touch"], ["'t3'"]),
    (["run", "deeparchitect"], ["no chapter yet", "08_search/search_spaces"]),
    (["run", "t3", "--seeds", "5:0"], ["5:0"]),
    (["run", "t3", "--seeds", "two"], ["two"]),
    (["run", "t3", "--seeds", "-1:2"], ["-1:2"]),
    (["run", "t3", "--scale", "huge"], ["huge", "tiny", "book", "full"]),
    (["run", "t3", "--source", "whine"], ["whine", "wine"]),
    (["run", "t3", "--jobs", "0"], ["--jobs"]),
    (["run"], ["slug"]),
    (["dance"], ["dance"]),
    (["ledger", "--jsn"], ["--json"]),
    (["tour", "--text", "no/such/file.txt"], ["no/such/file.txt"]),
    (["lab", "casual"], ["casual", "'causal'"]),
    (["refresh", "ledgre"], ["ledgre", "ledger"]),
    (["bench", "basic"], ["basic", "basics"]),
    (["bench", "merg"], ["merg", "'merge'"]),
    (["merge", "no/such/model", "--out", "new"], ["no/such/model"]),
    (["merge", "a", "b"], ["--out"]),
    (["select", "no/such/pool", "out.parquet"], ["no/such/pool"]),
    (["select", "README.md", "out.txt"], ["out.txt", ".parquet"]),
    (["select", "README.md", "out.parquet", "--keep", "0"], ["keep", "got 0"]),
    (["select", "README.md", "out.parquet", "--near", "1.5"], ["threshold", "1.5"]),
    (["select", "README.md", "out.parquet", "--method", "importance"], ["--target"]),
    (["select", "README.md", "out.parquet", "--method", "magic"], ["magic", "importance"]),
])
def test_a_wrong_request_gets_one_line_and_exit_code_2(ask, request_, words):
    said = ask(*request_, rc=2)
    assert said.stdout == "" and len(said.stderr.splitlines()) == 1, said.stderr
    for word in words: assert word in said.stderr


def test_a_wrong_scale_in_the_environment_is_named(ask):
    assert "huge" in ask("run", "t3", PTBOOK_SCALE="huge", rc=2).stderr


def test_ctrl_c_exits_with_130_and_no_traceback(env, tmp_path):
    mark = tmp_path/"started"
    process = subprocess.Popen([*PROGRAM, "run", "t3", "--jobs", "1", "--json"], env=env | {"SLEEP": str(mark)}, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for _ in range(600):
        if mark.exists(): break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "" and "interrupted" in err and "Traceback" not in err


def test_ledger_has_a_row_for_every_paper():
    rows = json.loads(ptbook("ledger", "--json").stdout)
    assert len(rows) == 99 and all(list(row) == LEDGER_KEYS for row in rows)
    assert {row["verdict"] for row in rows} <= {"supported", "undecided", "contradicted", "not yet"}
    assert all((row["effect"] is None) == (row["verdict"] == "not yet") for row in rows)
    text = ptbook("ledger").stdout
    assert text.startswith("99 papers: ")
    assert {row["slug"] for row in rows} <= set(text.split())


def test_the_ledger_shows_the_synthetic_result_and_neither_tiny_nor_stale_ones(ask, tmp_path):
    def line():
        said = ask("ledger", "--json")
        return next(row for row in json.loads(said.stdout) if row["slug"] == "t3"), said.stderr
    ask("run", "t3", "--scale", "tiny", "--jobs", "1")
    assert line()[0]["verdict"] == "not yet"
    ask("run", "t3", "--source", "wine", "--jobs", "1")
    assert (line()[0]["verdict"], line()[0]["source"]) == ("contradicted", "wine")
    ask("run", "t3", "--jobs", "1")
    row, _ = line()
    assert (row["verdict"], row["source"], row["scale"]) == ("supported", None, "book")
    assert row["claim"].startswith("touch") and row["low"] <= row["effect"] <= row["high"]
    chapter = tmp_path/"rooms/embodied/touch.py"
    chapter.write_text(chapter.read_text().replace("0.1 * seed", "0.2 * seed"))
    row, notes = line()
    assert row["verdict"] == "not yet" and "t3" in notes and "stale" in notes


def test_a_reader_may_stop_listening():
    piped = subprocess.run(f"{sys.executable} -c 'from ptbook.press.cli import main; main()' ledger | head -1", shell=True, capture_output=True, text=True)
    assert piped.stdout.startswith("99 papers") and piped.stderr == ""


def test_sources_and_chapters(ask):
    sources = {row["name"]: row for row in json.loads(ask("sources", "--json").stdout)}
    assert "embedded" in sources["digits"]["places"] and sources["digits"]["licence"] and sources["pydocs"]
    assert "digits" in ask("sources").stdout
    chapters = {row["chapter"]: row for row in json.loads(ask("chapters", "--json").stdout)}
    assert chapters["press/cli"]["title"] == "The command line" and "basics/claims" in chapters
    assert "basics/claims" in ask("chapters").stdout


def test_names_that_mean_a_notebook(monkeypatch, tmp_path):
    for address in ("index", "01_tour", "01_objectives/causal", "07_continual/prototypes", "05_merge/causal_notes", "04_adapt/prototypes", ".hidden/causal"):
        path = tmp_path/"nbs"/f"{address}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"cells": []}')
    (tmp_path/"papers.tsv").write_bytes((ledger.book_folder()/"papers.tsv").read_bytes())
    monkeypatch.setattr(ledger, "book_folder", lambda: tmp_path)
    causal = tmp_path/"nbs/01_objectives/causal.ipynb"
    for name in ("causal", "objectives/causal", "01_objectives/causal", "qwen25", "nbs/01_objectives/causal.ipynb", "ptbook.objectives.causal"):
        assert ledger.notebook(name) == causal, name
    assert ledger.notebook("tour").name == "01_tour.ipynb" and ledger.notebook("index").name == "index.ipynb"
    with pytest.raises(ledger.UnknownName, match="could be '04_adapt/prototypes' or '07_continual/prototypes'"): ledger.notebook("prototypes")
    with pytest.raises(ledger.UnknownName, match="did you mean 'causal'"): ledger.notebook("casual")
    with pytest.raises(ledger.NoChapter, match="no chapter yet"): ledger.notebook("model_soups")


def test_an_installed_wheel_carries_the_book(monkeypatch, tmp_path):
    package = tmp_path/"site-packages/ptbook"
    (package/"_book/nbs").mkdir(parents=True)
    (package/"_book/papers.tsv").write_bytes((ledger.book_folder()/"papers.tsv").read_bytes())
    monkeypatch.setattr(ledger.ptbook, "__file__", str(package/"__init__.py"))
    assert ledger.book_folder() == package/"_book" and len(ledger.papers()) == 99
    (package/"_book/papers.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="install ptbook again"): ledger.book_folder()


def test_a_notebook_that_is_interrupted_while_it_runs_is_unchanged(tmp_path):
    mark, path = tmp_path/"started", tmp_path/"chapter.ipynb"
    cell = {"cell_type": "code", "id": "a", "execution_count": None, "metadata": {}, "outputs": [],
            "source": f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    before = path.read_bytes()
    code = f"from pathlib import Path; from ptbook.press.refresh import refresh_file; refresh_file(Path({str(path)!r}), 'tiny')"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for _ in range(600):
        if mark.exists() and mark.read_text(): break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err and process.returncode
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["chapter.ipynb", "started"]
    with pytest.raises(ProcessLookupError): os.kill(int(mark.read_text()), 0)


def test_refresh_by_name_cleans_what_it_keeps(monkeypatch, tmp_path):
    from ptbook.press import refresh
    path = tmp_path/"nbs/01_objectives/causal.ipynb"
    path.parent.mkdir(parents=True)
    cell = {"cell_type": "code", "id": "a", "execution_count": 7, "metadata": {"collapsed": True, "tags": ["x"]}, "outputs": [], "source": "object()"}
    path.write_text(json.dumps({"cells": [cell], "metadata": {"colab": {}}, "nbformat": 4, "nbformat_minor": 5}))
    for name in ("papers.tsv", "settings.ini"): (tmp_path/name).write_bytes((ledger.book_folder()/name).read_bytes())
    for module in (ledger, refresh): monkeypatch.setattr(module, "book_folder", lambda: tmp_path)
    assert refresh.refresh("qwen25", "tiny") == path
    kept = path.read_bytes()
    (ran,) = json.loads(kept)["cells"]
    assert ran["outputs"][0]["data"]["text/plain"] == ["<object>"] and ran["execution_count"] is None and ran["metadata"] == {"tags": ["x"]}
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", str(path)], cwd=tmp_path, check=True)
    assert path.read_bytes() == kept


def test_refresh_names_the_cell_that_failed(tmp_path):
    from ptbook.press.refresh import CellFailed, refresh_file
    path = tmp_path/"chapter.ipynb"
    def fails(source, message):
        cells = [{"cell_type": "code", "id": i, "execution_count": None, "metadata": {}, "outputs": [], "source": s} for i, s in (("a", "x = 0"), ("b", source))]
        path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        before = path.read_bytes()
        with pytest.raises(CellFailed, match=re.escape(message)): refresh_file(path, "tiny", progress=False)
        assert path.read_bytes() == before
    fails("def f():\n    return 1 / x\n\nf()", "code cell 2, line 4: `f()`: ZeroDivisionError")
    fails("y = = 1", "code cell 2, line 1: `y = = 1`: SyntaxError")
    fails("import os\nos._exit(1)", "the kernel died")


def test_the_readme_shows_what_the_page_shows(monkeypatch, tmp_path):
    from ptbook.press import refresh
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    image = {"output_type": "display_data", "metadata": {}, "data": {"image/png": picture, "text/plain": "<Figure>"}}
    cells = [{"cell_type": "raw", "source": "---\ntitle: x\n---"}, {"cell_type": "markdown", "source": "# Title\n[a](01_tour.ipynb)"},
             {"cell_type": "code", "source": "#| echo: false\n#| fig-alt: A curve falls\nplot()", "outputs": [image]},
             {"cell_type": "code", "source": "#| hide\nsecret()", "outputs": [image]},
             {"cell_type": "code", "source": "1 + 1", "outputs": [{"output_type": "execute_result", "data": {"text/plain": ["2"]}}]}]
    (tmp_path/"nbs").mkdir()
    (tmp_path/"nbs/index.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    monkeypatch.setattr(refresh, "book_folder", lambda: tmp_path)
    text = refresh.write_readme().read_text()
    assert "![A curve falls](nbs/images/index-1.png)" in text and (tmp_path/"nbs/images/index-1.png").read_bytes()[:4] == b"\x89PNG"
    assert "```python\n1 + 1\n```\n\n```text\n2\n```" in text and "[a](nbs/01_tour.ipynb)" in text
    assert "secret" not in text and "plot()" not in text and "title: x" not in text and "#|" not in text


def test_what_a_chapter_quotes_from_its_results_is_quoted_at_the_end(tmp_path):
    from ptbook.press.refresh import run_cells
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (
        "from pathlib import Path\ndef verdict_line(slug): return Path('result').read_text() if Path('result').exists() else 'not yet'", "verdict_line('a')", "1 + 1", "Path('result').write_text('supported');")])
    nbformat.write(nb, tmp_path/"chapter.ipynb")
    done = run_cells(tmp_path/"chapter.ipynb", "tiny", progress=False)
    assert len(done.cells) == 4 and [o["data"]["text/plain"] for c in done.cells[1:3] for o in c.outputs] == ["'supported'", "2"]


def test_select(ask, tmp_path):
    pool = tmp_path/"pool"
    pool.mkdir()
    texts = [f"{i} the sea and the ship and a wave of the tide" if i % 4 == 0 else f"{i} bread and salt in the oven of the kitchen" for i in range(80)]
    (pool/"a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + '\n{"text": "cut')
    (tmp_path/"target.txt").write_text("a wave and a ship\n\nthe tide of the sea")
    out = str(tmp_path/"best.parquet")
    said = ask("select", str(pool), out, "--target", str(tmp_path/"target.txt"), "--keep", "0.25", "--json")
    told = json.loads(said.stdout)
    assert told["read"] == 81 and sum(told["counts"].values()) == 81 and told["counts"]["kept"] == 20 and told["counts"]["unreadable"] == 1
    assert "1 of 81 records could not be read" in said.stderr
    import pyarrow.parquet as pq
    assert all("ship" in t for t in pq.read_table(out)["text"].to_pylist()) and Path(told["page"]).exists() and Path(told["reasons"]).exists()
    near = ask("select", str(pool), out, "--method", "random", "--near", "0.3")
    assert "81 records read" in near.stdout and "duplicate" in near.stdout
