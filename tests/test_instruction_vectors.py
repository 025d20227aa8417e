"""What the notebook on instruction vectors cannot show: bad input, files, dtypes, and models it did not make."""
import copy
import math
import warnings

import pytest
import torch
from torch import nn

from ptbook.merge.instruction_vectors import (
    WORDS, Shards, align_vocab, block_of, chat_vector, domain_vector, facts_world, independence, merge_instruction, merged_model, random_like, scan, weights_of)


def family(make=lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), step=0.02):
    torch.manual_seed(0)
    models = [make()]
    for _ in range(2):
        models.append(copy.deepcopy(models[0]))
        with torch.no_grad():
            for p in models[-1].parameters(): p.add_(step * torch.randn_like(p))
    return models


def equal(state, other): return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_corners_are_the_models_bit_for_bit_at_any_size(scale):
    base, inst, dom = family(step=scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert equal(merge_instruction(base, inst, dom, 1, 0), inst.state_dict())
        assert equal(merge_instruction(base, inst, dom, 0, 1), dom.state_dict())
        assert equal(merge_instruction(base, inst, dom, 0, 0), base.state_dict())
        assert equal(merge_instruction(base, inst, dom, .3, .3), merge_instruction(base, dom, inst, .3, .3))


def test_equals_the_sum_of_task_vectors_and_leaves_the_models_alone():
    base, inst, dom = family()
    before = [copy.deepcopy(m.state_dict()) for m in (base, inst, dom)]
    state = merge_instruction(base, inst, dom, 0.5, 2.0)
    for k, t in base.state_dict().items():
        assert torch.allclose(state[k], t + 0.5 * chat_vector(base, inst)[k] + 2.0 * domain_vector(base, dom)[k], atol=1e-6)
        state[k].zero_()
    assert all(equal(m.state_dict(), b) for m, b in zip((base, inst, dom), before))


def test_integer_buffers_and_scalars_stay_of_their_kind():
    make = lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    base, inst, dom = family(make)
    dom[1].num_batches_tracked.fill_(7)
    inst.register_parameter("temperature", nn.Parameter(torch.tensor(1.5)))
    for m in (base, dom): m.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
    state = merge_instruction(base, inst, dom)
    assert state["1.num_batches_tracked"].item() == 7 and state["temperature"].shape == () and state["temperature"].item() == 1.5


def test_skip_keeps_the_domain_models_value():
    base, inst, dom = family()
    state = merge_instruction(base, inst, dom, skip=("2.*",))
    assert torch.equal(state["2.weight"], dom[2].weight) and not torch.equal(state["0.weight"], dom[0].weight)
    assert equal(merge_instruction(base, inst, dom, skip=("*",)), dom.state_dict())


def test_half_precision_is_rounded_once():
    base, inst, dom = (m.bfloat16() for m in family())
    state = merge_instruction(base, inst, dom)
    exact = {k: base.state_dict()[k].double() + (inst.state_dict()[k].double() - base.state_dict()[k].double()) + (dom.state_dict()[k].double() - base.state_dict()[k].double()) for k in state}
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, exact[k].bfloat16()) for k, t in state.items())


def test_rows_that_only_one_model_has_are_copied():
    emb = lambda n: {"embed.weight": torch.randn(n, 4)}
    base, inst, dom = emb(5), emb(7), emb(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = merge_instruction(base, inst, dom)["embed.weight"]
        padded = merge_instruction(emb(9), inst, dom)["embed.weight"]
    assert merged.shape == (7, 4) and torch.equal(merged[5:], inst["embed.weight"][5:])
    assert padded.shape == (9, 4) and torch.equal(padded[6], inst["embed.weight"][6])
    with pytest.raises(ValueError, match="mlp.*only vocabularies"): merge_instruction({"mlp": torch.randn(5, 4)}, {"mlp": torch.randn(7, 4)}, {"mlp": torch.randn(5, 4)})
    with pytest.raises(ValueError, match="embed.weight"): merge_instruction({"embed.weight": torch.randn(5, 4)}, {"embed.weight": torch.randn(5, 3)}, {"embed.weight": torch.randn(5, 4)})


def test_bad_input_is_refused_by_name():
    base, inst, dom = family()
    broken = copy.deepcopy(inst)
    with torch.no_grad(): broken[2].bias[0] = math.nan
    with pytest.raises(ValueError, match="inst: '2.bias' holds NaN"): merge_instruction(base, broken, dom)
    with pytest.raises(ValueError, match="dom: .* only one"): merge_instruction(base, inst, nn.Linear(6, 5))
    with pytest.raises(ValueError, match="alpha"): merge_instruction(base, inst, dom, alpha=math.inf)
    with pytest.raises(TypeError, match="model: got int"): merge_instruction(3, inst, dom)
    with pytest.raises(ValueError, match="id 0 is 'b'"): align_vocab({"a": 0}, {"b": 0})
    with pytest.raises(ValueError, match="zero everywhere"): independence(chat_vector(base, base), chat_vector(base, inst))
    with pytest.raises(ValueError, match="in common"): independence({"a": torch.ones(2)}, {"b": torch.ones(2)})
    with pytest.raises(ValueError, match="shape"): independence({"a": torch.ones(2)}, {"a": torch.ones(3)})
    with pytest.raises(ValueError, match="alphas"): scan(base, inst, dom, [], [1], {"x": lambda m: 0})


def test_a_stranger_is_suspected():
    base, inst, dom = family()
    torch.manual_seed(9)
    stranger = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match="really its parent"): merge_instruction(stranger, inst, dom)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_instruction(base, inst, dom)


