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
# # How far to the limit
#
# > A ratio to a peer says who is faster. A ratio to the machine says how much there is left to gain.

# %%
#| default_exp press.bench_limits

# %% [markdown]
# Two programs can be equally slow. Whoever compares libraries only with each other will not notice. A machine has limits that no program passes: so many multiplications in a second, so many bytes from memory, so many to the disk.
# They can be measured in a few seconds, on the spot and with the same threads. Then every piece of work has a shortest time, and the question is how many times that it takes, and why.
#
# This chapter has the instruments: the limits, the counting of work, the growth of cost, and the step of a GPT-2 on a GPU. What they say of this book stands on [its page about speed](../14_speed.ipynb).

# %%
#| export
import math, os, re, statistics, tempfile, time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ptbook.basics.claims import interval
from ptbook.basics.memory import saved_bytes
from ptbook.basics.models import Transformer, style
from ptbook.basics.show import GREY, INK, PALETTE, figure
from ptbook.basics.train import fit
from ptbook.press.bench import PeerMissing, benchmark, row, undisturbed

# %%
import torch.nn.functional as F

from ptbook.basics.show import use_style
from ptbook.press.bench import stepper

use_style()
tiny = os.environ.get("PTBOOK_SCALE") == "tiny"


# %% [markdown]
# ## Many in turns
#
# [The chapter on measuring](bench.ipynb) times two functions in turns, because a machine has moods. Here there are more than two, and the reason is the same.

# %%
#| export
def turns(
    functions: Mapping[Hashable, Callable[[], object]], # name -> what to time
    repetitions: int = 5, # timings of each
    threads: int = 1, # torch threads
) -> dict[Hashable, np.ndarray]: # name -> (repetitions,) seconds
    "Time several functions in turns, after an untimed call of each; every other turn goes backwards. Raises ValueError for no repetition."
    if repetitions < 1: raise ValueError(f"repetitions: got {repetitions}, wanted at least 1")
    times = {name: np.empty(repetitions) for name in functions}
    with undisturbed(threads):
        for f in functions.values(): f()
        for turn in range(repetitions):
            for name in list(functions)[::1 if turn % 2 == 0 else -1]:
                start = time.perf_counter()
                functions[name]()
                times[name][turn] = time.perf_counter() - start
    return times


# %%
order = []
turns({name: lambda name=name: order.append(name) for name in "ABC"}, repetitions=2)
print("".join(order))

# %%
assert "".join(order) == "ABC" + "ABC" + "CBA"


# %% [markdown]
# ## Work
#
# What has to be done is counted, not guessed. `torch` counts the floating-point operations of matrix products as they are dispatched. It does not know the attention kernel of the CPU, so we tell it.
# The causal mask is not taken off: the whole square of scores is counted, as is usual.

# %%
#| export
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)}

def flops(
    f: Callable[[], object], # what to run, once
) -> int:
    "The floating-point operations of the matrix products, convolutions and attention of a call. Everything else is free."
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter: f()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Work:
    "Something to time, and what it cannot do without."
    name: str
    run: Callable[[], object]
    flops: float = 0.0 # floating-point operations of a call
    bytes: float = 0.0 # that a call must move between memory and processor


# %% [markdown]
# A layer with $k$ inputs and $n$ outputs at $m$ positions costs $2mnk$ operations; backward costs twice that, once for the inputs' gradient and once for the weights'.

# %%
m, k, n = 6, 32, 10
layer, x = nn.Linear(k, n), torch.randn(m, k, requires_grad=True)
forward, both = flops(lambda: layer(x)), flops(lambda: layer(x).sum().backward())
print(forward, both)

# %%
assert forward == 2 * m * n * k and both == 3 * forward


# %% [markdown]
# And the bytes of a training step? Everything that lies in a cache already is free, so only a lower bound can be given. AdamW must read the weights in the forward pass, in the backward pass and once more, write and read the gradient, and read and write two averages and write the weights: ten times the model.
# What the forward pass keeps for the backward pass is written once and read once. That is the traffic of a model which is larger than the caches; a smaller one has less.

