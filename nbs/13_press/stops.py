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
# # The tour goes on
#
# > A model that has been to school is not finished: it can be poured together from several, teach a smaller one, and put on another subject like a coat.

# %%
#| default_exp press.stops

# %% [markdown]
# [The tour](../01_tour.ipynb) raises a model. Here are the stops that come after its first words. Each leans on a chapter of the book, and shows in a few seconds what the chapter measures over several seeds.
# They have the form of all stops: a function takes the tour as it stands and gives back a section of the page.

# %%
#| export
import copy, html, tempfile
from collections.abc import Callable
from pathlib import Path
import numpy as np, torch
from torch import Tensor, nn
from ptbook.adapt.adapter_files import save
from ptbook.adapt.adapters import adapt, trainable, using
from ptbook.adapt.lora import LoRA
from ptbook.basics.evaluate import bits_per_byte
from ptbook.basics.models import Transformer, style
from ptbook.basics.sources import load
from ptbook.basics.text import ByteTokenizer, Stream, pack
from ptbook.basics.train import fit
from ptbook.distill.well_read import soft_cross_entropy
from ptbook.merge.soups import greedy_soup, path, uniform_soup
from ptbook.press.tour import BATCH, BLOCK, LEARNING, SIZES, Section, Tour, next_byte_loss, picture, quote, spread_over, write

# %%
from IPython.display import HTML
from ptbook.press.tour import born, choose, school

# %% [markdown]
# A small tour, so that there is a model to go on with.

# %%
life = Tour(seconds=30, progress=False)
for stop in (choose, born, school): print(stop(life).line)


# %% [markdown]
# ## How long may a stop take?
#
# The reader has been promised a tour of three minutes, on any machine. The schooling has told us how fast this one is, so a stop asks for a share of the schooling's time and learns how many steps that is.

# %%
#| export
def steps_for(
    tour: Tour,
    share: float, # of the time that the schooling took
    most: int, # steps
) -> int: # at least 5
    "As many steps of the schooling's kind as fit."
    return int(min(most, max(5, share * len(tour.run.history)))) if tour.scale.name != "tiny" else 5


