"""What is tried with the mutated things: each takes a case and the world, and returns what to do.

The numbers beside them are how often each is tried; those that load a model, or a command line, take longer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch

import weft
from weft.base_model.loading import load_base, load_tokenizer
from weft.checkpoint.adapters import read_adapters
from weft.checkpoint.folder import open_mixture
from weft.cli import main
from weft.config import XLoraConfig
from weft.data.labelled import training_rows
from weft.data.texts import read_tokens
from weft.errors import WeftError
from weft.evaluate.cell_store import CellStore
from weft.evaluate.data_sets import read_data_set
from weft.evaluate.report import check_outputs
from weft.formats.card import card_text
from weft.formats.mixture import opened
from weft.traces.figures import write_figure
from weft.traces.page import write_page
from weft.traces.trace import Trace

from .hostile import NUMBERS, RAW, TEXTS, VALUES
from .judge import Case, Wrong
from .mutations import copy, mutate_bytes, mutate_folder, mutate_values
from .world import LAYOUTS, ROWS, World

Action = Callable[[Case], Any]
Maker = Callable[[Case, World], Action]


def _mutated(case: Case, world: World, name: str) -> Path:
    target = case.inputs / name
    copy(world.at(name), target)
    case.what += mutate_folder(target, case.outside, case.rng)
    case.named = (str(case.inputs), "'math'", "'code'", "'0'", "'1'", "'third'", "adapter '", "base (", "name (")
    return target


def adapter(case: Case, world: World) -> Action:
    """An adapter's folder is read."""
    folder = _mutated(case, world, "adapters/math")
    return lambda case: read_adapters({"math": str(folder)}, base_is_known=True)


def adapter_injected(case: Case, world: World) -> Action:
    """A mixture is made with it, and works."""
    folder = _mutated(case, world, "adapters/math")

    def act(case: Case) -> None:
        model = weft.from_adapters(world.base, {"math": str(folder), "code": str(world.at("adapters/code"))})
        try:
            world.logits_of(model)
        finally:
            model.base_model.unload()

    return act


def mixture(case: Case, world: World) -> Action:
    """A mixture's options are read, and its files verified."""
    layout = case.rng.choice(LAYOUTS)
    folder = _mutated(case, world, layout)

    def act(case: Case) -> None:
        if layout != "mistralrs":
            XLoraConfig.from_pretrained(folder)
        with opened(folder):
            pass

    return act


def mixture_loaded(case: Case, world: World) -> Action:
    """A mixture is loaded; where it has a manifest, it gives what it gave, or is refused."""
    layout = case.rng.choice(["weft", "weft", "weft", "peft", "xlora"])
    folder = _mutated(case, world, layout)

    def act(case: Case) -> None:
        model = weft.from_pretrained(folder, world.base)
        try:
            found = world.logits_of(model)
        finally:
            model.base_model.unload()
        # The mixture's own options may be changed by hand; all else is in the manifest.
        own = folder / "adapter_config.json" if layout != "xlora" else folder / "xlora_config.json"
        same = json.loads(own.read_text()) == json.loads(world.at("weft/adapter_config.json").read_text())
        if layout == "weft" and same and not torch.equal(found, world.logits["weft"]):
            raise Wrong("other logits than were saved, and a manifest")

    return act


def converted(case: Case, world: World) -> Action:
    """A mixture is written in another layout."""
    folder = _mutated(case, world, case.rng.choice([*LAYOUTS, "mistralrs"]))
    to = case.rng.choice(LAYOUTS)
    case.what.append(f"convert to {to}")
    return lambda case: weft.convert_mixture(folder, to, case.output / "new")


def changed(case: Case, world: World) -> Action:
    """An expert is dropped, or the card written."""
    folder = _mutated(case, world, "weft")
    if case.rng.random() < 0.5:
        return lambda case: weft.drop_expert(folder, "math", case.output / "new")
    return lambda case: card_text(open_mixture(folder))


