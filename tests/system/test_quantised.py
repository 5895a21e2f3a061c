"""Mixtures on bases of which bitsandbytes or torchao has quantised the weights: the same formula, the same tools."""

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

import weft
from models import VOCAB, gate_options, lora, mixture_by_loop, quietly, save_adapter
from quantised import load_quantised, wide_llama
from weft.errors import AdapterError

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS = ["nf4", "int8", "torchao-int8"]
CLASSES = {
    "nf4": peft.tuners.lora.Linear4bit,
    "nf4-double": peft.tuners.lora.Linear4bit,
    "int8": peft.tuners.lora.Linear8bitLt,
    "torchao-int8": peft.tuners.lora.torchao.TorchaoLoraLinear,
}
# int8 layers of bitsandbytes round their input too, in steps of 1/127 of its largest value: where two paths differ by
# an ulp, one rounding in thousands goes the other way.
TOLERANCE = {"nf4": 1e-4, "int8": 3e-2, "torchao-int8": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    wide_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide-adapters")
    options = {"math": lora(r=4), "code": lora(r=6, target_modules=["q_proj", "down_proj", "up_proj"])}
    return {
        name: save_adapter(wide_llama(), config, folder / name, seed=seed)
        for seed, (name, config) in enumerate(options.items(), start=1)
    }


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 7))