# %%
#| export
def step_work(
    name: str,
    model: nn.Module, # what requires a gradient learns, by AdamW
    loss: Callable[[], Tensor], # a forward pass
    step: Callable[[], object], # a whole step: loss, backward, update
    inputs: Any = (), # tensors of the batch
) -> Work:
    "A training step as work."
    def both(): loss().backward()
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    counted, kept = flops(both), saved_bytes(loss, model, inputs).bytes
    model.zero_grad(set_to_none=True)
    return Work(name, step, counted, 10 * trained + 2 * frozen + 2 * kept)


# %%
def gpt2(hidden_size: int, layers: int, length: int = 64) -> Transformer:
    torch.manual_seed(0)
    return Transformer(style("gpt2", hidden_size=hidden_size, layers=layers, heads=max(2, hidden_size // 64), max_length=length))

def training(hidden_size: int, layers: int, batch: int, length: int) -> Work:
    model, ids = gpt2(hidden_size, layers, length), torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))
    def loss(): return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return step_work(f"step, d={hidden_size}", model, loss, stepper(model, loss), ids)

work = training(128, 2, 8, 64)
weights = sum(p.numel() for p in gpt2(128, 2).parameters() if p.ndim == 2) - 64 * 128 # the table of positions multiplies nothing
print(f"{work.flops / 1e9:.2f} billion operations, of which 6 per weight and token: {6 * weights * 8 * 64 / 1e9:.2f}; {work.bytes / 1e6:.0f} MB")

# %%
assert 6 * weights * 8 * 64 < work.flops < 1.2 * 6 * weights * 8 * 64


# %% [markdown]
# ## Limits
#
# The multiplications: square products of growing size, and the best of them. The bytes: the *triad* $a = b + s\,c$ of [McCalpin's STREAM](https://www.cs.virginia.edu/stream/) on arrays that no cache holds, counted as three arrays, and a plain sum, which only reads.
# (A processor that reads a line before it overwrites it moves a fourth array in the triad; as in STREAM it is not counted.)

# %%
#| export
def product(
    n: int, # rows and columns
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    least: float = 2e8, # operations of a call at least, so that it can be timed
) -> Work:
    "Square matrix products."
    a, b, calls = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype), math.ceil(least / (2 * n ** 3))
    out = torch.empty_like(a)
    def run():
        for _ in range(calls): torch.mm(a, b, out=out)
        if out.device.type == "cuda": torch.cuda.synchronize(out.device)
    return Work(f"product, n={n}", run, 2 * n ** 3 * calls, 3 * n * n * a.element_size() * calls)


def triad(
    n: int = 1 << 24, # numbers per array; three arrays of float32
) -> Work:
    "STREAM's triad."
    a, b, c = torch.zeros(n), torch.ones(n), torch.ones(n)
    return Work("triad", lambda: torch.add(b, c, alpha=2.0, out=a), 2 * n, 3 * 4 * n)


def reading(
    n: int = 1 << 25, # numbers of float32
) -> Work:
    "A sum, which writes nothing."
    a = torch.ones(n)
    return Work("sum", a.sum, n, 4 * n)


# %%
some = triad(1 << 10)
some.run()
assert some.bytes == 3 * 4 << 10 and product(64).flops >= 2e8 and reading(1 << 10).bytes == 4 << 10


# %% [markdown]
# The disk: a file is written and brought to the disk with `fsync`, and read again. A file that was just written is still in memory, in the system's *page cache*, and reading it measures a copy. So the system is asked to forget it first (`posix_fadvise`).
# That is a request; and a virtual machine's disk may have a cache of its own, which nobody here can empty. So the figure for reading is an upper bound of what the device does.

# %%
#| export
def disk(
    folder: str | Path, # on the disk in question
    size: int = 64 << 20, # bytes
) -> dict[str, Work]: # write, read, cached: the same file
    "Writing a file to the disk, reading it back, and reading it from the page cache. The file is `disk.bin` in the folder."
    path, data, buffer = Path(folder)/"disk.bin", os.urandom(1 << 20), bytearray(1 << 20)
    def write():
        with open(path, "wb", buffering=0) as file:
            for _ in range(size >> 20): file.write(data)
            os.fsync(file.fileno())
    def read(forget: bool = True):
        with open(path, "rb", buffering=0) as file:
            if forget and hasattr(os, "posix_fadvise"): os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.readinto(buffer): pass
    whole = (size >> 20) << 20
    return {"write": Work("disk, write", write, bytes=whole), "read": Work("disk, read", read, bytes=whole), "cached": Work("page cache", lambda: (read(False)), bytes=whole)}


