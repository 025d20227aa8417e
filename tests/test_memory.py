"""Memory: bytes that can be counted by hand, and what must not be counted."""
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from ptbook.basics.memory import gradient_bytes, optimizer_bytes, parameter_bytes, saved_bytes, training_memory


def net(*sizes: int, act=nn.GELU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), act())][:-1])


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_linear_layers_by_hand(batch, dtype):
    model, x = net(8, 16, 4).to(dtype), torch.randn(batch, 8, dtype=dtype)
    size = x.element_size()
    assert saved_bytes(lambda: model(x), model, inputs=x).bytes == size * batch * 16 * 2
    assert saved_bytes(lambda: model(x), model).bytes == size * batch * (16 * 2 + 8)
    assert saved_bytes(lambda: model(x)).bytes == size * batch * (16 * 2 + 8) # parameters are known without the model
    for p in model[2].parameters(): p.requires_grad_(False)
    assert saved_bytes(lambda: model(x), model, inputs=x).bytes == size * batch * 16 # only what the function was asked


def test_a_storage_counts_once_and_whole():
    wide = torch.randn(10, 100, requires_grad=True)
    assert saved_bytes(lambda: wide.exp()[:, :5].pow(2).sum()).bytes == 4 * 1000 # the slice keeps all of the exponential, which is saved anyway
    assert saved_bytes(lambda: (h := wide * 2).pow(2).sum() + h.mT.pow(3).sum()).bytes == 4 * 1000
    half = torch.randn(10, 100, requires_grad=True)
    assert saved_bytes(lambda: (wide + half)[:, :5].pow(2).sum()).bytes == 4 * 1000


def test_modules_add_up_and_names_are_dotted():
    model = nn.ModuleDict({"a": net(4, 8, 4), "b": net(4, 8, 4)})
    x = torch.randn(5, 4)
    saved = saved_bytes(lambda: model["b"](model["a"](x)).pow(2).sum(), model, inputs=x)
    assert saved.bytes == sum(saved.by_module.values()) == saved.within("") == saved.within("a") + saved.within("b") + saved.by_module[""]
    assert saved.by_module["a.1"] == saved.by_module["a.2"] == 4 * 5 * 8 and set(saved.by_module) == {"", "a.1", "a.2", "b.0", "b.1", "b.2"}


def test_no_gradient_no_bytes():
    model, x = net(4, 8, 4), torch.randn(5, 4)
    with torch.no_grad(): assert saved_bytes(lambda: model(x), model).bytes == 0
    assert saved_bytes(lambda: model.requires_grad_(False)(x), model).bytes == 0


def test_checkpointing_keeps_inputs():
    parts, x = [net(4, 32, 4) for _ in range(3)], torch.randn(5, 4)
    run = lambda: functools.reduce(lambda h, p: checkpoint(p, h, use_reentrant=False), parts, x)
    model = nn.ModuleList(parts)
    assert saved_bytes(run, model, inputs=x).bytes == 2 * 4 * 5 * 4
    assert saved_bytes(lambda: functools.reduce(lambda h, p: p(h), parts, x), model, inputs=x).bytes == 4 * 5 * (3 * 64 + 2 * 4)


def test_backward_is_not_disturbed():
    model, x = net(6, 12, 3), torch.randn(5, 6)
    model(x).pow(2).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    held = []
    saved_bytes(lambda: held.append(model(x).pow(2).sum()) or held[0], model)
    held[0].backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected))


def test_hooks_go_even_after_an_error():
    model = net(4, 8, 4)
    with pytest.raises(RuntimeError): saved_bytes(lambda: model(torch.randn(5, 3)), model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="f: got NoneType"): saved_bytes(lambda: None)


def test_tied_weights_count_once():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    assert parameter_bytes(gpt2) == 4 * sum(p.numel() for p in gpt2.parameters())
    lone = nn.Linear(4, 4, bias=False)
    assert parameter_bytes(nn.ModuleList([lone, lone])) == 64 and gradient_bytes(lone) == 0


@pytest.mark.parametrize("make, per_number", [(torch.optim.AdamW, 8), (functools.partial(torch.optim.SGD, lr=0.1), 0), (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), 4)])
def test_a_step_is_counted_and_undone(make, per_number):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    model[0].bias.requires_grad_(False)
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    memory = training_memory(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch, make)
    learns = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in learns)
    assert memory.weights == 4 * (numbers + 8) and memory.gradients == 4 * numbers and memory.peak is None
    assert memory.optimizer == per_number * numbers + (4 * len(learns) if per_number == 8 else 0)
    assert memory.total == sum(memory[:4]) and memory.activations > 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and torch.equal(torch.get_rng_state(), random)
    assert not model.training and not model[2].training and all(p.grad is None for p in learns)


def test_an_optimizer_is_empty_before_its_first_step():
    assert optimizer_bytes(torch.optim.AdamW(net(2, 2).parameters())) == 0
    with pytest.raises(ValueError, match="requires a gradient"): training_memory(net(2, 2).requires_grad_(False), lambda m, b: m(b).sum(), torch.ones(1, 2))


def test_a_hugging_face_model_and_its_batch():
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16))
    batch = {"input_ids": torch.randint(50, (4, 8)), "labels": torch.tensor([0, 1, 0, 1])}
    loss = lambda model, b: model(**b).loss
    all_learn = training_memory(bert, loss, batch)
    assert saved_bytes(lambda: bert.eval()(**batch), bert).bytes > 0 # a ModelOutput, too, keeps its graph
    for n, p in bert.named_parameters(): p.requires_grad_(n.startswith("classifier"))
    head = training_memory(bert, loss, batch)
    assert head.weights == all_learn.weights and head.gradients == 4 * (16 * 2 + 2) and head.activations < 0.1 * all_learn.activations
