"""Rank selection: gates, the threshold after each update, and what is left when a task has been learnt."""
import copy
import json
import warnings
from functools import partial

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from ptbook.adapt import rank_selection as rs
from ptbook.adapt.adapter_files import load, save
from ptbook.adapt.adapters import Adapted, adapt, attached, merge, parts, remove, trainable
from ptbook.adapt.lora import LoRA
from ptbook.adapt.rank_selection import (
    GatedLoRA, KappaSchedule, RankSelective, Task, ZeroShot, active_ranks, class_loss, consolidate, continual_fit, prune, retention, selecting, shrink_evenly_, soft_threshold_, to_lora)
from ptbook.basics.claims import as_scale
from ptbook.basics.train import fit

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def adapted(r: int = 4, targets=None, model: nn.Module | None = None) -> nn.Module: # with gates and B of its own
    model = adapt(model or mlp(), RankSelective(r=r), targets)
    fill(model)
    return model


def fill(model: nn.Module, gates=(0.5, 0.0, -1.5, 0.0)):
    with torch.no_grad():
        for part in parts(model).values(): part.B.normal_(), part.gate.copy_(torch.tensor(gates))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor: return (model(batch) - 1).square().mean()


def stream(n: int = 3) -> list[Task]: # tasks of two classes each, four inputs wide
    g = torch.Generator().manual_seed(1)
    def part(c: int, rows: int): return torch.randn(rows, 6, generator=g), c + torch.randint(2, (rows,), generator=g)
    return [Task(f"task {i}", (2 * i, 2 * i + 1), part(2 * i, 40), part(2 * i, 20)) for i in range(n)]


def classifier(classes: int = 6) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, classes))


# ---- the threshold

@pytest.mark.parametrize("lam", [0.0, 1e-3, 0.4, 5.0])
def test_the_soft_threshold_is_the_proximal_operator(lam):
    g = torch.linspace(-2, 2, 41).double()
    found = soft_threshold_(g.clone(), lam)
    value = lambda z: (z - g) ** 2 / 2 + lam * z.abs()
    for step in (-1e-3, 1e-3): assert (value(found) <= value(found + step) + 1e-15).all()
    assert ((found == 0) == (g.abs() <= lam)).all() and soft_threshold_(g, lam) is g


@pytest.mark.parametrize("lam", [-1e-9, float("nan")])
def test_a_threshold_below_zero_is_refused(lam):
    with pytest.raises(ValueError, match="lam"): soft_threshold_(torch.ones(2), lam)


def test_even_shrinkage_takes_as_much_and_closes_nothing():
    g = torch.tensor([0.3, -0.05, 2.0, 0.01])
    soft, even = soft_threshold_(g.clone(), 0.1), shrink_evenly_(g.clone(), 0.1)
    assert soft.abs().sum().item() == pytest.approx(even.abs().sum().item()) and (even != 0).all() and torch.allclose(even / g, (even / g)[0])
    assert torch.equal(shrink_evenly_(torch.zeros(3), 0.1), torch.zeros(3))


@pytest.mark.parametrize("total, dense", [(1, 0.0), (7, 0.5), (150, 0.5), (10, 1.0), (100, 0.0)])
def test_the_threshold_climbs_from_zero_to_kappa(total, dense):
    course = [KappaSchedule(total, dense, 0.01, 5)(t) for t in range(total + 3)]
    assert course == sorted(course) and all(lam == 0 for t, lam in enumerate(course) if t < dense * total) and max(course) <= 0.01
    if total >= 10 and dense < 1: assert course[total - 1] == pytest.approx(0.01) and len(set(course)) == 5
    if dense == 1: assert not any(course[:total])


@pytest.mark.parametrize("name, value", [("total", 0), ("dense", -0.1), ("dense", 1.1), ("kappa", -1e-3), ("kappa", float("inf")), ("levels", 1)])
def test_a_schedule_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"): KappaSchedule(**{"total": 10} | {name: value})


# ---- training

def test_without_a_threshold_it_is_gated_lora_bit_for_bit():
    runs = []
    for watched in (True, False):
        model = adapted()
        train = lambda: fit(model, square, [X], 12, lr=1e-2, progress=False)
        if watched:
            with selecting(model, KappaSchedule(12, kappa=0.0)): train()
        else: train()
        runs.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(p, runs[1][n]) for n, p in runs[0].items())


