"""The model card of a saved mixture: its experts, licences, evaluation results, and how to load it."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, TaskType

from weft.checkpoint.folder import GATE_KEY, SavedMixture, open_mixture
from weft.checkpoint.licenses import CARD, WEFTS_MARK, declared_license
from weft.checkpoint.manifest import EXPERTS_FOLDER
from weft.config import XLoraConfig
from weft.errors import CheckpointError
from weft.files.reading import read_json
from weft.files.writing import replace_file

EVAL_FILE = "eval.json"
PICTURES = ("gate.png", "gate.svg")  # `weft inspect --figure` writes one of them
_UNDECLARED = "not declared"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_card(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    base: str | None = None,
    license: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    licence: str | None = None,
) -> Path:
    """Write the model card (README.md) of a saved mixture, which replaces peft's template.

    A gate.png or gate.svg in the folder is included.

    Args:
        folder: the folder of a mixture that weft saved.
        name: name or Hub id of the mixture; None takes the folder's name.
        base: Hub id of the base model; None takes the one that the mixture names.
        license: licence of the mixture, as a Hub identifier (apache-2.0, mit, ...); None declares none.
        evaluation: a file that `weft eval --output` wrote; None takes the folder's eval.json, if there is one.
        licence: the old spelling of `license`, until 0.2.

    Returns:
        The path of the card.

    Raises:
        CheckpointError: the folder is not a complete mixture of weft, or the evaluation cannot be read.

    Example:
        >>> weft.write_card("my-mixture", base="HuggingFaceTB/SmolLM2-135M", license="apache-2.0")
    """
    file, license = Path(folder) / CARD, todays_license(license, licence)
    text = card_text(
        open_mixture(folder, keep_experts=False), name=name, base=base, license=license, evaluation=evaluation
    )
    replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))
    return file


def todays_license(license: str | None, licence: str | None) -> str | None:
    """The value of a public function's argument `license`, or of its old spelling `licence`.

    Warns:
        FutureWarning: `licence` is given.
    """
    if licence is None:
        return license
    warnings.warn("the argument licence is called license now", FutureWarning, stacklevel=3)
    return licence


def card_text(
    saved: SavedMixture,
    *,
    name: str | None = None,
    base: str | None = None,
    license: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
) -> str:
    """The text of the card (see `write_card`)."""
    config, folder = XLoraConfig.of_saved(saved), saved.folder
    if config.format_version is None:
        raise CheckpointError(
            f"{folder} was not saved by weft, so its experts may lie elsewhere: write it anew, with  weft convert "
            f"{folder} --to weft --output FOLDER"
        )
    base = base or config.base_model_name_or_path or "the base model"
    name = name or folder.resolve().name
    sections = [
        _front_matter(config, base, license),
        WEFTS_MARK,
        f"# {name}",
        f"{config.num_experts} LoRA experts of {_code(_shown(base))} as one model: a gate weighs them token by token "
        "and layer by layer (X-LoRA, [arXiv 2402.07148](https://arxiv.org/abs/2402.07148)), with weft on `torch`, "
        "`transformers` and `peft`.",
        _experts_section(folder, config, base),
        _gate_section(saved, config),
        _results_section(
            folder / EVAL_FILE if evaluation is None else Path(evaluation), required=evaluation is not None
        ),
        _loading_section(name, base, config),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(config: XLoraConfig, base: str, license: str | None) -> str:
    import yaml  # a dependency of huggingface_hub

    values: dict[str, Any] = {"library_name": "weft", "tags": ["weft", "x-lora", "lora", "mixture-of-experts"]}
    if config.task_type == TaskType.CAUSAL_LM:
        values["pipeline_tag"] = "text-generation"
    if is_hub_id(base):
        values["base_model"] = base
    if license is not None:
        values["license"] = license
    return f"---\n{yaml.safe_dump(values, sort_keys=True)}---"


def is_hub_id(name: str) -> bool:
    """Whether a base model's name is a Hub id, which others can load, and not a local folder."""
    return _HUB_ID.fullmatch(name) is not None and not os.path.isdir(name)


def _shown(base: str) -> str:
    """A base model's Hub id, or the last part of a local folder's path, as the full path should not be published."""
    return base if is_hub_id(base) else Path(base).name


