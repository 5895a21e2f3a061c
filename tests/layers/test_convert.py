"""Every class of LoRA layer that peft has is converted or refused by its name, those of missing libraries too."""

import ast
import importlib.util
import sys
import types
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn

from models import mixture_by_loop, quietly, randomise
from weft.config import XLoraConfig
from weft.errors import AdapterError
from weft.layers.carrier import Routing, ScalingsCarrier
from weft.layers.convert import CONVERTED, REFUSED, convert_layers_to_xlora

SOURCES = Path(lora.__file__).parent


def lora_classes_in_pefts_source():
    """ "module.Class" of every concrete LoRA layer in peft.tuners.lora, read from the source."""
    bases, names = {}, {"LoraLayer": "layer.LoraLayer"}
    for file in sorted(SOURCES.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                # By name alone: what is an attribute, as nn.Embedding, is torch's.
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
                names[node.name] = f"{file.stem}.{node.name}"
    found, grown = {"LoraLayer"}, True
    while grown:
        new = {name for name, parents in bases.items() if name not in found and parents & found}
        found, grown = found | new, bool(new)
    # Abstract: others derive from it, and nothing makes one.
    return {names[name] for name in found - {"LoraLayer", "_ConvNd"}}


def test_every_lora_class_of_peft_is_decided():
    found = lora_classes_in_pefts_source()
    assert {"bnb.Linear4bit", "hqq.HqqLoraLinear", "layer.ParamWrapper"} <= found
    decided = set(CONVERTED) | set(REFUSED)  # TransformerEngine's since peft 0.19
    assert found - decided == set(), "peft has new LoRA layers: convert or refuse them in weft/convert.py"
    assert decided - found - {"te.TeLinear"} == set(), "peft has these LoRA layers no longer"
    assert not set(CONVERTED) & set(REFUSED)


def test_converting_imports_no_library_of_quantisation():
    source = Path(sys.modules["weft.layers.convert"].__file__).read_text(encoding="utf-8")
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert all(name.partition(".")[0] in {"__future__", "typing", "peft", "torch", "weft"} for name in imported)


def _class_of(kind):
    """A class of peft's; where its library is missing, from peft's source with a stand-in for the library."""
    module_name, _, class_name = kind.partition(".")
    if importlib.util.find_spec("bitsandbytes") is not None or module_name != "bnb":
        module = importlib.import_module(f"peft.tuners.lora.{module_name}")
        if hasattr(module, class_name):
            return getattr(module, class_name)
    stand_ins = {"hqq.core.quantize": "HQQLinear", "eetq": "EetqLinear"}
    for path, name in stand_ins.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[path], name, nn.Linear)
    source = (SOURCES / f"{module_name}.py").read_text(encoding="utf-8")
    guard = next(line for line in source.splitlines() if line.startswith("if is_"))
    full_name = f"peft.tuners.lora.{module_name}"
    namespace = {"__name__": full_name, "__package__": "peft.tuners.lora"}
    exec(compile(source.replace(guard, "if True:"), full_name, "exec"), namespace)
    return namespace[class_name]


@pytest.fixture
def _no_stand_ins_left():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"hqq", "eetq"}:
            del sys.modules[name]


class Tiny(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


LINEAR = [kind for kind in CONVERTED if kind.partition(".")[0] in {"gptq", "awq", "hqq", "eetq", "aqlm", "inc"}]


@pytest.mark.usefixtures("_no_stand_ins_left")
@pytest.mark.parametrize("kind", LINEAR)
def test_a_converted_linear_class_is_the_formula_over_its_base_layer(kind):
    # The base layer is whatever it is: an ordinary one stands in for the quantised.
    layer = quietly(_class_of(kind), nn.Linear(6, 5), "a", config=peft.LoraConfig(r=2), r=2, lora_alpha=4)
    options = {"lora_dropout": 0.0, "init_lora_weights": True, "use_rslora": False}  # before peft 0.19 not in a config
    layer.update_layer("b", 3, lora_alpha=3, config=peft.LoraConfig(r=3), **options)
    layer.set_adapter(["a", "b"])
    assert isinstance(layer, LoraLayer)
    randomise(layer, seed=1)
    model, x = Tiny(layer), torch.randn(2, 4, 6)
    every_expert_at_one = layer(x)
    tuner = nn.Module()
    tuner.carrier = carrier = ScalingsCarrier()
    config = XLoraConfig(adapters={"a": "-", "b": "-"})
    assert convert_layers_to_xlora(model, tuner, config) == 1
    torch.testing.assert_close(layer(x), every_expert_at_one)
    scalings = torch.rand(2, 4, 1, 2)
    with carrier.following(Routing(scalings)):
        torch.testing.assert_close(layer(x), mixture_by_loop(layer, x, scalings[:, :, 0]))


def _instance_of(class_path):
    """An object of a class with this full name that is a LoRA layer, and nothing else."""
    module, _, name = class_path.rpartition(".")

    class Layer(nn.Module, LoraLayer):
        def __init__(self):
            super().__init__()

    Layer.__module__, Layer.__qualname__, Layer.__name__ = module, name, name
    return Layer()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_class_is_named_with_the_reason(kind):
    model = Tiny(_instance_of(f"peft.tuners.lora.{kind}"))
    pattern = (
        rf"layer 'layer' is adapted as peft\.tuners\.lora\.{kind}, which X-LoRA does not support: {REFUSED[kind]}; "
    )
    with pytest.raises(AdapterError, match=pattern + r"expected one of Linear, .*Linear4bit.*\. Leave this layer out"):
        convert_layers_to_xlora(model, nn.Module(), XLoraConfig(adapters={"a": "-"}))


@pytest.mark.parametrize("name", ["my.own.Linear", "peft.tuners.lora.layer.Conv4d"])
def test_an_unknown_class_is_refused_though_it_may_look_like_a_known_one(name):
    pattern = (
        rf"is adapted as {name}, which X-LoRA does not support: it is unknown here what it computes; expected one of"
    )
    with pytest.raises(AdapterError, match=pattern):
        convert_layers_to_xlora(Tiny(_instance_of(name)), nn.Module(), XLoraConfig(adapters={"a": "-"}))


def test_the_real_attention_class_of_peft_is_refused():
    layer = lora.layer.MultiheadAttention(
        nn.MultiheadAttention(8, 2), "a", config=peft.LoraConfig(r=2), r=2, lora_alpha=2
    )
    with pytest.raises(
        AdapterError, match=r"layer 'layer' is adapted as peft\.tuners\.lora\.layer\.MultiheadAttention"
    ):
        convert_layers_to_xlora(Tiny(layer), nn.Module(), XLoraConfig(adapters={"a": "-"}))