def test_shards_give_what_modules_give(tmp_path):
    from safetensors.torch import save_file
    models = family()
    for name, m in zip("bid", models):
        (tmp_path / name).mkdir()
        state = m.state_dict()
        for i, keys in enumerate((list(state)[:1], list(state)[1:])): save_file({k: state[k] for k in keys}, tmp_path / name / f"model-{i}.safetensors")
    assert equal(merge_instruction(*(Shards(tmp_path / n) for n in "bid")), merge_instruction(*models))
    with pytest.raises(FileNotFoundError, match="no .safetensors"): Shards(tmp_path)


def test_tied_hugging_face_models_and_adapters():
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True))
    def adapted(seed, target):
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=1, target_modules=[target], init_lora_weights=False))
    a, b = adapted(1, "q_proj"), adapted(2, "down_proj")
    kept = copy.deepcopy(a.state_dict())
    state = merge_instruction(base, a, b)
    assert equal(a.state_dict(), kept) # the adapter is still an adapter
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    for key, t in base.state_dict().items():
        delta = 0
        for m, target in ((a, "q_proj"), (b, "down_proj")):
            if target in key: delta = m.base_model.model.get_submodule(key.removesuffix(".weight")).get_delta_weight("default")
        assert torch.allclose(state[key] - t, delta + torch.zeros_like(t), atol=1e-6), key
    merged = copy.deepcopy(base)
    merged.load_state_dict(state)
    assert weights_of(merged).keys() == state.keys()


def test_cosines():
    base, inst, dom = family()
    v, w = chat_vector(base, inst), domain_vector(base, dom)
    found = independence(v, w)
    flat = lambda t: torch.cat([x.flatten() for x in t.values()])
    assert found["overall"] == pytest.approx(torch.cosine_similarity(flat(v), flat(w), dim=0).item(), abs=1e-6)
    assert independence(v, w, per_block=False) == {"overall": found["overall"]}
    assert independence(w, v)["overall"] == pytest.approx(found["overall"])
    assert independence({k: 3 * t for k, t in v.items()}, w)["overall"] == pytest.approx(found["overall"])
    assert block_of("model.layers.11.mlp.up.weight") == "model.layers.11" and block_of("head") == "head"
    noise = random_like(v, 0)
    assert all(noise[k].norm().item() == pytest.approx(t.norm().item(), rel=1e-5) for k, t in v.items()) and abs(independence(noise, v)["overall"]) < 0.9


def test_scan_is_the_grid_of_merges():
    base, inst, dom = family()
    x = torch.randn(4, 6)
    table = scan(base, inst, dom, [0, 1], [0, 0.5, 1], {"out": lambda m: m(x).sum().item()})
    assert table.shape == (6, 3) and list(table.columns) == ["alpha", "beta", "out"]
    at = table.set_index(["alpha", "beta"])["out"]
    assert at[0, 1] == dom(x).sum().item() and at[1, 0] == inst(x).sum().item() and at[1, 1] == merged_model(base, inst, dom)(x).sum().item()


def test_the_world_hides_the_exam():
    world, again, other = facts_world(5), facts_world(5), facts_world(6)
    assert torch.equal(world.exam, again.exam) and not torch.equal(world.exam, other.exam)
    assert world.exam.shape == (120, 8) and world.general.shape == (180, 7) and world.vocab_size == len(WORDS) == len(set(WORDS))
    assert not set(world.exam[:, 4].tolist()) & set(torch.cat([world.general[:, 3], world.questions[:, 4]]).tolist())
