"""The folded adapter, loaded by peft into a fresh base model, is the mixture at those weights."""

import json
import re
import shlex
from functools import partial

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import weft
from models import VOCAB, folder_files, lora, make_architecture, quietly, save_adapter, tiny_llama, weft_model
from unusual_models import VISION
from weft.cli import main
from weft.errors import AdapterError, ConfigError, DataError
from weft.formats.folding import _target_modules
from weft.gate.routing import keep_top_k

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def model(llama_adapters):
    return weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).eval()


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 7))


def table_for(model, seed=3):
    options = model.xlora_config
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(options.layer_names), len(options.expert_names), generator=generator)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def test_folded_is_unfolded_in_every_architecture(architecture, ids, tmp_path):
    model = weft_model(architecture)
    model.set_global_scaling_weight(0.7)
    for weights in ({"0": 0.5, "2": -0.3}, table_for(model)):
        weft.fold(model, tmp_path / "folded", weights)
        # peft warns of every adapter that targets tied embeddings.
        load = quietly if architecture[0] == "gemma3" else lambda function, *args: function(*args)
        folded = load(peft.PeftModel.from_pretrained, make_architecture(architecture[0])[0], tmp_path / "folded")
        with model.fixed_scalings(weights):
            torch.testing.assert_close(logits(folded, ids), logits(model, ids), **CLOSE)
        assert (logits(folded, ids) - logits(make_architecture(architecture[0])[0], ids)).abs().max() > 1e-2


def test_ranks_alphas_rslora_and_targets_may_differ(model, ids, tmp_path):
    table = table_for(model)
    for weights in ({"math": 0.4, "code": 0.1, "adapter_3": 0.9}, table, table.tolist()):
        config = weft.fold(model, tmp_path / "folded", weights)
        folded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "folded")
        with model.fixed_scalings(weights):
            torch.testing.assert_close(logits(folded, ids), logits(model, ids), **CLOSE)
        assert (config.r, config.lora_alpha) == (14, 14)  # 4 + 4 + 6, also where an expert has no such layer
        assert config_of(tmp_path / "folded")["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
        assert folder_files(tmp_path / "folded") == [CONFIG, TENSORS, "weft_fold.json"]


def test_constant_weights_per_layer_equal_the_formula_layer_by_layer(model, ids, tmp_path):
    table = table_for(model)
    weft.fold(model, tmp_path / "folded", table)
    tensors = load_file(tmp_path / "folded" / TENSORS)
    for row, name in zip(table.tolist(), model.xlora_config.layer_names, strict=True):
        layer = model.base_model.lora_model.model.get_submodule(name)
        expected = sum(
            weight * layer.get_delta_weight(expert)
            for weight, expert in zip(row, model.xlora_config.expert_names, strict=True)
            if expert in layer.lora_A
        )
        key = f"base_model.model.{name}"
        found = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_has_no_weight_takes_no_rank_and_no_layer(model, ids, tmp_path):
    config = weft.fold(model, tmp_path / "one", {"code": 0.5, "math": 0.0})
    assert config.r == 4
    assert config.target_modules == ["q_proj", "up_proj", "v_proj"]
    table = torch.zeros_like(table_for(model))
    names = model.xlora_config.layer_names
    table[names.index("model.layers.1.self_attn.q_proj")] = torch.tensor([0.2, 0.3, 0.0])
    table[names.index("model.layers.0.mlp.down_proj"), 2] = 1.0
    config = weft.fold(model, tmp_path / "two", table)
    assert config.r == 8
    assert config.target_modules == ["0.mlp.down_proj", "1.self_attn.q_proj"]
    assert len(load_file(tmp_path / "two" / TENSORS)) == 4
    folded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "two")
    with model.fixed_scalings(table):
        torch.testing.assert_close(logits(folded, ids), logits(model, ids), **CLOSE)


def test_experts_in_half_precision_are_written_in_it(llama_adapters, ids, tmp_path):
    base = tiny_llama().to(torch.bfloat16)
    model = weft.from_adapters(base, llama_adapters).eval()
    model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=False)
    weft.fold(model, tmp_path / "half", {"math": 0.5, "code": 0.5})
    assert {value.dtype for value in load_file(tmp_path / "half" / TENSORS).values()} == {torch.bfloat16}
    layer = base.get_submodule("model.layers.0.mlp.up_proj")
    layer.lora_A["code"].to(torch.float32)
    layer.lora_B["code"].to(torch.float32)
    weft.fold(model, tmp_path / "mixed", {"math": 0.5, "code": 0.5})
    assert {value.dtype for value in load_file(tmp_path / "mixed" / TENSORS).values()} == {torch.float32}


