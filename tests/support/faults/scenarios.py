"""What is done while something goes wrong: a writer of weft's each, and how to see what it left."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass

import torch
import transformers
from safetensors import safe_open

import weft
from models import lora, quietly, save_adapter, tiny_llama, tiny_tokenizer
from weft.cli import main
from weft.errors import WeftError
from weft.train.checkpoints import find_checkpoints

TEXT = "the quick brown fox"
LEFTOVERS = (".part", ".old")


class CommandError(WeftError):
    """A command ended with an error of weft's."""


@dataclass
class Scenario:
    """One writer.

    Attributes:
        name: for the report.
        prepare: makes the folder's start, from the fixed one with base, adapters and mixture.
        run: the command.
        look: what is there afterwards, read as a user would read it; None where there is nothing to read.
        again: what its user does after it went wrong; None does the same.
        in_parts: it writes several files, each whole, or what it has so far: there is more than before and after.
    """

    name: str
    prepare: object
    run: object
    look: object
    again: object = None
    in_parts: bool = False


def command(*arguments):
    """Run weft's command line; an error of weft's is raised, with what it says."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    if code:
        raise CommandError(errors.getvalue())


def make_start(root):
    """Base, adapters, a mixture of them, an older mixture, texts."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("math", "code", "law")):
        base = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
        save_adapter(base, lora(target_modules=["q_proj", "v_proj"]), root / "adapters" / name, seed=seed)
    adapters = {name: str(root / "adapters" / name) for name in ("math", "code")}
    torch.manual_seed(0)
    weft.from_adapters(str(root / "base"), adapters).save_pretrained(root / "mixture")
    tokenizer.save_pretrained(root / "mixture")
    rows = [json.dumps({"text": f"{TEXT} {number}"}) for number in range(6)]
    (root / "texts.jsonl").write_text("\n".join(rows))


def digest(file):
    if file.suffix != ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    with safe_open(file, framework="pt") as opened:  # whose metadata are in no order
        digests = {key: hashlib.sha256(opened.get_tensor(key).numpy().tobytes()).hexdigest() for key in opened.keys()}  # noqa: SIM118
        return [opened.metadata(), digests]


