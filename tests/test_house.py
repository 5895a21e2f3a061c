"""The rules of the house that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# Imports point one way: a module imports only from lines above its own.
ORDER = [
    ["errors", "command_options", "own_weight", "palette", "placement", "quantised", "licences", "visible", "web"],
    ["versions", "console", "options", "format_options", "files", "base_loading"],
    ["countdown", "names", "tensor_files"],
    ["whole", "digests", "processes", "routing", "chat_template", "one_thread", "option_values"],
    ["ownership", "scaling_index"],
    ["freezing", "data", "sampling", "detokeniser", "losses"],
    ["config", "carrier", "cache", "short_backbone", "gate_metrics", "labelled", "traces"],
    ["adapter_keys", "gate", "experts", "backbone", "auxiliary", "callbacks", "scalings_log", "summary"],
    [
        "layers",
        "rank_weights",
        "gate_place",
        "given_hidden",
        "layer_inputs",
        "padding",
        "row_scalings",
        "adapter_options",
    ],
    ["convert", "passes", "adapters", "page", "figures"],
    ["gate_files", "manifest", "original", "seq2seq", "finite", "injection"],
    ["heads", "checkpoints"],
    ["frozen_copies", "whole_checkpoints"],
    ["peft_methods"],
    ["checkpoint", "retrained"],
    ["peft_state", "inside_transformers"],
    ["model"],
    ["integration", "speculation"],
    ["change_experts", "mixture_files", "card"],
    ["formats", "publication"],
    ["hub"],
    ["streaming"],
    ["loading", "monitoring", "scaling_cache", "packing", "progress", "gate_start"],
    ["distributed", "start_from"],
    ["train", "evaluate"],
    ["train_experts"],
    ["folding", "tracing", "serve"],
    ["cli"],
    ["__init__", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def module_of(path):
    return path.relative_to(ROOT / "src/weft").parts[0].removesuffix(".py")


def top_level_imports(path):
    """Modules of weft that are imported when this one is."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("weft."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_point_one_way(path):
    own = module_of(path)
    for imported in top_level_imports(path):
        assert imported == own or LEVEL[imported] < LEVEL[own], f"{path} imports weft.{imported}"


def test_every_module_has_its_place_in_the_order():
    assert {module_of(path) for path in SOURCES} == set(LEVEL)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_is_over_400_lines_and_none_uses_pefts_xlora(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    assert "tuners.xlora" not in text
    assert "tuners import xlora" not in text


def test_importing_weft_imports_nothing_heavy():
    code = "import sys, weft; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


def test_public_names_are_there_and_unknown_ones_are_not():
    import weft

    assert all(getattr(weft, name) is not None for name in weft.__all__)
    assert weft.layers.XLoraLinearLayer is not None
    assert weft.model.convert_layers_to_xlora is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = weft.nonsense
    assert set(weft.__all__) <= set(dir(weft))