def _experts_section(folder: Path, config: XLoraConfig, base: str) -> str:
    rows = [[f"base: {_code(_shown(base))}", "", "", _base_license(base) or _UNDECLARED]]
    for name in config.expert_names or []:
        expert = folder / EXPERTS_FOLDER / name
        options = read_json(expert / CONFIG_NAME)
        targets = options.get("target_modules")
        shown = ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets)
        kind = f"{options.get('r')}{' (DoRA)' if options.get('use_dora') else ''}"
        rows.append([_code(name), kind, shown, declared_license(expert / CARD) or _UNDECLARED])
    table = _table(["", "rank", "adapted modules", "licence, as declared"], rows)
    return f"## Experts\n\n{table}"


def _base_license(base: str) -> str | None:
    """The licence in the base model's card: in its folder, on the Hub, or in the Hub's cache."""
    if os.path.isdir(base) or not is_hub_id(base):
        return declared_license(Path(base) / CARD)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return declared_license(Path(hf_hub_download(base, CARD)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None


def _gate_section(saved: SavedMixture, config: XLoraConfig) -> str:
    gate = [value for key, value in saved.tensors[saved.gate_file].items() if GATE_KEY in key]
    layers = f"each of {len(config.layer_names or [])} LoRA layers" if config.layerwise_scalings else "all LoRA layers"
    kept = f"each token keeps {config.top_k_lora}" if config.top_k_lora else "each token takes all experts"
    place = "the base model's last hidden state (a scaling pass before the adapted one)"
    if config.scaling_pass_layers is not None:
        place = f"what leaves the first {config.scaling_pass_layers} decoder layers (a short scaling pass)"
    if config.scaling_pass_rank is not None:
        place += f" with a LoRA of the gate's own in them, of rank {config.scaling_pass_rank}"
    if config.gate_layer is not None:
        place = f"what enters decoder layer {config.gate_layer} (one pass in all)"
    text = (
        f"## Gate\n\n{sum(value.numel() for value in gate):,} parameters in {config.xlora_depth} linear layers; "
        f"weights for {layers}, {kept}. It reads {place}."
    )
    pictures = [name for name in PICTURES if os.path.isfile(saved.folder / name)]
    return "\n\n".join([text, *(f"![The experts' shares, as `weft inspect` drew them]({name})" for name in pictures)])


def _results_section(file: Path, *, required: bool) -> str:
    """The tables of `weft eval`: all entries of the form {row: {data set: number}}."""
    if not os.path.isfile(file) and not required:
        return ""
    values = read_json(file)
    tables = {title: rows for title, rows in values.items() if _is_table(rows)}
    if not tables:
        if required:
            raise CheckpointError(
                f"{file} holds no table of rows and data sets: expected what weft eval --output writes"
            )
        return ""
    shown = []
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        cells = [[row, *(_number(of.get(column)) for column in columns)] for row, of in rows.items()]
        shown.append(_table([_text(title), *columns], cells, numbers=True))
    return "## Results\n\nAs `weft eval` measured them, on held-out data sets.\n\n" + "\n\n".join(shown)


def has_results(file: Path) -> bool:
    """Whether the file exists and has tables of `weft eval`."""
    try:
        return any(_is_table(rows) for rows in read_json(file).values())
    except CheckpointError:
        return False


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(row, dict) and row and all(value is None or _is_number(value) for value in row.values())
            for row in value.values()
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _loading_section(name: str, base: str, config: XLoraConfig) -> str:
    given = "" if base == config.base_model_name_or_path else f", base={json.dumps(base)}"
    if not is_hub_id(base):  # a local folder
        given = ', base="..."'
    call = f"weft.from_pretrained({json.dumps(name)}{given})"
    return (
        "## How to load\n\n```python\nimport weft\n\n"
        f"model = {call}\n```\n\nIt is a peft `PeftModel`: `model.generate(...)` and all else work as usual. On the "
        f"command line: `weft generate {name} --prompt '...'`."
    )


def _table(header: list[str], rows: Iterable[list[str]], *, numbers: bool = False) -> str:
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _text(text: str) -> str:
    """Text for a table cell, with `|` and HTML escaped."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
