"""The causal chapter: bad input at the door, relative positions, resuming a GRPO run, and a second process."""
import math

import pytest
import torch
from torch import nn

from ptbook.basics.claims import SCALES
from ptbook.basics.models import Transformer, logits_of, style
from ptbook.basics.text import Stream
from ptbook.basics.train import fit
from ptbook.objectives.causal import (ANSWER, BUDGETS, EOS, PROMPT, Recipe, Stage, causal_loss, dpo_loss, exact_match, fit_hyper_law, group_advantages,
                                      grpo_loss, grpo_objective, make_world, network, preference_pairs, response_mask, rollout, sequence_logprob,
                                      shuffled_match)


def ids(rows=3, length=8, seed=0): return torch.randint(15, (rows, length), generator=torch.Generator().manual_seed(seed))


class Guess(nn.Module):
    "Logits that depend on nothing but a learned vector: the smallest module from ids to logits."
    def __init__(self, vocab=15):
        super().__init__()
        self.bias, self.drop = nn.Parameter(torch.zeros(vocab)), nn.Dropout(0.5)

    def forward(self, ids): return self.drop(self.bias).expand(*ids.shape, -1)


@pytest.mark.parametrize("mask, word", [(torch.ones(3, 7), "shape"), (torch.zeros(3, 8), "row 0"),
                                        (torch.eye(3, 8), "row 0")]) # only the first token of row 0: nothing predicts it
def test_causal_loss_refuses_masks(mask, word):
    with pytest.raises(ValueError, match=word): causal_loss(network(0), ids(), mask)


def test_causal_loss_refuses_single_tokens():
    with pytest.raises(ValueError, match="length 2"): causal_loss(network(0), ids(3, 1))
    with pytest.raises(ValueError, match="length 2"): causal_loss(network(0), ids()[0])


@pytest.mark.parametrize("start", [0, 8, -1])
def test_sequence_logprob_refuses_start(start):
    with pytest.raises(ValueError, match="start"): sequence_logprob(network(0), ids(), start)


def test_bad_networks():
    with pytest.raises(ValueError, match="kv_heads"): Transformer(style("qwen2", vocab_size=15, hidden_size=48, heads=4, kv_heads=3))
    with pytest.raises(ValueError, match="even"): Transformer(style("qwen2", vocab_size=15, hidden_size=36, heads=4, kv_heads=2))


def test_bad_losses():
    v = torch.zeros(4)
    for beta in (0, -1, math.nan):
        with pytest.raises(ValueError, match="beta"): dpo_loss(v, v, v, v, beta)
    with pytest.raises(ValueError, match="shapes"): dpo_loss(v, v, v, torch.zeros(3))
    for shape in ((4,), (4, 1)):
        with pytest.raises(ValueError, match="2 or more"): group_advantages(torch.zeros(shape))
    m = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="no response token"): grpo_loss(m, m, m, v, m)
    with pytest.raises(ValueError, match="adv"): grpo_loss(m, m, m, torch.zeros(3), m + 1)
    with pytest.raises(ValueError, match="shapes"): grpo_loss(m, m[:, :2], m, v, m + 1)
    with pytest.raises(ValueError, match="beta"): grpo_loss(m, m, m, v, m + 1, beta=-1)
    with pytest.raises(ValueError, match="eps"): grpo_loss(m, m, m, v, m + 1, eps=0)


@pytest.mark.parametrize("N, D, best", [([1, 2], [1, 2], [1, 2]), ([1, 2, 3], [1, 2], [1, 2, 3]), ([1, 2, 4], [1, 2, 4], [1, 1, 1]), # on one line
                                        ([1, 2, 4], [1, 5, 2], [1, 0, 1]), ([1, 2, -4], [1, 5, 2], [1, 1, 1]), ([1, 2, math.inf], [1, 5, 2], [1, 1, 1])])
def test_bad_laws(N, D, best):
    with pytest.raises(ValueError): fit_hyper_law(N, D, best)


def test_law_recovers_exponents():
    law = fit_hyper_law([1, 10, 100, 1000], [5, 1, 9, 2], [2 * n**-0.4 * d**0.3 for n, d in zip([1, 10, 100, 1000], [5, 1, 9, 2])])
    assert math.isclose(law.b, -0.4, abs_tol=1e-9) and math.isclose(law.c, 0.3, abs_tol=1e-9) and math.isclose(law(1, 1), 2, rel_tol=1e-9)


def test_recipe():
    stage = Stage("a", lambda model: 3)
    for stages in ([], [stage, stage]):
        with pytest.raises(ValueError, match="stages"): Recipe(stages)
    seen = []
    rows = Recipe([Stage("one", lambda m: seen.append("one")), Stage("two", lambda m: seen.append("two"))])(nn.Linear(1, 1), lambda m: {"n": len(seen)})
    assert seen == ["one", "two"] and [(r["stage"], r["n"]) for r in rows] == [("one", 1), ("two", 2)]