# %%
with tempfile.TemporaryDirectory() as folder:
    works = disk(folder, 2 << 20)
    works["write"].run(), works["read"].run()
    assert (Path(folder)/"disk.bin").stat().st_size == works["read"].bytes == 2 << 20


# %% [markdown]
# ## Reached
#
# A piece of work has a shortest time: its operations at the peak, or its bytes at the memory's speed, whichever is longer. The *gap* is how many times that it takes.

# %%
#| export
@dataclass(frozen=True)
class Limits:
    "What the machine can do."
    peak: float # operations per second
    bandwidth: float # bytes per second
    products: dict[int, float] # size -> operations per second

    def seconds(self, work: Work) -> float: # the shortest time there is for it
        return max(work.flops / self.peak, work.bytes / self.bandwidth)

    @property
    def ridge(self) -> float: return self.peak / self.bandwidth # operations per byte from which on the peak is the limit


@dataclass(frozen=True)
class Reached:
    "A piece of work that was timed."
    work: Work
    times: np.ndarray # (repetitions,) seconds

    @property
    def seconds(self) -> float: return float(np.median(self.times))
    @property
    def intensity(self) -> float: return self.work.flops / self.work.bytes # operations per byte
    def gap(self, limits: Limits) -> float: return self.seconds / limits.seconds(self.work) # 1 is the limit


def reach(
    works: Iterable[Work], # with different names
    repetitions: int = 5,
    threads: int = 1,
) -> dict[str, Reached]: # by name
    "Time pieces of work in turns."
    works = list(works)
    times = turns({w.name: w.run for w in works}, repetitions, threads)
    return {w.name: Reached(w, times[w.name]) for w in works}


def limits_of(
    reached: Mapping[str, Reached], # products of some sizes and a triad, by name; others are passed over
) -> Limits:
    "The fastest product and the fastest triad: of a limit one wants the best timing, not the median."
    rates = {int(name.split("=")[1]): r.work.flops / float(r.times.min()) for name, r in reached.items() if name.startswith("product, n=")}
    return Limits(max(rates.values()), reached["triad"].work.bytes / float(reached["triad"].times.min()), rates)


def limit_works(
    sizes: Sequence[int] = (64, 128, 256, 512, 1024, 2048), # of the products
    n: int = 1 << 24, # numbers per array of the triad
) -> list[Work]:
    "What `limits_of` wants to have been timed, best in the same turns as the work that is set beside it."
    return [*map(product, sizes), triad(n)]


# %%
limits = limits_of(reach(limit_works((64, 256), 1 << 20) if tiny else limit_works(), 3))
print(f"{limits.peak / 1e9:.0f} billion operations and {limits.bandwidth / 1e9:.1f} GB per second with one thread; they meet at {limits.ridge:.1f} operations per byte")

# %%
assert Reached(Work("x", None, flops=2 * limits.peak, bytes=1), np.array([5.0, 4.0, 9.0])).gap(limits) == 2.5
assert Reached(Work("x", None, flops=1, bytes=4 * limits.bandwidth), np.array([4.0])).gap(limits) == 1.0


# %% [markdown]
# The two limits make a roof ([Williams and others 2009](https://doi.org/10.1145/1498765.1498785)): on the left memory, on the right arithmetic. Each piece of work is a point below it, and its distance from the roof, straight up, is the gap.

# %%
#| export
def roofline(
    reached: Iterable[Reached],
    limits: Limits,
    title: str = "",
    shift: Mapping[str, tuple[float, float]] = {}, # name -> where its label stands, in points from the mark
):
    "Draw the roof and the points below it; returns the axes."
    fig, ax = figure(title, "operations per byte of memory traffic", "billion operations per second", size=(8.6, 5.0))
    reached = list(reached)
    low, high = min(0.05, *(r.intensity / 2 for r in reached)), max(100.0, *(r.intensity * 4 for r in reached))
    x = np.geomspace(low, high, 200)
    ax.plot(x, np.minimum(limits.peak, x * limits.bandwidth) / 1e9, "-", color=INK, linewidth=2.5)
    ax.plot(x, np.minimum(limits.peak, x * limits.bandwidth) / 2e9, ":", color=GREY, linewidth=1.5)
    for r, colour in zip(reached, PALETTE * len(reached)):
        ax.plot(r.intensity, r.work.flops / r.seconds / 1e9, "o", color=colour, markersize=8)
        ax.annotate(r.work.name, (r.intensity, r.work.flops / r.seconds / 1e9), xytext=shift.get(r.work.name, (8, -4)), textcoords="offset points", fontsize=11)
    ax.text(low * 1.15, limits.bandwidth * low * 1.5 / 1e9, f"memory, {limits.bandwidth / 1e9:.0f} GB/s", rotation=0, fontsize=11, va="bottom")
    ax.text(high / 1.1, limits.peak * 1.12 / 1e9, f"products, {limits.peak / 1e9:.0f} GFLOP/s", ha="right", fontsize=11)
    ax.set(xscale="log", yscale="log", xlim=(low, high))
    return ax


