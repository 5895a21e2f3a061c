"""Options: peft's names and defaults, a range for each, and one error that says everything that is wrong."""

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import peft
import pytest
from peft.tuners.xlora import XLoraConfig as PeftXLoraConfig

import weft
from models import quietly, tiny_llama
from weft.config import PEFT_PLACEHOLDER_HIDDEN_SIZE, XLoraConfig, config_json
from weft.errors import ConfigError, WeftError

TWO = {"math": "adapters/math", "code": "adapters/code"}
WEFTS_OWN = {
    *(
        "scaling_pass_layers",
        "scaling_pass_rank",
        "gate_layer",
        "allow_dora",
        "heads",
        "scalings_log_size",
        "expert_names",
        "layer_names",
        "format_version",
    ),
    *("balance_loss_weight", "entropy_loss_weight", "expert_label_loss_weight"),
}


def fields(config_class):
    return {field.name: field for field in dataclasses.fields(config_class)}


# ---------------------------------------------------------------------- peft's names and defaults


def test_fields_are_pefts_in_pefts_order_and_then_wefts_own():
    own = [name for name in fields(XLoraConfig) if name not in fields(PeftXLoraConfig)]
    assert set(own) == WEFTS_OWN
    assert list(fields(XLoraConfig)) == [*fields(PeftXLoraConfig), *own]


@pytest.mark.parametrize("name", list(fields(PeftXLoraConfig)))
def test_default_is_pefts(name):
    default = fields(XLoraConfig)[name].default
    if name == "layerwise_scalings":
        assert default
        assert not XLoraConfig.from_peft(PeftXLoraConfig(hidden_size=32, adapters=TWO)).layerwise_scalings
        return
    if name == "scaling_pass_value":  # None stands for it, as it depends on gate_layer
        default = XLoraConfig(adapters=TWO).scaling_pass_value
    assert default == fields(PeftXLoraConfig)[name].default


def test_constant_weight_is_a_share_where_there_is_no_scaling_pass():
    assert XLoraConfig(adapters=TWO, gate_layer=1).scaling_pass_value == 0.5
    assert XLoraConfig(adapters=TWO, gate_layer=1, scaling_pass_value=0.0).scaling_pass_value == 0.0
    assert XLoraConfig(adapters=TWO, scaling_pass_layers=1).scaling_pass_value == 0.0


@pytest.mark.parametrize(("name", "value", "least"), [("scaling_pass_layers", 0, 1), ("gate_layer", -1, 0)])
def test_place_of_the_gate_is_checked(name, value, least):
    with pytest.raises(ConfigError, match=rf"{name} \({value}\) must be a whole number of at least {least}"):
        XLoraConfig(adapters=TWO, **{name: value})


def test_a_short_scaling_pass_and_none_exclude_each_other():
    with pytest.raises(ConfigError, match=r"scaling_pass_layers \(2\) and gate_layer \(1\) exclude each other"):
        XLoraConfig(adapters=TWO, scaling_pass_layers=2, gate_layer=1)


def test_options_that_peft_takes_mean_the_same_in_both():
    options = {"hidden_size": 32, "adapters": TWO, "xlora_depth": 3, "softmax_temperature": 0.5, "top_k_lora": 1}
    options["layerwise_scalings"] = True
    ours, theirs = XLoraConfig(**options), PeftXLoraConfig(**options)
    assert {name: getattr(ours, name) for name in fields(PeftXLoraConfig)} == theirs.to_dict() | {
        "peft_type": ours.peft_type
    }
    assert ours.peft_type == theirs.peft_type == peft.PeftType.XLORA


def test_missing_hidden_size_stays_open_where_peft_would_assume_one():
    assert XLoraConfig(adapters=TWO).hidden_size is None
    assert quietly(PeftXLoraConfig, adapters=TWO).hidden_size == PEFT_PLACEHOLDER_HIDDEN_SIZE


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("adapters", [None, {}, ["adapters/math"], "adapters/math"])
def test_adapters_are_required(adapters):
    with pytest.raises(ConfigError) as raised:
        XLoraConfig(adapters=adapters)
    expected = f"adapters ({adapters!r}) must name at least one expert: {{name: folder or Hub id}}"
    assert raised.value.problems == [expected]


@pytest.mark.usefixtures("without_type_checks")
def test_adapters_keep_their_order_and_become_strings():
    config = XLoraConfig(adapters={"z": Path("adapters/z"), "a": "user/a"})
    assert list(config.adapters.items()) == [("z", "adapters/z"), ("a", "user/a")]
    assert config.num_experts == 2


@pytest.mark.usefixtures("without_type_checks")
def test_expert_names_give_the_order_of_adapters():
    adapters = {"a": Path("x"), "b": "y"}
    assert list(XLoraConfig(adapters=adapters, expert_names=["b", "a"]).adapters.items()) == [("b", "y"), ("a", "x")]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("adapters", [["math", "code"], "math", {"math": None}, {"math": 3}, {0: "adapters/math"}])
