"""The two passes, what they run and what they leave alone."""

import copy
import io
import pickle
import threading

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import weft
from models import (
    VOCAB,
    is_expert,
    lora,
    make_architecture,
    mixture_by_loop,
    quietly,
    randomise,
    save_adapter,
    tiny_llama,
)
from weft.errors import AdapterError, ConfigError
from weft.layers import XLoraLayer
from weft.model.model import convert_layers_to_xlora


@pytest.fixture
def model(llama_adapters):
    return weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).eval()


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 7))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


# -------------------------------------------------------------------------------------- the passes


def test_scaling_pass_runs_the_backbone_alone_without_head_or_lora(model, ids):
    base = model.get_base_model()
    calls = {"head": 0, "backbone": 0, "down": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    handles = [
        base.lm_head.register_forward_hook(count("head")),
        base.model.register_forward_hook(count("backbone")),
    ]
    original = XLoraLayer._add_mixture
    XLoraLayer._add_mixture = lambda *args: count("down")() or original(*args)
    try:
        logits(model, ids.repeat(1, 5))  # more tokens than have their weights made ready
    finally:
        XLoraLayer._add_mixture = original
        for handle in handles:
            handle.remove()
    assert calls == {"head": 1, "backbone": 2, "down": len(lora_layers(model))}


def test_the_gate_reads_the_base_models_last_hidden_state(model, ids):
    seen = []
    model.internal_xlora_classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, ids)
    with torch.no_grad():
        expected = tiny_llama()(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(seen[0], expected)


def test_scaling_pass_value_lets_experts_act_at_a_constant_weight(model, ids):
    seen = []
    model.internal_xlora_classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.set_scaling_pass_value(None)
    logits(model, ids)
    weights = dict.fromkeys(model.xlora_config.expert_names, 1 / 3)
    with torch.no_grad(), model.fixed_scalings(weights):
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(seen[0], expected)
    assert model.xlora_config.scaling_pass_value == pytest.approx(1 / 3)


def test_only_the_gate_gets_gradients(model, ids):
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "internal_xlora_classifier" in name}


def test_trainable_adapters_get_gradients_too(llama_adapters, ids):
    model = weft.from_adapters(tiny_llama(), llama_adapters, use_trainable_adapters=True)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (is_expert(name) or "internal_xlora" in name), name


def test_gates_gradient_agrees_with_finite_differences(tmp_path, ids):
    base, targets = make_architecture("gpt2")  # whose norms stay in float64
    paths = {
        str(i): save_adapter(make_architecture("gpt2")[0], lora(target_modules=targets), tmp_path / str(i), seed=i)
        for i in range(2)
    }
    model = weft.from_adapters(base.double(), paths, layerwise_scalings=True).double().eval()
    weight = model.internal_xlora_classifier.layers[0].weight
    assert weight.dtype == torch.float64

    def loss():
        return -model(input_ids=ids).logits.log_softmax(-1).gather(-1, ids[..., None]).mean()

    loss().backward()
    for index in [(0, 0), (1, 5), (2, 31)]:
        with torch.no_grad():
            original, step = weight[index].clone(), 1e-5
            weight[index] = original + step
            above = loss()
            weight[index] = original - step
            below = loss()
            weight[index] = original
        torch.testing.assert_close(weight.grad[index], (above - below) / (2 * step), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_also_for_two_forwards_before_one_backward(
    llama_adapters, ids, reentrant
):
    other = torch.randint(1, VOCAB, (3, 5))

    def gradients(checkpointing):
        torch.manual_seed(1)
        model = weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).train()
        if checkpointing:
            quietly(model.gradient_checkpointing_enable, {"use_reentrant": reentrant})
        loss = model(input_ids=ids, labels=ids).loss - 0.5 * model(input_ids=other, labels=other).loss
        loss.backward()
        assert model.base_model.carrier.routing is None
        return [p.grad for p in model.internal_xlora_classifier.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)
    assert plain.abs().sum() > 0


