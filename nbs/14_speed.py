# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How fast is it?
#
# > Beside other libraries, beside itself at other sizes, and beside what the machine could do at the most.

# %%
import html, json, os, shutil, tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import HTML, Markdown
from safetensors.torch import save_file

from ptbook.basics.show import GREY, INK, PALETTE, figure, use_style
from ptbook.press.bench import bench_text, changed, kept_rows, stepper
from ptbook.press.bench_limits import Limits, Reached, Work, disk, grow, growth, measure_limits, next_token_loss, product, reach, reading, roofline, step_work, triad, turns, where_time_goes

use_style()
torch.set_num_threads(1)
tiny = os.environ.get("PTBOOK_SCALE") == "tiny"
scratch = Path(tempfile.mkdtemp())


# %% [markdown]
# There are three ways to say how fast a program is, and each hides something. *Twice as fast as another* hides that both may be slow. *Three seconds* hides what happens at ten times the size. *Half of what the machine can do* hides that nobody may need that half.
# Together they hide little. So here are all three, for everything in this book that takes time.
#
# ## Beside other libraries
#
# Each comparison was given a target before it was measured; both sides do the same work, which is checked, and take turns. How that is done, and why, is told in [the chapter on measuring](13_press/bench.ipynb); the comparisons themselves stand in the chapters on [adapters](13_press/bench_adapt.ipynb), [stored logits](13_press/bench_distill.ipynb), [merging](13_press/bench_merge.ipynb) and [choosing](13_press/bench_curate.ipynb).
# All of them take ten minutes. They were made by `ptbook bench all --save`, which keeps them in `results/speed`, and this page reads what is kept.

# %%
TITLES = {"basics": "Training and writing", "adapt": "Adapters", "distill": "Stored logits", "merge": "Merging files", "curate": "Choosing data", "gpu": "On a GPU"}
kept = kept_rows()
rows = [r | {"set": name} for name, record in kept.items() for r in record["rows"]]

def table(heads: list[str], lines: list[list[str]]) -> HTML:
    "A table; the first cell of a line is its head."
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in rest)}</tr>' for first, *rest in lines)
    return HTML(f'<div class="wide"><table class="speed"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

def line(r: dict) -> list[str]:
    met = "met" if r["ratio"] <= r["target"] else "<strong>missed</strong>"
    return [f'{html.escape(r["name"])}<br><small>beside {html.escape(r["peer"])}</small>', f'{r["ours"]:,.2f} {r["unit"]}', f'{r["theirs"]:,.2f} {r["unit"]}', f'{r["ratio"]:.2f}', f'{r["target"]:.2f}, {met}']

table(["what", "ours", "theirs", "ours / theirs", "target"], [line(r) for r in rows])

# %%
assert set(kept) <= set(TITLES) and len(rows) > 0
for r in rows: assert set(r) == {"name", "peer", "ours", "theirs", "ratio", "target", "unit", "set"} and abs(r["ratio"] - r["ours"] / r["theirs"]) < 1e-6 * r["ratio"], r["name"]

# %%
met = sum(r["ratio"] <= r["target"] for r in rows)
fig, ax = figure(f"{met} of {len(rows)} targets were met; left of the line this book's side is smaller", "ours / theirs (time or memory, logarithmic)", size=(9.6, 1.6 + 0.34 * (len(rows) + len(kept))))
y, ticks = 0, []
for number, (name, group) in enumerate(groupby(rows, key=lambda r: r["set"])):
    ax.text(0.011, y, TITLES[name], fontweight="bold", fontsize=11, va="center")
    for y, r in enumerate(group, y + 1):
        ax.hlines(y, min(r["ratio"], 1), max(r["ratio"], 1), color=GREY, linewidth=1)
        ax.plot(r["ratio"], y, "o", color=PALETTE[0] if r["ratio"] <= r["target"] else "white", markeredgecolor=PALETTE[0], markeredgewidth=2, markersize=8)
        ax.plot(r["target"], y, "|", color=PALETTE[1], markersize=15, markeredgewidth=3)
        ticks.append((y, r["name"]))
    y += 1
ax.axvline(1, color=INK, linewidth=1.2)
ax.plot([], [], "o", color=PALETTE[0], label="target met"), ax.plot([], [], "o", color="white", markeredgecolor=PALETTE[0], markeredgewidth=2, label="missed"), ax.plot([], [], "|", color=PALETTE[1], markersize=15, markeredgewidth=3, linestyle="", label="target")
ax.set(xscale="log", xlim=(0.01, 10), ylim=(y, -1.2))
ax.set_yticks([t for t, _ in ticks], [n for _, n in ticks], fontsize=10)
ax.grid(axis="y", visible=False)
ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08 if len(rows) > 9 else -0.2), ncols=3);

