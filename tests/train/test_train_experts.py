"""From data to a mixture in one command: experts first, then the gate; and going on from a mixture."""

import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from models import folder_files, quietly, save_adapter, tiny_tokenizer
from weft.cli import main
from weft.errors import ConfigError
from weft.options import TrainOptions
from weft.train.experts import train_experts, train_in_stages
from weft.train.gate import train

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def texts(tmp_path):
    """{name: a file of texts}."""
    files = {}
    for name, text in {"fox": "the quick brown fox ", "law": "the parties agree that "}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(json.dumps({"text": f"{text}{number}"}) for number in range(6)))
    return files


@pytest.fixture
def arguments(base_folder, texts, tmp_path):
    """`weft train --experts-from` with few steps."""
    return [
        *("train", "--base", str(base_folder), "--experts-from", *(f"{name}={path}" for name, path in texts.items())),
        *("--expert-steps", "3", "--expert-rank", "2", "--expert-learning-rate", "0.01", "--batch-size", "2"),
        *("--max-steps", "2", "--sequence-length", "16", "--output", str(tmp_path / "out")),
    ]


def tensors(folder):
    # Copies: what safetensors 0.5 reads changes with the file when that is written over.
    return {key: value.clone() for key, value in load_file(folder / TENSORS).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def changed(arguments, **options):
    """The arguments with these options replaced."""
    found = list(arguments)
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if option in found:
            found[found.index(option) + 1] = value
        else:
            found += [option, value]
    return found


def test_held_out_texts_that_experts_were_trained_on_are_named_as_such(arguments, texts, capsys):
    said = "it is trained and evaluated on the experts' own texts: eval_data names texts that no expert has seen"
    assert main(changed(arguments, max_steps="0")) == 0
    assert said in capsys.readouterr().out
    assert main([*changed(arguments, max_steps="0", resume="true"), "--eval-data", str(texts["fox"])]) == 0
    assert said not in capsys.readouterr().out


def test_experts_share_one_base_model_and_each_is_what_it_is_alone(base_folder, texts, tmp_path, monkeypatch):
    loaded = []
    load = weft.train.experts.load_base
    monkeypatch.setattr(
        weft.train_experts, "load_base", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs)
    )

    def trained(names, output):
        return train_experts(
            TrainOptions(
                base=str(base_folder),
                experts_from={name: str(texts[name]) for name in names},
                expert_steps=3,
                expert_learning_rate=0.01,
                batch_size=2,
                output=str(tmp_path / output),
            ),
            say=lambda line: None,
        )

    both = quietly(trained, ["fox", "law"], "both")
    assert len(loaded) == 1
    for name in ("fox", "law"):
        assert same(tensors(both[name]), tensors(quietly(trained, [name], name)[name]))
    assert not same(tensors(both["fox"]), tensors(both["law"]))


