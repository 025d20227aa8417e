"The site, built once and read twice: as files, and in a browser, where every page is opened."
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ptbook.press import site, site_plan
from ptbook.press.site_check import WEIGHT, check
from ptbook.press.site_plan import address, entries, read_plan

ROOT = Path(__file__).parent.parent
PLAN = read_plan()
PREFIX = "/" + PLAN.url.split("/", 3)[3]
READING = [entry.source for entry, _ in PLAN.reading() if entry.source.endswith(".md") or (ROOT/entry.source).is_file()]
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --no-first-run --disable-quic".split()
SIZES = {"phone": {"width": 390, "height": 800}, "desktop": {"width": 1400, "height": 900}}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "The whole site, made by the book's own renderer."
    out = tmp_path_factory.mktemp("site")/"docs"
    with pytest.MonkeyPatch.context() as patch:
        which = shutil.which
        patch.setattr(shutil, "which", lambda name, *a, **k: None if name == "quarto" else which(name, *a, **k))
        return site.build(out)


@pytest.fixture(scope="module")
def base(built):
    "The address of the site on this machine."
    with site.server(built, PLAN) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None: pytest.fail("no Chromium on this machine, and the site is tested in it: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()


def pages(built: Path) -> list[str]:
    return sorted(p.relative_to(built).as_posix() for p in built.rglob("*.html") if p.relative_to(built).as_posix() != "index.html")


# As files

def test_nothing_is_wrong_with_the_pages(built):
    wrong = check(built, PREFIX)
    assert not wrong, "\n".join(wrong)


def test_pages_are_where_the_plan_says(built):
    sources = {entry.source for entry, _ in PLAN.reading()}
    lacking = sorted(s for s in sources if s.endswith(".ipynb") and not (ROOT/s).is_file())
    assert not lacking, f"_quarto.yml lists notebooks that are not there: {lacking}"
    assert set(pages(built)) == {address(s) for s in sources} | {"404.html"}
    assert all(PLAN.wants(s) for s in sources), "in the sidebar, but not in project: render:"


def test_the_sidebar_is_the_plans(built):
    html = (built/"nbs/05_merge/soups.html").read_text()
    menu = html[html.index('<nav class="menu"'):html.index("</nav>")]
    linked = [(built/"nbs/05_merge"/href).resolve().relative_to(built.resolve()).as_posix() for href in re.findall(r'href="([^"]+)"', menu)]
    assert linked == [address(source) for source in READING] and menu.count('aria-current="page"') == 1


def test_a_chapter_leads_on_and_back(built):
    html, at = (built/"nbs/05_merge/soups.html").read_text(), READING.index("nbs/05_merge/soups.ipynb")
    for rel, source in (("prev", READING[at - 1]), ("next", READING[at + 1])):
        href = re.search(rf'<a rel="{rel}" href="([^"]+)"', html)[1]
        assert (built/"nbs/05_merge"/href).resolve() == (built/address(source)).resolve()
    assert "https://colab.research.google.com/github/ptbook/ptbook/blob/main/nbs/05_merge/soups.ipynb" in html
    assert "https://github.com/ptbook/ptbook/raw/main/nbs/05_merge/soups.ipynb" in html


def test_the_reference_names_types_comments_and_source(built):
    html = (built/"nbs/05_merge/soups.html").read_text()
    entry = re.search(r'<details class="api" id="ptbook\.merge\.soups\.greedy_soup">.*?</details>', html, re.DOTALL)[0]
    line = int(re.search(r"ptbook/merge/soups\.py#L(\d+)", entry)[1])
    assert (ROOT/"ptbook/merge/soups.py").read_text().splitlines()[line - 1].startswith("def greedy_soup(")
    assert "what it is" in entry and "Callable" in entry


def test_machines_find_every_page(built):
    places = {e.text for e in ElementTree.parse(built/"sitemap.xml").iter("{http://www.sitemaps.org/schemas/sitemap/0.9}loc")}
    assert places == {PLAN.url + page for page in pages(built) if page != "404.html"}
    assert set(re.findall(r"\]\(([^)]+)\)", (built/"llms.txt").read_text())) == places


def test_the_site_is_light(built):
    weights = {page: (built/page).stat().st_size for page in pages(built)}
    assert max(weights.values()) <= WEIGHT
    assert sum(p.stat().st_size for p in (built/"assets").iterdir()) < 60_000


def test_quartos_keys_are_known():
    "Each key of _quarto.yml stands in Quarto's reference of websites, projects and HTML."
    known = {"project": {"type", "output-dir", "render", "resources"}, "execute": {"enabled"}, "format": {"html"},
             "website": {"title", "description", "site-url", "repo-url", "page-navigation", "search", "sidebar"}}
    assert {key: set(value) <= known.get(key, set()) for key, value in PLAN.config.items()} == dict.fromkeys(PLAN.config, True)
    assert set(PLAN.site["sidebar"]) <= {"style", "contents"} and PLAN.config["project"]["type"] == "website"
    assert set(PLAN.config["format"]["html"]) <= {"theme", "toc", "code-copy", "code-fold", "html-math-method", "css"}
    css = PLAN.config["format"]["html"]["css"]
    assert (ROOT/css).is_file()


def test_quarto_gets_the_same_pages(tmp_path, monkeypatch):
    "A program called quarto stands on the path, and notes what it is given."
    fake = tmp_path/"bin/quarto"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\nimport pathlib, sys\nfolder = pathlib.Path(sys.argv[2])\n(folder/'_docs').mkdir()\n(folder/'_docs/seen.txt').write_text('\\n'.join(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()))\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    seen = set((site.build(tmp_path/"out")/"seen.txt").read_text().splitlines())
    assert set(READING) | {"404.md", "_quarto.yml", "llms.txt", "nbs/assets/content.css"} <= seen
    given = json.loads((ROOT/"_proc/quarto/nbs/05_merge/soups.ipynb").read_text())
    assert given["cells"][0]["source"].startswith("---\ntitle:") and "#| export" not in json.dumps(given)


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    (tmp_path/"mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no site"): site.build(tmp_path)
    assert (tmp_path/"mine.txt").read_text() == "mine"


def test_an_installed_copy_says_that_it_has_no_plan(tmp_path):
    with pytest.raises(RuntimeError, match="checkout"): site_plan.read_plan(tmp_path)
    with pytest.raises(ValueError, match="wanted a path"): entries([["a"]])


# In a browser

def watched(browser, size: str, theme: str):
    "A page of a new window, and a list of what goes wrong in it."
    window = browser.new_context(viewport=SIZES[size], color_scheme=theme)
    page, wrong = window.new_page(), []
    page.on("console", lambda said: wrong.append(f"{page.url}: {said.text}") if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("request", lambda asked: None if re.match(r"(http://127\.0\.0\.1:|data:|blob:|file:)", asked.url) else wrong.append(f"{page.url} asked for {asked.url}"))
    return page, wrong


@pytest.mark.parametrize("size", SIZES)
def test_every_page_opens(built, base, browser, size):
    page, wrong = watched(browser, size, "light")
    for path in pages(built):
        page.goto(base + path, wait_until="load")
        for theme, paper in (("light", "rgb(253, 253, 252)"), ("dark", "rgb(21, 24, 28)")):
            page.emulate_media(color_scheme=theme)
            seen, wide = page.evaluate("[getComputedStyle(document.body).backgroundColor, document.documentElement.scrollWidth - innerWidth]")
            if seen != paper: wrong.append(f"{path} has {seen} for paper in {theme}")
            if wide > 0: wrong.append(f"{path} is {wide} pixels wider than the window")
    page.context.close()
    assert not wrong, "\n".join(wrong)


def test_every_page_works_from_disk(built, browser):
    page, wrong = watched(browser, "desktop", "light")
    for path in ("nbs/index.html", "ledger.html", "nbs/05_merge/soups.html"):
        page.goto((built/path).as_uri())
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"
        assert page.evaluate("[...document.images].filter(i => i.loading !== 'lazy' && i.complete && !i.naturalWidth).length") == 0
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    assert paint is None or paint < 1000
    page.keyboard.press("/")
    assert "needs a server" in page.locator("dialog .said").inner_text()
    page.context.close()
    assert not wrong, wrong


def test_an_address_that_leads_nowhere_says_so(base, browser):
    page, _ = watched(browser, "desktop", "light")
    assert page.goto(base + "nbs/05_merge/soup.html").status == 404
    page.get_by_role("link", name="the opening page").click()
    assert page.url == base + "nbs/index.html"
    page.context.close()


def test_search_leads_to_the_chapter(base, browser):
    page, wrong = watched(browser, "desktop", "light")
    page.goto(base + "nbs/index.html")
    page.keyboard.press("/")
    page.locator("dialog input").fill("greedy soup")
    page.wait_for_selector("dialog li a")
    assert "soups" in page.locator("dialog li a").first.get_attribute("href")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/nbs/05_merge/soups.html*")
    assert page.locator("h1").inner_text() == "Model soups"
    page.context.close()
    assert not wrong, wrong


def test_the_ledger_sifts_and_sorts(base, browser):
    page, wrong = watched(browser, "desktop", "light")
    page.goto(base + "ledger.html")
    rows = page.locator("table.ledger tbody tr:visible")
    assert rows.count() == 99
    page.get_by_label("find").fill("model soups")
    assert rows.count() == 1 and page.locator("output").inner_text() == "1 paper"
    page.get_by_label("find").fill("")
    page.get_by_label("verdict").select_option("supported")
    assert 0 < rows.count() < 99 and set(page.locator("tr:visible .verdict").all_inner_texts()) == {"supported"}
    page.get_by_role("button", name="effect").click()
    effects = [float(by) for by in page.eval_on_selector_all("tr[data-verdict=supported] td:nth-child(5)", "cells => cells.map(c => c.dataset.by)")]
    assert effects == sorted(effects)
    page.get_by_role("button", name="effect").click()
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.get_by_label("verdict").select_option("")
    page.get_by_role("button", name="no.").click()
    assert page.locator("tbody tr td:first-child").all_inner_texts() == [str(n) for n in range(1, 100)]
    page.context.close()
    assert not wrong, wrong


def test_a_widget_lives_without_a_kernel(base, browser):
    page, wrong = watched(browser, "desktop", "light")
    page.goto(base + "nbs/05_merge/soups.html")
    widget = page.locator(".ptbook-explore").first
    widget.scroll_into_view_if_needed()
    before = widget.screenshot()
    control = widget.locator("[data-n]").first
    control.press({"range": "ArrowRight", "checkbox": "Space"}.get(control.get_attribute("type"), "ArrowDown"))
    page.wait_for_timeout(200)
    assert widget.screenshot() != before
    page.context.close()
    assert not wrong, wrong


def test_a_reader_can_choose_the_theme(base, browser):
    page, _ = watched(browser, "phone", "light")
    page.goto(base + "nbs/index.html")
    page.get_by_role("button", name="Dark or light").click()
    page.goto(base + "ledger.html")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    page.get_by_role("button", name="Menu").click()
    page.get_by_role("link", name="Bibliography").click()
    assert page.locator("h1").inner_text() == "Bibliography"
    page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(base, browser, theme):
    from axe_playwright_python.sync_playwright import Axe
    found = []
    for path in ("nbs/index.html", "nbs/01_tour.html", "nbs/05_merge/soups.html", "nbs/05_merge/index.html", "ledger.html", "nbs/14_speed.html"):
        page, _ = watched(browser, "desktop", theme)
        page.goto(base + path)
        page.evaluate("for (const box of document.querySelectorAll('details')) box.open = true")
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"): found.append(f"{path}: {violation['id']}: {[node['html'][:160] for node in violation['nodes'][:3]]} {violation['nodes'][0]['failureSummary'][:300]}")
        page.context.close()
    assert not found, "\n".join(found)


def test_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-c", "from ptbook.press.cli import main; main()", "site", "--out", str(ROOT/"nbs")], capture_output=True, text=True)
    assert done.returncode == 2 and "holds no site" in done.stderr and not done.stdout


def test_a_figure_with_twice_the_dots_takes_the_same_place(tmp_path):
    import matplotlib.pyplot as plt
    from ptbook.press.site_render import size_of
    fig = plt.figure(figsize=(7.2, 4.2))
    for dots in (100, 200):
        fig.savefig(tmp_path/"a.png", dpi=dots)
        assert size_of((tmp_path/"a.png").read_bytes()) == ' width="720" height="420"'