def test_adapted_head_follows_logits_to_keep(tmp_path, ids):
    paths = {
        str(i): save_adapter(tiny_llama(), lora(target_modules=["lm_head", "q_proj"]), tmp_path / str(i), seed=i)
        for i in range(2)
    }
    model = weft.from_adapters(tiny_llama(), paths, layerwise_scalings=True).eval()
    whole = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=3), whole[:, -3:])
    torch.testing.assert_close(logits(model, ids, logits_to_keep=torch.tensor([0, 4])), whole[:, [0, 4]])
    model.generate(input_ids=ids, max_new_tokens=2)


def test_positional_arguments_are_understood(model, ids):
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(model.get_base_model()(ids, mask).logits, logits(model, ids, attention_mask=mask))


def test_bfloat16_base_keeps_experts_and_gate_in_float32(llama_adapters, ids):
    model = weft.from_adapters(tiny_llama().to(torch.bfloat16), llama_adapters).eval()
    assert model.internal_xlora_classifier.layers[0].weight.dtype == torch.float32
    assert {p.dtype for n, p in model.named_parameters() if is_expert(n)} == {torch.float32}
    assert logits(model, ids).dtype == torch.bfloat16
    reference = weft.from_adapters(tiny_llama(), llama_adapters).eval()
    reference.internal_xlora_classifier.load_state_dict(model.internal_xlora_classifier.state_dict())
    torch.testing.assert_close(logits(model, ids).float(), logits(reference, ids), rtol=0.1, atol=0.1)
    for own, expected in zip(
        (p for n, p in model.named_parameters() if is_expert(n)),
        (p for n, p in reference.named_parameters() if is_expert(n)),
        strict=True,
    ):
        assert torch.equal(own, expected)  # float32 files lose nothing


# -------------------------------------------------------------------------------------- state


def test_modes_and_requires_grad_stay_what_the_user_set(model, ids):
    model.train()
    next(lora_layers(model)[0].lora_A.parameters()).requires_grad_(True)
    model.internal_xlora_classifier.eval()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    logits(model, ids)
    model.generate(input_ids=ids, max_new_tokens=2)
    with model.disable_adapter():
        logits(model, ids)
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])


def test_disabling_nests(model, ids):
    expected = logits(tiny_llama(), ids)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), expected)
        assert torch.equal(logits(model, ids), expected)
        assert torch.equal(
            model.generate(input_ids=ids, max_new_tokens=3, do_sample=False),
            tiny_llama().generate(input_ids=ids, max_new_tokens=3, do_sample=False),
        )
    assert not torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("during", ["scaling pass", "adapted pass"])
def test_no_state_is_left_after_an_exception(model, ids, error, during):
    expected = logits(model, ids)
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == (1 if during == "scaling pass" else 2):
            raise error("stop")

    handle = model.get_base_model().model.norm.register_forward_hook(fail)
    with pytest.raises(error):
        logits(model, ids)
    handle.remove()
    carrier = model.base_model.carrier
    assert (carrier.routing, carrier.experts_off, carrier.in_scaling_pass) == (None, False, False)
    assert torch.equal(logits(model, ids), expected)


def test_hooks_are_registered_once(model, ids):
    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    for _ in range(3):
        logits(model, ids)
    model.generate(input_ids=ids, max_new_tokens=3)
    assert hooks() == before


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "pickle"])
def test_a_copy_gives_the_same_and_is_independent(model, ids, how):
    expected = model(input_ids=ids).logits  # with a graph: nothing of it may hinder the copy
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(logits(twin, ids), expected)
    assert twin.base_model.carrier is not model.base_model.carrier
    randomise(twin, 77)
    assert not torch.equal(logits(twin, ids), expected)
    assert torch.equal(logits(model, ids), expected)
    assert twin.xlora_config.model is twin.base_model


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_moves_everything(model, ids, dtype):
    expected = logits(model, ids)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    tolerance = 1e-5 if dtype == torch.float64 else 0.2
    torch.testing.assert_close(logits(model, ids).float(), expected, rtol=tolerance, atol=tolerance)