def vision_model(name):
    """A vision model whose every block counts: ConvNeXt multiplies its blocks by 1e-6 at the start."""
    base = VISION[name][0]()
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if "layer_scale" in key:
                parameter.fill_(1.0)
    return base


@pytest.mark.parametrize("name", VISION)
def test_convolutions_are_folded(name, tmp_path):
    _, targets, size, _ = VISION[name]
    make = partial(vision_model, name)
    paths = {
        f"e{r}": save_adapter(make(), lora(r=r, task_type=None, target_modules=targets), tmp_path / f"e{r}", seed=r)
        for r in (2, 4)
    }
    model = weft.from_adapters(make(), paths).eval()
    images = torch.randn(2, 3, size, size)
    for weights in ({"e2": 0.6, "e4": 0.7}, table_for(model)):
        weft.fold(model, tmp_path / "folded", weights)
        folded = peft.PeftModel.from_pretrained(make(), tmp_path / "folded")
        with torch.no_grad(), model.fixed_scalings(weights):
            torch.testing.assert_close(folded(pixel_values=images).logits, model(pixel_values=images).logits, **CLOSE)


def test_grouped_convolutions_are_folded_group_by_group(tmp_path):
    make = partial(vision_model, "convnext")  # its depthwise convolutions have 8 and 12 groups
    targets = {"e8": ["stages.0.layers.0.dwconv"], "e24": ["dwconv"]}
    paths = {
        name: save_adapter(make(), lora(r=int(name[1:]), task_type=None, target_modules=modules), tmp_path / name, 1)
        for name, modules in targets.items()
    }
    model = quietly(weft.from_adapters, make(), paths).eval()
    images = torch.randn(2, 3, 32, 32)
    for weights, rank in (({"e8": 0.6, "e24": 0.7}, 48), ({"e8": 1.0}, 8)):  # 32 ranks, which 12 does not divide
        assert weft.fold(model, tmp_path / "folded", weights).r == rank
        folded = quietly(peft.PeftModel.from_pretrained, make(), tmp_path / "folded")
        with torch.no_grad(), model.fixed_scalings(weights):
            torch.testing.assert_close(folded(pixel_values=images).logits, model(pixel_values=images).logits, **CLOSE)


def gpt2_with_bias(folder, **targets):
    """GPT-2 whose expert "biased" has a lora_bias of its own."""
    paths = {}
    for seed, (name, modules) in enumerate(targets.items()):
        config = lora(r=2 + seed, target_modules=modules, lora_bias=name == "biased", fan_in_fan_out=True)
        adapter = quietly(peft.get_peft_model, make_architecture("gpt2")[0], config)
        with torch.no_grad():
            for key, parameter in adapter.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        quietly(adapter.save_pretrained, str(folder / name))
        paths[name] = str(folder / name)
    return weft.from_adapters(make_architecture("gpt2")[0], paths).eval()


@pytest.mark.parametrize("weights", [{"biased": 0.3, "plain": 0.6}, {"plain": 0.6}])
def test_a_lora_bias_stays_outside_of_the_weights(weights, ids, tmp_path):
    model = gpt2_with_bias(tmp_path, plain=["c_fc"], biased=["c_attn", "c_fc"])
    model.set_global_scaling_weight(0.5)
    config = weft.fold(model, tmp_path / "folded", weights)
    assert config.lora_bias
    folded = peft.PeftModel.from_pretrained(make_architecture("gpt2")[0], tmp_path / "folded")
    with model.fixed_scalings(weights):
        torch.testing.assert_close(logits(folded, ids), logits(model, ids), **CLOSE)


def test_a_lora_bias_beside_an_embedding_is_refused(tmp_path):
    model = gpt2_with_bias(tmp_path, plain=["wte"], biased=["c_attn"])
    with pytest.raises(AdapterError, match=r"lora_bias \(True\), and others adapt the embedding 'transformer.wte'"):
        weft.fold(model, tmp_path / "folded", {"plain": 1.0, "biased": 1.0})
    assert not (tmp_path / "folded").exists()


def test_the_config_is_an_ordinary_one(base_folder, base_adapters, tmp_path):
    model = weft.from_adapters(str(base_folder), base_adapters)
    weft.fold(model, tmp_path / "folded", {"math": 1.0, "code": 1.0})
    config = config_of(tmp_path / "folded")
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", "lora_bias": False}
    empty = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "modules_to_save": None}
    assert config.items() >= {**plain, **empty, "base_model_name_or_path": str(base_folder)}.items()
    assert peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "folded").peft_config["default"].r == 8
    # And it is an expert like any other.
    again = weft.from_adapters(str(base_folder), {"folded": str(tmp_path / "folded")})
    assert again.xlora_config.num_experts == 1


