"Merging model folders: equal to the merge in memory, little memory, whole or not at all, and a named error for everything else."
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from ptbook.basics.whole import HOST
from ptbook.merge import files
from ptbook.merge.files import merge_files
from ptbook.merge.folders import LIMIT, MergeError, tensors_of
from ptbook.merge.methods import BLOCK, METHODS, merge_state_dicts
from ptbook.press import cli

KINDS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=16)),  # tied
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48, tie_word_embeddings=True)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=16))}


def save(folder: Path, kind: str, seed: int, dtype=torch.float32, **options) -> Path:
    torch.manual_seed(seed)
    model = KINDS[kind]().to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder, **options)
    return folder


def held(folder: Path) -> dict: return {n: t for f in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(f).items()}
def same(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
def quiet(*args, **options): return merge_files(*args, progress=False, **options)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("llamas")
    return [save(root/f"m{i}", "llama", i, max_shard_size="20kB") for i in range(4)]


def plain(folder: Path, tensors: dict, **config) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder/"model.safetensors", metadata={"format": "pt"})
    (folder/"config.json").write_text(json.dumps({"model_type": "x"} | config))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_bit_for_bit_what_memory_gives(llamas, tmp_path, method):
    base = None if method == "linear" else llamas[0]
    done = quiet(llamas[1:], tmp_path/"out", method, [1, 2, 0.5], base, density=0.3, threads=3)
    expected = merge_state_dicts([held(f) for f in llamas[1:]], method, [1, 2, 0.5], base and held(base), density=0.3)
    assert same(held(tmp_path/"out"), expected) and done.tensors == len(expected)
    assert len(list((tmp_path/"out").glob("*.safetensors"))) == len(list(llamas[1].glob("*.safetensors"))) > 2
    hf.LlamaForCausalLM.from_pretrained(tmp_path/"out")