def written(case: Case, world: World) -> Action:
    """Something is written under a name that may be none, or where somebody else's files are."""
    rng = case.rng
    names = ["x" * 300, "x" * 5000, "a\0b", "a\ud83d", "", ".", "b/c/d", "e", "mine", "mine/note.txt", "file", "shut"]
    name = rng.choice(names)
    (case.output / "mine").mkdir()
    (case.output / "mine" / "note.txt").write_text("mine")
    (case.output / "file").write_text("mine")
    (case.output / "shut").mkdir(mode=0o300)
    target, suffix = f"{case.output}/{name}", rng.choice(["", "", ".json", ".html", ".svg", ".md"])
    case.what.append(f"{name[:20]!r} {suffix}")
    adapters = {"math": str(world.at("adapters/math")), "code": str(world.at("adapters/code"))}

    def save(model: Any) -> None:
        try:
            model.save_pretrained(target)
        finally:
            model.base_model.unload()

    tries: list[Action] = [
        lambda case: weft.convert_mixture(world.at("weft"), "xlora", target),
        lambda case: weft.drop_expert(world.at("weft"), "math", target),
        lambda case: Trace.load(world.at("a.trace")).save(target + suffix),
        lambda case: write_page([Trace.load(world.at("a.trace"))], target + suffix),
        lambda case: write_figure(Trace.load(world.at("a.trace")), target + suffix),
        lambda case: save(weft.from_adapters(world.base, adapters)),
        lambda case: check_outputs([target + suffix]),
    ]
    attempt = rng.choice(tries)

    def act(case: Case) -> None:
        try:
            attempt(case)
        finally:
            case.output.joinpath("shut").chmod(0o700)
            notes = [case.output / "mine" / "note.txt", case.output / "file"]
            if [note.read_text() for note in notes if note.is_file()] != ["mine", "mine"]:
                raise Wrong("somebody else's file was lost")

    return act


def expert_added(case: Case, world: World) -> Action:
    """An expert is added."""
    what = case.rng.choice(["weft", "adapters/math"])
    _mutated(case, world, what)
    mixture = case.inputs / "weft" if what == "weft" else world.at("weft")
    new = world.at("adapters/math") if what == "weft" else case.inputs / "adapters/math"
    return lambda case: weft.add_expert(mixture, "third", str(new), case.output / "new", base=world.base)


def base_model(case: Case, world: World) -> Action:
    """A base model and its tokenizer are loaded."""
    folder = _mutated(case, world, "base")
    case.named = (str(folder),)
    if case.rng.random() < 0.3:
        return lambda case: load_tokenizer(str(folder))
    return lambda case: load_base(str(folder), "auto")


def trace_file(case: Case, world: World) -> Action:
    """A trace is read."""
    (case.inputs / "a").mkdir(parents=True)
    file = case.inputs / "a" / "a.safetensors"
    copy(world.at("a.trace"), file)
    case.what += mutate_folder(file.parent, case.outside, case.rng)
    case.named = (str(file),)

    def act(case: Case) -> None:
        trace = Trace.load(file)
        trace.shares(), trace.perplexities(), trace.by_name(), trace.to_arrow()

    return act


def cells_file(case: Case, world: World) -> Action:
    """A file of finished cells is read."""
    file = case.inputs / "a.cells.jsonl"
    copy(world.at("data/a.cells.jsonl"), file)
    _mutate_lines(file, case)
    return lambda case: CellStore(file)


def data_file(case: Case, world: World) -> Action:
    """A file of rows is read for training or evaluation."""
    name = case.rng.choice([f"{name}.jsonl" for name in ROWS] * 3 + ["plain.txt"])
    file = case.inputs / name
    copy(world.at(f"data/{name}"), file)
    _mutate_lines(file, case)
    case.named = (str(file), str(case.inputs))
    experts, tokenizer = ["math", "code"], world.tokenizer
    tries: list[Action] = [
        lambda case: read_tokens(str(file), tokenizer),
        lambda case: read_data_set("a", str(file), tokenizer, experts, sequence_length=8),
        lambda case: training_rows([str(file)], experts, tokenizer, 8, labelled=True),
        lambda case: training_rows([str(file)], [], tokenizer, 8, labelled=False, assistant_only_loss=True),
    ]
    return case.rng.choice(tries)


def table_file(case: Case, world: World) -> Action:
    """A table of the `datasets` library is read."""
    file = case.inputs / "table.parquet"
    copy(world.at("data/table.parquet"), file)
    case.what.append(mutate_bytes(file, case.rng))
    return lambda case: read_tokens(str(file), world.tokenizer)


def _mutate_lines(file: Path, case: Case) -> None:
    rng, lines = case.rng, file.read_text().split("\n")
    kind = rng.random()
    if kind < 0.2 or not lines[0].startswith("{"):
        case.what.append(mutate_bytes(file, rng))
        return
    if kind < 0.9:
        row = json.loads(lines[0])
        place = row
        while isinstance(next(iter(place.values()), None), list) and rng.random() < 0.6:
            inner = next(iter(place.values()))
            if not inner or not isinstance(inner[0], dict):
                break
            place = inner[0]
        case.what.append(mutate_values(place, rng))
        if rng.random() < 0.3:
            place[rng.choice(sorted(place) or ["text"])] = rng.choice(TEXTS)
        lines[0] = json.dumps(row)
        for number, raw in enumerate(RAW):
            lines[0] = lines[0].replace(json.dumps(f"@@raw@@{number}"), raw)
    else:
        lines[0] = rng.choice(RAW)
        case.what.append(f"first line {lines[0][:40]!r}")
    file.write_text("\n".join(lines), encoding="utf-8")


