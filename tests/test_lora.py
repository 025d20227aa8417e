"LoRA: what the paper says of it, and what `peft` computes."
import math

import peft
import pytest
import torch
from torch import nn

from ptbook.adapt.adapters import adapt, matrix, parts, trainable
from ptbook.adapt.lora import HEAD, RATES, LoRA, LoRAAdapter, Scattered, learner, lora
from ptbook.basics.claims import run
from ptbook.basics.worlds import glyph_vit


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 5))


@pytest.mark.parametrize("rows", [6, 400]) # few rows go the one way, many the other
@pytest.mark.parametrize("r, alpha, rslora", [(1, 1.0, False), (3, 16.0, False), (4, 6.0, True)])
def test_gradients_are_those_of_peft(r, alpha, rslora, rows):
    ours, theirs = adapt(mlp(), LoRA(r=r, alpha=alpha, rslora=rslora), ["0", "2"]), peft.get_peft_model(mlp(), peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["0", "2"]))
    x = torch.randn(rows, 12)
    pairs = []
    for place, part in parts(ours).items():
        layer = theirs.base_model.model.get_submodule(place)
        with torch.no_grad(): part.B.normal_(), layer.lora_A.default.weight.copy_(part.A), layer.lora_B.default.weight.copy_(part.B)
        pairs += [(part.A, layer.lora_A.default.weight), (part.B, layer.lora_B.default.weight)]
    a, b = ours(x), theirs(x)
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    a.square().sum().backward(), b.square().sum().backward()
    assert all((p.grad - q.grad).abs().max() < 1e-4 * q.grad.abs().max().clamp(min=1) for p, q in pairs)


def test_the_in_place_product_is_the_derivative_of_the_plain_one():
    part = LoRAAdapter(nn.Linear(5, 4).double(), 2, 0.7)
    with torch.no_grad(): part.B.normal_()
    x, y = torch.randn(3, 5, dtype=torch.double, requires_grad=True), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y, A, B: part.add(y * 1.0, x), (x, y, part.A, part.B))
    assert torch.allclose(part.add(y * 1.0, x), y + x @ part.delta().T)


def test_the_start():
    torch.manual_seed(0)
    kaiming, gaussian = LoRAAdapter(nn.Linear(400, 300), 50, 1.0), LoRAAdapter(nn.Linear(400, 300), 50, 1.0, init="gaussian")
    bound = 1 / math.sqrt(400)
    assert 0.98 * bound < kaiming.A.abs().max() <= bound and abs(kaiming.A.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert abs(gaussian.A.std() - 1 / 50) < 1e-3 and kaiming.B.abs().max() == gaussian.B.abs().max() == 0


@pytest.mark.parametrize("r", [1, 2, 5])
def test_rank_and_count(r):
    model = adapt(mlp(), LoRA(r=r), ["0", "2"])
    with torch.no_grad():
        for part in parts(model).values(): part.B.normal_()
    assert all(torch.linalg.matrix_rank(part.delta()) == r for part in parts(model).values())
    assert trainable(model).trainable == r * (12 + 20) + r * (20 + 5)
    same = adapt(mlp(), Scattered(r), ["0", "2"])
    assert trainable(same).trainable == min(r * 32, 240) + min(r * 25, 100)


def test_scattered_numbers_are_where_they_were_drawn():
    torch.manual_seed(0)
    part = Scattered(1).adapter(nn.Linear(8, 6), "")
    with torch.no_grad(): part.values.fill_(1.0)
    assert part.delta().sum() == 14 and set(part.delta().flatten().tolist()) == {0.0, 1.0}
    part.delta().square().sum().backward()
    assert torch.equal(part.values.grad, torch.full((14,), 2.0))


def test_ranks_by_layer():
    model = adapt(mlp(), LoRA(r=1, alpha=4, rank_pattern={"2": 3}, alpha_pattern={"0": 2.0}), ["0", "2"])
    assert {place: (part.A.shape[0], part.scale) for place, part in parts(model).items()} == {"0": (1, 2.0), "2": (3, 4 / 3)}
    with pytest.raises(ValueError, match="rank_pattern"): LoRA(rank_pattern={"2": 0})


@pytest.mark.parametrize("arm", RATES)
def test_what_each_arm_trains(arm):
    start = glyph_vit(0)
    model = learner(start, arm, 0)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {n for n in learns if n in HEAD}
    assert heads == set(HEAD)
    rest = learns - heads
    if "head" in arm: assert not rest
    elif "full" in arm: assert learns == set(dict(model.named_parameters()))
    else: assert rest and all(".adapters.default." in n for n in rest)
    if "r=2" in arm: assert trainable(model).trainable == trainable(learner(start, "scattered numbers", 0)).trainable
    assert all(p.requires_grad for p in start.parameters())


def test_the_experiment_at_its_smallest(monkeypatch):
    monkeypatch.setenv("PTBOOK_SCALE", "tiny")
    report = run(lora, "tiny", seeds="0", jobs=1, progress=False)
    assert set(RATES) < set(report.arms) and abs(report.arms["gap, blank"][0] - (report.arms["blank: full fine-tuning"][0] - report.arms["blank: LoRA r=2"][0])) < 1e-9
    assert [c["primary"] for c in report.claims] == [True, False, False, False]
