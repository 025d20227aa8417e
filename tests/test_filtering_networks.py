"Data filtering networks: losses, scores, cuts, poison, streams, and bad input."
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptbook.basics.claims import SCALES
from ptbook.curate import filtering_networks as dfn
from ptbook.curate.filtering_networks import (
    CAPTIONS, WORDS, DualEncoder, Pairs, PairScorer, ProcessorInputs, pair_records, clip_loss, embed, filter_by_score, filter_report,
    filter_sets, induced, make_world, new_model, pair_loss, pair_scores, poison, read_pairs, right_pairs, scored, side_by_side, zero_shot)


def gen(seed=0): return torch.Generator().manual_seed(seed)


def pairs(n=50, side=8):
    g = gen()
    return right_pairs((torch.rand(30, 1, 8, 8, generator=g), torch.arange(30) % 10), n, g, side)


@pytest.fixture(scope="module")
def world(): return make_world(1000, SCALES["tiny"])


class OpenClip(nn.Module):
    "As open_clip returns it: four parts, the last a bias."
    def __init__(self):
        super().__init__()
        self.inner, self.dropout = new_model(0, 8), nn.Dropout(0.5)
    def forward(self, image, text): return *self.inner(self.dropout(image), text), torch.zeros(())


def test_loss_is_the_mean_of_both_directions():
    u, v = torch.randn(2, 6, 5, generator=gen())
    s = 7 * F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    want = -(s.log_softmax(1).diagonal().mean() + s.log_softmax(0).diagonal().mean()) / 2
    assert torch.allclose(clip_loss(u, v, 7.0), want, atol=1e-5)
    order = torch.randperm(6, generator=gen())
    assert torch.allclose(clip_loss(u[order], v[order], 7.0), want, atol=1e-5) and not torch.allclose(clip_loss(u, v[order], 7.0), want, atol=1e-3)
    assert torch.allclose(clip_loss(u, v, 0.0), torch.tensor(math.log(6)), atol=1e-5)


def test_scores_do_not_see_norms_batches_or_modes():
    data, model = pairs(), OpenClip()
    scores = pair_scores(model, *data)
    assert model.training and scores.shape == (50,) and scores.abs().max() <= 1 and not scores.requires_grad
    for batch in (1, 7, 50): assert torch.allclose(pair_scores(model, *data, batch=batch), scores, atol=1e-5)
    order = torch.randperm(50, generator=gen())
    assert torch.allclose(pair_scores(model, *data.at(order)), scores[order], atol=1e-5)
    with torch.no_grad():
        for last in (model.inner.image[-1], model.inner.text[-1]): last.weight.mul_(5), last.bias.mul_(5)
    assert torch.allclose(pair_scores(model, *data), scores, atol=1e-5)
    assert pair_scores(model, data.images[:0], data.texts[:0]).shape == (0,)


def test_the_scale_stops_at_its_largest():
    model = DualEncoder(64, most=20.0)
    with torch.no_grad(): model.log_scale.fill_(9.0)
    assert torch.allclose(embed(model, *pairs(3))[2], torch.tensor(20.0), atol=1e-3)


def test_a_wrapped_model_of_transformers_is_known():
    class Inner(nn.Module):
        logit_scale = torch.tensor(1.0)
        def get_text_features(self): pass
        def forward(self, pixel_values, input_ids, attention_mask=None): return SimpleNamespace(image_embeds=pixel_values, text_embeds=input_ids.float())
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Inner()
        def forward(self, *a, **kw): return self.module(*a, **kw)
    x = torch.randn(4, 3, generator=gen())
    u, v, s = embed(Wrapped(), x, {"input_ids": torch.ones(4, 3, dtype=torch.long), "attention_mask": torch.ones(4, 3)})
    assert torch.equal(u, x) and torch.equal(v, torch.ones(4, 3)) and s == math.exp(1)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64, np.float32])
def test_ties_keep_their_number_and_the_earlier(kind):
    scores = np.array([1, 2, 2, 2, 0, 2], kind) if kind is np.float32 else torch.tensor([1, 2, 2, 2, 0, 2], dtype=kind)
    assert filter_by_score(scores, 0.5).tolist() == [1, 2, 3] and filter_by_score(scores, 1.0).tolist() == list(range(6))
    assert filter_by_score(scores, 0.001).tolist() == [1]


def test_auc_is_the_chance_that_a_right_pair_stands_higher():
    scores, ok = torch.randint(5, (40,), generator=gen()).double(), torch.rand(40, generator=gen(1)) < 0.4
    higher = scores[ok][:, None] - scores[~ok][None]
    want = ((higher > 0).double() + (higher == 0).double() / 2).mean().item()
    assert abs(filter_report(scores, ok)["auc"] - want) < 1e-9
    assert filter_report(-scores, ok)["auc"] == pytest.approx(1 - want)
    assert filter_report(scores, ok, 1.0)["precision"] == pytest.approx(ok.double().mean().item())


