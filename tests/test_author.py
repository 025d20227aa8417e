"A new chapter: that it has the form, exports, runs, and stands on the site; and that any chapter runs in Colab."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptbook.press import author, ledger

ROOT = Path(__file__).parent.parent
BRIEF = """# SPDF
2023. arXiv 2303.10464.

## Claim
- Sparse pre-training costs nothing after dense fine-tuning.

## Method
Mask, train, unmask.

## Pitfalls
Optimiser states of masked weights.
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A checkout of the book, to write in."
    book = tmp_path_factory.mktemp("checkout")/"book"
    shutil.copytree(ROOT, book, ignore=shutil.ignore_patterns(".git", ".venv", "work", "_docs", "_proc", "build", ".*", "__pycache__"))
    return book


def run(book: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    "A program in the copy, with the copy's library."
    settings = os.environ | {"PYTHONPATH": str(book), "PTBOOK_SCALE": "tiny", "PTBOOK_STATIC": "1"} | env
    return subprocess.run(command, cwd=book, env=settings, capture_output=True, text=True, timeout=600)


def ptbook(book: Path, *args: str) -> subprocess.CompletedProcess:
    return run(book, sys.executable, "-c", "from ptbook.press.cli import main; main()", *args)


@pytest.fixture(scope="module")
def made(copy, tmp_path_factory) -> Path:
    "A chapter in a part that had none."
    brief = tmp_path_factory.mktemp("brief")/"spdf.md"
    brief.write_text(BRIEF)
    done = ptbook(copy, "new", "spdf", "--brief", str(brief), "--claim", "the paper's arm >= dense", "--claim", "sparse > dense", "--metric", "bits per byte")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path == copy/f"nbs/{ledger.paper_of('spdf').chapter}.ipynb"
    return path


def test_it_passes_the_checks_of_the_book(copy, made):
    cells = json.loads(made.read_text(encoding="utf-8"))["cells"]
    assert author.faults(cells, ["spdf"]) == [] and len(author.unwritten(cells)) > 8
    done = run(copy, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_book.py")
    assert done.returncode == 0, done.stdout[-3000:]
    tried = run(copy, str(Path(sys.executable).with_name("nbdev_test")), "--path", str(made))
    assert tried.returncode == 0, tried.stdout[-3000:] + tried.stderr[-3000:]


def test_the_brief_stands_where_it_is_needed(made):
    parts = author.sections(json.loads(made.read_text(encoding="utf-8"))["cells"])
    def said(name): return "\n".join("".join(cell["source"]) for cell in parts[name])
    assert "arxiv.org/abs/2303.10464" in said("") and "costs nothing" in said("")
    assert "Mask, train, unmask." in said("Build it") and "masked weights" in said("What did not carry over")


def test_its_claims_are_the_ones_that_were_given(copy, made):
    code = "from ptbook.press.ledger import find; e = find('spdf'); print(e.metric, [(c.text, c.primary) for c in e.claims])"
    assert run(copy, sys.executable, "-c", code).stdout.strip() == """bits per byte [("the paper's arm ≥ dense", True), ('sparse > dense', False)]"""


def test_it_has_no_result_and_says_so(copy, made):
    done = ptbook(copy, "run", "spdf", "--scale", "tiny", "--jobs", "1")
    assert done.returncode == 1 and "spdf: its arms are not measured yet" in done.stderr and not list((copy/"results").glob("spdf*"))
    rows = json.loads(ptbook(copy, "ledger", "--json").stdout)
    assert next(r for r in rows if r["slug"] == "spdf")["verdict"] == "not yet"


def test_it_is_on_the_site(copy, made):
    code = ("from ptbook.press.ledger import cells; from ptbook.press.site_plan import read_plan; from ptbook.press.site_prepare import prepared; p = read_plan(); "
            "s = next(s for s in p.notebooks() if any('spdf' in ''.join(c['source']) for c in cells(p.folder/s))); print(s, p.wants(s), len(prepared(p, s)['cells']) > 10)")
    assert run(copy, sys.executable, "-c", code).stdout.split() == [made.relative_to(copy).as_posix(), "True", "True"]


def test_a_chapter_is_never_overwritten(copy, made):
    before = made.read_bytes(), (copy/"_quarto.yml").read_bytes()
    for slug, words in (("spdf", "there already"), ("model_soups", "there already"), ("spfd", "did you mean 'spdf'"), ("t3", "wanted two arms")):
        done = ptbook(copy, "new", slug, *(["--claim", "better"] if slug == "t3" else []))
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert (made.read_bytes(), (copy/"_quarto.yml").read_bytes()) == before and not list(copy.rglob("touch.ipynb"))


@pytest.mark.parametrize("slug", [p.slug for p in ledger.papers()])
def test_every_paper_can_have_one(slug):
    paper = ledger.paper_of(slug)
    about = [p for p in ledger.papers() if p.chapter == paper.chapter]
    cells = author.skeleton(about, author.read_settings())["cells"]
    assert author.faults(cells, [p.slug for p in about]) == []
    for cell in cells:
        if cell["cell_type"] == "code" and "%pip" not in cell["source"]: compile(cell["source"], slug, "exec")
    site = author.listed((ROOT/"_quarto.yml").read_text(encoding="utf-8"), paper.chapter)
    assert site.count(f"- nbs/{paper.chapter}.ipynb\n") == 1


def test_nothing_in_the_book_is_unwritten():
    left = {address: author.unwritten(json.loads(path.read_text(encoding="utf-8"))["cells"]) for address, path in ledger.notebooks().items() if address != "13_press/author"}
    assert not any(left.values()), {a: l for a, l in left.items() if l}


@pytest.mark.parametrize("address", ledger.notebooks())
def test_a_chapter_about_a_paper_has_the_form(address):
    slugs = [p.slug for p in (*ledger.papers(), *ledger.COMPANIONS) if p.chapter == address]
    if slugs: assert author.faults(json.loads(ledger.notebooks()[address].read_text(encoding="utf-8"))["cells"], slugs) == []


@pytest.mark.parametrize("address", ledger.notebooks())
def test_a_chapter_begins_with_the_hidden_cell_for_colab(address):
    first = next(c for c in json.loads(ledger.notebooks()[address].read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code")
    assert {**first, "source": "".join(first["source"])} == author.colab_cell(author.read_settings())


def test_in_colab_the_hidden_cell_installs_the_book_and_elsewhere_nothing(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell
    from packaging.requirements import Requirement
    settings, asked = author.read_settings(), []
    shell = InteractiveShell()
    shell.register_magic_function(lambda line: asked.append(line), "line", "pip")
    source = author.colab_cell(settings)["source"]
    shell.run_cell(source).raise_error()
    assert not asked
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    shell.run_cell(source).raise_error()
    command = re.fullmatch(r'install --quiet "(.*)"', asked[0])
    wanted = Requirement(command[1])
    assert wanted.name == settings["lib_name"] and wanted.url == "git+" + settings["git_url"]
    assert all(f"{extra}_requirements" in settings for extra in wanted.extras)