@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_many_blocks(tmp_path, method):
    g = torch.Generator().manual_seed(0)
    shapes = {"large": (files.PART//512 + 3, 512), "odd": (2*BLOCK + 5,), "one": (), "none": (0, 4)}
    states = [{n: torch.randn(s, generator=g).bfloat16() for n, s in shapes.items()} | {"ids": torch.arange(9) + i, "on": torch.tensor([True, i > 0])} for i in range(3)]
    folders = [plain(tmp_path/f"m{i}", s) for i, s in enumerate(states)]
    quiet(folders[1:], tmp_path/"out", method, base=None if method == "linear" else folders[0])
    assert same(held(tmp_path/"out"), merge_state_dicts(states[1:], method, base=states[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "15kB"}])
def test_the_result_is_a_model(tmp_path, kind, options):
    folders = [save(tmp_path/f"m{i}", kind, i, **options) for i in range(2)]
    quiet(folders, tmp_path/"out", dtype="bfloat16")
    model, first = (type(KINDS[kind]()).from_pretrained(f) for f in (tmp_path/"out", folders[0]))
    assert model.dtype == torch.bfloat16 and model.config.model_type == kind
    other = type(first).from_pretrained(folders[1]).state_dict()
    for name, t in model.state_dict().items():
        if t.is_floating_point(): assert torch.equal(t, ((first.state_dict()[name] + other[name])/2).bfloat16()), name
    tied = getattr(model.config, "tie_word_embeddings", False)
    assert not tied or model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_dtypes_may_be_mixed_and_asked_for(tmp_path):
    a = plain(tmp_path/"a", {"w": torch.full((4,), 1.0).half()}, torch_dtype="float16")
    b = plain(tmp_path/"b", {"w": torch.full((4,), 2.0).bfloat16()})
    for asked, got in ((None, torch.float16), ("float32", torch.float32)):
        quiet([a, b], tmp_path/f"{asked}", dtype=asked)
        assert held(tmp_path/f"{asked}")["w"].dtype == got and json.loads((tmp_path/f"{asked}/config.json").read_text())["torch_dtype"] == str(got)[6:]
    big = plain(tmp_path/"big", {"w": torch.full((4,), 6e4).half()})
    with pytest.raises(MergeError, match="too large for torch.float16"): quiet([big, big], tmp_path/"over", weights=[1, 1], normalize=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_named_with_its_file(tmp_path, bad, method):
    folders = [plain(tmp_path/f"m{i}", {"good": torch.randn(5), "w": torch.randn(BLOCK + 9)}) for i in range(3)]
    state = held(folders[1])
    state["w"][BLOCK + 3] = bad
    save_file(state, folders[1]/"model.safetensors")
    with pytest.raises(MergeError) as error: quiet(folders[:2], tmp_path/"out", method, [0.5, 0.5], None if method == "linear" else folders[2], density=0.1)
    assert "'w'" in str(error.value) and "m1/model.safetensors" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "m2"]


def test_models_that_differ_are_refused(tmp_path, llamas):
    w = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    one = plain(tmp_path/"one", w)
    cases = {"less": ({"a": w["a"]}, {}, "'b'"), "more": (w | {"c": torch.ones(1)}, {}, "'c'"), "shape": (w | {"a": torch.ones(3, 2)}, {}, r"\[3, 2\]"),
             "kind": (w | {"b": torch.ones(2).long()}, {}, "int64"), "type": (w, {"model_type": "y"}, "model_type"), "arch": (w, {"architectures": ["Y"]}, "architectures"),
             "heads": (w, {"num_attention_heads": 4}, "num_attention_heads")}
    for name, (tensors, config, word) in cases.items():
        with pytest.raises(MergeError, match=word): quiet([one, plain(tmp_path/name, tensors, **config)], tmp_path/"out")
        with pytest.raises(MergeError, match=word): quiet([one], tmp_path/"out", "ties", base=tmp_path/name)
    assert not (tmp_path/"out").exists()


def words(folder: Path, tokens: dict, kind: str) -> None:
    if kind == "vocab.txt": (folder/kind).write_text("\n".join(sorted(tokens, key=tokens.get)))
    elif kind == "vocab.json": (folder/kind).write_text(json.dumps(tokens))
    elif kind == "tokenizer.model": (folder/kind).write_bytes(repr(tokens).encode())
    elif kind == "unigram": (folder/"tokenizer.json").write_text(json.dumps({"model": {"vocab": [[t, -1.0] for t in sorted(tokens, key=tokens.get)]}}))
    else: (folder/kind).write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": [{"id": 9, "content": "<s>"}], "note": folder.name}))


@pytest.mark.parametrize("kind", ["tokenizer.json", "unigram", "vocab.json", "vocab.txt", "tokenizer.model"])
def test_tokenizers_are_compared_and_carried(tmp_path, kind):
    a, b, c, none = (plain(tmp_path/n, {"w": torch.ones(2)}) for n in "abcn")
    words(a, {"cat": 0, "dog": 1}, kind); words(b, {"cat": 0, "dog": 1}, kind); words(c, {"dog": 0, "cat": 1}, kind)
    quiet([a, b, none], tmp_path/"out")
    assert [p.name for p in (tmp_path/"out").iterdir() if p.name in files.CARRIED] == [p.name for p in a.iterdir() if p.name in files.CARRIED]
    with pytest.raises(MergeError, match="tokenizers differ") as error: quiet([a, c], tmp_path/"never")
    assert kind == "tokenizer.model" or "'cat'" in str(error.value)


def test_files_that_lie(tmp_path):
    good = plain(tmp_path/"good", {"w": torch.ones(100), "v": torch.ones(3)})
    data = (good/"model.safetensors").read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    def header(**entries): h = json.dumps(entries).encode(); return struct.pack("<Q", len(h)) + h
    w = {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}
    bad = {"empty": b"", "short": data[:4], "cut": data[:-9], "longer": data + b"1234", "huge": struct.pack("<Q", 2**63) + data[8:], "header": struct.pack("<Q", LIMIT + 1) + data[8:],
           "no json": struct.pack("<Q", n) + b"{" * n + data[8 + n:], "list": struct.pack("<Q", 2) + b"[]", "deep": struct.pack("<Q", 50000) + b"[" * 50000,
           "shape": header(w=w | {"shape": [10**12]}) + bytes(400), "beyond": header(w=w | {"data_offsets": [0, 10**15]}) + bytes(400),
           "negative": header(w=w | {"shape": [-100]}) + bytes(400), "overlap": header(w=w, v=w) + bytes(400), "dtype": header(w=w | {"dtype": "F8_E4M3", "shape": [400]}) + bytes(400)}
    for name, content in bad.items():
        shutil.rmtree(tmp_path/"bad", ignore_errors=True)
        shutil.copytree(good, tmp_path/"bad")
        (tmp_path/"bad/model.safetensors").write_bytes(content)
        with pytest.raises(MergeError, match="model.safetensors"): quiet([good, tmp_path/"bad"], tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_a_file_that_shrinks_meanwhile(tmp_path, monkeypatch):
    folders = [plain(tmp_path/f"m{i}", {"w": torch.ones(1000)}) for i in range(2)]
    def cut_short(plan, threads, progress):
        os.truncate(folders[1]/"model.safetensors", 1000)
        return whole(plan, threads, progress)
    whole = files.merge_all
    monkeypatch.setattr(files, "merge_all", cut_short)
    with pytest.raises(MergeError, match="ends earlier"): quiet(folders, tmp_path/"out")


def test_indexes_that_lead_elsewhere(tmp_path, llamas):
    outside = plain(tmp_path/"outside", {"model.norm.weight": torch.ones(32)})/"model.safetensors"
    def trap(name, **change):
        folder = tmp_path/name
        shutil.copytree(llamas[0], folder)
        index = json.loads((folder/"model.safetensors.index.json").read_text())
        (folder/"model.safetensors.index.json").write_text(json.dumps(index | change.get("top", {}) | {"weight_map": index["weight_map"] | change.get("map", {})} if "raw" not in change else change["raw"]))
        return folder
    link = trap("link", map={"model.norm.weight": "link.safetensors"})
    (link/"link.safetensors").symlink_to(outside)
    for folder in (trap("dots", map={"model.norm.weight": "../outside/model.safetensors"}), trap("root", map={"model.norm.weight": str(outside)}), link,
                   trap("gone", map={"model.norm.weight": "gone.safetensors"}), trap("number", map={"model.norm.weight": 7}), trap("back", map={"model.norm.weight": "..\\x"}),
                   trap("less", map={"nothing": "model-00001-of-00002.safetensors"}), trap("list", raw=[]), trap("empty", raw={"weight_map": {}}), trap("none", raw={})):
        with pytest.raises(MergeError): tensors_of(folder)
        with pytest.raises(MergeError): quiet([llamas[0], folder], tmp_path/"out")
    whole = plain(tmp_path/"single", {"w": torch.ones(2)})
    (whole/"model.safetensors").unlink()
    (whole/"model.safetensors").symlink_to(outside)
    with pytest.raises(MergeError, match="leads out"): tensors_of(whole)
    for nothing in (tmp_path/"nowhere", tmp_path): 
        with pytest.raises(MergeError): tensors_of(nothing)


def test_the_hub_s_cache_is_made_of_links(tmp_path):
    blob = plain(tmp_path/"models--x/blobs", {"w": torch.ones(2)})
    snapshot = tmp_path/"models--x/snapshots/abc"
    snapshot.mkdir(parents=True)
    for file in blob.iterdir(): (snapshot/file.name).symlink_to(Path("../../blobs")/file.name)
    quiet([snapshot, snapshot], tmp_path/"out")
    assert held(tmp_path/"out")["w"].tolist() == [1, 1] and not (tmp_path/"out/config.json").is_symlink()


@pytest.mark.parametrize("wrong, word", [
    (dict(weights=[1]), "weights"), (dict(method="ties"), "base"), (dict(method="sum"), "method"), (dict(dtype="int8"), "dtype"), (dict(inputs=[]), "weights"),
    (dict(density=0, method="ties", base=True), "density"), (dict(out="there"), "already"), (dict(out="m0", overwrite=True), "input"), (dict(out="", overwrite=True), "input")])
def test_wrong_requests(tmp_path, wrong, word):
    folders = [plain(tmp_path/f"m{i}", {"w": torch.ones(2)}) for i in range(2)]
    (tmp_path/"there").mkdir()
    wrong = {"inputs": folders} | wrong | {"out": tmp_path/wrong.get("out", "out")} | ({"base": folders[0]} if "base" in wrong else {})
    with pytest.raises(ValueError, match=word): quiet(**wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "there"]


def test_overwriting(tmp_path):
    folders = [plain(tmp_path/f"m{i}", {"w": torch.full((2,), float(i))}) for i in range(2)]
    quiet(folders, tmp_path/"out")
    (tmp_path/"out/old").touch()
    quiet(folders, tmp_path/"out", weights=[0, 1], overwrite=True)
    assert held(tmp_path/"out")["w"].tolist() == [1, 1] and not (tmp_path/"out/old").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "out"]


def child(program: str, *args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "import sys; from ptbook.merge.files import merge_files\n" + program, *map(str, args)], stdout=subprocess.PIPE, text=True)


def test_a_killed_merge_leaves_the_old_or_the_new(tmp_path):
    g = torch.Generator().manual_seed(0)
    folders = [plain(tmp_path/f"m{i}", {f"w{j}": torch.randn(1 << 20, generator=g) for j in range(6)}) for i in range(3)]
    quiet(folders[:1], tmp_path/"out")
    old, new = held(folders[0]), merge_state_dicts([held(f) for f in folders])
    process = child("print('ready', flush=True)\nwhile True: merge_files(sys.argv[2:], sys.argv[1], overwrite=True, progress=False); print('done', flush=True)", tmp_path/"out", *folders)
    process.stdout.readline()
    time.sleep(0.05)
    process.kill(); process.wait()
    for delay in (0.02, 0.2):
        pid = os.fork()  # a second and a third one, without the wait for torch
        if pid == 0:
            try:
                while True: quiet(folders, tmp_path/"out", overwrite=True, threads=1)
            finally: os._exit(1)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if (tmp_path/"out").exists(): assert same(held(tmp_path/"out"), old) or same(held(tmp_path/"out"), new)
    quiet(folders, tmp_path/"out", overwrite=True)
    assert same(held(tmp_path/"out"), new) and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_killed_exchange_is_mended(tmp_path):
    one = plain(tmp_path/"one", {"w": torch.ones(2)})
    quiet([one], tmp_path/"out")
    draft = tmp_path/".out.0123abcd.draft"  # killed between the two renamings, where there is no exchange in one
    (draft/"new").mkdir(parents=True)
    (draft/"writer").write_bytes(HOST)
    shutil.copytree(tmp_path/"out", draft/"new/out")
    (tmp_path/"out").rename(draft/"old")
    with pytest.raises(MergeError, match="already"): quiet([one], tmp_path/"out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "out"]


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    folders = [plain(tmp_path/f"m{i}", {"w": torch.randn(200_000)}) for i in range(2)]
    process = child("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
                    "try: merge_files(sys.argv[2:], sys.argv[1], progress=False)\nexcept ValueError as e: print(type(e).__name__, e)", tmp_path/"out", *folders)
    assert "MergeError" in (said := process.communicate()[0]) and "could not be written" in said
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(MergeError, match="needs 8"): quiet(folders, tmp_path/"out")
    (tmp_path/"file").touch()
    with pytest.raises(MergeError, match="could not be written"): quiet(folders, tmp_path/"file/out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m0", "m1"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_models(tmp_path):
    state = {f"w{i}": torch.randn(1 << 21).bfloat16() for i in range(8)}  # 32 MB
    folders = [plain(tmp_path/f"m{i}", state) for i in range(8)]
    program = """
peaks = []
for method in ("linear", "ties"):
    for n in (3, 8):
        merge_files(sys.argv[2:n + 2], sys.argv[1], method, base=sys.argv[2], progress=False, overwrite=True, threads=2)
        peaks.append([int(line.split()[1]) // 1000 for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
print(peaks)"""
    linear, more_linear, ties, more_ties = json.loads(child(program, tmp_path/"out", *folders).communicate()[0])
    assert more_linear - linear < 40 and more_ties - ties < 40 and ties - more_linear < 120  # MB; five more models of 32 MB each


def test_threads_are_put_back(tmp_path, llamas):
    before = torch.get_num_threads()
    quiet(llamas[:2], tmp_path/"out", threads=2)
    with pytest.raises(MergeError): quiet([llamas[0], plain(tmp_path/"x", {"w": torch.ones(1)})], tmp_path/"no")
    assert torch.get_num_threads() == before


def ask(capfd, *args, rc=0):
    with pytest.raises(SystemExit) as stop: cli.main(["merge", *map(str, args)])
    said = capfd.readouterr()
    assert stop.value.code == rc, said
    return said


def test_the_command(tmp_path, llamas, capfd):
    said = ask(capfd, *llamas[1:3], "--out", tmp_path/"out", "--method", "ties", "--base", llamas[0], "--weights", "1,3", "--density", "0.4", "--json")
    assert json.loads(said.out)["folder"] == str(tmp_path/"out")
    assert same(held(tmp_path/"out"), merge_state_dicts([held(f) for f in llamas[1:3]], "ties", [1, 3], held(llamas[0]), density=0.4))
    assert "already" in ask(capfd, *llamas[:2], "--out", tmp_path/"out", rc=2).err
    assert "merged by linear" in ask(capfd, *llamas[:2], "--out", tmp_path/"out", "--overwrite").out


@pytest.mark.parametrize("args, word", [(["--weights", "1"], "weights"), (["--weights", "a,b"], "a,b"), (["--method", "mean"], "mean"), (["--method", "ties"], "base"),
                                        (["--dtype", "int8"], "int8"), (["--density", "2"], "density"), (["nowhere"], "nowhere"), (["--threads", "0"], "threads")])
def test_wrong_commands_get_one_line_and_exit_code_2(tmp_path, llamas, capfd, args, word):
    said = ask(capfd, *llamas[:2], *args, "--out", tmp_path/"out", rc=2)
    assert said.out == "" and len(said.err.splitlines()) == 1 and word in said.err