@pytest.mark.parametrize(
    ("wanted", "targets"),
    [
        (["a.q", "b.q"], ["q"]),
        (["a.q"], ["a.q"]),
        (["a.q", "b.q", "b.v"], ["b.v", "q"]),
        (["q"], "q"),  # every ending of "q" is one of "a.q" too
        (["q", "a.v"], r"q|a\.v"),
    ],
)
def test_targets_are_the_shortest_names_that_are_exact(wanted, targets):
    base = nn.ModuleDict({"a": nn.ModuleDict(), "b": nn.ModuleDict()})
    for name in {"a.q", "b.q", "a.v", "b.v", *wanted}:
        parent, _, last = name.rpartition(".")
        base.get_submodule(parent)[last] = nn.Linear(2, 2)
    assert _target_modules(base, wanted) == targets
    quietly(peft.LoraModel, base, peft.LoraConfig(target_modules=targets), "default")
    assert {name for name, module in base.named_modules() if hasattr(module, "lora_A")} == set(wanted)


@pytest.mark.parametrize("options", [{}, {"top_k_lora": 1}, {"top_k_lora": 2, "enable_softmax_topk": True}])
@pytest.mark.parametrize("layerwise", [True, False])
def test_mean_scalings_are_the_mean_over_unpadded_tokens(llama_adapters, options, layerwise):
    options = {"enable_softmax": "enable_softmax_topk" not in options, "layerwise_scalings": layerwise, **options}
    model = weft.from_adapters(tiny_llama(), llama_adapters, **options).eval()
    sequences = [torch.randint(1, VOCAB, (length,)).tolist() for length in (3, 9, 2)]
    seen = []
    for sequence in sequences:
        logits(model, torch.tensor([sequence]))
        seen.append(model.get_latest_scalings()[0])
    kept = keep_top_k(torch.cat(seen), options.get("top_k_lora"), renormalise="enable_softmax_topk" in options)
    for batch_size in (1, 2, 3):
        found = weft.mean_scalings(model, sequences, batch_size)
        torch.testing.assert_close(found, kept.mean(0))
    assert found.shape == (len(model.xlora_config.layer_names), 3)


def test_a_gate_that_is_constant_loses_nothing(model, ids, tmp_path):
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.zero_() if parameter.dim() > 1 else parameter.normal_()
    weft.fold(model, tmp_path / "folded", weft.mean_scalings(model, ids.tolist()))
    folded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "folded")
    torch.testing.assert_close(logits(folded, ids), logits(model, ids), **CLOSE)


def test_mean_scalings_need_texts_and_a_gate(model, ids):
    with pytest.raises(DataError, match="sequences is empty"):
        weft.mean_scalings(model, [])
    for context in (model.fixed_scalings({"math": 1.0}), model.disable_adapter()):
        with context, pytest.raises(RuntimeError, match="the gate does not run inside of fixed_scalings"):
            weft.mean_scalings(model, ids.tolist())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"chess": 1.0}, r"weights names \['chess'\], expected names among \['math', 'code', 'adapter_3'\]"),
        ({"math": float("nan")}, r"weights \({'math': nan}\) must be finite numbers"),
        ([[1.0, 0.0, 0.0]], r"weights has shape \[1, 3\], expected \[8, 3\]: a row for each LoRA layer"),
        ([[1.0], [1.0, 2.0]], r"weights is no table \[layer, expert\] of numbers"),
        ({"math": 0.0}, r"weights \({'math': 0.0}\) with global_scaling_weight \(1.0\) leave no expert acting"),
    ],
)
def test_weights_that_cannot_work_are_refused(model, weights, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        weft.fold(model, tmp_path / "folded", weights)
    assert not (tmp_path / "folded").exists()


def test_nothing_but_a_folded_adapter_is_overwritten(llama_adapters, tmp_path):
    math = tmp_path / "math"
    save_adapter(tiny_llama(), lora(), math, seed=1)
    model = weft.from_adapters(tiny_llama(), {**llama_adapters, "math": str(math)})
    model.save_pretrained(str(tmp_path / "mixture"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("")
    for name in ("notes", "mixture", "notes/todo.txt"):
        before = folder_files(tmp_path)
        with pytest.raises(
            ConfigError, match=rf"output \({tmp_path / name}\) (exists already and holds|is a file, exp)"
        ):
            weft.fold(model, tmp_path / name, {"code": 1.0})
        assert folder_files(tmp_path) == before
    with pytest.raises(ConfigError, match=rf"output \({math}\) is the folder of the expert 'math'"):
        weft.fold(model, math, {"code": 1.0})
    (tmp_path / "empty").mkdir()
    for rank in (4, 8):
        weights = {"code": 1.0} if rank == 4 else {"code": 1.0, "math": 1.0}
        weft.fold(model, tmp_path / "empty", weights)
        assert peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "empty").peft_config["default"].r == rank


@pytest.fixture
def mixture(base_folder, base_adapters, tmp_path):
    """The folder of a mixture whose base is the model in `base_folder`."""
    weft.from_adapters(str(base_folder), base_adapters, layerwise_scalings=True).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"the quick brown fox {i} " * 4}) for i in range(4)))
    return file