def test_two_models_in_two_threads_do_not_disturb_each_other(llama_adapters):
    models = [weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True).eval() for _ in range(2)]
    inputs = [torch.randint(1, VOCAB, (i + 1, 5 + i)) for i in range(2)]
    expected = [logits(m, x) for m, x in zip(models, inputs, strict=True)]
    wrong = []

    def run(i):
        for _ in range(20):
            if not torch.equal(logits(models[i], inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_unload_removes_hooks_wrappers_and_the_way_back_is_complete(model, ids):
    model.train()
    quietly(model.gradient_checkpointing_enable)
    model(input_ids=ids, labels=ids).loss.backward()
    base = model.base_model.unload().eval()
    quietly(base.gradient_checkpointing_disable)
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base, ids), logits(tiny_llama(), ids))


# -------------------------------------------------------------------------------------- peft's methods


def test_latest_scalings_and_log(model, ids):
    assert model.get_latest_scalings() is None
    logits(model, ids)
    assert model.get_scalings_log() == []
    model.enable_scalings_logging()
    for length in (3, 5, 3):
        model(input_ids=ids[:, :length])
    latest = model.get_latest_scalings()
    assert latest.shape == (2, 3, len(lora_layers(model)), 3)
    assert latest.requires_grad
    torch.testing.assert_close(latest.sum(-1), torch.ones(latest.shape[:-1]))
    log = model.get_scalings_log()
    assert [tuple(entry.shape[:2]) for entry in log] == [(2, 3), (2, 5), (2, 3)]
    assert not any(entry.requires_grad for entry in log)
    assert torch.equal(log[-1], latest)
    buckets = model.get_bucketed_scalings_log()
    assert {length: places for length, (places, _) in buckets.items()} == {3: [0, 2], 5: [1]}
    model.disable_scalings_logging()
    logits(model, ids)
    assert len(model.get_scalings_log()) == 3
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


def test_log_is_bounded(llama_adapters, ids):
    model = weft.from_adapters(tiny_llama(), llama_adapters, scalings_log_size=2)
    model.enable_scalings_logging()
    for length in (2, 3, 4):
        logits(model, ids[:, :length])
    assert [entry.shape[1] for entry in model.get_scalings_log()] == [3, 4]


def test_shared_scalings_are_the_same_in_every_layer(llama_adapters, ids):
    model = weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=False)
    logits(model, ids)
    scalings = model.get_latest_scalings()
    assert scalings.shape[2] == len(lora_layers(model))
    assert scalings.eq(scalings[:, :, :1]).all()


def test_options_can_be_set_later_within_their_range(model, ids):
    dense = logits(model, ids)
    model.set_topk_lora(3)
    assert torch.equal(logits(model, ids), dense)
    model.set_topk_lora(1)
    assert not torch.equal(logits(model, ids), dense)
    assert model.peft_config["default"].top_k_lora == 1
    model.set_topk_lora(None)
    for value in (0, 4):
        with pytest.raises(ConfigError, match=r"top_k_lora \(.*\) must be between 1 and the number of adapters \(3\)"):
            model.set_topk_lora(value)
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0
    torch.testing.assert_close(logits(model, ids), logits(tiny_llama(), ids))
    with pytest.raises(ConfigError, match=r"global_scaling_weight \(nan\) must be a finite number"):
        model.set_global_scaling_weight(float("nan"))
    assert model.get_global_scaling_weight() == 0


def test_fixed_scalings_refuse_unknown_names(model):
    with pytest.raises(
        ValueError, match=r"weights names \['chess'\], expected names among \['math', 'code', 'adapter_3'\]"
    ):
        model.fixed_scalings({"chess": 1.0}).__enter__()