def test_every_update_of_fit_is_followed_by_its_threshold():
    model, seen, course = adapted(targets=["0"]), [], KappaSchedule(10, 0.3, 0.02, 4)
    gate = parts(model)["0"].gate
    def loss(m, batch): seen.append(("used", gate.detach().clone())); return square(m, batch)
    first = register_optimizer_step_post_hook(lambda *_: seen.append(("stepped", gate.detach().clone())))
    try:
        with selecting(model, course): fit(model, loss, [X], 10, lr=1e-2, progress=False)
    finally: first.remove()
    seen.append(("used", gate.detach().clone()))
    stepped, used = [[g for what, g in seen if what == w] for w in ("stepped", "used")]
    assert len(stepped) == 10 and len(used) == 11
    for t in range(10): assert torch.equal(used[t + 1], soft_threshold_(stepped[t].clone(), course(t)))


def test_a_resumed_run_goes_on_with_its_threshold(tmp_path):
    def train(folder, stop=None):
        model, calls = adapted(), [0]
        def loss(m, batch):
            calls[0] += 1
            if calls[0] == stop: raise RuntimeError("stopped")
            return square(m, batch)
        with selecting(model, KappaSchedule(20, 0.2, 0.05)): fit(model, loss, [X], 20, lr=1e-2, folder=folder, save_every=folder and 5, progress=False)
        return torch.cat([p.gate for p in parts(model).values()])
    with pytest.raises(RuntimeError, match="stopped"): train(tmp_path, stop=14)
    assert torch.equal(train(tmp_path), train(None))


def test_only_an_optimiser_that_holds_the_gates_is_followed():
    model, other = adapted(), nn.Linear(2, 2)
    before = [p.gate.detach().clone() for p in parts(model).values()]
    step = torch.optim.SGD(other.parameters(), lr=0.1)
    mine = torch.optim.SGD([p.gate for p in parts(model).values()], lr=0.0) # keeps no count of its own
    def turn(optimizer): other(torch.ones(1, 2)).sum().backward(), square(model, X).backward(), optimizer.step()
    with selecting(model, lambda t: 0.1 * (t == 1)):
        turn(step), turn(mine)
        assert all(torch.equal(p.gate, g) for p, g in zip(parts(model).values(), before))
        turn(mine)
        assert all(torch.allclose(p.gate, soft_threshold_(g.clone(), 0.1)) for p, g in zip(parts(model).values(), before))
    after = [p.gate.detach().clone() for p in parts(model).values()]
    with pytest.raises(KeyError):
        with selecting(model, lambda t: 0.1): raise KeyError
    turn(mine)
    assert all(torch.equal(p.gate, g) for p, g in zip(parts(model).values(), after)) # nobody listens any more


def test_a_closed_gate_needs_more_than_the_threshold():
    model = adapted(targets=["0"])
    gate, optimizer = parts(model)["0"].gate, None
    for lr, open_ in ((0.01, 0), (0.03, 2)):
        fill(model)
        optimizer = torch.optim.SGD([gate], lr=1.0)
        gate.grad = torch.tensor([0.0, lr, 0.0, -lr])
        with selecting(model, lambda t: 0.02): optimizer.step()
        assert int(torch.count_nonzero(gate[[1, 3]])) == open_


# ---- one layer

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_new_adapter_changes_nothing(dtype):
    model, x = mlp().to(dtype), X.to(dtype)
    before = model(x).detach()
    adapt(model, RankSelective(r=3))
    assert torch.equal(model(x), before) and all(p.gate.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype) for p in parts(model).values())
    assert trainable(model).trainable == sum(3 * (m + n + 1) for m, n in ((8, 6), (4, 8)))


@pytest.mark.parametrize("make, targets", [(mlp, None), (gpt2, ["c_attn", "c_proj", "c_fc"])])
def test_branch_delta_and_merge_agree(make, targets):
    model = adapted(targets=targets, model=make())
    x = X if make is mlp else torch.randint(31, (2, 8))
    says = lambda m: m(x) if make is mlp else m(x).logits
    out = says(model).detach()
    for part in parts(model).values():
        u = torch.randn(5, part.A.shape[1])
        assert torch.allclose(part.branch(u), u @ part.delta().T, atol=1e-4)
        assert torch.linalg.matrix_rank(part.delta()) <= part.active_rank() == 2
    assert torch.allclose(says(merge(copy.deepcopy(model))), out, atol=1e-4) and not torch.allclose(says(remove(model)), out, atol=1e-3)


def test_a_rank_that_does_not_fit():
    for r in (0, -1):
        with pytest.raises(ValueError, match=f"r={r}"): RankSelective(r=r)
    for kept in ({"0": 5}, {"0": -1}, ["0"]):
        with pytest.raises(ValueError, match="kept"): RankSelective(r=4, kept=kept)
    with pytest.raises(ValueError, match="r=7"): adapt(mlp(), RankSelective(r=7))
    with pytest.raises(ValueError, match="r=7"): GatedLoRA(nn.Linear(6, 8), 7)


# ---- afterwards

