"JupyterLab as a reader meets it: copies of their own, a door with a token, and a chapter run in a real browser."
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from ptbook.press import cli, lab, ledger

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-c", "from ptbook.press.cli import main; main()"]
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --no-first-run --disable-quic".split()


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    "A book with one notebook."
    source = tmp_path/"nbs/01_objectives/causal.ipynb"
    source.parent.mkdir(parents=True)
    source.write_text("the book's")
    (tmp_path/"papers.tsv").write_bytes((ledger.book_folder()/"papers.tsv").read_bytes())
    for module in (ledger, lab): monkeypatch.setattr(module, "book_folder", lambda: tmp_path)
    return source


def started(monkeypatch) -> list:
    "What would be started, instead of starting it."
    calls = []
    monkeypatch.setattr(lab.subprocess, "call", lambda command, env: calls.append((command, env)) or 0)
    monkeypatch.setattr(lab, "sign", lambda copies: list(copies))
    return calls


def test_reading_never_changes_the_book(shelf, monkeypatch, tmp_path, capsys):
    calls, copy = started(monkeypatch), tmp_path/"work/01_objectives/causal.ipynb"
    assert lab.open_lab("causal") == 0 and copy.read_text() == "the book's"
    copy.write_text("the reader's")
    shelf.write_text("the book's second edition")
    assert lab.open_lab("qwen25") == 0 and copy.read_text() == "the reader's"
    assert "newer versions of 01_objectives/causal" in capsys.readouterr().err
    assert shelf.read_text() == "the book's second edition" and len(calls) == 2
    assert all(f"--ServerApp.root_dir={tmp_path/'work'}" in command for command, _ in calls)


def test_a_first_start_that_was_killed_leaves_no_orphans(shelf, monkeypatch, tmp_path):
    started(monkeypatch)
    copy = tmp_path/"work/01_objectives/causal.ipynb"
    copy.parent.mkdir(parents=True)
    shutil.copy(shelf, copy) # copied, and killed before it was noted
    lab.open_lab("causal")
    shelf.write_text("the book's second edition")
    lab.open_lab("causal")
    assert copy.read_text() == "the book's second edition"


def test_authors_open_the_book_itself(shelf, monkeypatch, tmp_path):
    calls = started(monkeypatch)
    lab.open_lab("causal", edit=True)
    command = calls[0][0]
    assert f"--ServerApp.root_dir={tmp_path/'nbs'}" in command and not (tmp_path/"work/01_objectives").exists()
    assert "--LabApp.default_url=/lab/workspaces/edit/tree/01_objectives/causal.ipynb" in command


def test_an_installed_book_cannot_be_edited(monkeypatch, tmp_path, capsys):
    package = tmp_path/"_book"
    (package/"nbs").mkdir(parents=True)
    (package/"nbs/index.ipynb").write_text("{}")
    for module in (ledger, lab): monkeypatch.setattr(module, "book_folder", lambda: package)
    with pytest.raises(SystemExit) as stop: cli.main(["lab", "--edit"])
    assert stop.value.code == 1 and "needs a checkout" in capsys.readouterr().err


def test_lab_without_jupyterlab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop: cli.main(["lab", "press/ledger"])
    said = capsys.readouterr()
    assert stop.value.code == 1 and "pip install jupyterlab" in said.err and not said.out