def test_adapters_of_another_type_are_an_error_of_the_option(adapters):
    with pytest.raises(ConfigError, match=r"adapters (\(|has the name 0)"):
        XLoraConfig(adapters=adapters)


# ---------------------------------------------------------------------- ranges

NAN, INF = float("nan"), float("inf")
WHOLE = "must be a whole number of at least 1"
FINITE = "must be a finite number"
OUT_OF_RANGE = [
    *((name, value, WHOLE) for name in ("xlora_depth", "xlora_size", "scalings_log_size") for value in (0, -1, 1.5)),
    *((name, value, WHOLE) for name in ("xlora_depth", "xlora_size", "scalings_log_size") for value in (True, "2")),
    *((name, None, WHOLE) for name in ("xlora_depth", "xlora_size", "scalings_log_size")),
    *(("hidden_size", value, WHOLE) for value in (0, -32, 32.0, "32")),
    *(("xlora_dropout_p", value, "must be in [0, 1)") for value in (-0.1, 1, 1.0, 1.5, NAN, None, "0.1", True)),
    *(
        ("softmax_temperature", value, f"{FINITE} above 0, in float32 too")
        for value in (0, 0.0, -1.0, NAN, INF, 1e39, None, "1")
    ),
    *(("scaling_pass_value", value, f"{FINITE}, in float32 too") for value in (NAN, INF, 1e300, "0", True)),
    *(("entropy_loss_weight", value, f"{FINITE}, in float32 too") for value in (NAN, INF, -1e39, None, "0", True)),
    *(
        (name, value, f"{FINITE} of at least 0, in float32 too")
        for name in ("balance_loss_weight", "expert_label_loss_weight")
        for value in (-0.1, NAN, INF, 1e39, None, "0", True)
    ),
    *(("global_scaling_weight", value, f"{FINITE}, in float32 too") for value in (NAN, -INF, -1e39, None, "1", False)),
    *(
        ("top_k_lora", value, "must be between 1 and the number of adapters (2)")
        for value in (0, -1, 3, 1.0, "1", True)
    ),
    *(
        (name, value, "must be True or False")
        for name in (
            "enable_softmax",
            "enable_softmax_topk",
            "layerwise_scalings",
            "use_trainable_adapters",
            "allow_dora",
        )
        for value in (1, 0, None, "yes")
    ),
]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("name", "value", "expected"), OUT_OF_RANGE, ids=lambda value: repr(value)[:30])
def test_value_out_of_range_names_option_value_and_range(name, value, expected):
    with pytest.raises(ConfigError, match=re.escape(f"\n  - {name} ({value!r}) {expected}") + "$"):
        XLoraConfig(adapters=TWO, **{name: value})


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "options",
    [
        {"xlora_depth": 1, "xlora_size": 1, "hidden_size": 1, "scalings_log_size": 1},
        {"xlora_dropout_p": 0},
        {"xlora_dropout_p": 0.999},
        {"softmax_temperature": 1e-9},
        {"scaling_pass_value": -1, "global_scaling_weight": 0},
        {"top_k_lora": 1},
        {"top_k_lora": 2},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 1},
    ],
)
def test_values_at_the_ends_of_their_ranges_are_taken(options):
    config = XLoraConfig(adapters=TWO, **options)
    assert {name: getattr(config, name) for name in options} == options


def test_softmax_topk_needs_top_k():
    with pytest.raises(ConfigError, match=r"enable_softmax_topk \(True\) needs top_k_lora \(None\)"):
        XLoraConfig(adapters=TWO, enable_softmax=False, enable_softmax_topk=True)


def test_softmax_and_softmax_topk_exclude_each_other():
    with pytest.raises(ConfigError, match=r"enable_softmax \(True\) and enable_softmax_topk \(True\) exclude"):
        XLoraConfig(adapters=TWO, enable_softmax_topk=True, top_k_lora=1)


def test_all_problems_are_reported_in_one_error():
    with pytest.raises(ConfigError) as error:
        XLoraConfig(adapters={"a.b": "x"}, xlora_depth=0, xlora_dropout_p=2.0, top_k_lora=7, enable_softmax_topk=True)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 5
    for name in ("a.b", "xlora_depth", "xlora_dropout_p", "top_k_lora", "enable_softmax_topk"):
        assert sum(name in line for line in lines) == 1, name


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, WeftError)


# ---------------------------------------------------------------------- unknown options and names


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("xlora_dept", "xlora_depth"), ("topk_lora", "top_k_lora"), ("softmax_temprature", "softmax_temperature")],
)
@pytest.mark.parametrize("make", [XLoraConfig, lambda **options: weft.from_adapters(tiny_llama(), **options)])
def test_unknown_option_names_the_nearest_valid_one(make, wrong, right):
    with pytest.raises(ConfigError, match=rf"{wrong} is not an option: did you mean {right}\?"):
        make(adapters=TWO, **{wrong: 1})