def mixture(folder, adapters, kind, *, base=None, **options):
    torch.manual_seed(1)
    base = load_quantised(folder, kind) if base is None else base
    return quietly(weft.from_adapters, base, adapters, **gate_options(**options)).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def frozen_state(model):
    """What training must not change, as plain tensors."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    by_torchao = ("qdata", "tensor_impl")  # of its newer tensors, and of those that peft before 0.19 makes
    return {
        name: p.dequantize() if any(hasattr(p, part) for part in by_torchao) else p.detach()
        for name, p in frozen.items()
    }


def lora_layers(model):
    return [module for module in model.base_model.model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("nf4", torch.bfloat16)])
def test_every_layer_is_the_formula_over_its_quantised_base_layer(folder, adapters, ids, kind, dtype):
    model = mixture(folder, adapters, kind, base=load_quantised(folder, kind, dtype=dtype))
    layers, carrier, checked = lora_layers(model), model.base_model.carrier, []
    for number, layer in enumerate(layers):
        assert type(layer) is CLASSES[kind]
        assert {parameter.dtype for parameter in layer.lora_A.parameters()} == {torch.float32}

        def compared(x, number=number, layer=layer, mixed=layer.forward):
            found = mixed(x)
            scalings = None if carrier.routing is None else carrier.routing.of_layer(number)
            if scalings is None:
                assert torch.equal(found, layer.base_layer(x))
            else:
                expected = mixture_by_loop(layer, x, scalings)
                assert found.dtype == expected.dtype == dtype
                tolerance = 1e-4 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            checked.append((number, scalings is None))
            return found

        layer.forward = compared
    logits(model, ids)
    assert sorted(checked) == sorted((number, plain) for number in range(len(layers)) for plain in (True, False))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_reads_exactly_the_quantised_base_model(folder, adapters, ids, kind):
    base = load_quantised(folder, kind)
    with torch.no_grad():
        expected_logits, expected = base(input_ids=ids).logits, base.model(input_ids=ids).last_hidden_state
    model, read = mixture(folder, adapters, kind, base=base), []
    model.internal_xlora_classifier.register_forward_pre_hook(lambda gate, args: read.append(args[0]))
    assert not torch.equal(logits(model, ids), expected_logits)
    assert torch.equal(read[0], expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected_logits)


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_alone_is_that_adapter_in_peft(folder, adapters, ids, kind):
    model = mixture(folder, adapters, kind)
    for name, path in adapters.items():
        alone = quietly(peft.PeftModel.from_pretrained, load_quantised(folder, kind), path).eval()
        with model.fixed_scalings({name: 1.0}):
            found = logits(model, ids)
        torch.testing.assert_close(found, logits(alone, ids), rtol=TOLERANCE[kind], atol=TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gate_learns_also_after_an_evaluation(folder, adapters, ids, kind, checkpointing):
    # On CPUs with bfloat16 instructions, bitsandbytes would repack its layers in the evaluation and lose gradients.
    model = mixture(folder, adapters, kind, base=load_quantised(folder, kind, repack=True))
    before = logits(model, ids)
    base_weights = {key: value.clone() for key, value in frozen_state(model).items()}
    if checkpointing:
        quietly(model.gradient_checkpointing_enable)
    model.train()
    gate = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(gate, lr=0.03), []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in gate)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert not torch.equal(logits(model.eval(), ids), before)
    assert all(torch.equal(value, base_weights[key]) for key, value in frozen_state(model).items())


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_gradients_are_those_of_the_dequantised_base(folder, adapters, ids, kind):
    base = load_quantised(folder, kind)
    plain = wide_llama()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear):
                own = base.get_submodule(name)
                # What the layer makes of the unit vectors is its weight.
                module.weight.copy_(own(torch.eye(module.in_features)).T)
    gradients = []
    for each in (base, plain):
        model = mixture(folder, adapters, kind, base=each)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_is_uncached_generation(folder, adapters, kind):
    model = mixture(folder, adapters, kind)
    ids = torch.randint(1, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("kind", [*KINDS, "nf4-double"])
def test_saved_and_loaded_on_a_freshly_quantised_base_it_is_the_same(folder, adapters, ids, kind, tmp_path):
    base = load_quantised(folder, kind, repack=True)
    model = mixture(folder, adapters, kind, base=base)
    expected = logits(model, ids)
    quietly(model.save_pretrained, tmp_path / "mixture")
    # Saving reads the state of the base's layers too, which bitsandbytes would spoil where it had repacked them.
    assert torch.equal(logits(model, ids), expected)
    again = weft.from_pretrained(tmp_path / "mixture", load_quantised(folder, kind, repack=True))
    assert torch.equal(logits(again, ids), expected)

    weights = {"math": 0.25, "code": 0.75}
    weft.fold(again, tmp_path / "folded", weights)
    folded = quietly(peft.PeftModel.from_pretrained, load_quantised(folder, kind), tmp_path / "folded").eval()
    tolerance = TOLERANCE[kind.removesuffix("-double")]
    with again.fixed_scalings(weights):
        torch.testing.assert_close(logits(again, ids), logits(folded, ids), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_a_base_that_was_repacked_already_is_unpacked(folder, adapters, ids, kind):
    base = load_quantised(folder, kind, repack=True)
    repacked = logits(base, ids)
    model = mixture(folder, adapters, kind, base=base)
    with model.disable_adapter():
        # Repacked layers compute in bfloat16.
        torch.testing.assert_close(logits(model, ids), repacked, rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(logits(model, ids), logits(load_quantised(folder, kind), ids), rtol=2e-2, atol=2e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    # Taken out again, the base is as bitsandbytes likes it.
    layer = model.base_model.unload().model.layers[0].mlp.up_proj
    fresh = load_quantised(folder, kind, repack=True).model.layers[0].mlp.up_proj
    repacks = "support_avx512bf16_for_cpu"  # since bitsandbytes 0.49
    assert getattr(layer, repacks, None) == getattr(fresh, repacks, None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_base_prepared_for_training_in_few_bits_is_taken(folder, adapters, ids, reentrant):
    base = quietly(
        peft.prepare_model_for_kbit_training,
        load_quantised(folder, "nf4"),
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    model = mixture(folder, adapters, "nf4", base=base).train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_the_layers_that_peft_refuses_are_refused_by_name_and_the_base_stays_as_it_was(folder, adapters, monkeypatch):
    def refuse(self):
        raise TypeError("TorchaoLoraLinear only supports int8 weights for now.")

    # torchao makes its int4 weights on a GPU only: peft's answer to them is put here by hand.
    monkeypatch.setattr(CLASSES["torchao-int8"], "_check_dtype_supported", refuse)
    base = load_quantised(folder, "torchao-int8")
    with pytest.raises(AdapterError, match=r"adapter 'math' .* TorchaoLoraLinear only supports int8 weights for now"):
        mixture(folder, adapters, "torchao-int8", base=base)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def test_a_base_read_from_gguf_is_an_ordinary_one(adapters, ids, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = _write_gguf(gguf, wide_llama(), tmp_path / "tiny.gguf")

    def read():
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()

    model, plain = mixture(tmp_path, adapters, None, base=read()), wide_llama()
    plain.load_state_dict(read().state_dict())
    assert type(lora_layers(model)[0]) is peft.tuners.lora.Linear
    assert torch.equal(logits(model, ids), logits(mixture(tmp_path, adapters, None, base=plain), ids))
    quietly(model.save_pretrained, tmp_path / "mixture")
    again = weft.from_pretrained(tmp_path / "mixture", read())
    assert torch.equal(logits(again, ids), logits(model, ids))


def _write_gguf(gguf, model, file):
    """A model as llama.cpp writes it, in eight bits."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, _, ending = name.rpartition(".")
        values, kind = value.numpy(), gguf.GGMLQuantizationType.Q8_0
        if value.dim() == 2:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{names.get_name(stem)}.{ending}", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{ending}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
