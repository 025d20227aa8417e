"A child that runs one reader on one path at a time, in bounded memory, and says what came of it: the property that `test_hostile.py` holds every reader to."
import contextlib
import copy
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

MEMORY = 1 << 30 # bytes that a reader may take beside what the imports need
SECONDS = 30 # of the processor, for one input
GUARDED = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "urllib.Request", "shutil.unpack_archive"}


class Child:
    "The other end of `serve`, started again whenever it dies or hangs."
    def __init__(self, home: Path):
        self.home, self.process = home, None

    def start(self) -> None:
        for name in ("home", "cache", "cwd", "tmp"): (self.home/name).mkdir(exist_ok=True)
        env = {"HOME": self.home/"home", "PTBOOK_CACHE": self.home/"cache", "TMPDIR": self.home/"tmp", "MPLCONFIGDIR": self.home/"home", "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1, "TQDM_DISABLE": 1,
               "RAYON_NUM_THREADS": 1, "TOKENIZERS_PARALLELISM": "false", "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": 2, "MALLOC_TRIM_THRESHOLD_": 1 << 20,
               "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])}
        self.process = subprocess.Popen([sys.executable, "-c", "import hostile; hostile.serve()"], cwd=self.home/"cwd", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.home/"stderr", "w"),
                                        env=os.environ | {key: str(value) for key, value in env.items()}, text=True)
        assert self.answer(600) == {"ready": True}, (self.home/"stderr").read_text()[-2000:]

    def answer(self, seconds: float) -> dict:
        if not select.select([self.process.stdout], [], [], seconds)[0]: return self.stop() or {"outcome": "hung"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else self.stop() or {"outcome": f"crashed with {self.process.returncode}: {(self.home/'stderr').read_text()[-2000:]}"}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, reader: str, path: Path) -> dict: # outcome, error, message, seconds, megabytes, touched
        if self.process is None or self.process.poll() is not None: self.start()
        self.process.stdin.write(json.dumps([reader, os.fsencode(path).hex()]) + "\n")
        self.process.stdin.flush()
        return self.answer(12 * SECONDS) # of the clock: others may be at work on the machine


def memory(field: str) -> int: # megabytes
    return next(int(line.split()[1]) // 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def is_named(error: Exception, path: Path) -> bool:
    "Whether an error is of a kind that callers expect, and says which file it is about."
    kind = type(error)
    if not (kind.__module__ == "builtins" or kind.__module__.startswith("ptbook.")): return False
    if not isinstance(error, (ValueError, LookupError, OSError)) or isinstance(error, (UnicodeError, IndexError)): return False
    names = {path.name, *(p.name for p in path.rglob("*"))} if path.is_dir() else {path.name}
    return any(name in str(error) or repr(name)[1:-1] in str(error) for name in names)


def serve() -> None:
    "Read lines of [reader, path], answer each with a line."
    import resource
    import torch
    touched: list[str] = []
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for warm in WARM: warm()
    from ptbook.adapt.adapter_files import MATCH # the one process that a reader starts: it matches a pattern, and can be ended
    sys.addaudithook(lambda event, args: touched.append(f"{event} {args[:2]!r}"[:200]) if event in GUARDED and MATCH not in str(args) and repr(MATCH)[1:-1] not in str(args) else None)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize:") * (1 << 20) + MEMORY,) * 2)
    torch.set_num_threads(1)
    print('{"ready": true}', file=answers, flush=True)
    for line in sys.stdin:
        name, path = json.loads(line)
        path = Path(os.fsdecode(bytes.fromhex(path)))
        with contextlib.suppress(OSError): Path("/proc/self/clear_refs").write_text("5") # the peak counts from here
        touched.clear()
        before, began = memory("VmRSS:"), time.process_time()
        told = {"outcome": "read"}
        try:
            with warnings.catch_warnings(action="ignore"): READERS[name](path)
        except BaseException as error: # a leak of any kind is what is looked for
            told = {"outcome": "refused" if is_named(error, path) or isinstance(error, ValueError) and name in NAMELESS else "leaked", "error": type(error).__name__, "message": str(error)[:600].encode(errors="replace").decode()}
            if told["outcome"] == "leaked" and os.environ.get("HOSTILE_TRACES"): __import__("traceback").print_exc()
            del error
        told |= {"seconds": time.process_time() - began, "megabytes": memory("VmHWM:") - before, "touched": touched[:3]}
        print(json.dumps(told), file=answers, flush=True)


# What is asked of each reader. A module is imported when it is first needed.

def rows(tables: dict) -> None:
    for table in tables.values():
        for batch in (table.to_batches(1000) if hasattr(table, "to_batches") else [table]): batch["text"].to_pylist() if hasattr(batch, "schema") else list(batch)

def own(path: Path) -> None:
    from ptbook.basics.files import read_own
    rows(read_own(path))

def loaded(path: Path) -> None:
    from ptbook.basics.sources import load, provenance
    ds = load(path)
    ds["train"][:], provenance(ds)

def mirror(path: Path) -> None:
    from ptbook.basics.sources import load
    os.environ["PTBOOK_DATA"] = str(path.parent)
    load(path.name)["train"].with_format("arrow")[:]

def wav(path: Path) -> None:
    from ptbook.basics.files import decode_wav
    decode_wav(path.read_bytes())

def records(path: Path) -> None:
    from ptbook.curate.records import Files
    for record in Files(path): assert (record.text is None) == bool(record.problem), record

def selected(path: Path) -> None:
    from ptbook.curate.report import select_files
    with tempfile.TemporaryDirectory() as out: select_files(path, Path(out)/"kept.parquet", "heuristics", 0.5)

def small_bert():
    import torch, transformers
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20, max_position_embeddings=16)).eval()