# %%
assert steps_for(life, 0.1, 10 ** 6) == max(5, len(life.run.history) // 10) and steps_for(life, 0.1, 7) <= 7

# %% [markdown]
# ## One soup
#
# We tune the model three times more on its own text, each time with other blocks in another order and with another learning rate, and let none of them settle down: the rate stays high to the end. Each ends somewhere around the valley's floor.
# Then we do what [the chapter on soups](../05_merge/soups.ipynb) is about. Predict: is the mean of three restless models better than the best of them?
#
# The ingredients are chosen on one half of the text that was put away, and all numbers come from the other half.

# %%
#| export
RATES = (1e-3, 1.5e-3, 2e-3) # of the three, after a schooling that ended at 0

def tune(
    tour: Tour,
    steps: int, # of each
) -> list[nn.Module]: # one per rate
    "Copies of the model that have read on, each with a rate and an order of its own."
    more = lambda i, lr: fit(copy.deepcopy(tour.model), next_byte_loss, Stream(tour.blocks, batch=BATCH, seed=1 + i), steps, lr=lr, schedule="constant", warmup=0.1, progress=False).model
    return [more(i, lr) for i, lr in enumerate(RATES)]

def halves(tour: Tour) -> tuple[Tensor, Tensor]: # to choose with, to measure with
    "The text that was put away, block by block in turns."
    return (tour.test[::2], tour.test[1::2]) if len(tour.test) > 1 else (tour.test, tour.test)


# %%
#| export
def stir(tour: Tour) -> Section:
    "Tune the model several times, and make one soup of it."
    from ptbook.basics.show import figure
    chosen, measured = halves(tour)
    bits = lambda model, blocks=measured: bits_per_byte(model, blocks, ignore=ByteTokenizer.eos)
    steps = steps_for(tour, 0.06, 150)
    members = tune(tour, steps)
    soup = greedy_soup(members, lambda m: -bits(m, chosen))
    singles, start = [bits(m) for m in members], bits(tour.model)
    best, stirred = singles[soup.history[0].model], bits(soup.model)
    t, line = path(*members[:2], lambda m: -bits(m), n=7)
    fig, ax = figure("On the way from one tuned model to another", "place between the first and the second", "bits per byte", size=(7.2, 3.2))
    ax.plot(t, -line, "o-", color="#009E73")
    worth = "better than the best of them" if stirred < best else "no better than the best of them"
    return Section("One soup", f"three tunings of {steps} steps need {', '.join(f'{b:.3f}' for b in singles)} bits per byte, a soup of {len(soup.ingredients)} of them {stirred:.3f}", f"""<p>The model goes on reading, three times from the
same place, each time for {steps} steps in another order and with another learning rate that stays high to the end. So there are three models, which need {', '.join(f'{b:.3f}' for b in singles)} bits per byte; the one they came from needs {start:.3f}.</p>
<p>None is thrown away. Their weights are averaged, number by number: a <b>soup</b>. The greedy recipe put {len(soup.ingredients)} of the three into the pot. One model, with the running cost of one model, needs <b>{stirred:.3f}</b>: {worth}.
Ingredients were chosen on one half of the text that was put away; these numbers are from the other half.</p>
{picture(fig, f"Bits per byte along the line between two tuned models: {-line[0]:.3f} and {-line[-1]:.3f} at the ends, {-line[3]:.3f} in the middle")}
<p>That this works at all is because the three have one start. The picture walks in a straight line from the first to the second and measures the model at each place, on that same half.</p>""")


# %%
section = stir(life)
print(section.line)
HTML(section.body)

# %% [markdown]
# What would happen with models of different starts? Two newborns that went to the same school speak equally well, and their mean speaks not at all.

# %%
torch.manual_seed(1)
other = fit(Transformer(life.model.config), next_byte_loss, Stream(life.blocks, batch=BATCH, seed=0), len(life.run.history), **LEARNING, progress=False).model
both, mean = [bits_per_byte(m, life.test) for m in (life.model, other)], bits_per_byte(uniform_soup([life.model, other]), life.test)
assert mean > max(both)
f"two schoolmates need {both[0]:.2f} and {both[1]:.2f} bits per byte, their mean {mean:.2f}"

# %% [markdown]
# ## A student half the size
#
# The model has become a teacher. A newborn of half its size goes to school twice, for equally many steps on the same blocks: once with the text alone, which says which byte came next, and once with the teacher beside it, who says for every place how likely *each* byte was.
# That is [distillation](../03_distill/well_read.ipynb). Predict: do the teacher's doubts help, in a schooling this short?

# %%
#| export
SMALLER = SIZES | dict(hidden_size=64) # about half the weights

def taught(
    tour: Tour,
    steps: int,
    teacher: nn.Module | None, # None: the text alone
) -> nn.Module:
    "A smaller newborn after its schooling."
    def by_teacher(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.no_grad(): wanted = teacher(ids)
        return soft_cross_entropy(model(ids), wanted)
    torch.manual_seed(0)
    student = Transformer(style("llama", **SMALLER))
    return fit(student, by_teacher if teacher else next_byte_loss, Stream(tour.blocks, batch=BATCH, seed=0), steps, **LEARNING, progress=False).model

def graduate(tour: Tour) -> Section:
    "Teach a student of half the size, by the model and by the text."
    from ptbook.basics.show import figure
    steps, size = steps_for(tour, 0.12, 300), lambda model: sum(p.numel() for p in model.parameters())
    students = {"by the text alone": taught(tour, steps, None), "by the teacher": taught(tour, steps, tour.model)}
    bits = {who: bits_per_byte(model, tour.test, ignore=ByteTokenizer.eos) for who, model in students.items()}
    alone, helped = bits.values()
    teacher, small = bits_per_byte(tour.model, tour.test, ignore=ByteTokenizer.eos), size(students["by the teacher"])
    fig, ax = figure(f"Taught by the teacher {helped:.2f}, by the text {alone:.2f} bits per byte", "bits per byte of held-out text", "", size=(7.2, 2.2))
    ax.barh([*bits, "the teacher itself"], [alone, helped, teacher], color=["#56B4E9", "#009E73", "#332288"], height=0.6)
    ax.invert_yaxis(), ax.grid(axis="y", visible=False)
    verdict = f"The teacher is worth {alone - helped:.2f} bits per byte here" if helped < alone else f"In {steps} steps the teacher's doubts do not help: {helped - alone:.2f} bits per byte more than with the text alone"
    return Section("A student half the size", f"{small:,} weights for {size(tour.model):,}: after {steps} steps {helped:.3f} bits per byte with the teacher, {alone:.3f} without", f"""<p>The model now teaches. A newborn with {small:,} weights, {small / size(tour.model):.0%} of its own, goes to school for {steps} steps:
once with the text, which says what came next, and once with the teacher, who says how likely each of the 256 bytes was. The blocks are the same, and so are the steps.</p>
{picture(fig, f"Bits per byte: {alone:.3f} by the text alone, {helped:.3f} by the teacher, {teacher:.3f} the teacher itself")}
<p>{verdict}. Both students have read {steps * BATCH * BLOCK:,} bytes, the teacher {len(tour.run.history) * BATCH * BLOCK:,}.</p>""")

# %%
section = graduate(life)
print(section.line)
HTML(section.body)

# %% [markdown]
# ## An adapter for another subject
#
# The model has read prose about programs. Now it is to read programs. All its weights stay; beside each linear layer a change of rank eight may learn, and that is an [adapter](../04_adapt/lora.ipynb). What it learns is a small file. Taken off, it leaves the model as it was: not nearly, but bit for bit.

# %%
#| export
def subject(tour: Tour) -> tuple[str, Tensor, Tensor]: # name, blocks to learn from, blocks to measure on
    "Another subject: the source code of Python's standard library, or its manual for a tour that is about code."
    name = "pydocs" if "stdlib_code" in tour.name else "stdlib_code"
    texts, token = load(name)["train"]["text"], ByteTokenizer()
    limit = tour.scale.pick(tiny=20_000, book=600_000)
    blocks = pack(map(token.encode, spread_over(texts[::2], limit)), BLOCK, token.eos)
    return name, blocks, pack(map(token.encode, spread_over(texts[1::2], min(limit, 32_000))), BLOCK, token.eos)[:-1]

def specialise(tour: Tour) -> Section:
    "Put an adapter on the model and let it read something else."
    name, blocks, unseen = subject(tour)
    bits = lambda test: bits_per_byte(model, test, ignore=ByteTokenizer.eos)
    model, steps, opening = copy.deepcopy(tour.model), steps_for(tour, 0.1, 250), "def "
    before, old, said = bits(unseen), bits(tour.test), write(model, opening, tour.words)
    adapt(model, LoRA(r=8, alpha=16))
    fit(model, next_byte_loss, Stream(blocks, batch=BATCH, seed=0), steps, lr=5e-3, weight_decay=0.0, progress=False)
    with tempfile.TemporaryDirectory() as folder: size = sum(file.stat().st_size for file in save(model, Path(folder) / "adapter").iterdir())
    learns, after, forgot, says = trainable(model), bits(unseen), bits(tour.test), write(model, opening, tour.words)
    with using(model, None): unchanged = bits(tour.test) == old
    kept = "to the last digit what it was" if unchanged else "not what it was"
    return Section("A coat for another subject", f"an adapter of {learns.trainable:,} numbers ({size / 1000:.0f} kB): {before:.2f} -> {after:.2f} bits per byte of {name} after {steps} steps", f"""<p>The model reads on, but in another subject: <b>{html.escape(name)}</b>. On text of that kind it needs {before:.2f} bits per byte.
Its weights are locked. Beside every linear layer a small change may learn, {learns.trainable:,} numbers in all, {learns.trainable / (learns.total - learns.trainable):.0%} of the model: an <b>adapter</b>. After {steps} steps the model with its adapter needs <b>{after:.2f}</b>.</p>
<p>Saved by itself it is a file of {size / 1000:.0f} kB. While it is on, the text of the first stop costs {forgot:.2f} bits per byte; the model alone needed {old:.2f}. Taken off, that number is {kept}.</p>
<p>“{opening.strip()}”, continued without the adapter and with it:</p>{quote(opening + "▸" + said)}{quote(opening + "▸" + says)}""")

# %%
section = specialise(life)
print(section.line)
HTML(section.body)

# %% [markdown]
# ## The stops, in order

# %%
#| export
STOPS: list[Callable[[Tour], Section]] = [stir, graduate, specialise] # after the stops of `press.tour`

# %% [markdown]
# ## Exercises
#
# **1.** The greedy recipe looked at held-out text. Does the uniform soup, which looks at nothing, do as well here?

# %% jupyter={"source_hidden": true}
#| code-fold: true
#| code-summary: "Solution"
members = tune(life, steps_for(life, 0.1, 100))
each = [bits_per_byte(m, life.test) for m in members]
print(f"alone {np.round(each, 3)}, uniform soup {bits_per_byte(uniform_soup(members), life.test):.3f}")

# %% [markdown]
# **2.** The schooling ends with a learning rate of 0, and tuning with a high one makes the single models worse than they were. What does the soup look like to somebody who knows schedules? Average over *time* instead: the weights after every tenth step of one restless run.

# %% jupyter={"source_hidden": true}
#| code-fold: true
#| code-summary: "Solution"
along, model = [], copy.deepcopy(life.model)
for leg in range(4):
    model = fit(model, next_byte_loss, Stream(life.blocks, batch=BATCH, seed=10 + leg), 10, lr=1.5e-3, schedule="constant", warmup=0.0, progress=False).model
    along.append(copy.deepcopy(model))
each, mean = [bits_per_byte(m, life.test) for m in along], bits_per_byte(uniform_soup(along), life.test)
print(f"alone {np.round(each, 3)}, averaged over time {mean:.3f}: averaging does what lowering the rate would do")

# %% [markdown]
# ## What was learned
#
# Models that grew from one start can be poured together, and what they do not agree on cancels. What a large one knows, a small one can be told. And a model can learn another subject without losing the first: the new part is kept beside it.