def test_pruning_changes_no_output():
    model = adapted()
    fill(model), parts(model)["2"].gate.data.zero_()
    out = model(X).detach()
    assert active_ranks(model) == {"0": 2, "2": 0} == prune(model) == prune(model)
    assert torch.allclose(model(X), out, atol=1e-6) and parts(model)["2"].A.shape == (0, 8) and attached(model)["default"].method.kept == {"0": 2, "2": 0}
    assert all(p.requires_grad for part in parts(model).values() for p in part.parameters())
    assert torch.allclose(merge(model)(X), out, atol=1e-5)


def test_a_pruned_adapter_can_be_saved_and_loaded(tmp_path):
    model = adapted()
    parts(model)["2"].gate.data.zero_()
    prune(model), save(model, tmp_path / "a")
    again = load(mlp(), tmp_path / "a")
    assert torch.equal(again(X), model(X)) and active_ranks(again) == {"0": 2, "2": 0}
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["kept"] == {"0": 2, "2": 0}


def test_consolidating_keeps_the_outputs_and_begins_anew():
    model = adapted()
    for _ in range(3):
        fill(model)
        out = model(X).detach()
        if _ == 1: prune(model)
        assert consolidate(model) is model and torch.allclose(model(X), out, atol=1e-5)
        assert active_ranks(model) == {"0": 4, "2": 4} and all(not p.delta().any() and p.gate.requires_grad for p in parts(model).values())
    assert torch.allclose(remove(model)(X), out, atol=1e-5)


def test_no_consolidating_within_a_backward_pass():
    model = adapted()
    y = model(X)
    y.register_hook(lambda grad: consolidate(model) and None)
    with pytest.raises(RuntimeError, match="backward"): y.sum().backward()
    consolidate(model)


def test_what_has_no_gates_is_refused():
    model = adapt(mlp(), LoRA(r=2), name="plain")
    for f in (active_ranks, prune, consolidate, to_lora):
        with pytest.raises(ValueError, match="LORA"): f(model)
        with pytest.raises(KeyError, match="gone"): f(model, "gone")
    with pytest.raises(ValueError, match="no gates"):
        with selecting(model, lambda t: 0.1): pass


@pytest.mark.parametrize("make, targets", [(mlp, None), (gpt2, ["c_attn", "c_fc"])])
def test_it_leaves_as_a_lora_that_peft_loads(make, targets, tmp_path):
    model = adapted(targets=targets, model=make())
    for i, part in enumerate(parts(model).values()): part.gate.data[:i] = 0
    x = X if make is mlp else torch.randint(31, (2, 8))
    says = lambda m: m(x) if make is mlp else m(x).logits
    out, ranks = says(model).detach(), {k: r for k, r in active_ranks(model).items() if r}
    save(to_lora(model), tmp_path / "lora")
    assert torch.allclose(says(model), out, atol=1e-4) and attached(model)["default"].method.rank_pattern == ranks and list(parts(model)) == list(ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "lora")
    assert torch.allclose(says(theirs), out, atol=1e-4) and torch.allclose(says(load(make(), tmp_path / "lora")), out, atol=1e-4)
    assert torch.allclose(says(merge(model)), out, atol=1e-4)


def test_names_that_end_alike_keep_their_ranks(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(6, 6), "deep": nn.ModuleDict({"fc": nn.Linear(6, 6)})})
    model = adapt(make(), RankSelective(r=4))
    for gates, part in zip(([1.0, 0, 0, 0], [1.0, 1, 1, 0]), parts(model).values()):
        with torch.no_grad(): part.B.normal_(), part.gate.copy_(torch.tensor(gates))
    deltas = {k: p.delta().detach() for k, p in parts(model).items()}
    save(to_lora(model), tmp_path / "lora")
    again = load(make(), tmp_path / "lora")
    assert all(torch.allclose(p.delta(), deltas[k], atol=1e-6) for k, p in parts(again).items()) and [len(p.A) for p in parts(again).values()] == [1, 3]


def test_nothing_open_is_no_lora():
    model = adapt(mlp(), RankSelective(r=2))
    for part in parts(model).values(): part.gate.data.zero_()
    with pytest.raises(ValueError, match="all gates are 0"): to_lora(model)


# ---- a stream

def test_other_classes_play_no_part():
    x, y = torch.randn(8, 6, requires_grad=True), torch.tensor([2, 3, 3, 2, 2, 3, 2, 2])
    class_loss(lambda x: x, (x, y), [2, 3]).backward()
    assert not x.grad[:, [0, 1, 4, 5]].any() and x.grad[:, [2, 3]].any()