def adapter(path: Path) -> None:
    from ptbook.adapt.adapter_files import load
    load(copy.deepcopy(once(small_bert)), path)

def merge(path: Path) -> None:
    from ptbook.merge.files import merge_files
    with tempfile.TemporaryDirectory() as out: merge_files([path, path], Path(out)/"merged", threads=1, progress=False)

def alike(path: Path) -> None: # two folders
    from ptbook.merge.folders import check_alike, tensors_of
    check_alike(path/"a", path/"b", tensors_of(path/"a"), tensors_of(path/"b"))

def small_net():
    import torch
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5))

def keeper(folder: Path):
    import torch
    from accelerate import Accelerator
    from ptbook.basics.checkpoints import Batches, Keeper
    model = small_net()
    return Keeper(folder, {"lr": 0.1}, model, torch.optim.AdamW(model.parameters()), Batches([torch.zeros(2, dtype=torch.long)]), once(lambda: Accelerator(cpu=True), "accelerator"))

def checkpoint(path: Path) -> None: keeper(path).resume()

def weights_alone(path: Path) -> None:
    from ptbook.basics.checkpoints import load_weights
    load_weights(small_net(), path)

def store(path: Path) -> None:
    import numpy as np
    from ptbook.distill.stored_logits import LogitStore
    held = LogitStore(path)
    held.read(np.arange(min(held.layout.samples, 100)))

def network(path: Path) -> None:
    from ptbook.basics.weights import from_hf
    from_hf(str(path))

def language_model(path: Path) -> None:
    from ptbook.curate.report import language_model
    language_model(path)[1]("a b")

def encoder(path: Path) -> None:
    from ptbook.curate.optimal_transport import Encoder
    Encoder(str(path))(["a b"])

def picture(path: Path) -> None:
    from ptbook.curate.redundancy import grey_image
    grey_image(path)

def encoded_picture(path: Path) -> None:
    from ptbook.curate.redundancy import grey_image
    grey_image(path.read_bytes())

def shards(path: Path) -> None:
    from ptbook.merge.instruction_vectors import Shards
    held = Shards(path)
    for name in held: held[name].double().sum()

def policy(path: Path) -> None:
    from ptbook.curate.skills import SkillIt
    import numpy as np
    SkillIt(np.eye(3)).resume(path).p

def result(path: Path) -> None:
    from ptbook.basics.results import read_report
    repr(read_report(path))

def results(path: Path) -> None:
    from ptbook.basics.results import load_results, stale, verdict_line
    repr(load_results(path)), stale(path), verdict_line("s", folder=path)

