"""Many models at once: what training side by side must not change, and what it refuses."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptbook.basics.models import Transformer, style
from ptbook.basics.stacked import Beside, clip_each, fit_stacked, stack, stacked_logits
from ptbook.basics.text import Stream
from ptbook.basics.train import NonFiniteLoss, fit


def decoder(seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(style("llama", vocab_size=20, hidden_size=16, layers=1, heads=2, max_length=12))


def next_token(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ids(seed: int) -> torch.Tensor:
    return torch.randint(20, (40, 12), generator=torch.Generator().manual_seed(seed))


def largest_gap(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


def test_decoders_train_as_alone():
    models, streams = [decoder(s) for s in range(3)], [Stream(ids(s), batch=4, seed=s) for s in range(3)]
    together = fit_stacked(models, next_token, Beside(streams), 12, lr=[1e-3, 3e-3, 1e-2], weight_decay=0.1, schedule="linear", warmup=3)
    for model, made, stream, lr in zip(models, together, streams, (1e-3, 3e-3, 1e-2)):
        alone = fit(copy.deepcopy(model), next_token, stream, 12, lr=lr, weight_decay=0.1, schedule="linear", warmup=3, progress=False).model
        assert largest_gap(made, alone) < 1e-4 < largest_gap(made, model)


def test_what_is_frozen_stays_and_inputs_are_left_alone():
    models = [decoder(s) for s in range(2)]
    for m in models: m.embedding.requires_grad_(False)
    before = [copy.deepcopy(m.state_dict()) for m in models]
    after = fit_stacked(models, next_token, Beside([Stream(ids(0), batch=4)] * 2), 3, lr=0.1)
    for m, was, made in zip(models, before, after):
        assert all(torch.equal(was[n], t) for n, t in m.state_dict().items())
        changed = {n for n, p in made.named_parameters() if not torch.equal(p, dict(m.named_parameters())[n])}
        assert changed and not any(n.startswith("embedding") for n in changed)
        assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in m.parameters()]


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    model = Transformer(style("qwen2", vocab_size=20, hidden_size=16, layers=1, heads=2, max_length=12))
    made, = fit_stacked([model], next_token, Beside([Stream(ids(0), batch=4)]), 3, lr=1e-2)
    alone = fit(copy.deepcopy(model), next_token, Stream(ids(0), batch=4), 3, lr=1e-2, schedule="constant", warmup=0.0, weight_decay=0.0, progress=False).model
    assert largest_gap(made, alone) < 1e-3 # keys have no use for a bias: its gradient is rounding, and Adam walks on it


class Sum(nn.Module):
    "Two inputs, one of them by name."
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x, y, *, sign=1.0): return self.scale * (x + sign * y)


def test_models_may_have_several_inputs():
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    made = fit_stacked([Sum(), Sum()], lambda m, b: m(b[0], b[1], sign=-1.0).pow(2).mean(), [(x, y)], 1, lr=0.1, clip=None)
    assert torch.allclose(made[0].scale, torch.full((3,), 0.9), atol=1e-3)


def test_a_neighbour_changes_nothing():
    one = fit_stacked([decoder(0)], next_token, Beside([Stream(ids(0), batch=4)]), 6, lr=1e-2)
    beside = fit_stacked([decoder(0), decoder(1)], next_token, Beside([Stream(ids(0), batch=4), Stream(ids(1), batch=4)]), 6, lr=[1e-2, 0.3])
    assert largest_gap(one[0], beside[0]) < 1e-5


def test_answers_are_those_of_each_model():
    models = [decoder(s).train(s == 0) for s in range(2)]
    said = stacked_logits(models, ids(0)[:5])
    assert all(torch.allclose(said[i], m.eval()(ids(0)[:5]), atol=1e-5) for i, m in enumerate(models))


@pytest.mark.parametrize("wrong, word", [(dict(lr=[1e-3]), "lr"), (dict(lr=-1.0), "lr"), (dict(weight_decay=[0.1, 0.2, 0.3]), "weight_decay"), (dict(lr=float("nan")), "lr")])
def test_settings_that_do_not_fit(wrong, word):
    with pytest.raises(ValueError, match=word): fit_stacked([decoder(0), decoder(1)], next_token, Beside([Stream(ids(0), batch=4)] * 2), 2, **wrong)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="none"): stack([])
    with pytest.raises(ValueError, match="model 1"): stack([nn.Linear(2, 3), nn.Linear(3, 2)])
    with pytest.raises(ValueError, match="running statistics"): stack([nn.BatchNorm1d(2)])
    with pytest.raises(ValueError, match="gradient"): fit_stacked([nn.Linear(2, 2).requires_grad_(False)], next_token, [], 1)
    with pytest.raises(ValueError, match="2"): stacked_logits([nn.Linear(2, 2)] * 2, torch.zeros(3, 1, 2), each=True)
    with pytest.raises(ValueError, match="streams"): Beside([])


def test_a_loss_that_is_no_number_names_step_and_model():
    bad = [torch.zeros(2, 4, 3)] * 3
    bad[2] = torch.stack([torch.zeros(4, 3), torch.full((4, 3), torch.inf)])
    with pytest.raises(NonFiniteLoss, match="step 3.*model 1"): fit_stacked([nn.Linear(3, 1), nn.Linear(3, 1)], lambda m, x: m(x).pow(2).mean(), bad, 3)


def test_each_model_is_clipped_by_its_own_norm_over_tensors_of_any_shape():
    grads = [torch.tensor([3.0, 0.3]), torch.tensor([[[4.0, 0.0]], [[0.0, 0.4]]])] # of two models: a scalar and a matrix of each
    norms = clip_each(grads, 1.0)
    assert torch.allclose(norms, torch.tensor([5.0, 0.5])) and torch.allclose(grads[0], torch.tensor([0.6, 0.3])) and torch.allclose(grads[1][:, 0], torch.tensor([[0.8, 0.0], [0.0, 0.4]]))