def test_every_notebook_finds_its_kernel():
    "JupyterLab asks which kernel to use for a notebook that names none. Nothing else is kept about a notebook, such as the state of widgets that are gone."
    for address, path in ledger.notebooks().items():
        assert json.loads(path.read_text(encoding="utf-8"))["metadata"] == {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, address


@contextmanager
def running(*args: str, home: Path, cwd: Path | None = None, **more: str):
    "`ptbook lab` in a home of its own; yields its address, the page, and the token."
    folders = {"HOME": home, "JUPYTER_CONFIG_DIR": home/"config", "JUPYTER_DATA_DIR": home/"data", "JUPYTER_RUNTIME_DIR": home/"runtime", "IPYTHONDIR": home/"ipython"}
    env = os.environ | {name: str(path) for name, path in folders.items()} | {"PTBOOK_SCALE": "tiny", "PTBOOK_STATIC": "0"} | more
    with (home/"log").open("w") as log: server = subprocess.Popen([*PROGRAM, "lab", *args, "--no-browser"], env=env, cwd=cwd, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            said = (home/"log").read_text()
            found = re.search(r"http://127\.0\.0\.1:(\d+)(/lab\S+)\?token=(\w+)", said)
            if found or server.poll() is not None: break
            time.sleep(0.1)
        assert found, said
        for _ in range(300): # the address is written before anybody listens there
            with socket.socket() as knock:
                if not knock.connect_ex(("127.0.0.1", int(found[1]))): break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{found[1]}", found[2], found[3]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "A chapter, open in JupyterLab; its copy is taken away afterwards, unless a reader had one."
    work, before = lab.work_folder(), lab.work_folder().exists()
    copy = work/"00_basics/show.ipynb"
    kept = copy.read_bytes() if copy.exists() else None
    if kept: copy.unlink()
    try:
        with running("basics/show", "--port", "9380", home=tmp_path_factory.mktemp("home")) as said: yield said
    finally:
        if not before: shutil.rmtree(work)
        elif kept: copy.write_bytes(kept)
        else: copy.unlink(missing_ok=True)


def test_the_door_has_a_lock(opened):
    base, page, token = opened
    assert page.startswith("/lab/workspaces/") and page.endswith("/tree/00_basics/show.ipynb")
    assert urllib.request.urlopen(f"{base}/api/contents?token={token}", timeout=20).status == 200
    for wrong in ("", "?token=", "?token=0"):
        with pytest.raises(urllib.error.HTTPError, match="403"): urllib.request.urlopen(f"{base}/api/contents{wrong}", timeout=20)


def test_nobody_else_can_knock(opened):
    "The server's sockets, as the system lists them."
    port = f"{int(opened[0].rsplit(':', 1)[1]):04X}"
    listening = [line.split()[1].split(":")[0] for name in ("tcp", "tcp6") if Path(f"/proc/net/{name}").exists()
                 for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:] if line.split()[1].endswith(":" + port) and line.split()[3] == "0A"]
    assert listening == ["0100007F"]


def test_a_chapter_runs_in_the_browser(opened):
    from playwright.sync_api import sync_playwright
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None: pytest.fail("no Chromium on this machine, and the lab is tested in it: apt-get install chromium")
    base, path, token = opened
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        away = []
        page.on("request", lambda r: away.append(r.url) if not r.url.startswith((base, base.replace("http", "ws"), "data:", "blob:")) else None)
        page.goto(f"{base}{path}?token={token}")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=90_000)
        page.wait_for_selector(".jp-TableOfContents :text('How many seeds are enough?')", timeout=30_000) # beside the chapter
        page.wait_for_selector(":text('Python 3 (ipykernel) | Idle')", timeout=60_000) # the kernel is ready
        assert page.locator(".jp-Dialog").count() == 0 # and nobody asks anything
        page.click(".jp-TableOfContents :text('How many seeds are enough?')")
        still = page.locator(".ptbook-explore").first # the book's own picture moves before a cell was run
        still.wait_for(state="visible", timeout=20_000)
        shown = still.locator("[data-stage] img").last
        first = shown.get_attribute("src")
        still.locator("input[type=range]").first.fill("4")
        assert shown.get_attribute("src") not in (first, None)
        page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        page.wait_for_selector(".noUi-handle", timeout=180_000)
        page.wait_for_function("[...document.querySelectorAll('.jp-InputPrompt')].every(p => !p.textContent.includes('*'))", timeout=180_000)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .jp-mod-error").filter(has_text="Traceback").count() == 0
        handle, picture = page.locator(".noUi-handle").first, page.locator("img.widget-image, .widget-image img").first
        handle.scroll_into_view_if_needed()
        before, box = picture.get_attribute("src"), handle.bounding_box()
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, y), page.mouse.down(), page.mouse.move(box["x"] + 120, y, steps=6), page.mouse.up()
        page.wait_for_function("before => document.querySelector('img.widget-image, .widget-image img').src != before", arg=before, timeout=10_000)
        browser.close()
    assert not away


def test_it_works_from_a_wheel(tmp_path):
    "Without the repository: the notebooks travel in the wheel, the copies go to the current folder."
    tree, installed, here = tmp_path/"tree", tmp_path/"installed", tmp_path/"here"
    here.mkdir()
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "work", "_docs", "_proc", "build", ".*", "__pycache__", "tests"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(tree)], check=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("ptbook-*.whl"))) as wheel: wheel.extractall(installed)
    with running("merge/soups", "--port", "9390", home=tmp_path, cwd=here, PYTHONPATH=str(installed)) as (base, page, token):
        assert page.endswith("/tree/05_merge/soups.ipynb")
        shown = json.load(urllib.request.urlopen(f"{base}/api/contents/05_merge/soups.ipynb?token={token}", timeout=20))
    assert shown["content"]["cells"] and (here/"work/05_merge/soups.ipynb").read_bytes() == (ROOT/"nbs/05_merge/soups.ipynb").read_bytes()
    assert sorted(p.name for p in here.iterdir()) == ["work"]
