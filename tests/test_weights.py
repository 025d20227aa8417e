"Our networks beside transformers': the same logits, the same tensors, there and back."
import json

import pytest
import torch

import transformers as tf
from ptbook.basics.models import Transformer, style
from ptbook.basics.weights import CLASSES, from_hf, to_hf

torch.set_num_threads(1)
V = 61
TEXT = dict(vocab_size=V, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=88, max_position_embeddings=40)
T5 = dict(vocab_size=V, d_model=48, d_kv=8, d_ff=88, num_layers=2, num_heads=4, decoder_start_token_id=0)
VIT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
GPT2 = dict(vocab_size=V, n_embd=48, n_layer=3, n_head=4, n_positions=40)
MODELS = {
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2)),
    "gpt2 untied, one head, other ffn": (tf.GPT2LMHeadModel, tf.GPT2Config(**{**GPT2, "n_head": 1}, n_inner=56, tie_word_embeddings=False)),
    "gpt2 unscaled, relu, eps": (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2, scale_attn_weights=False, activation_function="relu", layer_norm_epsilon=1e-2)),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT)),
    "llama grouped, tied": (tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama one group, biases, head_dim": (tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT, num_key_value_heads=1, head_dim=20, attention_bias=True, mlp_bias=True,
                                                                          rope_theta=5e5, rms_norm_eps=1e-2)),
    "qwen2 grouped, tied": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6)),
    "qwen2 untied": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**TEXT, num_key_value_heads=4)),
    "bert": (tf.BertForMaskedLM, tf.BertConfig(**TEXT)),
    "bert tanh, eps, 3 types": (tf.BertForMaskedLM, tf.BertConfig(**TEXT, hidden_act="gelu_new", layer_norm_eps=1e-2, type_vocab_size=3)),
    "bert untied": (tf.BertForMaskedLM, tf.BertConfig(**TEXT, tie_word_embeddings=False)),
    "roberta": (tf.RobertaForMaskedLM, tf.RobertaConfig(**TEXT)),
    "roberta pad 3": (tf.RobertaForMaskedLM, tf.RobertaConfig(**TEXT, pad_token_id=3, layer_norm_eps=1e-3)),
    "t5 v1.0": (tf.T5ForConditionalGeneration, tf.T5Config(**T5)),
    "t5 v1.1": (tf.T5ForConditionalGeneration, tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5 uneven": (tf.T5ForConditionalGeneration, tf.T5Config(**T5, num_decoder_layers=3, relative_attention_num_buckets=8, relative_attention_max_distance=20,
                                                             feed_forward_proj="gated-silu", layer_norm_epsilon=1e-2)),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig(**VIT, image_size=28, patch_size=7, num_channels=1, num_labels=10)),
    "vit colour, no qkv bias": (tf.ViTForImageClassification, tf.ViTConfig(**VIT, image_size=32, patch_size=8, qkv_bias=False, num_labels=3, layer_norm_eps=1e-3)),
}

@torch.no_grad()
def make(name, dtype=torch.float32):
    "A Hugging Face model whose weights are large enough that a wrong epsilon, mask or scale shows in the logits."
    cls, config = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    hf = cls(config).eval()
    if name == "t5 v1.1": hf.lm_head.weight = torch.nn.Parameter(torch.randn(V, 48))
    for n, p in hf.named_parameters():
        fan = p.shape[0] if config.model_type == "gpt2" and p.dim() == 2 and ".h." in n else p[0].numel()
        if p.dim() == 1: p.add_(0.3 * torch.randn_like(p))
        else: p.copy_(torch.randn_like(p) * (0.7 if fan == 48 and p.shape[0] in (V, 40, 3, 2) else 1.2 * fan**-0.5))
    if "untied" in name and "bert" in name: hf.cls.predictions.bias.zero_()
    return hf.to(dtype)

def inputs(hf, padding, seed=0, batch=3, length=24):
    "(our keyword arguments, theirs, real positions) for one batch."
    g = torch.Generator().manual_seed(seed)
    c = hf.config
    if c.model_type == "vit":
        images = torch.randn(batch, c.num_channels, c.image_size, c.image_size, generator=g)
        return dict(ids=images), dict(pixel_values=images), slice(None)
    ids = torch.randint(5, V, (batch, length), generator=g)
    gap = torch.tensor([0, 5, 17])[:batch, None]
    at = torch.arange(length)[None]
    real = {"none": torch.ones(batch, length, dtype=bool), "left": at >= gap, "right": at < length - gap}[padding]
    ids = ids.where(real, torch.tensor(c.pad_token_id or 0))
    mask = None if padding == "none" else real.long()
    ours, theirs = dict(ids=ids, attention_mask=mask), dict(input_ids=ids, attention_mask=mask)
    if c.model_type == "bert":
        types = torch.randint(0, c.type_vocab_size, ids.shape, generator=g)
        ours["token_type_ids"] = theirs["token_type_ids"] = types
    if c.model_type == "t5":
        decoder = torch.randint(0, V, (batch, 9), generator=g)
        ours["decoder_ids"] = theirs["decoder_input_ids"] = decoder
        real = slice(None)
    return ours, theirs, real

@torch.no_grad()
def gap(ours, hf, padding):
    a, b, real = inputs(hf, padding)
    x, y = ours(**a)[real], hf(**b).logits[real]
    assert y.std() > 0.1, "logits too small to tell anything"
    return (x - y).abs().max().item()

@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_there_and_back(name, padding):
    hf = make(name)
    if hf.config.model_type == "vit" and padding != "none": pytest.skip("images are not padded")
    ours = from_hf(hf)
    assert gap(ours, hf, padding) < 1e-4
    again = to_hf(ours).eval()
    assert gap(ours, again, padding) < 1e-4