# %% [markdown]
# Filled marks met their target, hollow ones missed it. And the circumstances, without which no ratio means anything:

# %%
def circumstances(name: str, record: dict) -> list[str]:
    of, versions, old = record["machine"], ", ".join(f"{k} {v}" for k, v in record["versions"].items()), changed(record)
    memory = f", {of['memory'] / 1e9:.0f} GB" if of["memory"] else ""
    return [TITLES[name], record["date"], f"{of['processor']}, {of['cores']} cores{memory}, {of['system']}", f"{record['repetitions']} turns, {record['seconds']:.0f} s", f'<small>{html.escape(versions)}</small>', ", ".join(old) or "nothing"]

table(["set", "measured on", "machine", "how", "versions", "changed since"], [circumstances(*item) for item in kept.items()])

# %%
missing = [TITLES[name] for name in TITLES if name not in kept]
missed = [f'{r["name"]} ({r["ratio"]:.2f} for {r["target"]:.2f})' for r in rows if r["ratio"] > r["target"]]
Markdown("- Missed: " + ("; ".join(missed) or "nothing") + ".\n- Not measured on this machine: " + (", ".join(missing) or "nothing") + ".")


# %% [markdown]
# ## How cost grows
#
# Predict the exponent of each before you look: a training step as the model gets wider, a merge as there are more models or larger ones, a selection as there are more documents, a LoRA step as the rank rises, an experiment as there are more seeds.
#
# Each is timed at several sizes in turns, and a power law is fitted per repetition; the interval says how far the repetitions agree. Everything runs on one thread.

# %%
from ptbook.basics.models import Transformer, generate, style

repetitions = 2 if tiny else 5