@pytest.mark.parametrize("fraction, hard", [(0.3, 0.5), (1.0, 0.25), (0.5, 1.0), (0.7, 0.0)])
def test_poison_is_as_much_as_was_asked_for(fraction, hard):
    texts = CAPTIONS[torch.randint(80, (4000,), generator=gen())]
    before, (made, ok) = texts.clone(), poison(texts, fraction, hard, gen(1))
    assert torch.equal(texts, before) and torch.equal(ok, (made == texts).all(1))
    luck = fraction * (1 - hard) / 80
    assert abs((~ok).float().mean() - (fraction - luck)) < 0.01
    known = {tuple(t) for t in CAPTIONS.tolist()}
    assert {tuple(t) for t in made.tolist()} <= known # a wrong caption is still a caption
    assert torch.equal(poison(texts, fraction, hard, gen(1))[0], made) and not torch.equal(poison(texts, fraction, hard, gen(2))[0], made)
    assert poison(texts[:1], 1.0, 0.0, gen())[1].all() # there is no other pair to take from


def test_pictures_are_what_captions_say():
    x = torch.zeros(1, 1, 8, 8)
    x[..., 1:7, 3:5] = 1
    see = lambda words: dfn.draw(x, torch.tensor([[0, *map(WORDS.index, words.split())]]))[0, 0]
    left, right = see("left large light"), see("right large light")
    assert torch.allclose(left.flip(1), right, atol=1e-5) and not torch.allclose(left, right, atol=0.1) # mirror images
    centre = lambda rows: (rows * torch.arange(8)).sum() / rows.sum()
    assert centre(left[:3].sum(0)) < centre(left[5:].sum(0)) # the top leans to the left
    assert see("left small light").sum() < 0.6 * left.sum() and torch.allclose(see("left large dark"), 1 - left)
    assert torch.equal(CAPTIONS.unique(dim=0), CAPTIONS) and len(CAPTIONS) == 80


def test_the_world_is_apart_and_the_same_for_a_seed(world):
    again, other = make_world(1000, SCALES["tiny"]), make_world(1001, SCALES["tiny"])
    assert torch.equal(world.pool.images, again.pool.images) and torch.equal(world.ok, again.ok) and not torch.equal(world.pool.texts, other.pool.texts)
    assert len(world.things[0]) == 600 and 0.28 < world.ok.float().mean() < 0.32
    sets = filter_sets(world, 0, many=900)
    assert [len(s.texts) for s in sets.values()] == [500] * 4 + [900] * 2
    clean, special = sets["clean-500"], sets["specialist-6000"]
    for share in (25, 50, 100):
        assert torch.equal(sets[f"poisoned {share}%"].images, clean.images)
        assert abs((sets[f"poisoned {share}%"].texts != clean.texts).any(1).float().mean() - share / 100) < 0.02
    light = special.images.mean((1, 2, 3)) < 0.5 # what the polarity word ought to say
    assert abs((light == (special.texts[:, 3] == WORDS.index("light"))).float().mean() - 0.5) < 0.06


def test_no_thing_is_in_two_parts(monkeypatch):
    seen = []
    monkeypatch.setattr(dfn, "right_pairs", lambda things, *a: seen.append(things[0]) or right_pairs(things, *a))
    world = make_world(3, SCALES["tiny"])
    parts = [{image.numpy().tobytes() for image in images} for images in (*seen, world.things[0])]
    assert sum(map(len, parts)) == len(set.union(*parts)) > 1700


