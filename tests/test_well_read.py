"""Pre-trained distillation: identities that hold for any model, on the book's and on Hugging Face's, and what is refused."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, DataCollatorForLanguageModeling

from ptbook.basics.claims import as_scale
from ptbook.distill import well_read as chapter
from ptbook.distill.well_read import (
    Pooled, Recipe, Rows, classifier, copy_lowest, deal_anew, distil, encode_words, finetune, make_world, mlm_batch, pretrain_mlm, pretrained_distillation, reader, sentences,
    soft_cross_entropy, soft_labels)

QUIET = dict(progress=False)


def bert(kind=BertForSequenceClassification, seed: int = 0, **more) -> nn.Module:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=12, num_labels=3)
    return kind(BertConfig(**sizes | more))


class Conv(nn.Module):
    "A body without attention."
    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(41, 8), nn.Conv1d(8, 8, 3, padding=1)

    def hidden(self, ids, attention_mask=None): return self.words(ids) + self.conv(self.words(ids).mT).mT


class Words(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, ids): return self.body.hidden(ids) @ self.body.words.weight.T


def padded(n: int = 24, length: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, length + 1, (n, 1), generator=g)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(2, 40, (n, length), generator=g) * mask, "attention_mask": mask}


def same(a: nn.Module, b: nn.Module) -> bool: return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("classes", [2, 5])
def test_hard_labels_are_a_case_of_soft_ones(classes):
    z, y = torch.randn(9, classes), torch.randint(classes, (9,))
    assert torch.allclose(soft_cross_entropy(z, teacher_probs=F.one_hot(y, classes).float()), F.cross_entropy(z, y), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
def test_the_loss_is_the_divergence_and_the_teachers_entropy(temperature):
    z, t = torch.randn(9, 4, dtype=torch.double), torch.randn(9, 4, dtype=torch.double)
    p = (t / temperature).softmax(-1)
    kl = F.kl_div((z / temperature).log_softmax(-1), p, reduction="batchmean")
    entropy = -(p * p.log()).sum(-1).mean()
    assert torch.allclose(soft_cross_entropy(z, t, temperature), temperature**2 * (kl + entropy))
    assert torch.allclose(soft_cross_entropy(z, t, temperature), soft_cross_entropy(z, teacher_probs=t.softmax(-1), temperature=temperature))
    assert torch.allclose(soft_cross_entropy(z, t, temperature), soft_cross_entropy(z + 3, t - 7, temperature)) # shifts of logits mean nothing


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(temperature, dtype):
    z = torch.randn(6, 4).to(dtype).requires_grad_()
    soft_cross_entropy(z, z.detach().clone(), temperature).backward()
    assert z.grad.abs().max() < (1e-6 if dtype == torch.float32 else 1e-2)


def test_certain_teachers_give_no_nan():
    z = torch.randn(3, 4, requires_grad=True)
    for temperature in (1.0, 2.0):
        loss = soft_cross_entropy(z, teacher_probs=torch.eye(4)[:3], temperature=temperature)
        assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


def test_what_the_loss_refuses():
    z = torch.zeros(2, 3)
    for wrong, word in ((dict(), "exactly one"), (dict(teacher_logits=z, teacher_probs=z), "exactly one"), (dict(teacher_logits=torch.zeros(2, 4)), r"\(2, 4\)"), (dict(teacher_logits=torch.zeros(3)), r"\(3,\)"),
                        (dict(teacher_probs=z), "row 0"), (dict(teacher_probs=torch.tensor([[0.2, 0.3, 0.5], [1.5, -0.5, 0.0]])), "row 1"), (dict(teacher_probs=torch.full((2, 3), torch.nan)), "row 0"),
                        (dict(teacher_logits=z, temperature=0.0), "temperature"), (dict(teacher_logits=z, temperature=-1.0), "temperature"), (dict(teacher_logits=z, temperature=math.nan), "temperature")):
        with pytest.raises(ValueError, match=word): soft_cross_entropy(z, **wrong)


def test_masks_come_at_the_rate_and_shares_of_hugging_face():
    ids, special = torch.randint(5, 1000, (300, 64)), (0, 1, 2)
    ids[:, 0], ids[:, -3:] = 1, 0
    torch.manual_seed(0)
    inputs, labels = mlm_batch(ids, 3, 1000, 0.15, special)
    class Tokenizer: # as much of one as the collator asks for
        mask_token, pad_token_id, mask_token_id = "[MASK]", 0, 3
        def __len__(self): return 1000
        def convert_tokens_to_ids(self, token): return 3
    theirs = DataCollatorForLanguageModeling(Tokenizer(), mlm_probability=0.15)
    other, other_labels = theirs.torch_mask_tokens(ids.clone(), special_tokens_mask=torch.isin(ids, torch.tensor(special)))
    for x, y in ((inputs, labels), (other, other_labels)):
        chosen = y != -100
        assert not chosen[:, 0].any() and not chosen[:, -3:].any() and chosen[:, 1:-3].float().mean().item() == pytest.approx(0.15, abs=0.008)
        assert torch.equal(x[~chosen], ids[~chosen]) and torch.equal(y[chosen], ids[chosen])
        assert (x[chosen] == 3).float().mean().item() == pytest.approx(0.8, abs=0.025)
        assert (x[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("recipe, masked", [((1.0, 0.0, 0.0), 1.0), ((0.0, 0.0, 1.0), 0.0)])
def test_other_recipes(recipe, masked):
    ids = torch.randint(4, 50, (20, 20))
    inputs, labels = mlm_batch(ids, 3, 50, 0.5, recipe=recipe)
    assert (inputs[labels != -100] == 3).float().mean() == masked
    if not masked: assert torch.equal(inputs, ids) and (labels != -100).any()


def test_padding_is_never_masked_and_one_token_always_is():
    texts = padded()
    inputs, labels = mlm_batch(texts["input_ids"], 1, 41, 1.0, attention_mask=texts["attention_mask"])
    assert torch.equal(labels != -100, texts["attention_mask"].bool()) and (inputs[texts["attention_mask"] == 0] == 0).all()
    for _ in range(20): assert (mlm_batch(torch.tensor([[5, 6]]), 1, 41, 1e-6)[1] != -100).sum() == 1


def test_what_masking_refuses():
    ids = torch.tensor([[0, 1, 5]])
    for wrong, word in ((dict(p=0.0), "p:"), (dict(p=1.5), "p:"), (dict(special=(0, 5)), "no token"), (dict(attention_mask=torch.zeros(1, 3)), "no token"), (dict(recipe=(0.8, 0.1, 0.2)), "recipe"), (dict(recipe=(1.5, -0.5, 0)), "recipe"), (dict(mask_id=50), "mask_id")):
        with pytest.raises(ValueError, match=word): mlm_batch(ids, **(dict(mask_id=1, vocab_size=41) | wrong))


def test_a_teacher_is_asked_without_dropout_whatever_its_mode():
    teacher, texts = bert().train(), padded()
    probs = soft_labels(teacher, texts, batch=5)
    with torch.no_grad(): assert torch.allclose(probs, teacher.eval()(**texts).logits.softmax(-1), atol=1e-6)
    teacher.train()
    assert torch.equal(soft_labels(teacher, texts, batch=5), probs) and teacher.training and not probs.requires_grad
    with pytest.raises(ValueError, match="shape"): soft_labels(bert(BertForMaskedLM), texts)
    with pytest.raises(ValueError, match="no rows"): soft_labels(teacher, chapter.take(texts, slice(0)))


def test_rows_stay_together_in_dicts():
    texts = padded(10)
    seen = [Rows(texts, torch.arange(10), batch=5, seed=1)[step] for step in range(2)]
    assert sorted(torch.cat([rows for _, rows in seen]).tolist()) == list(range(10))
    for given, rows in seen: assert all(torch.equal(given[k], texts[k][rows]) for k in texts)
    with pytest.raises(ValueError): Rows(texts, torch.arange(9), batch=5)


def test_distilling_a_hugging_face_bert_into_another_class():
    teacher, texts = bert(), padded()
    with torch.no_grad(): teacher.classifier.weight.mul_(40) # a teacher with opinions
    body = Conv()
    student = Pooled(body, 8, 3)
    before = copy.deepcopy(body.words.weight)
    made = pretrained_distillation(student, texts["input_ids"], texts["input_ids"], teacher, mlm=Words(body), mask_id=40, vocab_size=41, special=(0,), teacher_inputs=texts, steps=(5, 60, 0), lr=(1e-3, 3e-2, 1), **QUIET)
    assert made.student is student and list(made.runs) == ["pre-train", "distil"] and not torch.equal(before, body.words.weight)
    losses = made.runs["distil"].losses
    entropy = -(made.probs * made.probs.log()).sum(-1).mean().item()
    assert losses[-10:].mean() - entropy < 0.5 * (losses[:3].mean() - entropy)


def test_a_hugging_face_student_reads_through_its_other_head():
    words, student = bert(BertForMaskedLM), bert()
    words.bert = student.bert
    before = copy.deepcopy(student.state_dict())
    run = pretrain_mlm(words, padded(), mask_id=40, vocab_size=41, special=(0,), steps=3, **QUIET)
    after = student.state_dict()
    assert len(run.losses) == 3 and run.losses[0] == pytest.approx(math.log(41), abs=0.5)
    assert not torch.equal(before["bert.embeddings.word_embeddings.weight"], after["bert.embeddings.word_embeddings.weight"]) and torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_no_reading_is_distillation_from_scratch_and_the_order_of_stages():
    teacher, texts = bert(), padded()
    make = lambda: classifier(reader(3, 41, 16, length=8), 3)
    piped, plain = make(), make()
    made = pretrained_distillation(piped, None, texts["input_ids"], teacher, (texts["input_ids"], torch.arange(24) % 3), teacher_inputs=texts, steps=(0, 4, 3), lr=(1, 1e-2, 1e-3), **QUIET)
    distil(plain, texts["input_ids"], soft_labels(teacher, texts), steps=4, lr=1e-2, **QUIET)
    finetune(plain, texts["input_ids"], torch.arange(24) % 3, steps=3, lr=1e-3, **QUIET)
    assert same(piped, plain) and list(made.runs) == ["distil", "fine-tune"]


def test_what_the_stages_refuse():
    texts, student, teacher = padded(), bert(), bert()
    ids, probs = texts["input_ids"], torch.full((24, 3), 1 / 3)
    for call, word in ((lambda: distil(student, texts, torch.full((24, 2), 0.5), steps=1, **QUIET), "2 classes"), (lambda: distil(student, texts, torch.randn(24, 3), steps=1, **QUIET), "sum to 1"),
                       (lambda: distil(student, texts, probs[:23], steps=1, **QUIET), "rows"), (lambda: finetune(student, texts, torch.full((24,), 3), steps=1, **QUIET), "3"),
                       (lambda: finetune(student, texts, torch.rand(24), steps=1, **QUIET), "integers"), (lambda: pretrain_mlm(student, texts, mask_id=1, vocab_size=41, steps=1, **QUIET), "logits of shape"),
                       (lambda: pretrain_mlm(bert(BertForMaskedLM), texts, mask_id=1, vocab_size=30, steps=1, **QUIET), "vocab_size"),
                       (lambda: pretrain_mlm(bert(BertForMaskedLM), {"tokens": ids}, mask_id=1, vocab_size=41, steps=1, **QUIET), "input_ids"),
                       (lambda: distil(bert(BertForMaskedLM), texts, probs, steps=1, **QUIET), "shape"),
                       (lambda: pretrained_distillation(student, texts, texts, teacher, mask_id=1, vocab_size=41, **QUIET), "mlm"),
                       (lambda: pretrained_distillation(student, None, texts, teacher, mlm=bert(BertForMaskedLM), mask_id=1, vocab_size=41, **QUIET), "D_LM"),
                       (lambda: pretrained_distillation(student, texts, texts, teacher, mlm=bert(BertForMaskedLM), mask_id=1, vocab_size=41, **QUIET), "shares no parameter"),
                       (lambda: pretrained_distillation(student, texts, texts, bert(num_labels=4), steps=(0, 1, 0), **QUIET), "4 classes")):
        with pytest.raises(ValueError, match=word): call()


def test_a_truncated_teacher_is_the_teachers_lowest_layers():
    deep, shallow = bert(num_hidden_layers=3, seed=1), bert(seed=2)
    head = shallow.classifier.weight.clone()
    names = copy_lowest(shallow.bert, deep.bert)
    assert same(shallow.bert.encoder.layer[0], deep.bert.encoder.layer[0]) and len(names) == len(shallow.bert.state_dict()) and torch.equal(shallow.classifier.weight, head)
    ids = padded()["input_ids"]
    with torch.no_grad(): assert torch.allclose(shallow.bert.eval()(ids).last_hidden_state, deep.bert.eval()(ids, output_hidden_states=True).hidden_states[1], atol=1e-5)
    before = copy.deepcopy(shallow.state_dict())
    with pytest.raises(ValueError, match="same width"): copy_lowest(shallow.bert, bert(hidden_size=32).bert)
    with pytest.raises(ValueError, match="named"): copy_lowest(nn.Linear(2, 2), shallow)
    assert all(torch.equal(before[n], t) for n, t in shallow.state_dict().items())


def test_padding_does_not_reach_a_pooled_classifier():
    texts, model = padded(), classifier(reader(0, 41, 16, length=8), 3)
    first = texts["attention_mask"][0].sum().item()
    alone = model(texts["input_ids"][:1, :first])
    assert torch.allclose(model(texts["input_ids"], texts["attention_mask"])[:1], alone, atol=1e-5)


def test_the_language_is_as_described():
    ids, facts = sentences(5, 4000)
    table = torch.randperm(288, generator=torch.Generator().manual_seed(5)).view(3, 2, 48)
    for fact in range(3):
        yes = torch.isin(ids[:, fact::3], table[fact, 1])
        assert torch.isin(ids[:, fact::3], table[fact]).all()
        assert (yes == facts[:, fact:fact + 1].bool()).float().mean().item() == pytest.approx(0.85, abs=0.01)
    assert torch.equal(sentences(5, 4000)[0], ids) and not torch.equal(sentences(6, 4000)[0], ids)


def test_dealing_anew_keeps_words_in_their_places_and_padding():
    texts = padded(200)
    dealt = deal_anew(texts, 0)
    assert torch.equal(dealt["input_ids"].sort(0).values, texts["input_ids"].sort(0).values) and torch.equal(dealt["input_ids"] == 0, texts["input_ids"] == 0)
    assert not torch.equal(dealt["input_ids"], texts["input_ids"])


def test_words_become_ids():
    part, vocabulary = encode_words(["The cat, the DOG", "a cat"], 5, length=3)
    assert vocabulary == {"the": 3, "cat": 4} and part["ids"].tolist() == [[3, 4, 3], [2, 4, 0]] and part["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(ValueError, match="number 1"): encode_words(["a cat", "?!"], 5)


def test_transfer_and_labelled_texts_are_apart_from_the_test():
    r = Recipe(texts=50, transfer=20, ends=(10, 40), labelled=6, test=30)
    world = make_world(2, r)
    all_ids, facts = sentences(2, 50 + 40 + 12 + 30)
    assert torch.equal(torch.cat([world.texts, world.transfer]), all_ids[:90])
    for t, ((labelled, labels), (test, answers)) in enumerate(world.tasks):
        assert torch.equal(labelled, all_ids[90 + t:102:2]) and torch.equal(labels, facts[90 + t:102:2, t]) and torch.equal(test, all_ids[102:]) and torch.equal(answers, facts[102:, t])


def test_arms_at_the_smallest_scale():
    arms = chapter.well_read(1000, as_scale("tiny"))
    assert all(0 <= v <= 1 for n, v in arms.items() if "nats" not in n) and arms["better of PF and KD scratch"] == max(arms["PF"], arms["KD scratch"])
    assert {"KD scratch, 10 texts", "PD, 40 texts"} <= set(arms) and 0 < arms["MLM loss (nats)"] < 7