# %%
found = reach([training(128, 2, 8, 64), triad(1 << (16 if tiny else 24)), product(256)], repetitions=3)
roofline(found.values(), limits, "A small training step is arithmetic; a triad is memory");

# %%
assert found["triad"].intensity < limits.ridge < found["product, n=256"].intensity


# %% [markdown]
# ## Where the time goes
#
# A gap wants a reason. The profiler of `torch` says how long each operation took; what they do not account for is Python and the dispatch between them.

# %%
#| export
KINDS = { # kind -> what the names of its operations look like
    "products": r"aten::(add|b|badd)?mm$", "attention": r"flash_attention|scaled_dot_product", "optimiser": r"_fused_adam", "norms": r"layer_norm|rms_norm"}

def where_time_goes(
    f: Callable[[], object],
    calls: int = 3,
) -> dict[str, float]: # kind -> share of the time, of all of which the sum is 1; "Python" is what no operation accounts for
    "The shares of matrix products, attention, norms, optimiser, other operations and Python."
    from torch.profiler import ProfilerActivity, profile
    f()
    with undisturbed(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        for _ in range(calls): f()
        seconds = time.perf_counter() - begun
    shares = Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, look in KINDS.items() if re.search(look, event.key)), "other operations")
        shares[kind] += event.self_cpu_time_total / 1e6 / seconds
    return {kind: shares[kind] for kind in [*KINDS, "other operations"]} | {"Python": max(0.0, 1 - sum(shares.values()))}


# %%
shares = where_time_goes(training(128, 2, 8, 64).run)
{kind: f"{share:.0%}" for kind, share in shares.items()}

# %%
assert abs(sum(shares.values()) - 1) < 0.05 and shares["products"] > shares["optimiser"]


# %% [markdown]
# ## Growth
#
# How does cost grow with size? A straight line in logarithms has the exponent as its slope. One line is fitted per repetition, so that the spread of the slopes says how well the exponent is known.

# %%
#| export
@dataclass(frozen=True)
class Growth:
    "seconds = constant * x ** exponent"
    exponent: float
    low: float # 95 % interval over repetitions
    high: float
    constant: float

    def __call__(self, x: np.ndarray) -> np.ndarray: return self.constant * np.asarray(x, float) ** self.exponent
    def __str__(self) -> str: return f"exponent {self.exponent:.2f} [{self.low:.2f}, {self.high:.2f}]"


def growth(
    x: Sequence[float], # sizes, at least two
    seconds: np.ndarray, # (repetitions, sizes)
) -> Growth:
    "Least squares in logarithms. Raises ValueError for shapes that do not fit, fewer than two sizes, or what has no logarithm."
    x, seconds = np.asarray(x, float), np.atleast_2d(np.asarray(seconds, float))
    if x.ndim != 1 or len(set(x.tolist())) < 2 or seconds.shape[1:] != x.shape: raise ValueError(f"x, seconds: got shapes {x.shape} and {seconds.shape}, wanted (sizes,) and (repetitions, sizes), at least two different sizes")
    if min(x.min(), seconds.min()) <= 0: raise ValueError("x, seconds: got a number that is not positive, wanted what has a logarithm")
    slopes, heights = np.polyfit(np.log(x), np.log(seconds).T, 1)
    low, high = interval(slopes)
    return Growth(float(slopes.mean()), float(low), float(high), float(np.exp(heights.mean())))