def test_induced_models_start_alike_and_see_only_what_was_kept():
    data, fn = pairs(200), lambda: new_model(3, 8)
    idx = torch.arange(100)
    spoilt = Pairs(data.images.clone(), data.texts.clone())
    spoilt.images[100:] = 0.5
    a, b = induced(fn, data, idx, 4), induced(fn, spoilt, idx, 4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and not all(torch.equal(p, q) for p, q in zip(a.parameters(), fn().parameters()))
    again = side_by_side(fn, [data.at(idx)] * 2, 4)
    assert torch.allclose(pair_scores(a, *data), pair_scores(again[1], *data), atol=1e-4)


def test_zero_shot_averages_the_prompts_of_a_class():
    model, prompts = new_model(0, 8), CAPTIONS.view(10, 8, 4)
    data = pairs(20)
    u, v, _ = embed(model, data.images, CAPTIONS)
    want = (F.normalize(u, dim=1) @ F.normalize(F.normalize(v, dim=1).view(10, 8, -1).mean(1), dim=1).T).argmax(1)
    assert torch.equal(zero_shot(model, data.images, prompts), want)
    assert torch.equal(zero_shot(model, data.images, CAPTIONS[:, None]), (F.normalize(u, dim=1) @ F.normalize(v, dim=1).T).argmax(1))


def test_the_scorer_is_exact_in_any_company():
    scorer, records = PairScorer(new_model(0, 8), read_pairs), pair_records(pairs())
    once = scorer(records)
    assert once.dtype == np.float64 and once.shape == (50,) and scorer([]).shape == (0,)
    for chunk in (1, 3, 50, 99): assert np.array_equal([s.score for s in scored(iter(records), scorer, chunk)], once)
    assert np.array_equal(pickle.loads(pickle.dumps(scorer))(records), once)
    assert np.allclose(PairScorer(new_model(0, 8), read_pairs, batch=16)(records), once, atol=1e-5)


def test_a_stream_is_read_no_further_than_needed():
    read, records = [], pair_records(pairs(20))
    stream = scored((read.append(i) or r for i, r in enumerate(records)), PairScorer(new_model(0, 8), read_pairs), chunk=4)
    record, score, problem = next(stream)
    assert read == [0, 1, 2, 3] and record is records[0] and isinstance(score, float) and not problem
    assert len(list(stream)) == 19 and list(scored([], lambda r: np.zeros(len(r)))) == []


def test_a_damaged_record_is_told_and_no_other_is_touched():
    scorer, records = PairScorer(new_model(0, 8), read_pairs), pair_records(pairs(20))
    once, spoilt = scorer(records), [*records]
    spoilt[2], spoilt[9], spoilt[19] = {**records[2], "text": None}, {**records[9], "image": None}, {**records[19], "text": "nonsense"}
    for chunk in (1, 4, 20):
        found = list(scored(spoilt, scorer, chunk))
        assert [s.record for s in found] == spoilt and [i for i, s in enumerate(found) if s.problem] == [2, 9, 19]
        assert all(math.isnan(s.score) if s.problem else s.score == once[i] for i, s in enumerate(found)) and "nonsense" in found[19].problem
    told = list(scored(records[:2], lambda part: np.array([1.0, float("nan")])))
    assert [bool(s.problem) for s in told] == [False, True]
    with pytest.raises(KeyError, match="text"): list(scored([{"image": records[0]["image"]}], scorer))
    with pytest.raises(RuntimeError): list(scored(records, PairScorer(new_model(0, 4), read_pairs))) # the network's fault, not a record's


def test_records_come_back_as_they_were():
    data = pairs()
    images, texts = read_pairs(pair_records(data))
    assert torch.equal(images, data.images) and torch.equal(texts, data.texts)
    for text in ("seven left large", "seven left large pink"):
        with pytest.raises(ValueError, match="text"): read_pairs([{"image": np.zeros((8, 8)), "text": text}])


def test_a_processor_is_asked_for_captions_of_one_length():
    def processor(**asked):
        assert asked["padding"] == "max_length" and asked["truncation"] and asked["images"] == ["p"] and asked["text"] == ["c"]
        return {"pixel_values": torch.zeros(1, 3), "input_ids": torch.ones(1, 5), "attention_mask": torch.ones(1, 5)}
    images, texts = ProcessorInputs(processor, image="jpg", text="txt")([{"jpg": "p", "txt": "c"}])
    assert images.shape == (1, 3) and sorted(texts) == ["attention_mask", "input_ids"]


def test_what_is_refused():
    data, model, nan = pairs(), new_model(0, 8), float("nan")
    u = torch.randn(3, 4)
    for wrong, word in (
            (lambda: clip_loss(u, u[:2], 1.0), "u, v"), (lambda: clip_loss(u[:1], u[:1], 1.0), "batch of 1"), (lambda: pair_loss(model, data.at(torch.tensor([0]))), "batch of 1"),
            (lambda: embed(nn.Identity(), u, u), "model|argument"), (lambda: pair_scores(model, data.images, data.texts[:3]), "50 and 3"),
            (lambda: pair_scores(model, data.images, {"a": data.texts, "b": data.texts[:2]}), "images, texts"), (lambda: pair_scores(model, *data, batch=0), "batch"),
            (lambda: filter_by_score([], 0.5), "scores"), (lambda: filter_by_score(torch.rand(3, 2)), "scores"), (lambda: filter_by_score([0.1, nan]), "1 of 2 are NaN"),
            (lambda: filter_by_score([0.1], 0), "keep"), (lambda: filter_by_score([0.1], 1.1), "keep"), (lambda: filter_by_score([0.1], nan), "keep"),
            (lambda: filter_report([0.1, 0.2], [True, True]), "ok"), (lambda: filter_report([0.1, 0.2], [True]), "ok"),
            (lambda: poison(data.texts, -0.1, 0.5, gen()), "fraction"), (lambda: poison(data.texts, 0.1, 2.0, gen()), "hard"), (lambda: poison(data.texts[:, :1], 0.1, 0.5, gen()), "texts"),
            (lambda: list(scored([1], len, 0)), "chunk"), (lambda: list(scored([1, 2], lambda r: np.zeros(1))), "2 records"), (lambda: PairScorer(model, read_pairs, batch=0), "batch"), (lambda: side_by_side(lambda: model, [data], 1, batch=1), "batch of 1")):
        with pytest.raises((ValueError, TypeError) if "argument" in word else ValueError, match=word): wrong()
    class Wrong(nn.Module):
        def forward(self, images, texts): return images
    with pytest.raises(ValueError, match="wanted \\(u, v, logit_scale\\)"): embed(Wrong(), u, u)