def test_any_module():
    model, x = Guess().eval(), ids()
    assert math.isclose(causal_loss(model, x).item(), math.log(15), rel_tol=1e-6)
    assert torch.allclose(sequence_logprob(model, x, 3), torch.full((3, 5), -math.log(15)))
    drawn = rollout(model, x[:2, :6], 4, 4, EOS)
    assert drawn.shape == (8, 10) and torch.equal(drawn[:4, :6], x[:1, :6].expand(4, -1))


def test_positions_are_relative_and_the_future_is_hidden():
    model, x = network(0).eval(), ids(2, 10)
    lead = torch.arange(10)[None].expand(2, -1)
    assert torch.allclose(logits_of(model, x), logits_of(model, x, positions=lead + 7), atol=1e-5)
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 15
    assert torch.equal(logits_of(model, x)[:, :6], logits_of(model, changed)[:, :6])


def test_what_stands_behind_eos_has_no_say():
    model, reference = network(0), network(1)
    x = ids(8, 10)
    x[:, 7] = EOS
    other = x.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 15
    def loss(rows):
        lp, ref = sequence_logprob(model, rows, PROMPT), sequence_logprob(reference, rows, PROMPT).detach()
        adv = group_advantages(torch.arange(8.).view(2, 4)).flatten()
        return grpo_loss(lp, lp.detach(), ref, adv, response_mask(rows[:, PROMPT:], EOS))
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(loss(rows), list(model.parameters()))]) for rows in (x, other))
    assert torch.allclose(a, b, atol=1e-7) and a.abs().max() > 0


def test_one_step_raises_what_was_better():
    torch.manual_seed(0)
    model, first = Guess(), lambda rows: (rows[:, PROMPT] == 3).float()
    model.drop.p = 0.0
    fit(model, grpo_objective(Guess().eval(), first, ANSWER, EOS, 8), Stream(ids(64, PROMPT), batch=16), 30, lr=0.1, progress=False)
    assert model.bias.argmax() == 3


def test_old_probabilities_are_free_of_dropout():
    model = Guess() # dropout 0.5, in train mode
    model.bias.data = torch.linspace(-1, 1, 15)
    objective = grpo_objective(model, lambda rows: rows[:, PROMPT].float(), ANSWER, EOS, 4, beta=0.0)
    assert objective(model, ids(4, PROMPT)).isfinite() and model.training # and the mode comes back


def test_extra_columns_reach_the_reward():
    got = {}
    def reward(rows, gold):
        got["gold"] = gold
        return (rows[:, PROMPT] == gold).float()
    grpo_objective(network(1), reward, ANSWER, EOS, 4)(network(0), (ids(3, PROMPT), torch.tensor([5, 6, 7])))
    assert got["gold"].tolist() == [5] * 4 + [6] * 4 + [7] * 4


def test_shuffled_rewards_cross_the_groups():
    world = make_world(0)
    rows = torch.cat([world.demonstrations[:1].expand(8, -1), world.demonstrations[1:2].expand(8, -1).clone()])
    rows[8:, PROMPT] = (rows[8:, PROMPT] + 1) % 8 # one group all right, one all wrong: no variance within, all of it across
    torch.manual_seed(0)
    groups = shuffled_match(rows).view(2, 8).sum(1)
    assert exact_match(rows).view(2, 8).sum(1).tolist() == [8, 0] and groups.sum() == 8 and 0 < groups[0] < 8


def test_pairs_only_where_both_are_found():
    model, x = Guess().eval(), ids(5, PROMPT)
    for constant in (0.0, 1.0):
        won, lost = preference_pairs(model, x, lambda rows: torch.full((len(rows),), constant), ANSWER, EOS)
        assert won.shape == lost.shape == (0, PROMPT + ANSWER)


def test_a_resumed_grpo_run_ends_in_the_same_weights(tmp_path):
    world, ends = make_world(1000), []
    def go(folder, steps_first=None):
        model = network(0)
        args = dict(lr=1e-3, seed=5, progress=False, folder=folder, save_every=2)
        loss, data = grpo_objective(network(0), exact_match, ANSWER, EOS), Stream(world.prompts, batch=4, seed=0)
        if steps_first:
            seen = []
            def stopping(m, batch):
                seen.append(1)
                if len(seen) > steps_first: raise RuntimeError("killed")
                return loss(m, batch)
            stopping.__qualname__ = loss.__qualname__
            with pytest.raises(RuntimeError): fit(model, stopping, data, 6, **args)
            model = network(0)
        return fit(model, loss, data, 6, **args)
    whole, resumed = go(tmp_path / "a"), go(tmp_path / "b", 3)
    assert list(whole.losses) == list(resumed.losses)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)


def test_budgets_of_compared_arms():
    tiny, book = SCALES["tiny"], SCALES["book"]
    for scale in (tiny, book):
        assert BUDGETS["GRPO"].at(scale) == BUDGETS["more SFT"].at(scale) == BUDGETS["GRPO, shuffled rewards"].at(scale)
        assert BUDGETS["long SFT"].at(scale) == BUDGETS["pre-train"].at(scale) + BUDGETS["SFT"].at(scale)