def test_an_experts_training_is_shown_as_the_gates_and_not_with_quiet(arguments, tmp_path, capsys):
    result = f"saved to {tmp_path}/out: try  weft generate {tmp_path}/out --prompt '...'\n"
    assert main([*arguments, "--logging-steps", "1", "--quiet"]) == 0
    assert capsys.readouterr().out == result
    for folder in ("out", "out-experts"):
        shutil.rmtree(tmp_path / folder)
    assert main([*arguments, "--logging-steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expert = lines[: lines.index("training the gate over fox, law")]
    assert sum(re.match(r"step [123]/3  loss \d", line) is not None for line in expert) == 6
    assert sum(line.startswith("trained to step 3: ") for line in expert) == 2
    assert not any(line.startswith("{") for line in lines)


def test_experts_are_trained_and_then_the_gate_on_the_data_of_all(arguments, base_folder, texts, tmp_path, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"training expert 'fox' on {texts['fox']}: " in shown
    assert "training the gate over fox, law" in shown
    assert "the experts' own texts" not in shown  # nothing is evaluated
    model = weft.from_pretrained(tmp_path / "out")
    assert model.xlora_config.expert_names == ["fox", "law"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["checkpoints", "experts"]
    ids = torch.arange(1, 9).view(1, 8)
    for name in ("fox", "law"):
        base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
        folder = tmp_path / "out-experts" / name
        assert set(folder_files(folder)) == {"README.md", "adapter_config.json", TENSORS, "weft_expert.json"}
        assert any(value.abs().sum() > 0 for key, value in tensors(folder).items() if "lora_B" in key)
        alone = peft.PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad(), model.fixed_scalings({name: 1.0}):
            torch.testing.assert_close(alone(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)

    # The same in two commands.
    both = changed(arguments, output=str(tmp_path / "two"))
    start = both.index("--experts-from")
    both[start : start + 3] = ["--data", *(f"{name}={text}" for name, text in texts.items())]
    both += ["--adapters", *(f"{name}={tmp_path}/out-experts/{name}" for name in texts)]
    assert main(both) == 0
    assert same(tensors(tmp_path / "two"), tensors(tmp_path / "out"))


def test_some_experts_may_be_there_already_and_the_gate_have_data_of_its_own(
    arguments, base_adapters, texts, tmp_path, capsys
):
    del arguments[arguments.index("--experts-from") + 2]  # law
    more = ["--adapters", f"math={base_adapters['math']}", "--data", str(texts["law"]), "--expert-targets", "q_proj"]
    assert main([*arguments, *more]) == 0
    model = weft.from_pretrained(tmp_path / "out")
    assert model.xlora_config.expert_names == ["fox", "math"]
    config = json.loads((tmp_path / "out-experts/fox/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 16, ["q_proj"])


def test_complete_experts_are_not_trained_again(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("weft.train.experts.train", lambda options: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments) == 130  # between the stages
    assert f"complete experts are in {tmp_path}/out-experts, the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    before = tensors(tmp_path / "out-experts/fox")
    for file in (tmp_path / "out-experts/law").iterdir():
        file.unlink()
    assert main([*arguments, "--resume"]) == 0  # no checkpoint yet: the gate starts anew
    shown = capsys.readouterr().out
    assert "training expert 'fox'" not in shown
    assert "training expert 'law'" in shown
    assert same(tensors(tmp_path / "out-experts/fox"), before)
    record = tmp_path / "out-experts/fox/weft_expert.json"  # as earlier versions wrote it
    earlier = {"warmup_ratio": "warmup", "gradient_accumulation_steps": "gradient_accumulation"}
    saved = json.loads(record.read_text())
    assert set(earlier) <= set(saved)
    record.write_text(json.dumps({earlier.get(name, name): value for name, value in saved.items()}))
    assert main([*changed(arguments, max_steps="4"), "--resume"]) == 0  # and now from the gate's checkpoint
    assert "training expert" not in capsys.readouterr().out


def test_an_expert_that_was_damaged_is_found_before_anything_is_trained(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("weft.train.experts.train", lambda options: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments) == 130
    monkeypatch.undo()
    folder = tmp_path / "out-experts/law"
    before = tensors(folder)
    (tmp_path / "out-experts/fox/README.md").write_text("a card of the user's")
    for damage, reason in (
        (lambda file: save_file({key: value + 1 for key, value in before.items()}, file), "was changed after it was"),
        (lambda file: file.unlink(), "is missing"),
    ):
        damage(folder / TENSORS)
        capsys.readouterr()
        assert main(arguments) == 1
        shown = capsys.readouterr()
        assert f"expert 'law' in {folder} is not as it was saved: {TENSORS} {reason}" in shown.err
        assert "; remove it to train it anew" in shown.err
        assert "training" not in shown.out
    shutil.rmtree(folder)
    assert main(arguments) == 0
    assert same(tensors(folder), before)


def test_an_interrupted_expert_is_not_complete(arguments, tmp_path, capsys, monkeypatch):
    stop = lambda self, args, state, control, **kwargs: (
        setattr(control, "should_training_stop", True) or setattr(self, "requested", True)
    )
    monkeypatch.setattr("weft.train.stopping.StopOnInterrupt.on_step_end", stop)
    assert main(arguments) == 130
    assert "stopped; complete experts are in" in capsys.readouterr().err
    assert not (tmp_path / "out-experts/fox").exists()
    assert not (tmp_path / "out").exists()


BAD = {
    "rank": ({"expert_rank": "0", "expert_alpha": "0"}, r"expert_rank \(0\) must be at least 1\n.*expert_alpha \(0\)"),
    "steps": ({"expert_steps": "-1"}, r"expert_steps \(-1\) must be at least 0"),
    "epochs": ({"expert_steps": "0", "expert_epochs": "0"}, r"expert_epochs \(0.0\) must be above 0"),
    "rate": ({"expert_learning_rate": "0"}, r"expert_learning_rate \(0.0\) must be above 0"),
    "targets": (
        {"expert_targets": "nothing"},
        r"expert_targets \(\['nothing'\]\) do not fit the base model: .*nothing",
    ),
    "no targets": ({"expert_targets": "[]"}, "expert_targets is empty: names of modules, or all-linear"),
    "a mixture": ({"start_from": "x"}, r"experts_from \(.*\) and start_from \(x\) exclude each other: weft add-expert"),
    "the gate's options": ({"xlora_depth": "0"}, r"xlora_depth \(0\) must be a whole number of at least 1"),
    "an adapter": ({"adapters": "math=/nowhere"}, r"adapter 'math' \(/nowhere\) is neither a folder here nor a Hub id"),
    "a name twice": (
        {"adapters": "fox=/nowhere"},
        r"adapters and experts_from both name \['fox'\]: each expert has one",
    ),
    "data": ({"data": "/nowhere.jsonl"}, r"data \(/nowhere.jsonl\) is not a file"),
    "data to evaluate on": ({"eval_data": "/nowhere.jsonl"}, r"data \(/nowhere.jsonl\) is not a file"),
    "labels": ({"data": __file__, "gate_start": "labels"}, r"data \(.*\) names none of the experts \['fox'"),
    "no base": ({"base": "/nowhere"}, r"base \(/nowhere\) is neither a folder here nor a Hub id"),
    "length": ({"sequence_length": "5000"}, r"sequence_length \(5000\) must be at most the model's number of posit"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_found_before_anything_is_trained(options, message, arguments, tmp_path, capsys):
    assert main(changed(arguments, **options)) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out-experts").exists()
    assert not (tmp_path / "out").exists()


def test_experts_from_needs_names_and_data(arguments, tmp_path, capsys):
    start = arguments.index("--experts-from") + 1
    for entries, message in (
        (["fox.jsonl"], "experts_from has the entry 'fox.jsonl', expected name=DATA"),
        (["fox=a", "fox=b"], "experts_from has the name 'fox' twice (a and b)"),
        (["fox=/nowhere.txt"], "experts_from (/nowhere.txt) is not a file"),
    ):
        assert main([*arguments[:start], *entries, *arguments[start + 2 :]]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out-experts").exists()


def test_experts_of_other_options_or_other_origin_are_not_taken(arguments, base_folder, tmp_path, capsys):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    save_adapter(base, peft.LoraConfig(task_type="CAUSAL_LM"), tmp_path / "out-experts/law", seed=1)
    assert main(arguments) == 1
    assert (
        "out-experts/law holds an adapter that weft did not train: give it with --adapters" in capsys.readouterr().err
    )
    record = tmp_path / "out-experts/law/weft_expert.json"
    record.write_text(json.dumps({"expert_rank": 8}))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"expert 'law' is in {record.parent} from an earlier run (remove it to train it anew):" in error
    assert "expert_rank (2) must be what it was trained with (8)" in error


def test_the_gates_training_alone_does_not_leave_experts_from_out_in_silence(base_folder):
    options = TrainOptions(base=str(base_folder), experts_from=["a=b"], data=["c"])
    with pytest.raises(ConfigError, match=r"experts_from \(\['a=b'\]\) needs weft.train.experts.train_in_stages"):
        train(options)
    with pytest.raises(ConfigError, match="adapters is missing"):
        train_in_stages(TrainOptions(base=str(base_folder), data=["c"]))


# ---------------------------------------------------------------------- going on from a mixture


def test_training_goes_on_from_a_mixture_with_all_its_options(base_folder, base_adapters, texts, tmp_path):
    torch.manual_seed(5)
    options = {"xlora_depth": 2, "xlora_size": 8, "softmax_temperature": 0.5, "global_scaling_weight": 0.8}
    model = weft.from_adapters(str(base_folder), base_adapters, **options, layerwise_scalings=True)
    model.save_pretrained(tmp_path / "mixture")
    fixed = ["--data", str(texts["fox"]), "--max-steps", "1", "--sequence-length", "16", "--learning-rate", "1e-30"]
    assert main(["train", "--start-from", str(tmp_path / "mixture"), *fixed, "--output", str(tmp_path / "out")]) == 0
    again = weft.from_pretrained(tmp_path / "out")
    for name, value in options.items():
        assert getattr(again.xlora_config, name) == value
    for key, value in model.internal_xlora_classifier.state_dict().items():
        torch.testing.assert_close(again.internal_xlora_classifier.state_dict()[key], value)


def test_an_added_expert_is_trained_with_the_others(base_folder, mixture, base_adapters, texts, tmp_path):
    more = weft.add_expert(mixture, "law", base_adapters["math"])
    fixed = ["--start-from", str(more), "--data", str(texts["law"]), "--max-steps", "2", "--learning-rate", "0.1"]
    assert main(["train", *fixed, "--output", str(tmp_path / "out")]) == 0
    before, after = (weft.from_pretrained(path).internal_xlora_classifier for path in (more, tmp_path / "out"))
    rows = (after.layers[-1].weight - before.layers[-1].weight).unflatten(0, (-1, 3)).abs().amax((0, 2))
    assert (rows > 0).all()


def test_options_that_are_not_the_mixtures_are_refused(mixture, base_adapters, texts, tmp_path, capsys):
    fixed = ["--start-from", mixture, "--data", str(texts["fox"]), "--output", str(tmp_path / "out")]
    assert main(["train", *fixed, "--xlora-depth", "3", "--adapters", f"math={base_adapters['math']}"]) == 1
    error = capsys.readouterr().err
    assert "xlora_depth (3) must be what the mixture to start from has (1): leave it out" in error
    assert re.search(r"adapters \(.*\) and start_from \(.*\) exclude each other: .* weft add-expert adds one", error)
    assert main(["train", "--start-from", base_adapters["math"], "--data", str(texts["fox"]), "--output", "y"]) == 1
    assert "is of type LORA, expected XLORA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_one_expert_is_not_trained_further(mixture, texts, tmp_path, capsys):
    one = weft.drop_expert(mixture, "code")
    assert (
        main(["train", "--start-from", str(one), "--data", str(texts["fox"]), "--output", str(tmp_path / "out")]) == 1
    )
    said = f"start_from ({one}) has one expert (math), expected two or more, between which a gate can choose"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_page_run(base_folder, base_adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(base_folder)
    config = shutil.copytree(base_adapters["math"], tmp_path / "adapters/chem") / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base_folder), "my-model"))
    for file in ("code.jsonl", "law.jsonl", "mixed.jsonl"):
        (tmp_path / file).write_text(json.dumps({"text": "the contract says"}))
    page = (Path(__file__).parents[2] / "docs/experts.md").read_text()
    commands = re.findall(r"^weft .*$", page, flags=re.M)
    assert [command.split()[1] for command in commands] == ["train", "add-expert", "train", "drop-expert"]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert weft.from_pretrained("my-new-mixture-without-chem").xlora_config.expert_names == ["code", "law"]


def test_an_expert_may_be_trained_by_itself_to_be_compared(base_folder, texts, tmp_path):
    options = TrainOptions(
        base=str(base_folder), experts_from={"one": str(texts["fox"])}, expert_steps=1, sequence_length=16
    )
    options.output = str(tmp_path / "out")
    said = []
    folders = quietly(train_experts, options, said.append)
    assert peft.PeftConfig.from_pretrained(str(folders["one"])).r == 8
    assert not (tmp_path / "out").exists()
    assert train_experts(options, said.append) == folders
    assert len(said) == 1


# ---------------------------------------------------------------------- base models with experts of their own

# By the names of such experts peft 0.18 takes linear layers only, also where they are fused.
FUSED_TOO = find_spec("peft.utils.transformers_weight_conversion") is not None


def moe(kind, vocabulary):
    torch.manual_seed(0)
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
    }
    if kind == "Mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**common, num_local_experts=4))
    own = {"moe_intermediate_size": 16, "num_experts": 4}
    if kind == "Qwen2Moe":
        own["shared_expert_intermediate_size"] = 16
        return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**common, **own))
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**common, **own, head_dim=8))


@pytest.fixture(params=["Qwen3Moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Mixtral", "Qwen2Moe"))])
def moe_arguments(request, arguments, tmp_path):
    """`weft train --experts-from` on such a base model."""
    tokenizer = tiny_tokenizer()
    moe(request.param, len(tokenizer)).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    return request.param, changed(arguments, base=str(tmp_path / "moe"))


def test_fused_experts_of_the_base_model_are_left_out_and_that_is_said(moe_arguments, tmp_path, capsys):
    kind, arguments = moe_arguments
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    fused = FUSED_TOO and kind != "Qwen2Moe"  # whose shared experts have names by which peft takes linear layers only
    assert ("the experts leave down_proj, gate.weight, gate_up_proj out" in shown) == fused
    model = weft.from_pretrained(tmp_path / "out")
    layers = {name.rpartition(".")[2] for name in model.base_model.xlora_config.layer_names}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= layers
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    alone = peft.PeftModel.from_pretrained(base, tmp_path / "out-experts/fox").eval()
    ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad(), model.fixed_scalings({"fox": 1.0}):
        torch.testing.assert_close(model(ids).logits, alone(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("moe_arguments", ["Qwen3Moe"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"expert_targets": "gate_proj"},
            f"expert_targets (['gate_proj', 'up_proj']) {'mean the parameters' if FUSED_TOO else 'do not fit'}",
        ),
        ({"gate_layer": "2"}, "gate_layer (2)"),
        ({"scaling_pass_layers": "9"}, "scaling_pass_layers (9)"),
        ({"adapters": "other={other}"}, "adapter 'other'"),
    ],
    ids=["targets", "gate layer", "pass", "adapter"],
)
def test_what_the_mixture_would_refuse_is_refused_before_any_training(
    options, message, moe_arguments, base_adapters, tmp_path, capsys
):
    values = {name: value.format(other=base_adapters["math"]) for name, value in options.items()}
    arguments = changed(moe_arguments[1], **values)
    if "expert_targets" in options:
        arguments.insert(arguments.index("--expert-targets") + 2, "up_proj")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "training" not in printed.out
    assert not (tmp_path / "out-experts").exists()