def test_unknown_option_like_no_other_lists_the_options():
    with pytest.raises(ConfigError) as error:
        XLoraConfig(adapters=TWO, zzz=1, yyy=2)
    zzz, yyy = str(error.value).splitlines()[1:]
    assert "zzz is not an option" in zzz
    assert "yyy is not an option" in yyy
    assert "top_k_lora" in zzz


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a/b", "..", "-a", "é", "a\n"])
def test_name_that_is_no_folder_or_module_name_is_refused(name):
    with pytest.raises(ConfigError, match=re.escape(f"the name {name!r}: names are letters, digits, '_' and '-'")):
        XLoraConfig(adapters={name: "x"})


@pytest.mark.parametrize("name", ["keys", "forward", "pop", "update", "training", "_parameters"])
def test_name_that_torch_reserves_is_refused(name):
    with pytest.raises(ConfigError, match=rf"the name '{name}', which torch.nn.ModuleDict reserves"):
        XLoraConfig(adapters={name: "x"})


@pytest.mark.parametrize("name", ["math", "0", "adapter_1", "a-b", "_x", "A1"])
def test_names_of_letters_digits_and_dashes_are_taken(name):
    assert list(XLoraConfig(adapters={name: "x"}).adapters) == [name]


@pytest.mark.parametrize("expert_names", [["math"], ["math", "math"], ["math", "code", "chem"], ["math", "chem"]])
def test_expert_names_must_be_those_of_adapters(expert_names):
    with pytest.raises(ConfigError, match=re.escape(f"expert_names ({expert_names}) must be the names in adapters")):
        XLoraConfig(adapters=TWO, expert_names=expert_names)


# ---------------------------------------------------------------------- from peft, and copies


def test_from_peft_takes_every_option():
    theirs = PeftXLoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path="base",
        hidden_size=48,
        adapters=TWO,
        enable_softmax=False,
        enable_softmax_topk=True,
        layerwise_scalings=True,
        xlora_depth=3,
        xlora_size=7,
        xlora_dropout_p=0.0,
        use_trainable_adapters=True,
        softmax_temperature=0.3,
        top_k_lora=1,
        scaling_pass_value=0.5,
        global_scaling_weight=2.0,
    )
    ours = XLoraConfig.from_peft(theirs)
    assert {name: getattr(ours, name) for name in fields(PeftXLoraConfig)} == dict(vars(theirs))


def test_from_peft_infers_the_hidden_size_that_peft_made_up():
    assert XLoraConfig.from_peft(quietly(PeftXLoraConfig, adapters=TWO)).hidden_size is None


def test_from_peft_can_replace_the_adapters():
    assert XLoraConfig.from_peft(PeftXLoraConfig(hidden_size=32, adapters={}), adapters=TWO).adapters == TWO


def test_from_peft_checks_what_peft_only_warns_of():
    theirs = quietly(PeftXLoraConfig, hidden_size=32, adapters=TWO, top_k_lora=0)
    with pytest.raises(ConfigError, match=r"top_k_lora \(0\) must be between 1 and the number of adapters \(2\)"):
        XLoraConfig.from_peft(theirs)


def test_from_peft_returns_wefts_own_as_it_is():
    config = XLoraConfig(adapters=TWO)
    assert XLoraConfig.from_peft(config) is config


def test_json_gives_the_same_options_back():
    config = XLoraConfig(adapters={"z": "1", "a": "2"}, expert_names=["z", "a"], top_k_lora=2, softmax_temperature=0.1)
    again = XLoraConfig(**json.loads(config_json(config)))
    assert again == config
    assert list(again.adapters) == ["z", "a"]


@pytest.fixture
def bound(llama_adapters):
    """(model, its config)"""
    model = weft.from_adapters(tiny_llama(), {"math": llama_adapters["math"], "code": llama_adapters["code"]})
    return model.base_model, model.base_model.xlora_config


def test_config_knows_the_model_it_belongs_to(bound):
    model, config = bound
    assert config.model is model
    assert XLoraConfig(adapters=TWO).model is None
    model.unload()
    assert config.model is None


def test_model_is_no_option(bound):
    _, config = bound
    assert "_model" not in config.to_dict()
    assert "XLoraModel" not in repr(config)
    assert config == copy.deepcopy(config)


def test_deep_copy_of_a_config_has_no_model(bound):
    _, config = bound
    assert copy.deepcopy(config).model is None


def test_deep_copy_of_a_model_has_a_config_of_its_own(bound):
    model, config = bound
    twin = copy.deepcopy(model)
    assert twin.xlora_config.model is twin
    assert twin.xlora_config is twin.peft_config["default"]
    assert twin.internal_xlora_classifier.config is twin.xlora_config
    assert config.model is model


def test_pickle_of_a_config_leaves_its_model_out(bound):
    _, config = bound
    data = pickle.dumps(config)
    again = pickle.loads(data)
    assert again == config
    assert again.model is None
    assert len(data) < 10_000