def files(folder):
    """{name: digest} of all files of a folder that something would read."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and name.parts[0] not in (*LEFTOVERS, "checkpoints") and file.suffix != ".part":
            found[str(name)] = digest(file)
    return found


def mixture(folder):
    """A mixture as it is loaded, None where there is none."""
    if not folder.is_dir():
        return None
    weft.checkpoint.adapters.local_folder(str(folder), "the mixture")  # as whoever loads it does
    if not {path.name for path in folder.iterdir()} - {*LEFTOVERS, "checkpoints"}:
        return None
    model = weft.from_pretrained(folder)
    return {"experts": model.xlora_config.expert_names, **files(folder)}


def adapter(folder):
    """An adapter as peft loads it."""
    if not folder.is_dir():
        return None
    weft.checkpoint.adapters.local_folder(str(folder), "the adapter")
    if not files(folder):
        return None
    base = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    quietly(weft.from_adapters, base, {"folded": str(folder)})
    return files(folder)


def _nothing(root):
    pass


def _train(root, *more):
    adapters = [f"{name}={root}/adapters/{name}" for name in ("math", "code")]
    command(
        *("train", "--base", root / "base", "--adapters", *adapters, "--data", root / "texts.jsonl"),
        *("--output", root / "out", "--batch-size", "2", "--max-steps", "6", "--save-steps", "2"),
        *("--gate-start", "random", "--sequence-length", "32", "--learning-rate", "0.01", *more),
    )


def _train_again(root):
    """As the command and its errors say: the same, or with --resume true where there are checkpoints."""
    try:
        _train(root)
    except CommandError as err:
        if "--resume true" not in str(err):
            raise
        _train(root, "--resume", "true")


def _trained(root):
    found = find_checkpoints(root / "out/checkpoints")
    if found.damaged:
        raise AssertionError(f"damaged: {found.damaged}")
    return mixture(root / "out")


def _train_experts(root):
    command(
        *("train", "--base", root / "base"),
        *("--experts-from", f"fox={root}/texts.jsonl", f"dog={root}/texts.jsonl"),
        *("--output", root / "out", "--batch-size", "2", "--max-steps", "2", "--expert-steps", "2"),
        *("--expert-rank", "2", "--gate-start", "random", "--sequence-length", "32", "--resume", "true"),
    )


def _save(root):
    torch.manual_seed(1)
    adapters = {name: str(root / "adapters" / name) for name in ("law", "code")}
    model = weft.from_adapters(str(root / "base"), adapters, use_trainable_adapters=True)
    quietly(model.save_pretrained, root / "mixture")


def _fold(root):
    command("fold", root / "mixture", "--weights", "math=0.5", "code=0.25", "--output", root / "folded")


def _fold_before(root):
    command("fold", root / "mixture", "--weights", "math=1", "--output", root / "folded")


def _evaluate(root):
    data = [f"math={root}/texts.jsonl"]
    rows = ["--rows", "base", "weft"]
    outputs = ["--output", root / "table.json", root / "table.md"]
    command("eval", root / "mixture", "--data", *data, *rows, *outputs, "--sequence-length", "32")


def _table(root):
    found = {}
    if (root / "table.json").exists():
        found["perplexity"] = json.loads((root / "table.json").read_text())["perplexity"]
    if (root / "table.md").exists():
        found["lines"] = len((root / "table.md").read_text().splitlines())
    return found or None


def _inspect(root):
    outputs = [f"--{name}={root}/gates.{ending}" for name, ending in (("output", "trace"), ("html", "html"))]
    command("inspect", root / "mixture", "--text", TEXT, *outputs, "--figure", root / "gates.svg")


def _traced(root):
    shown = {name: (root / name).exists() for name in ("gates.html", "gates.svg") if (root / name).exists()}
    if (root / "gates.html").exists():
        assert (root / "gates.html").read_text().rstrip().endswith("</html>")
    if (root / "gates.svg").exists():
        assert (root / "gates.svg").read_text().rstrip().endswith("</svg>")
    if (root / "gates.trace").exists():
        shown["tokens"] = len(weft.Trace.load(root / "gates.trace"))
    return shown or None


def _pull(root):
    import huggingface_hub

    original, huggingface_hub.snapshot_download = (
        huggingface_hub.snapshot_download,
        lambda *args, **kwargs: str(root / "mixture"),
    )
    try:
        weft.pull("user/mixture", root / "pulled")
    finally:
        huggingface_hub.snapshot_download = original


def _cache(root):
    sequences = [list(range(1, 9)), list(range(3, 7)), list(range(2, 12))]
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    model = weft.from_adapters(base, {"math": str(root / "adapters/math")})
    cache = weft.ScalingCache.build(model, sequences, root / "caches", announce=lambda line: None)
    return {str(number): digest_of_tensor(cache[number]) for number in range(3)}


def digest_of_tensor(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _cached(root):
    # What is there is used or computed anew: whoever builds it sees the same.
    return _cache(root) if (root / "caches").exists() else None


def _xlora(root):
    folder = root / "converted"
    if not folder.is_dir():
        return None
    weft.checkpoint.adapters.local_folder(str(folder), "the mixture")
    if not files(folder):
        return None
    weft.from_pretrained(folder, str(root / "base"))
    return files(folder)


def _in_place(verb, expert):
    return lambda root: command(verb, root / "mixture", expert.format(root), "--output", root / "mixture")


SCENARIOS = [
    Scenario("train", _nothing, _train, _trained, _train_again, in_parts=True),
    Scenario("train experts", _nothing, _train_experts, _trained, in_parts=True),
    Scenario("save_pretrained", _nothing, _save, lambda root: mixture(root / "mixture")),
    Scenario("add-expert", _nothing, _in_place("add-expert", "law={}/adapters/law"), lambda r: mixture(r / "mixture")),
    Scenario("drop-expert", _nothing, _in_place("drop-expert", "math"), lambda root: mixture(root / "mixture")),
    Scenario("fold", _nothing, _fold, lambda root: adapter(root / "folded")),
    Scenario("fold over one", _fold_before, _fold, lambda root: adapter(root / "folded")),
    Scenario(
        "convert",
        _nothing,
        lambda root: command("convert", root / "mixture", "--to", "xlora", "--output", root / "converted"),
        _xlora,
    ),
    Scenario("pull", _nothing, _pull, lambda root: mixture(root / "pulled")),
    Scenario("card", _nothing, lambda root: command("card", root / "mixture"), lambda root: mixture(root / "mixture")),
    Scenario("eval", _nothing, _evaluate, _table, in_parts=True),
    Scenario("inspect", _nothing, _inspect, _traced, in_parts=True),
    Scenario("scaling cache", _nothing, _cache, _cached),
]