def grow(
    make: Callable[[Any], Callable[[], object]], # size -> what to time
    sizes: Sequence, # in order
    repetitions: int = 5,
    threads: int = 1,
) -> np.ndarray: # (repetitions, sizes) seconds
    "Time the same work at several sizes, in turns."
    return np.stack(list(turns({size: make(size) for size in sizes}, repetitions, threads).values()), 1)


# %% [markdown]
# A square product has $n^3$ multiplications. Predict the exponent that is measured from 64 to 1024: is it three?

# %%
sizes = (64, 128, 256) if tiny else (64, 128, 256, 512, 1024)
def multiply(n: int):
    a, b = torch.randn(n, n), torch.randn(n, n)
    return lambda: a @ b
found = growth(sizes, grow(multiply, sizes))
print(found)

# %%
exact = growth([1, 2, 4, 8], 3.0 * np.array([1, 2, 4, 8.]) ** 1.5 * np.array([[1.0], [1.1], [0.9]]))
assert abs(exact.exponent - 1.5) < 1e-9 and exact.low <= 1.5 + 1e-9 and exact.high >= 1.5 - 1e-9 and 2.5 < exact.constant < 3.5
assert found.exponent < 3.2


# %% [markdown]
# Below three: small products do not reach the peak, so growing is cheaper than it looks. An exponent below the one expected is the mark of fixed costs.
#
# ## On a GPU
#
# On the machine where models are really trained the question is the same, and has a name: *model-FLOPs utilisation* ([Chowdhery and others 2022](https://arxiv.org/abs/2204.02311), appendix B), the share of the peak that the model's own arithmetic reaches. The model's own: three times the forward pass, whatever is computed twice to save memory.
#
# Which peak? The data sheet's holds for one clock rate that a card under load does not keep. A matrix product on the spot says what can be had. Both are given where both are known.

# %%
#| export
DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12} # operations per second, dense, bfloat16 (V100, T4: float16)

def peak_of(
    device: str | torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int] = (2048, 4096, 8192), # of the products
    repetitions: int = 3,
) -> tuple[float, float | None]: # operations per second: the fastest product here, and the data sheet's of this GPU if it is known
    "Two peaks."
    best = max(w.flops / reach([w], repetitions)[w.name].times.min() for w in (product(n, dtype, device) for n in sizes))
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return best, next((told for key, told in DATA_SHEET.items() if key in name), None)


def model_flops(
    config: Any, # of a `Transformer`
    batch: int,
    length: int,
) -> int: # per training step
    "Three times the forward pass, counted on a model without memory."
    with torch.device("meta"): model, ids = Transformer(config), torch.zeros(batch, length, dtype=torch.long)
    return 3 * flops(lambda: model(ids))


# %%
config = style("gpt2", hidden_size=128, layers=2, heads=2, max_length=64)
assert 0.9 < work.flops / model_flops(config, 8, 64) < 1.15 # beside what was counted while it ran; attention's backward pass computes the scores again
f"GPT-2 small, 1,024 tokens: {model_flops(style('gpt2', vocab_size=50304, hidden_size=768, layers=12, heads=12, max_length=1024), 1, 1024) / 1024 / 1e6:.0f} million operations per token"


# %% [markdown]
# The step is the one that `fit` makes, with its bar, its history and its checks: what a reader would get, and no loop written for the occasion. The first steps compile and warm up, so a clock in the batches starts when the step is reached that counts.

# %%
#| export
class Clocked:
    "Random batches, and a clock that starts when one of them is asked for."
    def __init__(self, ids: Tensor, first: int): # (batch, length); the step at which it starts
        self.ids, self.first, self.began = ids, first, math.nan

    def __getitem__(self, step: int) -> Tensor:
        if step == self.first:
            if torch.cuda.is_available(): torch.cuda.synchronize()
            self.began = time.perf_counter()
        return self.ids.roll(step, 1)


