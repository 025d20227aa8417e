"What must hold for the book as a whole: library and notebooks in step, nothing stale, nothing unsafe."
import ast
import csv
import filecmp
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
MODULES = sorted(p for p in (ROOT/"ptbook").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py") and "_book" not in p.parts)

# The rooms, and those that each may import from besides itself.
ROOMS = {
    "basics": set(), "objectives": {"basics"}, "architectures": {"basics"}, "distill": {"basics"}, "adapt": {"basics"}, "merge": {"basics"},
    "curate": {"basics"}, "continual": {"basics", "adapt", "merge"}, "search": {"basics"}, "multimodal": {"basics", "objectives"},
    "transfer": {"basics"}, "text2text": {"basics", "objectives"}, "embodied": {"basics"}, "press": {"basics", "distill", "adapt", "merge", "curate"}} # the tour and the benchmarks show what the parts do


def short(path: Path) -> str: return path.relative_to(ROOT).as_posix()
def cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]


@cache
def tree(path: Path) -> ast.Module: return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.fixture(scope="session")
def copied(tmp_path_factory) -> Path:
    "The notebooks and settings, without the library."
    copy = tmp_path_factory.mktemp("book")
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        if (ROOT/name).exists(): shutil.copy2(ROOT/name, copy/name)
    shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns(".*"))
    return copy


def nbdev(program: str, folder: Path) -> None:
    done = subprocess.run([str(Path(sys.executable).with_name(program))], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr


def test_there_is_a_book(): assert NOTEBOOKS and MODULES


def test_the_library_is_what_the_notebooks_export(copied):
    nbdev("nbdev_export", copied)
    made = {p.relative_to(copied) for p in (copied/"ptbook").rglob("*.py")}
    held = {p.relative_to(ROOT) for p in (ROOT/"ptbook").rglob("*.py") if "_book" not in p.parts}
    assert made == held, f"only exported: {sorted(map(str, made - held))}; only in ptbook/: {sorted(map(str, held - made))}"
    differ = [str(p) for p in sorted(made) if p.name != "_modidx.py" and not filecmp.cmp(copied/p, ROOT/p, shallow=False)]
    assert not differ, f"not what the notebooks export (nbdev_export): {differ}"
    index = Path("ptbook/_modidx.py")
    assert ast.dump(ast.parse((copied/index).read_text())) == ast.dump(ast.parse((ROOT/index).read_text())), "ptbook/_modidx.py is out of date (nbdev_export)"


def test_the_notebooks_are_clean(copied):
    nbdev("nbdev_clean", copied)
    dirty = [short(p) for p in NOTEBOOKS if (copied/p.relative_to(ROOT)).read_bytes() != p.read_bytes()]
    assert not dirty, f"not clean (nbdev_clean): {dirty}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_a_notebook_shows_no_error(path):
    failed = [i for i, cell in enumerate(cells(path)) for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert not failed, f"cells {failed} hold an error"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_a_notebook_opens_with_its_title_and_one_sentence(path):
    opening = "".join(cells(path)[0]["source"])
    assert re.match(r"# \S.*\n\n> \S", opening), opening[:100]


def test_the_readme_is_the_opening_page():
    from ptbook.press.refresh import readme
    text, images = readme()
    assert (ROOT/"README.md").read_text(encoding="utf-8") == text, "README.md is out of step with nbs/index.ipynb (ptbook refresh index)"
    for path, picture in images.items(): assert (ROOT/path).read_bytes() == picture, f"{path} is out of step with nbs/index.ipynb"


def test_the_readme_leads_somewhere():
    links = re.findall(r"""\]\(([^)\s#]+)|(?:src|href)=["']([^"'#]+)""", (ROOT/"README.md").read_text(encoding="utf-8"))
    lost = [link for link in map("".join, links) if not re.match(r"[a-z]+:", link) and not (ROOT/link).exists()]
    assert not lost, f"README.md links to what is not there: {lost}"


def test_no_result_is_stale():
    from ptbook.basics.results import stale
    old = [name for name in stale(ROOT/"results") if ".tiny." not in name] # tiny results are not kept in the repository
    assert not old, f"measured with code that has changed since (ptbook refresh the chapter): {old}"


def imports(path: Path) -> set[str]:
    "Every module a file imports, at its top or inside a function; relative ones in full."
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) + 1 - node.level], *filter(None, [node.module])]) if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_a_room_imports_only_what_it_may(path):
    room = path.relative_to(ROOT/"ptbook").parts[0]
    assert room in ROOMS, f"{room} is not a room of the book"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("ptbook.")} & set(ROOMS)
    assert used <= ROOMS[room] | {room}, f"{room} may import from {sorted(ROOMS[room])} only"


# What runs what a file says. `cloudpickle.dumps` and joblib send the book's own functions to its own workers, and read nothing from a file of somebody else.
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "shelve", "marshal", "jsonpickle"}
DANGEROUS = {"joblib.load", "pandas.read_pickle", "cloudpickle.load", "cloudpickle.loads", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
             "os.system", "os.popen", "shutil.unpack_archive", "tarfile.open", "tarfile.TarFile", "zipfile.ZipFile", "runpy.run_path", "importlib.machinery.SourceFileLoader", "builtins.eval", "builtins.exec"}


