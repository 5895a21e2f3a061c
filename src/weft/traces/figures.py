"""Figures of a trace for papers, drawn with matplotlib (the extra `figures`)."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch

from weft.errors import ConfigError
from weft.files.ownership import refuse_strangers_file
from weft.files.writing import replace_file
from weft.screen.palette import PALETTE, colour_of, is_marked
from weft.traces.numbers import TraceNumbers

_FORMATS = (".pdf", ".png", ".svg")
_CREATOR = "weft inspect --figure"  # in the files' metadata
_WIDTH = 6.75  # inches: the text of a two-column paper
# Names in the legend beside the shares; more are in rows below. Experts whose shares of data sets are in numbers.
_MOST_BESIDE, _IN_A_ROW, _MOST_NUMBERS = 10, 6, 12


def check_figure(file: str | os.PathLike[str]) -> None:
    """Raise if a figure cannot be written to this file.

    Raises:
        ConfigError: matplotlib is not installed, the suffix is unknown, or an existing file is not a figure of weft.
    """
    if Path(file).suffix.lower() not in _FORMATS:
        raise ConfigError(f"figure ({file}) must end in one of {', '.join(_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"figure ({file}) needs matplotlib, which is not installed: pip install 'weft[figures]', or leave it out"
        )
    refuse_strangers_file(Path(file), lambda path: _CREATOR.encode() in path.read_bytes(), "figure", "figure")


def write_figure(trace: TraceNumbers, file: str | os.PathLike[str]) -> None:
    """Write the figure of a trace to a file, which is replaced only if the new one is complete.

    Args:
        trace: the trace.
        file: a .pdf, .png or .svg file.

    Raises:
        ConfigError: see `check_figure`.
        CheckpointError: the file cannot be written.

    Example:
        >>> trace = weft.trace(model, "The contract says", tokenizer=tokenizer)
        >>> write_figure(trace, "gates.pdf")
    """
    check_figure(file)
    kind, drawn = Path(file).suffix.lower()[1:], figure(trace)
    metadata = {"Software" if kind == "png" else "Creator": _CREATOR}
    replace_file(Path(file), lambda path: drawn.savefig(path, format=kind, dpi=200, metadata=metadata))


def figure(trace: TraceNumbers) -> Any:
    """A matplotlib figure: shares over position, layers and experts, entropy per layer, experts by data set.

    The panels of layers and entropy are left out if all layers share the scalings; the panel of data sets is left out
    if there is only one.
    """
    from matplotlib.figure import Figure

    legend_below = len(trace.expert_names) > _MOST_BESIDE
    rows_below = math.ceil(len(trace.expert_names) / _IN_A_ROW) if legend_below else 0
    panels: list[tuple[Any, float]] = [(_positions, 1.3 + 0.15 * rows_below)]
    if len(trace.layer_names) > 1:
        panels += [(_layers, 0.35 + 0.2 * len(trace.expert_names)), (_entropy, 0.9)]
    rows = trace.by_name()
    if len(rows) > 1:
        panels.append((_data_sets, 0.5 + 0.22 * len(rows)))
    heights = [height for _, height in panels]
    drawn = Figure(figsize=(_WIDTH, sum(heights) + 0.55 * len(panels)), layout="constrained")
    axes = drawn.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for (draw, _), axis in zip(panels, axes, strict=True):
        draw(trace, axis)
        axis.tick_params(labelsize=7)
        axis.title.set_size(8)
        axis.xaxis.label.set_size(7)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def _positions(trace: TraceNumbers, axis: Any) -> None:
    stacked = trace.shares().T
    areas = axis.stackplot(
        range(len(trace) + 1),
        torch.cat([stacked, stacked[:, -1:]], 1).numpy(),
        step="post",
        colors=[colour_of(number) for number in range(len(stacked))],
        labels=[_plain(name) for name in trace.expert_names],
        linewidth=0,
    )
    for number, area in enumerate(areas):
        if is_marked(number):
            area.set(hatch="////", edgecolor="white")
    axis.set(xlim=(0, len(trace)), ylim=(0, 1), xlabel="token", title="shares over position")
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    if len(areas) > _MOST_BESIDE:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.3), "ncols": _IN_A_ROW, "columnspacing": 1.0}
    axis.legend(fontsize=7, frameon=False, **place)


def _layers(trace: TraceNumbers, axis: Any) -> None:
    weights = trace.scalings.mean(0, dtype=torch.float32).T  # [expert, layer]
    image = axis.imshow(weights.numpy(), aspect="auto", cmap="cividis", interpolation="nearest")
    axis.set(title="mean weight of each expert in each layer", xlabel="LoRA layer")
    axis.set_yticks(range(len(trace.expert_names)), [_plain(name) for name in trace.expert_names])
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01)
    bar.ax.tick_params(labelsize=7)


def _entropy(trace: TraceNumbers, axis: Any) -> None:
    entropy = trace.entropy().mean(0)
    axis.bar(range(len(entropy)), entropy.numpy(), width=1.0, color=PALETTE[4])
    axis.set(
        xlim=(-0.5, len(entropy) - 0.5), ylim=(0, 1), xlabel="LoRA layer", title="entropy (0: one expert, 1: all alike)"
    )


def _data_sets(trace: TraceNumbers, axis: Any) -> None:
    rows = trace.by_name()
    table = torch.stack(list(rows.values()))
    axis.imshow(table.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1)
    axis.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    many = len(trace.expert_names) > _MOST_NUMBERS
    names = [_plain(name) for name in trace.expert_names]
    axis.set_xticks(range(len(names)), names, rotation=90 if many else 0)
    for row, shares in enumerate([] if many else table.tolist()):
        for column, share in enumerate(shares):
            axis.text(
                column, row, f"{share:.2f}", ha="center", va="center", size=7, color="black" if share > 0.5 else "white"
            )
    axis.set_title("mean shares by data set")


def _plain(name: str) -> str:
    """A name, escaped for matplotlib: `$` would begin a formula, a leading `_` would hide it from the legend."""
    return name.replace("$", r"\$").lstrip("_") or name