@dataclass(frozen=True)
class Throughput:
    "What a training step reaches."
    tokens: float # per second
    flops: float # of the model, per second
    peak: float # operations per second of the fastest product
    told: float | None # the data sheet's
    seconds: float # per step
    device: str

    @property
    def mfu(self) -> float: return self.flops / self.peak

    def __str__(self) -> str:
        sheet = f", {self.flops / self.told:.0%} of the data sheet's {self.told / 1e12:.0f}" if self.told else ""
        return f"{self.tokens:,.0f} tokens per second on {self.device}: {self.mfu:.0%} of the {self.peak / 1e12:.3g} TFLOP/s of matrix products here{sheet}"


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor: # (batch, length) -> scalar, nats
    "Cross-entropy of every token but the first."
    return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gpt2_small_throughput(
    batch: int = 16, # sequences
    length: int = 1024, # tokens
    steps: int = 30, # that are timed
    warm: int = 10, # steps before
    precision: str = "bf16", # as for `fit`
    compiled: bool = True, # by torch.compile
    products: Sequence[int] = (2048, 4096, 8192), # sizes of the products that measure the peak
    **sizes: int, # of the model, other than GPT-2 small's
) -> Throughput:
    "Pre-train a GPT-2 small on random tokens, on the accelerator if there is one, else on the CPU."
    config = style("gpt2", **dict(vocab_size=50304, hidden_size=768, layers=12, heads=12, max_length=length) | sizes)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model, batches = Transformer(config).to(device), Clocked(torch.randint(config.vocab_size, (batch, length), device=device), warm)
    if compiled: model.compile()
    fit(model, next_token_loss, batches, warm + steps, precision=precision, progress=False)
    seconds = (time.perf_counter() - batches.began) / steps
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    peak, told = peak_of(device, dtype, products)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Throughput(batch * length / seconds, model_flops(config, batch, length) / seconds, peak, told, seconds, name)


@benchmark("gpu")
def gpu_pretraining(repetitions: int = 8) -> dict:
    "pre-training of GPT-2 small in bfloat16 on a GPU."
    if not torch.cuda.is_available(): raise PeerMissing("there is no GPU here that torch can use, so the pre-training of GPT-2 small was not timed")
    found = gpt2_small_throughput(steps=4 * repetitions)
    return row("GPT-2 small step, 16 x 1,024 tokens, bf16", f"products at {found.device}'s speed; {found}", (found.seconds, found.seconds * found.mfu), target=2.5)


# %% [markdown]
# There may be no GPU where this is read, but the code can be run: a small model on whatever there is, once as `fit` is used on a laptop and once in bfloat16. (A CPU without units for bfloat16 multiplies it slowly, so that a step in mixed precision can leave such products behind; only the first run's share means something there.)

# %%
lesson = dict(batch=2, length=32, steps=4, warm=2, compiled=torch.cuda.is_available(), products=(256, 512), vocab_size=256, hidden_size=64, layers=2, heads=2)
small, mixed = (gpt2_small_throughput(precision=precision, **lesson) for precision in ("no", "bf16"))
print(small)
try: print(gpu_pretraining())
except PeerMissing as error: print(error)

# %%
assert 0 < small.mfu < 1 and mixed.tokens > 0
known = Throughput(tokens=1000.0, flops=2e12, peak=8e12, told=10e12, seconds=1.0, device="a card")
assert known.mfu == 0.25 and "25%" in str(known) and "20%" in str(known)


# %% [markdown]
# ## What was learned
#
# - A limit is measured, not read from a data sheet, and of a limit one wants the best timing; of everything else the median.
# - Operations can be counted exactly, bytes only from below.
# - An exponent has an interval, and one that is too small is a sign of fixed costs.
#
# ### Exercises
#
# **1.** The triad was measured on arrays that no cache holds. What does it say on smaller ones, and where are the steps?

# %% jupyter={"source_hidden": true}
#| code-fold: true
#| code-summary: "Solution"
lengths = [1 << e for e in range(10, 17 if tiny else 26, 2)]
def often(n: int):
    work, calls = triad(n), max(1, (1 << 22) // n)
    return lambda: [work.run() for _ in range(calls)]
times = grow(often, lengths, repetitions=3).min(0)
{f"{12 * n / 1e6:.2g} MB": f"{12 * n * max(1, (1 << 22) // n) / s / 1e9:.0f} GB/s" for n, s in zip(lengths, times)}

# %% [markdown]
# **2.** How wrong would the exponent of a cost be that is in truth $a + b\,x$ with $a = b$, measured from $x = 1$ to $16$?

# %% jupyter={"source_hidden": true}
#| code-fold: true
#| code-summary: "Solution"
x = 2.0 ** np.arange(5)
print(f"{growth(x, 1 + x).exponent:.2f} instead of 1: a power law fits what has none. Look at the line, not only at its slope.")