@cache
def names(path: Path) -> dict[str, str]:
    "What a file's names stand for: `pd` for pandas, `load_file` for safetensors.torch.load_file, `slots` for ptbook.merge.folders.slots."
    package, known = path.relative_to(ROOT).parts[:-1], {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import): known |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) + 1 - node.level], *filter(None, [node.module])]) if node.level else node.module
            known |= {a.asname or a.name: f"{base}.{a.name}" for a in node.names}
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return known | {node.name: f"{module}.{node.name}" for node in tree(path).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def full_name(node: ast.AST, path: Path) -> str: # "torch.load" for `torch.load`, or for `load` after `from torch import load as load`
    first, dot, rest = ast.unparse(node).partition(".")
    return names(path).get(first, first) + dot + rest


def is_dangerous(name: str, given: dict[str, str]) -> bool:
    "Whether a call of this name with these arguments may run what a file says."
    if name == "torch.load" or name.endswith(".torch.load"): return given.get("weights_only") != "True"
    if given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False" or given.get("shell", "False") != "False": return True
    return name in DANGEROUS or name.split(".")[0] in UNPICKLERS or name.endswith((".extractall", ".read_pickle"))


def dangers(path: Path) -> dict[str, list[str]]: # function of the module, or "" -> what it does that is dangerous
    found = {}
    def walk(node, owner):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                given = {k.arg: ast.unparse(k.value) for k in child.keywords}
                if is_dangerous(full_name(child.func, path), given): found.setdefault(owner, []).append(f"line {child.lineno}: {ast.unparse(child)[:80]}")
            elif isinstance(child, (ast.Name, ast.Attribute)) and is_dangerous(full_name(child, path), {"weights_only": "True"}): found.setdefault(owner, []).append(f"line {child.lineno}: {ast.unparse(child)}") # handed on instead of called
            walk(child, child.name if not owner and isinstance(child, (ast.FunctionDef, ast.ClassDef)) else owner)
    walk(tree(path), "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_nothing_unpickles_and_no_remote_code_is_trusted(path):
    used = {name.split(".")[0] for name in imports(path)} & UNPICKLERS
    assert not used, f"imports {used}"
    assert not dangers(path)


def calls() -> dict[str, set[str]]: # ptbook.room.module.function -> what it names of ptbook
    "Who may call whom in the library; a function that is handed on counts as called."
    graph = {}
    for path in MODULES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in tree(path).body:
            owner = f"{module}.{node.name}" if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else module
            used = {full_name(n, path) for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))}
            graph.setdefault(owner, set()).update(name for name in used if name.startswith("ptbook."))
    return graph


def test_no_function_of_the_book_reaches_what_runs_a_file():
    graph = calls()
    assert "ptbook.basics.doors.shapes" in graph["ptbook.basics.doors.model_shapes"] and "ptbook.basics.weights.with_tokenizer" in graph["ptbook.curate.report.language_model"], "the graph sees calls within a module and between modules"
    bad = {f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}.{owner}".rstrip(".") for path in MODULES for owner in dangers(path)}
    reaching = set(bad)
    while more := {caller for caller, used in graph.items() if used & reaching} - reaching: reaching |= more
    assert not reaching


@pytest.mark.parametrize("line", ["import torch; torch.load(f)", "from torch import load as get; get(f, weights_only=False)", "import numpy as np; np.load(f, allow_pickle=True)", "from pandas import read_pickle; read_pickle(f)", "map(eval, lines)", "import yaml; yaml.load(f, Loader=yaml.Loader)",
                                  "import subprocess; subprocess.run(f, shell=True)", "AutoModel.from_pretrained(f, trust_remote_code=trust)", "import zipfile; zipfile.ZipFile(f).extractall()", "import joblib as j; j.load(f)"])
def test_the_search_finds(line, tmp_path, monkeypatch):
    (tmp_path/"ptbook").mkdir()
    (tmp_path/"ptbook/m.py").write_text(f"def reader(f):\n    {line}\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert dangers(tmp_path/"ptbook/m.py").keys() == {"reader"}


def public(path: Path) -> list[ast.AST]:
    "What `__all__` names and the file defines."
    exported = next((ast.literal_eval(n.value) for n in tree(path).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), [])
    return [n for n in tree(path).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and n.name in exported]


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_everything_public_says_what_it_does(path):
    silent = [node.name for node in public(path) if not ast.get_docstring(node)]
    assert not silent, f"no docstring: {silent}"


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_public_functions_say_their_types(path):
    def untyped(f): return [a.arg for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs] if a.annotation is None]
    bare = {n.name: untyped(n) for n in public(path) if isinstance(n, ast.FunctionDef) and untyped(n)}
    assert not bare, f"arguments without a type: {bare}"


def test_the_list_of_papers():
    with (ROOT/"papers.tsv").open(encoding="utf-8", newline="") as file:
        papers = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(papers) == 99 and len({p["slug"] for p in papers}) == 99
    assert [int(p["no"]) for p in papers] == list(range(1, 100))
    for paper in papers:
        assert re.fullmatch(r"[a-z0-9_]+", paper["slug"]) and paper["title"].strip(), paper
        room = re.fullmatch(r"\d\d_([a-z0-9]+)/[a-z0-9_]+", paper["chapter"])
        assert room and room[1] in ROOMS, paper


def test_importing_the_library_is_quick():
    timed = "import time; start = time.perf_counter(); import ptbook; print(time.perf_counter() - start)"
    seconds = [float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(seconds) < 0.3, seconds