def seeds(path: Path) -> None:
    from ptbook.basics.results import gather, kept_seeds
    if found := kept_seeds(path, [0]): gather("s", list(found.values()))

def cache(path: Path) -> None: # a folder of caches, each made to be called as the one that is looked for
    import pyarrow as pa
    from ptbook.basics import embedded
    embedded._cache_path = lambda build, packages: path/"made.parquet"
    table = embedded.cached(lambda: pa.table({"text": ["made"], "split": ["train"]}))()
    embedded.by_split(table)["train"]["text"].to_pylist()

def papers(path: Path) -> None:
    from ptbook.press import ledger
    ledger.book_folder = lambda: path
    ledger.papers()

def plan(path: Path):
    from ptbook.press.site_plan import heads, read_plan
    found = read_plan(path)
    found.reading(), found.url, found.output, heads(found)
    return found

def pages(path: Path) -> None:
    from ptbook.press.site_pages import citations
    from ptbook.press.site_plan import heads
    from ptbook.press.site_prepare import prepared
    from ptbook.press.site_render import as_page
    found = plan(path)
    citations(found), heads(found)
    for source in found.notebooks(): as_page(source, prepared(found, source))

def readme(path: Path) -> None:
    from ptbook.press.refresh import readme
    readme(path)

def refreshed(path: Path) -> None: # as far as the kernel
    import nbclient
    from ptbook.press.refresh import refresh_file
    nbclient.NotebookClient.execute = lambda *_, **__: None
    before = path.read_bytes()
    try: refresh_file(path, progress=False)
    finally: path.write_bytes(before)

def run_folder(path: Path) -> None:
    from ptbook.curate.pipeline import Plan, collect
    found = Plan.load(path)
    [found.file(path, "kept", shard) for shard in range(len(found.shards))]
    collect(path)

def unsafe(path: Path) -> None: # what no reader of the book may be
    import pickle
    pickle.loads(path.read_bytes())

def checked_site(path: Path) -> None:
    from ptbook.press.site_check import check
    check(path)


kept: dict = {}
def once(make, name: str = ""): return kept.setdefault(name or make.__name__, None) or kept.update({name or make.__name__: make()}) or kept[name or make.__name__]

def warm_up():
    import nbclient, nbformat, pandas, datasets, pyarrow.parquet, transformers, peft, sklearn, scipy.io.wavfile  # noqa: F401
    import ptbook.adapt.lora, ptbook.basics.weights, ptbook.curate.report, ptbook.merge.files, ptbook.press.site_prepare, ptbook.distill.stored_logits  # noqa: F401
    import ptbook.press.site_render, ptbook.curate.pipeline, ptbook.press.site_check, ptbook.curate.optimal_transport, ptbook.curate.redundancy, ptbook.curate.skills, ptbook.merge.instruction_vectors, nbdev.process, nbdev.clean, matplotlib.pyplot  # noqa: F401
    import torch
    once(small_bert), transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.Qwen2ForCausalLM, torch.zeros(10).sum()
    with tempfile.TemporaryDirectory() as folder: keeper(Path(folder)).save([{"step": 1, "loss": 1.0}], 2.0), keeper(Path(folder)).resume()

WARM = [warm_up]
READERS = {"text": own, "jsonl": own, "csv": own, "parquet": own, "folder": own, "load": loaded, "mirror": mirror, "wav": wav, "records: jsonl": records, "records: jsonl.gz": records, "records: parquet": records,
           "records: text": records, "records: folder": records, "select": selected, "adapter": adapter, "merge": merge, "merge: two folders": alike, "checkpoint": checkpoint, "checkpoint: weights": weights_alone,
           "stored logits": store, "from_hf": network, "language model": language_model, "encoder": encoder, "picture": picture, "picture: bytes": encoded_picture, "shards": shards, "losses": policy, "result": result, "results": results, "kept seeds": seeds, "embedded cache": cache, "papers": papers,
           "site: plan": plan, "site: pages": pages, "site: check": checked_site, "readme": readme, "refresh": refreshed, "run folder": run_folder, "unsafe": unsafe}
NAMELESS = {"wav", "picture: bytes"} # read bytes, not a file