def gpt2(hidden_size: int, layers: int, length: int, vocab_size: int = 260) -> Transformer:
    torch.manual_seed(0)
    return Transformer(style("gpt2", vocab_size=vocab_size, hidden_size=hidden_size, layers=layers, heads=max(2, hidden_size // 64), max_length=length))

def training(hidden_size: int, layers: int, batch: int, length: int) -> Work:
    model, ids = gpt2(hidden_size, layers, length), torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))
    def loss(): return next_token_loss(model, ids)
    return step_work(f"GPT-2 step, d={hidden_size} L={layers}", model, loss, stepper(model, loss), ids)

lines, widths = {}, (32, 64) if tiny else (64, 96, 128, 192, 256, 384)
parameters = [sum(p.numel() for p in gpt2(d, 4, 64).parameters()) for d in widths]
lines["training step", "parameters"] = parameters, grow(lambda d: training(d, 4, 8, 64).run, widths, repetitions)

# %%
from ptbook.merge.files import merge_files

def model_file(name: str, numbers: int) -> Path: # of bfloat16
    folder = scratch/name
    folder.mkdir()
    (folder/"config.json").write_text("{}")
    save_file({f"layer{i}": torch.randn(numbers // 4).bfloat16() for i in range(4)}, folder/"model.safetensors", metadata={"format": "pt"})
    return folder

def merging(inputs: list[Path], method: str = "linear", **more):
    return lambda: merge_files(inputs, scratch/"merged", method, [1 / len(inputs)] * len(inputs), threads=1, progress=False, overwrite=True, **more)

million = 1 << (14 if tiny else 20)
eight = [model_file(f"eight{i}", 4 * million) for i in range(8)]
counts, sizes = (2, 4, 8), [million * 2 ** i for i in range(2 if tiny else 5)]
of_size = {size: [model_file(f"size{size}-{i}", size) for i in range(4)] for size in sizes}
lines["merge of files", "models"] = counts, grow(lambda n: merging(eight[:n]), counts, repetitions)
lines["merge of files", "numbers in each of 4 models"] = sizes, grow(lambda size: merging(of_size[size]), sizes, repetitions)

# %%
from ptbook.curate.duplicates import near_duplicates
from ptbook.press.bench_curate import documents, same_features

corpus = list(documents(600 if tiny else 8000))
how_many = (200, 600) if tiny else (500, 1000, 2000, 4000, 8000)
score = same_features(corpus[:500], corpus[:100])
lines["near copies", "documents"] = how_many, grow(lambda n: lambda: near_duplicates(corpus[:n]), how_many, repetitions)
lines["importance weights", "documents"] = how_many, grow(lambda n: lambda: score(corpus[:n]), how_many, repetitions)

# %%
from ptbook.adapt.adapters import adapt
from ptbook.adapt.lora import LoRA
from ptbook.press.bench_adapt import TARGETS, base_model, next_loss

tokens = torch.randint(1000, (4, 32) if tiny else (8, 64), generator=torch.Generator().manual_seed(0))
def lora(r: int, hidden_size: int = 256):
    model = adapt(base_model("bert", 64 if tiny else hidden_size, 2), LoRA(r=r, alpha=2 * r), TARGETS["bert"][1])
    return stepper(model, lambda: next_loss(model, tokens))

ranks, hidden = ((1, 8), (32, 64)) if tiny else ((1, 4, 16, 64, 256), (64, 128, 256, 512))
lines["LoRA step", "rank"] = ranks, grow(lora, ranks, repetitions)
lines["LoRA step", "width of the model"] = hidden, grow(lambda d: lora(8, d), hidden, repetitions)

# %%
from ptbook.basics.claims import experiment, run

@experiment("busy", chapter="basics.claims", metric="a number")
def busy(seed, scale):
    x = torch.full((128, 128), 1 / 128)
    for _ in range(50 if tiny else 1000): x = x @ x * 128 / 128
    return {"arm": float(x.sum()) + seed}

seeds = (1, 2) if tiny else (1, 2, 4, 8)
lines["an experiment, jobs=1", "seeds"] = seeds, grow(lambda n: lambda: run(busy, "tiny", range(n), jobs=1, progress=False, folder=scratch/"busy"), seeds, repetitions)

# %% [markdown]
# And now the exponents.

# %%
fits = {key: growth(x, seconds) for key, (x, seconds) in lines.items()}
fig, axes = figure("", cols=3, rows=3, size=(11.5, 9.2))
for ax, ((what, size), (x, seconds)) in zip(axes.flat, lines.items()):
    fit = fits[what, size]
    ax.plot(x, 1000 * seconds.T, "o", color=PALETTE[0], markersize=4, alpha=0.6)
    ax.plot(x, 1000 * fit(x), "-", color=PALETTE[1])
    ax.set(xscale="log", yscale="log", xlabel=size, ylabel="ms", title=what)
    ax.title.set_fontsize(12)
    ax.text(0.04, 0.93, f"{fit.exponent:.2f} [{fit.low:.2f}, {fit.high:.2f}]", transform=ax.transAxes, va="top", fontsize=12)
for ax in axes.flat[len(lines):]: ax.remove()

# %%
table(["cost of", "with", "exponent", "95 % interval", "from", "to"], [[what, size, f"{fit.exponent:.2f}", f"[{fit.low:.2f}, {fit.high:.2f}]", f"{1000 * np.median(seconds[:, 0]):.1f} ms", f"{1000 * np.median(seconds[:, -1]):.1f} ms"]
      for ((what, size), fit), (x, seconds) in zip(fits.items(), lines.values())])

# %%
