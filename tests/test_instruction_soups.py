"""Instruction soups and the perplexity filter: bad input is refused at the door, and what must hold for any model and any data."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptbook.merge.instruction_soups import (
    BENCHMARKS, WORDS, Captioner, add_one_out, bases, caption_loss, captioned, instruction_soup, keep_lowest, make_kitchen, make_pool, mean_score, mixtures_of,
    perplexity, suite_of, tune)


class Table(nn.Module):
    "The next token from the last one; `shift`, if given, is added to the logits."
    def __init__(self, vocab: int = 11):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.drop = nn.Embedding(vocab, vocab), nn.Dropout(0.5)
    def forward(self, ids, shift=None): return self.drop(self.rows(ids)) + (0 if shift is None else shift[:, None])


@pytest.fixture
def model(): return Table().train()


@pytest.fixture
def ids(): return torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(1))


def test_perplexity_is_exp_of_the_mean_over_scored_tokens_within_a_row(model, ids):
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 4] = True
    got, table = perplexity(model, ids, mask), model.rows.weight.log_softmax(-1)
    for row, keep, value in zip(ids.tolist(), mask.tolist(), got):
        nats = [-table[a, b].item() for a, b, k in zip(row, row[1:], keep[1:]) if k]
        assert math.isclose(value.item(), math.exp(sum(nats) / len(nats)), rel_tol=1e-4)
    assert model.training and not got.requires_grad # dropout was off, and the mode is as it was


def test_the_first_token_is_never_scored(model, ids):
    mask = torch.ones_like(ids)
    without = mask.clone()
    without[:, 0] = 0
    assert torch.equal(perplexity(model, ids, mask), perplexity(model, ids, without))


def test_what_a_model_is_conditioned_on_passes_through(model, ids):
    shift = 5.0 * F.one_hot(ids[:, 3], 11).float()
    mask = torch.zeros_like(ids)
    mask[:, 3] = 1
    assert (perplexity(model, ids, mask, shift=shift) < perplexity(model, ids, mask)).all()


def test_half_precision_logits_are_scored_in_single(ids):
    class Low(Table):
        def forward(self, ids): return super().forward(ids).bfloat16()
    assert perplexity(Low(), ids, torch.ones_like(ids)).dtype == torch.float32


def test_certainty_does_not_overflow_what_is_not_scored(ids):
    class Never(nn.Module): # -inf for token 0, else all alike
        def forward(self, ids): return torch.zeros(*ids.shape, 11).index_fill(-1, torch.tensor([0]), -math.inf)
    some = ids.clamp(min=1)
    padded, mask = F.pad(some, (0, 2), value=0), F.pad(torch.ones_like(some), (0, 2))
    assert torch.allclose(perplexity(Never(), padded, mask), torch.full((5,), 10.0))


@pytest.mark.parametrize("mask", [torch.ones(5, 7), torch.ones(8), torch.zeros(5, 8), F.pad(torch.ones(5, 1), (0, 7))])
def test_a_mask_that_does_not_fit_or_is_empty_is_refused(model, ids, mask):
    with pytest.raises(ValueError, match="mask"): perplexity(model, ids, mask)


def test_logits_that_do_not_fit_are_refused(ids):
    class Prefixed(Table): # gives logits for two picture tokens, too
        def forward(self, ids): return F.pad(super().forward(ids), (0, 0, 2, 0))
    with pytest.raises(ValueError, match="logits"): perplexity(Prefixed(), ids, torch.ones_like(ids))


def test_keep_lowest_keeps_the_ceiling_nested_and_stable():
    scores = torch.randint(4, (37,), generator=torch.Generator().manual_seed(0)).float()
    before = []
    for i in range(1, 38):
        kept = keep_lowest(scores, i / 37).tolist()
        assert len(kept) == i and kept[:len(before)] == before
        assert kept == sorted(kept, key=lambda j: (scores[j].item(), j))
        before = kept


def test_keep_lowest_leaves_short_items_out_before_it_takes_the_share():
    scores, length = torch.arange(10.0), torch.tensor([1, 9] * 5)
    assert keep_lowest(scores, 0.4, length, 5).tolist() == [1, 3]
    assert keep_lowest(scores, 1.0, length, 100).tolist() == []


@pytest.mark.parametrize("given", [dict(fraction=0.0), dict(fraction=1.1), dict(fraction=-1), dict(fraction=math.nan)])
def test_a_share_outside_its_range_is_refused(given):
    with pytest.raises(ValueError, match="fraction"): keep_lowest(torch.rand(4), **given)


def test_scores_that_cannot_be_sorted_are_refused():
    for wrong in (torch.tensor([1.0, math.nan]), torch.rand(2, 2)):
        with pytest.raises(ValueError, match="scores"): keep_lowest(wrong, 0.5)
    with pytest.raises(ValueError, match="length"): keep_lowest(torch.rand(3), 0.5, torch.ones(4))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_mixtures_hold_all_of_the_core_at_its_share(share):
    core, extras = [f"b{i}" for i in range(30)], [[f"x{i}" for i in range(7)], [f"y{i}" for i in range(500)]]
    for mixture, extra in zip(add_one_out(core, extras, share), extras):
        items = list(mixture[i] for i in range(len(mixture)))
        others = [i for i in items if i not in core]
        assert sorted(i for i in items if i in core) == sorted(core) and set(others) <= set(extra)
        assert len(others) == round(30 * (1 - share) / share)
        counts = [others.count(i) for i in extra]
        assert max(counts) - min(counts) <= 1 # none a second time before each was there once


def test_mixtures_are_drawn_anew_with_another_seed_only():
    one, same, other = (add_one_out(range(20), [range(100, 200)], seed=s)[0] for s in (0, 0, 1))
    assert list(one) == list(same) != list(other)


def test_mixtures_refuse_what_cannot_be_mixed():
    for share in (0.0, 1.0, -0.1, 2):
        with pytest.raises(ValueError, match="core_share"): add_one_out([1], [[2]], share)
    with pytest.raises(ValueError, match="base_set"): add_one_out([], [[2]])
    with pytest.raises(ValueError, match=r"extras\[1\]"): add_one_out([1], [[2], []])


def random_models(n: int) -> list[nn.Module]:
    made = []
    for seed in range(n):
        torch.manual_seed(seed)
        made.append(nn.Linear(4, 3))
    return made


SUITE = {"sum": lambda m: m.weight.sum().item(), "bias": lambda m: -m.bias.abs().max().item()}


@pytest.mark.parametrize("recipe", ["maximum", "average", "greedy"])
def test_copies_make_the_model_again_and_the_models_are_left_alone(recipe):
    model, = random_models(1)
    before = model.weight.clone()
    soup = instruction_soup([model] * 4, SUITE, recipe).model
    assert soup is not model and torch.allclose(soup.weight, model.weight) and torch.equal(model.weight, before)


def test_greedy_is_never_below_maximum_where_it_chose():
    for n in range(1, 7):
        models = random_models(n)
        got = {recipe: mean_score(SUITE)(instruction_soup(models, SUITE, recipe).model) for recipe in ("maximum", "greedy")}
        assert got["greedy"] >= got["maximum"] == pytest.approx(max(map(mean_score(SUITE), models)))


def test_average_is_the_mean_of_all():
    models = random_models(5)
    result = instruction_soup(models, SUITE, "average")
    assert sorted(result.ingredients) == list(range(5)) and all(t.kept for t in result.history)
    assert torch.allclose(result.model.weight, torch.stack([m.weight for m in models]).mean(0), atol=1e-6)


def test_soups_refuse_what_they_cannot_cook():
    models = random_models(2)
    with pytest.raises(ValueError, match="recipe"): instruction_soup(models, SUITE, "best")
    with pytest.raises(ValueError, match="models"): instruction_soup([], SUITE, "average")
    with pytest.raises(ValueError, match="suite"): instruction_soup(models, {})
    with pytest.raises(ValueError, match="'odd' gave NaN"): instruction_soup(models, SUITE | {"odd": lambda m: math.nan}, "maximum")


def test_no_picture_is_in_two_parts_and_half_of_the_bad_labels_are_random():
    kitchen, clean = make_kitchen(7), make_kitchen(7)
    parts = [kitchen.base_set[0], kitchen.held_out["plain"][0], kitchen.test["plain"][0], kitchen.extras["plain"][0]]
    rows = [set(map(tuple, p.flatten(1).tolist())) for p in parts]
    assert all(not a & b for i, a in enumerate(rows) for b in rows[:i])
    assert list(kitchen.extras) == list(BENCHMARKS) and torch.equal(kitchen.extras["noisy"][0], clean.extras["noisy"][0])
    assert all(len(m) == 2 * len(kitchen.base_set[0]) for m in mixtures_of(kitchen))


def test_specialists_leave_their_start_alone_and_differ():
    kitchen = make_kitchen(3)
    start, = bases(kitchen, [3], 5)
    before = [p.clone() for p in start.parameters()]
    a, b = tune([start] * 2, mixtures_of(kitchen)[:2], 3, 3)
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), before))
    assert not torch.equal(a[1].weight, b[1].weight)
    assert 0 <= mean_score(suite_of(kitchen.test))(a) <= 1


def test_captions_say_what_is_drawn_or_are_marked_wrong():
    part = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 10
    right, mixed, empty = captioned(part, 0), captioned(part, 0, wrong=0.5), captioned(part, 0, boilerplate=1.0)
    assert right.right.all() and torch.equal(right.images, mixed.images) and not empty.right.any()
    assert torch.equal((mixed.ids == right.ids).all(1), mixed.right) and 0.4 < mixed.right.float().mean() < 0.65
    texts = {" ".join(WORDS[i] for i in row if i > 2) for row in empty.ids.tolist()}
    assert len(texts) == 2 and torch.equal(right.tensors[2].sum(1), torch.full((300,), 9))


def test_loss_and_perplexity_of_a_captioner_agree():
    part = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    data, model = captioned(part, 0, boilerplate=0.3), Captioner()
    ppl, count = perplexity(model, data.ids, data.ids != 0, images=data.images), (data.ids != 0).sum(1) - 1
    assert torch.isclose((ppl.log() * count).sum() / count.sum(), caption_loss(model, data.tensors), atol=1e-5)


def test_a_captioner_does_not_look_ahead():
    model, ids, images = Captioner(), torch.randint(len(WORDS), (2, 6)), torch.rand(2, 1, 8, 8)
    later = ids.clone()
    later[:, 4:] = 1
    assert torch.equal(model(ids, images)[:, :4], model(later, images)[:, :4])


def test_a_pool_is_half_right_and_a_scorer_knows_it():
    pool = make_pool(5, 80)
    assert 0.45 < pool.data.right.float().mean() < 0.6 and pool.perplexity.min() >= 1
    assert pool.perplexity[pool.data.right].median() < pool.perplexity[~pool.data.right].median()
    assert pool.data.right[keep_lowest(pool.perplexity, 0.2)].float().mean() > 0.7