def test_learning_a_stream():
    model, tasks, noted = classifier(), stream(), []
    names, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    R = continual_fit(model, tasks, RankSelective(r=4), ["0"], steps=30, lr=2e-2, learned=lambda i, m: noted.append((i, active_ranks(m))))
    assert R.shape == (3, 3) and ((R >= 0) & (R <= 1)).all() and [i for i, _ in noted] == [0, 1, 2]
    assert list(model.state_dict()) == names and not any(isinstance(m, Adapted) for m in model.modules())
    assert not torch.equal(model[0].weight, before["0.weight"]) and torch.equal(model[2].weight, before["2.weight"])
    assert R[-1].tolist() == [rs.task_accuracy(model, t) for t in tasks]


def test_a_stream_is_a_loop_of_fit_and_consolidate():
    tasks, course = stream(2), KappaSchedule(20, kappa=0.05)
    one, two = classifier(), classifier()
    continual_fit(one, tasks, RankSelective(r=4), ["0"], steps=20, lr=1e-2, kappa=0.05, seed=5)
    torch.manual_seed(5)
    adapt(two, RankSelective(r=4), ["0"])
    for i, task in enumerate(tasks):
        with selecting(two, course): fit(two, partial(class_loss, classes=task.classes), rs.Stream(*task.train, batch=32, seed=5 + i), 20, lr=1e-2, betas=(0.9, 0.9999), weight_decay=0.0, seed=5 + i, progress=False)
        torch.manual_seed(6 + i)
        consolidate(two)
    assert torch.equal(one[0].weight, remove(two)[0].weight)


def test_streams_that_are_refused():
    good = stream(2)
    with pytest.raises(ValueError, match="got none"): continual_fit(classifier(), [])
    with pytest.raises(ValueError, match="class 0 is in 'task 0' and in 'again'"): continual_fit(classifier(), [good[0], Task("again", (0, 1), good[0].train, good[0].test)])
    with pytest.raises(ValueError, match="each once"): Task("x", (0, 0), good[0].train, good[0].test)
    with pytest.raises(ValueError, match="not among"): Task("x", (0, 2), good[0].train, good[0].test)
    with pytest.raises(ValueError, match="kappa"): continual_fit(classifier(), good, kappa=-1.0)
    with pytest.raises(ValueError, match="dense"): continual_fit(classifier(), good, dense=2.0)


def test_retention():
    assert retention([[1.0, 0], [0.25, 1]]) == 0.25 and retention(np.full((4, 4), 0.5)) == 1.0
    for wrong, word in (([[1.0]], "shape"), (np.ones((2, 3)), "shape"), ([[0.0, 0], [0, 1]], "task 0")):
        with pytest.raises(ValueError, match=word): retention(wrong)


def test_a_clip_is_a_classifier():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    clip = CLIPModel(CLIPConfig(text_config=dict(vocab_size=20, max_position_embeddings=6, eos_token_id=19, bos_token_id=0, pad_token_id=1, **sizes), vision_config=dict(image_size=4, patch_size=2, **sizes), projection_dim=8)).eval()
    texts = {"input_ids": torch.tensor([[3, 4, 19], [5, 6, 19]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    model, x = ZeroShot(clip, texts), torch.randn(5, 3, 4, 4)
    expected = clip(pixel_values=x, **texts).logits_per_image.detach()
    assert torch.equal(model(x), expected)
    adapt(model, RankSelective(r=2), ZeroShot.targets)
    assert len(parts(model)) == 12 and torch.allclose(model(x), expected, atol=1e-5)
    class_loss(model, (x, torch.tensor([0, 1, 0, 1, 1])), [0, 1]).backward()
    assert all(p.B.grad is not None and p.B.grad.any() for p in parts(model).values()) # both encoders learn


# ---- the experiment

def test_no_image_is_for_two_things():
    old, new = rs.make_stream(2)
    ids = lambda images: {tuple(i.flatten().tolist()) for i in images}
    undo = {"inverted": lambda x: 1 - x, "rolled down": lambda x: x.roll(-3, 1), "rolled right": lambda x: x.roll(-3, 2)}
    test = ids(old[0].test[0])
    assert not ids(old[0].train[0]) & test and len(old[0].train[0]) == 1797 // 2
    for task in new:
        assert len(task.train[0]) == 300
        if task.name in undo: assert {tuple(round(v, 4) for v in i) for i in ids(undo[task.name](task.train[0]))}.isdisjoint({tuple(round(v, 4) for v in i) for i in test | ids(old[0].train[0])})


def test_arms_at_the_smallest_scale():
    arms = rs.dynamic_lora(1000, as_scale("tiny"))
    assert all(0 <= v <= 1 for v in arms.values()) and {f"{a}: {w}" for a in rs.ARMS for w in ("old", "new", "final", "kept")} < set(arms)
    assert arms["shrunk evenly: kept"] == 1.0