def options(case: Case, world: World) -> Action:
    """Options of a mixture that no mixture can have."""
    names = [name for name in XLoraConfig.__dataclass_fields__ if name not in ("peft_type", "peft_version")]
    names += ["nonsense", "modules_to_save"]
    given = {case.rng.choice(names): case.rng.choice(VALUES) for _ in range(case.rng.choice([1, 1, 2, 3]))}
    case.what.append(str(given)[:300])
    adapters = {"math": str(world.at("adapters/math")), "code": str(world.at("adapters/code"))}
    return lambda case: XLoraConfig(**{"adapters": adapters, "hidden_size": 32, **given})


def options_used(case: Case, world: World) -> Action:
    """The same, and a mixture is made with them."""
    act = options(case, world)
    given: dict[str, Any] = {}

    def use(case: Case) -> None:
        config = act(case)
        fields = {name: getattr(config, name) for name in XLoraConfig.__dataclass_fields__}
        given.update(
            {k: v for k, v in fields.items() if k not in ("peft_type", "peft_version", "task_type", "revision")}
        )
        given.pop("layer_names"), given.pop("expert_names"), given.pop("format_version")
        given.pop("auto_mapping"), given.pop("inference_mode"), given.pop("base_model_name_or_path")
        model = weft.from_adapters(world.base, given.pop("adapters"), **given)
        try:
            world.logits_of(model)
        finally:
            model.base_model.unload()

    return use


def loading(case: Case, world: World) -> Action:
    """Arguments of from_pretrained and from_adapters beside the options."""
    name = case.rng.choice(["device_map", "dtype", "revision", "token", "base", "path", "adapters"])
    value = case.rng.choice([*VALUES, *TEXTS])
    case.what.append(f"{name} = {str(value)[:100]!r}")
    adapters: Any = {"math": str(world.at("adapters/math"))}

    def act(case: Case) -> None:
        base: Any = str(world.at("base"))
        given = {} if name in ("base", "path", "adapters") else {name: value}
        if name == "base":
            weft.from_pretrained(world.at("weft"), value)
        elif name == "path":
            weft.from_pretrained(value, base)
        elif name == "adapters" and case.rng.random() < 0.5:
            weft.from_adapters(base, value)
        elif name == "adapters":
            weft.from_pretrained(world.at("weft"), base, adapters=value)
        elif case.rng.random() < 0.5:
            weft.from_adapters(base, adapters, **given)
        else:
            weft.from_pretrained(world.at("weft"), base, **given)

    return act


def calls(case: Case, world: World) -> Action:
    """What a mixture in memory is asked for, with arguments that it cannot have."""
    rng = case.rng
    value = rng.choice([*VALUES, *TEXTS])
    names = ["temperature", "top_k", "top_p", "seed", "max_new_tokens", "repetition_penalty", "speculate"]
    name = rng.choice([*names, "freeze_scalings_after"])
    tries: dict[str, Callable[[Any], Any]] = {
        "set_topk_lora": lambda model: model.set_topk_lora(value),
        "set_global_scaling_weight": lambda model: model.set_global_scaling_weight(value),
        "set_scaling_pass_value": lambda model: model.set_scaling_pass_value(value),
        "stream": lambda model: list(
            weft.stream(model, "one", tokenizer=world.tokenizer, **{"max_new_tokens": 1, name: value})
        ),
        "prompt": lambda model: list(
            weft.stream(model, rng.choice(TEXTS), tokenizer=world.tokenizer, max_new_tokens=1)
        ),
        "trace": lambda model: weft.trace(model, rng.choice(TEXTS), tokenizer=world.tokenizer, title=rng.choice(TEXTS)),
        "fold": lambda model: weft.fold(model, case.output / "folded", {"math": value, "code": 0.5}),
        "fixed_scalings": lambda model: model.fixed_scalings({"math": value}),
    }
    chosen = rng.choice(list(tries))
    case.what.append(f"{chosen} {name} {str(value)[:100]!r}")

    def act(case: Case) -> None:
        model = weft.from_pretrained(world.at("weft"), world.base)
        try:
            tries[chosen](model)
        finally:
            model.base_model.unload()

    return act


