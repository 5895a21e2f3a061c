"""The rules of the house that a machine can check."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import weft
from weft.moved import MOVED

ROOT = Path(__file__).parents[2]
WEFT = ROOT / "src/weft"
SOURCES = sorted(WEFT.rglob("*.py"))

# Imports point one way, inside of functions too: a room imports from those before its own.
ROOMS = [
    *("errors", "kernels", "files", "screen", "options", "distributed"),
    *("checkpoint", "config"),
    *("base_model", "gate", "data"),
    *("layers", "passes", "model"),
    *("generation", "train"),
    *("formats", "evaluate", "traces", "serve"),
    "cli",
]
# Whatever names them: they import modules of any room when these are asked for.
ABOVE = {"__init__", "__main__", "lazy", "moved"}
# The paths that were documented before there were rooms, and what was found there.
DOCUMENTED = {
    "weft.errors": ["WeftError", "ConfigError", "AdapterError", "CheckpointError", "DataError", "ThreadError"],
    "weft.evaluate": ["evaluate", "padded_batches", "perplexity"],
    "weft.figures": ["write_figure"],
    "weft.format_options": ["CardOptions", "ConvertOptions", "PullOptions", "PushOptions", "ServeOptions"],
    "weft.gate_metrics": ["GateMetrics"],
    "weft.layers": ["XLoraConv2dLayer", "XLoraEmbeddingLayer", "XLoraLayer", "XLoraLinearLayer"],
    "weft.losses": ["balance_loss", "entropy_loss", "expert_label_loss"],
    "weft.model": ["XLoraModel", "convert_layers_to_xlora"],
    "weft.options": [
        *("AddExpertOptions", "ChatOptions", "DropExpertOptions", "EvalOptions", "FoldOptions", "GenerateOptions"),
        *("InspectOptions", "TrainOptions"),
    ],
    "weft.page": ["write_page"],
    "weft.train": ["train"],
    "weft.train_experts": ["train_experts", "train_in_stages"],
}
PUBLIC = [
    *("GateCallback", "Generation", "ScalingCache", "ScalingCacheCollator", "Step", "Trace", "XLoraClassifier"),
    *("XLoraConfig", "XLoraModel", "add_expert", "convert_mixture", "drop_expert", "fit_gate", "fold"),
    *("from_adapters", "from_pretrained", "generate", "mean_scalings", "pull", "push", "register_with_peft"),
    *("stream", "trace", "trace_data", "trace_generation", "unregister_from_peft", "write_card"),
]


def name_of(path):
    return "weft." + ".".join(path.relative_to(WEFT).with_suffix("").parts)


def room_of(name):
    return name.split(".")[1]


def imports(path):
    """Modules of weft that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("weft."):
            yield node.module


def modules():
    return [path for path in SOURCES if room_of(name_of(path)) not in ABOVE]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_one_way(path):
    own = room_of(name_of(path))
    for imported in imports(path):
        room = room_of(imported)
        assert room in (own, "lazy") or ROOMS.index(room) < ROOMS.index(own), f"{path} imports {imported}"


def test_no_circle():
    importing = {name_of(path).removesuffix(".__init__"): set(imports(path)) for path in modules()}
    done = set()

    def visit(name, above):
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        if name not in done:
            for other in importing.get(name, ()):
                visit(other, [*above, name])
            done.add(name)

    for name in importing:
        visit(name, [])


def test_every_module_is_in_a_room():
    assert {room_of(name_of(path)) for path in SOURCES} == {*ROOMS, *ABOVE}


@pytest.mark.parametrize("room", [room for room in ROOMS if (WEFT / room).is_dir()])
def test_every_room_says_what_is_in_it(room):
    told = ast.get_docstring(ast.parse((WEFT / room / "__init__.py").read_text()))
    for path in (WEFT / room).iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            name = f"{path.name}/" if path.is_dir() else path.name
            assert re.search(rf"(^|\s){re.escape(name)}", told), f"{room}/__init__.py does not name {name}"
    for name in re.findall(r"\b[a-z_0-9]+\.py\b", told):
        assert (WEFT / room / name).is_file(), f"{room}/__init__.py names {name}, which is not there"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
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
    assert weft.__all__ == PUBLIC
    assert all(getattr(weft, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = weft.nonsense
    assert set(PUBLIC) <= set(dir(weft))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_for_type_checkers_are_those_that_are_found(path):
    """What is listed under TYPE_CHECKING of an `__init__.py` is what `lazily` finds."""
    tree = ast.parse(path.read_text())
    under = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    if path.name != "__init__.py" or not under:
        return
    package = importlib.import_module(name_of(path).removesuffix(".__init__"))
    told = {alias.name: node.module for node in under[0].body for alias in node.names}
    assert sorted(told) == sorted(package.__all__)
    for name, home in told.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_paths_are_still_there(module):
    assert all(hasattr(importlib.import_module(module), name) for name in DOCUMENTED[module])


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_is_that_of_today(old):
    module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__.name == module.__name__ == MOVED[old]
