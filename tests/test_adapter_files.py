"Adapters on disk: there and back, ours and peft's, and everything a stranger may send."
import copy
import json
import os
import shutil
import struct
import warnings

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from ptbook.adapt.adapter_files import CONFIG, WEIGHTS, AdapterError, load, save, tensors_of
from ptbook.adapt.adapters import adapt, attached, merge, use, using
from ptbook.adapt.lora import LoRA
from ptbook.basics.models import Transformer, logits_of, style

IDS = torch.randint(99, (3, 10), generator=torch.Generator().manual_seed(0))
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99)
MODELS = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3)), ["query", "dense"], ["classifier"]),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), ["q_proj", "down_proj"], []),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32)), ["c_attn", "c_proj"], [])}


def says(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(): return logits_of(model, IDS)


def base(family: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[family][0]().eval()


def stirred(family: str, method: LoRA = LoRA(r=3, alpha=5), name: str = "default", seed: int = 0) -> nn.Module:
    model = adapt(base(family), method, MODELS[family][1], train_also=MODELS[family][2], name=name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in tensors_of(model, name).values(): t.copy_(0.1 * torch.randn(t.shape, generator=g))
    return model


@pytest.mark.parametrize("method", [LoRA(r=3, alpha=5), LoRA(r=4, alpha=4, rslora=True, init="gaussian"), LoRA(r=2, rank_pattern={"query": 5, "q_proj": 5, "c_attn": 5}, alpha_pattern={"query": 3.0})], ids=["plain", "rslora", "pattern"])
@pytest.mark.parametrize("family", MODELS)
def test_ours_load_in_peft_and_here(family, method, tmp_path):
    model = stirred(family, method)
    save(model, tmp_path/"a")
    with warnings.catch_warnings(action="ignore"): theirs = peft.PeftModel.from_pretrained(base(family), tmp_path/"a").eval()
    assert (says(theirs) - says(model)).abs().max() < 1e-5 and (says(model) - says(base(family))).abs().max() > 1e-3
    assert torch.equal(says(load(base(family), tmp_path/"a")), says(model))


@pytest.mark.parametrize("settings", [dict(r=4, lora_alpha=6), dict(r=2, use_rslora=True, rank_pattern={"query": 3, "q_proj": 3, "c_attn": 3}), dict(r=2, target_modules="all-linear")], ids=["plain", "rslora", "all-linear"])
@pytest.mark.parametrize("family", MODELS)
def test_pefts_load_here(family, settings, tmp_path):
    make, targets, also = MODELS[family]
    task = {"task_type": "SEQ_CLS"} if family == "bert" else {}
    theirs = peft.get_peft_model(base(family), peft.LoraConfig(**{"target_modules": targets} | settings | task, fan_in_fan_out=family == "gpt2", modules_to_save=list(also) or None)).eval() # it adds to the list
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.requires_grad: p.normal_(std=0.1)
    theirs.save_pretrained(tmp_path/"a")
    model = load(base(family), tmp_path/"a")
    assert (says(theirs) - says(model)).abs().max() < 1e-5
    assert (says(merge(model)) - says(theirs)).abs().max() < 1e-4


def test_our_own_model_and_many_adapters(tmp_path):
    torch.manual_seed(0)
    model = Transformer(style("vit", hidden_size=16, layers=1, heads=2, image_size=8, patch_size=4)).eval()
    x, heads = torch.randn(2, 1, 8, 8), ["head", "head_bias"]
    out = {}
    for name in ("a", "b"):
        adapt(model, LoRA(r=2), ["qkv"], train_also=heads, name=name)
        with torch.no_grad():
            for t in tensors_of(model, name).values(): t.normal_()
        out[name] = model(x).detach()
        save(model, tmp_path/name, name)
    torch.manual_seed(0)
    fresh = Transformer(style("vit", hidden_size=16, layers=1, heads=2, image_size=8, patch_size=4)).eval()
    before = fresh(x).detach()
    load(load(fresh, tmp_path/"a", "first"), tmp_path/"b", "second")
    for name, wanted in (("first", out["a"]), ("second", out["b"]), (None, before)):
        with using(fresh, name): assert torch.equal(fresh(x), wanted)
    with pytest.raises(ValueError, match="first"): load(fresh, tmp_path/"a", "first")


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model = stirred("bert")
    save(model, tmp_path/"a")
    kept = (tmp_path/"a"/WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"): save(model, tmp_path/"a")
    (tmp_path/"b").mkdir()
    with pytest.raises(FileExistsError, match="no adapter"): save(model, tmp_path/"b", overwrite=True)
    def full(*_): raise OSError("no space left")
    for name in ("os.rename", "ptbook.basics.whole._exchanged"): monkeypatch.setattr(name, full)
    with pytest.raises(OSError, match="no space"): save(model, tmp_path/"c")
    with pytest.raises(OSError, match="no space"): save(model, tmp_path/"a", overwrite=True)
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"} and (tmp_path/"a"/WEIGHTS).read_bytes() == kept
    save(stirred("bert", seed=1), tmp_path/"a", overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"} and (tmp_path/"a"/WEIGHTS).read_bytes() != kept


def rewrite(**new): return lambda f: (f/CONFIG).write_text(json.dumps(json.loads((f/CONFIG).read_text()) | new))
def without(*keys): return lambda f: (f/CONFIG).write_text(json.dumps({k: v for k, v in json.loads((f/CONFIG).read_text()).items() if k not in keys}))
def tensors(change):
    def rewritten(f):
        held = load_file(f/WEIGHTS)
        change(held)
        save_file(held, f/WEIGHTS)
    return rewritten


A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
BROKEN = {
    "no settings": (lambda f: (f/CONFIG).unlink(), CONFIG),
    "no weights": (lambda f: (f/WEIGHTS).unlink(), WEIGHTS),
    "a huge file of settings": (lambda f: (f/CONFIG).write_text(" " * 1_000_001), "1,000,001"),
    "deep settings": (lambda f: (f/CONFIG).write_text("[" * 200_000), CONFIG),
    "settings that are a list": (lambda f: (f/CONFIG).write_text("[1]"), "list"),
    "settings that are no text": (lambda f: (f/CONFIG).write_bytes(b"\xff\xfe\x00"), CONFIG),
    "another kind": (rewrite(peft_type="IA3"), "IA3"),
    "a kind that is no name": (rewrite(peft_type=["LORA"]), "LORA"),
    "a kind that is a path": (rewrite(peft_type="../lora"), "../lora"),
    "no rank": (without("r"), "'r'"),
    "a rank that is no number": (rewrite(r="many"), "many"),
    "a rank beyond the layer": (rewrite(r=10 ** 12), "1000000000000"),
    "no alpha": (without("lora_alpha"), "lora_alpha"),
    "dora": (rewrite(use_dora=True), "use_dora"),
    "a trained bias": (rewrite(bias="all"), "bias"),
    "targets that are numbers": (rewrite(target_modules=[1, 2]), "target_modules"),
    "targets that mean nothing": (rewrite(target_modules=["nothing"]), "nothing"),
    "a pattern that is none": (rewrite(target_modules="(("), CONFIG),
    "fewer targets": (rewrite(target_modules=["query"]), "not expected"),
    "another rank": (rewrite(r=2), "shape"),
    "a missing tensor": (tensors(lambda t: t.pop(A)), f"{A} is missing"),
    "one too many": (tensors(lambda t: t.update(x=torch.zeros(1))), "x is not expected"),
    "another shape": (tensors(lambda t: t.update({A: torch.zeros(3, 31)})), "(3, 31)"),
    "cut short": (lambda f: os.truncate(f/WEIGHTS, (f/WEIGHTS).stat().st_size - 7), WEIGHTS),
    "nothing in it": (lambda f: os.truncate(f/WEIGHTS, 0), WEIGHTS),
    "a header of an exabyte": (lambda f: (f/WEIGHTS).write_bytes(struct.pack("<Q", 2 ** 60) + b"{}"), WEIGHTS)}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_named_and_the_model_left_alone(what, tmp_path):
    save(stirred("bert"), tmp_path/"a")
    change, told = BROKEN[what]
    change(tmp_path/"a")
    for model in (base("bert"), stirred("bert", name="other")):
        before, learns = says(model), {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(AdapterError) as error: load(model, tmp_path/"a")
        assert told in str(error.value), error.value
        if "other" in attached(model): use(model, "other")
        assert torch.equal(says(model), before) and {n: p.requires_grad for n, p in model.named_parameters()} == learns and "default" not in attached(model)


def test_float16_on_disk_is_read(tmp_path):
    model = stirred("bert")
    save(model, tmp_path/"a")
    tensors(lambda held: held.update({k: v.half() for k, v in held.items()}))(tmp_path/"a")
    assert (says(load(base("bert"), tmp_path/"a")) - says(model)).abs().max() < 1e-2