_COMMANDS: dict[str, list[str]] = {
    "generate": ["MIXTURE", "--base", "BASE", "--prompt", "one two", "--max-new-tokens", "1"],
    "inspect": ["MIXTURE", "--base", "BASE", "--text", "one two", "--output", "OUT/a.trace"],
    "chat": ["MIXTURE", "--base", "BASE", "--max-new-tokens", "1"],
    "fold": ["MIXTURE", "--base", "BASE", "--weights", "math=0.5", "code=0.5", "--output", "OUT/folded"],
    "eval": ["MIXTURE", "--base", "BASE", "--data", "DATA/text.jsonl", "--rows", "base", "--output", "OUT/a.json"],
    "convert": ["MIXTURE", "--to", "xlora", "--output", "OUT/x"],
    "drop-expert": ["MIXTURE", "math", "--output", "OUT/x"],
    "add-expert": ["MIXTURE", "third=ADAPTERS/math", "--base", "BASE", "--output", "OUT/x"],
    "card": ["MIXTURE"],
    "train": [
        "--base",
        "BASE",
        "--adapters",
        "math=ADAPTERS/math",
        "code=ADAPTERS/code",
        "--data",
        "DATA/text.jsonl",
        "--output",
        "OUT/trained",
        "--max-steps",
        "1",
        "--gate-start",
        "random",
    ],
}
_OPTIONS = ["prompt", "base", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "dtype", "speculate", "output"]
_OPTIONS += ["text", "data", "title", "html", "figure", "compare", "system", "weights", "sequence_length", "batch_size"]
_OPTIONS += ["max_sequences", "rows", "stride", "freeze_after", "search_data", "adapters", "rename", "to", "license"]
_OPTIONS += ["max_steps", "epochs", "learning_rate", "warmup_ratio", "xlora_depth", "xlora_size", "top_k_lora"]
_OPTIONS += [
    "gate_layer",
    "scaling_pass_layers",
    "scaling_pass_rank",
    "softmax_temperature",
    "global_scaling_weight",
    "cache_folder",
    "eval_data",
    "resume",
]
_OPTIONS += [
    "expert_rank",
    "experts_from",
    "start_from",
    "gate_start",
    "save_steps",
    "max_tokens",
    "config",
    "nonsense",
]


def command_line(case: Case, world: World) -> Action:
    """A command with an option that it cannot have; the mixture and all else are whole."""
    command = case.rng.choice(list(_COMMANDS))
    places = {"MIXTURE": world.at("weft"), "BASE": world.at("base"), "ADAPTERS": world.at("adapters")}
    places |= {"DATA": world.at("data"), "OUT": case.output}
    if command == "card":
        copy(world.at("weft"), case.output / "weft")
        places["MIXTURE"] = case.output / "weft"
    argv = [command]
    for part in _COMMANDS[command]:
        for name, place in places.items():
            part = part.replace(name, str(place))
        argv.append(part)
    for _ in range(case.rng.choice([1, 1, 2])):
        value = case.rng.choice([*TEXTS, *NUMBERS, *NUMBERS, *(str(value) for value in VALUES)])
        argv += [f"--{case.rng.choice(_OPTIONS)}={value.replace(chr(0), '')}"]
    case.what.append(" ".join(argv)[:400])
    return partial(_run, argv)


def options_file(case: Case, world: World) -> Action:
    """A --config that is no YAML, or too much of it."""
    file = case.inputs / "options.yaml"
    copy(world.at("data/options.yaml"), file)
    kind = case.rng.random()
    if kind < 0.5:
        case.what.append(mutate_bytes(file, case.rng))
    elif kind < 0.7:
        laughs = "".join(
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, case.rng.choice([3, 9, 30]))
        )
        file.write_text(f"a0: &a0 [x]\n{laughs}prompt: hello\n")
        case.what.append("aliases of aliases")
    elif kind < 0.9:
        name = case.rng.choice(["model", "prompt", "seed", "max_new_tokens", "nonsense", "top_p"])
        file.write_text(f"{name}: {case.rng.choice([*TEXTS, *RAW, *NUMBERS])}\n", errors="surrogatepass")
        case.what.append(file.read_text(errors="replace")[:80])
    else:
        file.unlink()
        file.mkdir()
    return partial(_run, ["generate", "nothing-here", "--config", str(file)])


def _run(argv: list[str], case: Case) -> None:
    """The command line in this process; what it says on a mistake is checked."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            code = main(argv)
    except SystemExit as err:
        if err.code not in (0, 2):
            raise
        raise WeftError(said.getvalue()[-400:]) from err
    if code == 1:
        if not said.getvalue().strip():
            raise Wrong("exit code 1 without a word")
        raise WeftError(said.getvalue()[-400:])
    if code != 0:
        raise Wrong(f"exit code {code}")


CASES: dict[str, tuple[Maker, int]] = {
    maker.__name__: (maker, weight)
    for maker, weight in [
        (adapter, 16),
        (adapter_injected, 3),
        (mixture, 18),
        (mixture_loaded, 6),
        (converted, 12),
        (changed, 4),
        (written, 3),
        (expert_added, 2),
        (base_model, 4),
        (trace_file, 6),
        (cells_file, 4),
        (data_file, 14),
        (table_file, 1),
        (options, 10),
        (options_used, 3),
        (loading, 3),
        (calls, 3),
        (command_line, 4),
        (options_file, 3),
    ]
}