def base_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_command_folds_chosen_weights(mixture, base_folder, ids, tmp_path, capsys):
    out = tmp_path / "folded"
    assert main(shlex.split(f"fold {mixture} --output {out} --weights math=0.25 code=0.75")) == 0
    shown = capsys.readouterr().out
    assert f"saved to {out}: an ordinary LoRA adapter of rank 8" in shown
    expression = re.search(r"peft\.PeftModel.*", shown).group()
    folded = eval(expression, {"peft": peft, "base": base_of(base_folder)})
    model = weft.from_pretrained(mixture)
    with model.fixed_scalings({"math": 0.25, "code": 0.75}):
        torch.testing.assert_close(logits(folded, ids), logits(model, ids), **CLOSE)


def test_the_command_folds_a_gates_mean(mixture, base_folder, data, ids, tmp_path):
    options = f"--data {data} --sequence-length 16 --max-sequences 3 --batch-size 2"
    assert main(shlex.split(f"fold {mixture} --output {tmp_path / 'folded'} {options}")) == 0
    model = weft.from_pretrained(mixture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    tokens = tokenizer(json.loads(data.read_text().split("\n")[0])["text"])["input_ids"]
    weights = weft.mean_scalings(model, [tokens[start : start + 16] for start in (0, 16, 32)])
    folded = peft.PeftModel.from_pretrained(base_of(base_folder), tmp_path / "folded")
    with model.fixed_scalings(weights):
        torch.testing.assert_close(logits(folded, ids), logits(model, ids), **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--weights math=1", "output is missing: a folder"),
        ("--output OUT", "weights and data are missing: give name=NUMBER"),
        ("--output OUT --weights math=1 --data x.txt", r"weights \(\['math=1'\]\) and data \(\['x.txt'\]\) exclude"),
        ("--output OUT --weights math", "weights has the entry 'math', expected name=NUMBER"),
        ("--output OUT --weights math=much", "weights has the entry 'math=much', expected name=NUMBER"),
        ("--output OUT --weights math=1 math=2", r"weights has the name 'math' twice \(1.0 and 2\)"),
        ("--output OUT --weights chess=1", r"weights names \['chess'\], expected names among \['math', 'code'\]"),
        ("--output OUT --weights math=1 --batch-size 0", r"batch_size \(0\) must be at least 1"),
        ("--output OUT --data x.txt --max-sequences -1", r"max_sequences \(-1\) must be at least 0"),
        ("--output OUT --data /nowhere.jsonl", r"data \(/nowhere.jsonl\) is not a file"),
        ("--output MIXTURE --data /nowhere.jsonl", r"output \(.*mixture\) exists already and holds"),
    ],
)
def test_bad_options_are_an_error_without_a_traceback(mixture, options, message, tmp_path, capsys):
    options = options.replace("OUT", str(tmp_path / "folded")).replace("MIXTURE", str(mixture))
    assert main(shlex.split(f"fold {mixture} {options}")) == 1
    errors = capsys.readouterr().err
    assert "weft fold: error: " in errors
    assert "Traceback" not in errors
    assert re.search(message, errors), errors
    assert not (tmp_path / "folded").exists()


def test_constant_layers_before_the_gate_are_averaged_as_they_are(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True, gate_layer=1, top_k_lora=1).eval()
    weights, before = weft.mean_scalings(model, [[1, 2, 3, 4]]), model.passes.routings.first_layer
    torch.testing.assert_close(weights[:before], torch.full((before, 3), 1 / 3))
    expected = keep_top_k(model.get_latest_scalings()[0, :, before:], 1).mean(0)
    torch.testing.assert_close(weights[before:], expected)
