"What the notebook of `show` cannot show: bad input, HTML rules, many widgets on one page, a kernel that is not there."
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from ptbook.basics import show
from ptbook.basics.show import colour, curves, explore, figure, kind_of, live, looks, seeds_plot, spread, to_html, to_widget


def line(slope, dashed=False):
    "A line and its slope"
    fig, ax = figure("A line", "x", "y", size=(3, 2))
    ax.plot([0, 1], [0, slope], linestyle="--" if dashed else "-")
    ax.set_ylim(-5, 5)
    return fig


class Balanced(HTMLParser):
    void = {"img", "input", "br"}

    def __init__(self):
        super().__init__()
        self.stack, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.void: self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def parse(page):
    parser = Balanced()
    parser.feed(page)
    assert not parser.stack
    return parser


def test_html_is_self_contained_balanced_and_labelled():
    page = to_html(explore(line, slope=[1, 2, 3], dashed=[False, True]))
    parser = parse(page)
    assert parser.seen[0] == "div" and {"input", "img", "label", "script"} <= set(parser.seen)
    assert not re.search(r"https?:|//cdn|src=\"(?!data:)", page)
    images = [attrs for tag, attrs in parser.attributes if tag == "img"]
    assert images[0]["alt"] == "A line and its slope" and images[1]["aria-hidden"] == "true"
    kinds = [attrs["type"] for tag, attrs in parser.attributes if tag == "input"]
    assert kinds == ["range", "checkbox"]


def test_two_widgets_on_one_page_have_different_ids():
    widget = explore(line, slope=[1, 2])
    ids = [re.search(r'id="([^"]+)"', to_html(widget))[1] for _ in range(2)]
    assert len(set(ids)) == 2
    assert all(f"[id=\"{i}\"]" not in ids for i in ids)


@pytest.mark.parametrize("values, kind", [([1, 2], "slider"), ([2, 1], "menu"), (["a"], "menu"), ([True, False], "checkbox"),
                                          (range(3), "slider"), (np.array([.1, .2]), "slider"), ([None, 1], "menu")])
def test_kind_of(values, kind):
    assert kind_of("x", values) == kind


@pytest.mark.parametrize("values", [[], "abc", [1, 1], [0.1, 0.1]])
def test_bad_choices_are_named(values):
    with pytest.raises(ValueError, match="slope"): explore(line, slope=values)


def test_bad_functions_and_sizes():
    with pytest.raises(ValueError, match="choices"): explore(line)
    with pytest.raises(TypeError, match="Axes"): explore(lambda a: plt.subplots()[1], a=[1])
    with pytest.raises(ValueError, match="sizes"): explore(lambda w: figure("x", size=(w, 2))[0], w=[2, 3])
    with pytest.raises(ValueError, match="sizes"): explore(lambda w: "text" if w == 1 else figure("x")[0], w=[1, 2])
    with pytest.raises(ValueError, match=r"1000 frames \(1000 a\).*400 KB"): explore(line, a=range(1000))
    with pytest.raises(ValueError, match=r"KB with 3 frames.*Give fewer"): explore(lambda a: "x" * 200_000 + str(a), a=[1, 2, 3])
    plt.close("all")


def test_hostile_text_stays_text():
    widget = explore(lambda name: f"<p>{name}</p></script><script>", alt='"><b>', name=["<i>", 'a"b', "</script>"])
    page = to_html(widget)
    assert page.count("</script>") == 2 # ours, and the first frame as `f` gave it, before our script
    assert '"><b>' not in page and "<option value=\"0\">&lt;i&gt;</option>" in page


def test_frames_are_looked_up_by_value_and_equal_frames_kept_once():
    widget = explore(lambda a, b: f"<p>{min(a, 2)}{b}</p>", a=[1, 2, 3], b=["x", "y"])
    assert len(widget.places) == 6 and len(widget.frames) == 4
    assert widget.frames[widget.frame(3, "y")] == "<p>2y</p>"
    with pytest.raises(ValueError): widget.frame(9, "x")


def test_widget_moves_to_the_frame_of_its_controls():
    widget = explore(lambda a, b, c: f"{a}{b}{c}", a=[1, 2, 3], b=["x", "y"], c=[True, False])
    box = to_widget(widget)
    box.children[0].value, box.children[1].value, box.children[2].value = 3, "y", False
    assert box.children[-1].value == "3yFalse"


def test_static_in_plain_python_and_by_environment(monkeypatch):
    assert not live()
    monkeypatch.setenv("PTBOOK_STATIC", "1")
    assert not live()
    assert set(explore(line, slope=[1])._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_live_bundle_has_both_forms(monkeypatch):
    monkeypatch.setattr(show, "live", lambda: True)
    bundle = explore(line, slope=[1, 2])._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(bundle)


def test_transparent_figures_get_paper():
    show.use_style("none")
    try: picture = show.pixels(line(1))
    finally: show.use_style()
    assert (picture[0, 0] == 255).all()
    assert not plt.get_fignums()


def test_colours_do_not_depend_on_the_process():
    code = "from ptbook.basics.show import colour; print(colour('an arm of a later chapter'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}).stdout
    assert out.strip() == colour("an arm of a later chapter")


def test_many_equal_hues_are_drawn_apart():
    drawn = looks(["uniform", "unigram", "bz2"])
    assert len({look["color"] for look in drawn.values()}) == 3


@pytest.mark.parametrize("arms", [{}, {"a": []}, {"a": [1], "b": [1, 2]}])
def test_seeds_plot_refuses(arms):
    with pytest.raises(ValueError, match="arms"): seeds_plot(arms)


def test_seeds_plot_one_arm_one_seed():
    assert len(seeds_plot({"a": [1.0]}).collections) == 1
    plt.close("all")


@pytest.mark.parametrize("lines", [{}, {"a": ([], [])}, {"a": ([1, 2], [1])}, {"a": ([1, 2], [[1], [2]])}])
def test_curves_refuses(lines):
    with pytest.raises(ValueError): curves(lines)
    plt.close("all")


def test_curves_with_all_equal_ends_and_one_point():
    ax = curves({name: ([1], [2.0]) for name in "abc"})
    ax.figure.canvas.draw()
    heights = sorted(t.get_window_extent().y0 for t in ax.texts)
    assert np.diff(heights).min() > 12
    plt.close("all")


def test_spread_keeps_order_of_ties():
    assert np.allclose(spread([0, 0, 0], 1), [-1, 0, 1])