def test_fixed_scalings_may_differ_from_layer_to_layer(model, ids):
    """A table of equal rows is the weights of all layers; each row acts on its own layer."""
    with model.fixed_scalings({"math": 0.3, "adapter_3": 0.6}):
        expected = logits(model, ids)
    table = torch.tensor([0.3, 0.0, 0.6]).repeat(len(model.xlora_config.layer_names), 1)
    with model.fixed_scalings(table):
        torch.testing.assert_close(logits(model, ids), expected)
    table[:, 0] = torch.arange(len(table)) / 10
    layers = lora_layers(model)
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda module, args, output, n=n: outputs.update({n: (args[0], output)}))
        for n, layer in enumerate(layers)
    ]
    with model.fixed_scalings(table):
        logits(model, ids)
    for hook in hooks:
        hook.remove()
    for n, layer in enumerate(layers):
        x, found = outputs[n]
        torch.testing.assert_close(found, mixture_by_loop(layer, x, table[n].expand(*x.shape[:2], -1)))


def test_what_a_mixture_cannot_do_is_said(model):
    with pytest.raises(
        ValueError, match=r"cannot be merged, .* weft\.fold\(model, folder, weights\) writes a constant"
    ):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="adapter 'more' cannot be added"):
        model.base_model.inject_adapter(model.get_base_model(), "more")
    with pytest.raises(ValueError, match="must be 'default', the mixture"):
        model.base_model.set_adapter("math")
    model.set_adapter("default")


# -------------------------------------------------------------------------------------- conversion


def test_layers_are_numbered_in_the_order_of_modules(model):
    layers = lora_layers(model.get_base_model())
    assert [layer.forward.__self__.layer_number for layer in layers] == list(range(len(layers)))
    assert isinstance(layers[0].forward.__self__, XLoraLayer)


def test_converting_counts_the_layers(model):
    base = model.get_base_model()
    assert convert_layers_to_xlora(base, model.base_model, model.xlora_config) == len(lora_layers(base))


def test_an_unsupported_lora_layer_is_refused_by_its_name(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

    import peft

    wrapped = Wrapper()
    peft.LoraModel(wrapped, lora(task_type=None, target_modules=["conv"]), "a")
    with pytest.raises(AdapterError, match=r"layer 'conv' is adapted as peft.tuners.lora.layer.Conv1d"):
        convert_layers_to_xlora(wrapped, nn.Module(), weft.XLoraConfig(hidden_size=2, adapters={"a": "."}))


def test_hidden_size_is_inferred_or_checked(llama_adapters):
    assert weft.from_adapters(tiny_llama(), llama_adapters).xlora_config.hidden_size == 32
    with pytest.raises(ConfigError, match=r"hidden_size \(64\) must be the base model's \(32\)"):
        weft.from_adapters(tiny_llama(), llama_adapters, hidden_size=64)


def test_hidden_size_of_a_multimodal_model_is_its_text_models():
    import transformers

    text = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    config = transformers.LlavaConfig(text_config={"model_type": "llama", **text})
    from weft.base_model.backbone import Backbone

    with torch.device("meta"):
        assert Backbone(transformers.LlavaForConditionalGeneration(config)).hidden_size() == 24


def test_a_base_model_that_cannot_work_is_an_error(llama_adapters, model):
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel"):
        weft.from_adapters(nn.Linear(2, 2), llama_adapters)


def test_an_earlier_mixture_is_taken_out_of_the_base_with_a_warning(
    llama_adapters, model, tmp_path, peft_xlora_restored
):
    base, ids = model.get_base_model(), torch.randint(1, VOCAB, (2, 5))
    expected = logits(weft.from_adapters(tiny_llama(), {"a": llama_adapters["code"]}).eval(), ids)
    with pytest.warns(UserWarning, match=r"\(LlamaForCausalLM\) carried an earlier mixture, of \['math', 'code', "):
        again = weft.from_adapters(base, {"a": llama_adapters["code"]}).eval()
    torch.testing.assert_close(logits(again, ids), expected)
    again.save_pretrained(str(tmp_path))
    weft.register_with_peft()
    with pytest.warns(UserWarning, match=r"carried an earlier mixture, of \['a'\]"):
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, ids), expected)
    loaded.base_model.unload()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, tiny_llama()(ids).logits)


def test_an_expert_called_like_the_mixture_is_refused(llama_adapters):
    with pytest.raises(ConfigError, match="adapters has the name 'default', which is the name of the mixture"):
        weft.from_adapters(tiny_llama(), {"default": llama_adapters["math"]})