@pytest.mark.parametrize("name", MODELS)
def test_state_dict_is_equal_bit_for_bit(name, tmp_path):
    hf = make(name)
    before = hf.state_dict()
    hf.save_pretrained(tmp_path / "hf")
    for ours in (from_hf(hf), from_hf(tmp_path / "hf"), from_hf(str(tmp_path / "hf"))):
        after = to_hf(ours).state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], before[k]) for k in before)
    to_hf(ours).save_pretrained(tmp_path / "again")
    again = from_hf(tmp_path / "again").state_dict()
    assert all(torch.equal(again[k], v) for k, v in ours.state_dict().items())

@pytest.mark.parametrize("name", ["gpt2", "llama grouped, tied", "qwen2 untied", "t5 v1.0", "t5 v1.1"])
def test_greedy_generation_equals_transformers(name):
    from ptbook.basics.models import generate
    hf = make(name)
    ids = torch.randint(5, V, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    want = hf.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = generate(from_hf(hf), ids, 12, temperature=0, attention_mask=mask)
    assert torch.equal(got, want)

def test_bfloat16_is_kept_and_returned():
    hf = make("llama grouped, tied", torch.bfloat16)
    ours = from_hf(hf)
    assert next(ours.parameters()).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(to_hf(ours).state_dict().values(), hf.state_dict().values()))

@pytest.mark.parametrize("name", CLASSES)
def test_our_styles_become_transformers_models(name, tmp_path):
    torch.manual_seed(0)
    ours = Transformer(style(name, hidden_size=32, heads=4, vocab_size=50, max_length=40)).eval()
    hf = to_hf(ours, **({"eos_token_id": 7} if name == "gpt2" else {})).eval()
    assert type(hf).__name__ == CLASSES[name] and (name != "gpt2" or hf.config.eos_token_id == 7)
    hf.save_pretrained(tmp_path)
    again = from_hf(tmp_path)
    assert style(name, **{f: getattr(again.config, f) for f in ("hidden_size", "heads", "layers", "ffn_size", "activation", "gate", "tied")}) == \
        style(name, **{f: getattr(ours.config, f) for f in ("hidden_size", "heads", "layers", "ffn_size", "activation", "gate", "tied")})
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))
    assert ours.state_dict().keys() == again.state_dict().keys()

def test_a_checkpoint_with_heads_we_do_not_use_loads(tmp_path):
    torch.manual_seed(0)
    full = tf.BertForPreTraining(tf.BertConfig(**TEXT)).eval()
    full.save_pretrained(tmp_path)
    ids = torch.randint(5, V, (2, 9))
    assert (from_hf(tmp_path)(ids) - full(ids).prediction_logits).abs().max() < 1e-4

# --- refusals, by name ---

def refuse(match, call):
    with pytest.raises(ValueError, match=match): call()

@pytest.mark.parametrize("match, hf", [
    ("rope_type.*linear", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}))),
    ("sliding_window=8", lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT, num_key_value_heads=4, use_sliding_window=True, sliding_window=8, max_window_layers=1))),
    ("is_decoder=True", lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT, is_decoder=True))),
    ("position_embedding_type='relative_key'", lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT, position_embedding_type="relative_key"))),
    ("scale_attn_by_inverse_layer_idx=True", lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True))),
    ("crossattention", lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, add_cross_attention=True))),
    ("activation 'tanh'", lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT, hidden_act="tanh"))),
    ("hidden_act='relu'", lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**TEXT, hidden_act="relu"))),
    ("patch_size=.4, 7.", lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT, image_size=28, patch_size=[4, 7]))),
    ("BertForSequenceClassification", lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT))),
    ("Linear", lambda: torch.nn.Linear(2, 2)),
    ("GPTNeoXForCausalLM", lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))),
])
def test_refused_by_name(match, hf): refuse(match, lambda: from_hf(hf()))

def test_a_tensor_left_over_is_named():
    hf = make("llama")
    hf.model.layers[1].self_attn.extra = torch.nn.Linear(2, 2)
    refuse("left over.*model.layers.1.self_attn.extra.weight", lambda: from_hf(hf))

def test_a_missing_or_foreign_tensor_in_a_folder_is_named(tmp_path):
    from safetensors.torch import load_file, save_file
    make("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    lost = state.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(state, path, metadata={"format": "pt"})
    refuse("missing_keys.*transformer.h.1.mlp.c_fc.weight", lambda: from_hf(tmp_path))
    save_file(state | {"transformer.h.1.mlp.c_fc.weight": lost, "transformer.h.9.strange": lost.clone()}, path, metadata={"format": "pt"})
    refuse("unexpected_keys.*transformer.h.9.strange", lambda: from_hf(tmp_path))

def test_pickled_weights_are_never_read(tmp_path):
    hf = make("gpt2")
    hf.config.save_pretrained(tmp_path)
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"): from_hf(tmp_path)

def test_remote_code_is_never_run(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict(model_type="strange", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError): from_hf(tmp_path)
    assert not (tmp_path / "ran").exists()

@pytest.mark.parametrize("match, model", [
    ("gpt2 cannot express.*norm='rms'", lambda: Transformer(style("gpt2", norm="rms"))),
    ("t5 cannot express.*activation='gelu'", lambda: Transformer(style("t5", gate=True, activation="gelu"))),
    ("llama cannot express.*qkv_bias=True", lambda: Transformer(style("llama", qkv_bias=True))),
    ("bert cannot express.*position='none'", lambda: Transformer(style("bert", position="none"))),
    ("Linear", lambda: torch.nn.Linear(2, 2)),
])
def test_what_transformers_cannot_express_is_named(match, model): refuse(match, lambda: to_hf(model()))
