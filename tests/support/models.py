"""Tiny random models of many architectures, their adapters, and the formula written as a plain loop."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import weft

VOCAB = 96


def lora(**options):
    """A LoraConfig for a tiny causal model."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**values, **options})


def is_expert(name):
    """Whether a parameter of this name is a LoRA factor or a magnitude."""
    return any(part in name for part in ("lora_A.", "lora_B.", "lora_embedding_", "lora_magnitude_vector"))


def randomise(module, seed):
    """Fill every LoRA parameter with noise, so that experts do something and differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_expert(name):
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                # A magnitude is as large as the weights are.
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)


# So that chunks of a prompt have none to go into.
GENERATE_MAKES_NO_CACHE = transformers.__version__.startswith("5.0.")


def quietly(function, *args, **kwargs):
    """Call peft where it warns of what these tests do on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def save_adapter(base, config, folder, seed):
    """An ordinary peft adapter folder with random weights."""
    model = quietly(peft.get_peft_model, base, config)
    randomise(model, seed)
    quietly(model.save_pretrained, str(folder))
    return str(folder)


def tiny_llama(vocab_size=VOCAB, **options):
    torch.manual_seed(0)
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**values, **options})).eval()
    model.generation_config.pad_token_id = 0
    return model


def _common(**options):
    return {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **options}


def _decoder(name, **options):
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


# architecture -> (model maker, modules to adapt)
ARCHITECTURES = {
    "llama": (tiny_llama, ["q_proj", "v_proj", "up_proj"]),
    "mistral": (
        lambda: _decoder("Mistral", **_common(intermediate_size=48, num_key_value_heads=2, sliding_window=4)),
        ["q_proj", "down_proj"],
    ),
    "qwen2": (
        lambda: _decoder("Qwen2", **_common(intermediate_size=48, num_key_value_heads=2)),
        ["q_proj", "o_proj", "gate_proj"],
    ),
    "gemma3": (
        lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                **_common(intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=4)
            )
        ),
        ["embed_tokens", "q_proj", "v_proj"],
    ),
    "opt": (
        lambda: _decoder("OPT", **_common(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)),
        ["q_proj", "out_proj"],
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        ["c_attn", "c_fc"],
    ),
    "gpt_neox": (
        lambda: _decoder("GPTNeoX", **_common(intermediate_size=48, max_position_embeddings=64)),
        ["query_key_value", "dense_h_to_4h"],
    ),
    "bloom": (
        lambda: _decoder("Bloom", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        ["query_key_value", "dense_4h_to_h"],
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(**_common(intermediate_size=48, max_position_embeddings=64))
        ),
        ["query", "value", "intermediate.dense"],
    ),
}


def make_architecture(name):
    torch.manual_seed(0)
    maker, targets = ARCHITECTURES[name]
    model = maker().eval()
    if model.can_generate():
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    return model, targets


def gate_options(**options):
    return {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16, **options}


def weft_model(architecture, **options):
    name, paths = architecture
    base, _ = make_architecture(name)
    torch.manual_seed(1)
    return quietly(weft.from_adapters, base, paths, **gate_options(**options)).eval()


def peft_model(architecture, monkeypatch, **options):
    """peft's own X-LoRA. Its adapter loader expects a backbone called `model`, so peft's ordinary one does that."""

    def load(lora_model, adapter_name, model_id, **kwargs):
        lora_model.peft_config[adapter_name] = peft.LoraConfig.from_pretrained(model_id)
        lora_model.peft_config[adapter_name].inference_mode = False
        lora_model.inject_adapter(lora_model.model, adapter_name)
        weights = peft.utils.save_and_load.load_peft_weights(model_id)
        weights = {key.removeprefix("base_model.model."): weight for key, weight in weights.items()}
        result = peft.set_peft_model_state_dict(lora_model.model, weights, adapter_name)
        assert not result.unexpected_keys

    monkeypatch.setattr(peft.tuners.xlora.model, "_load_adapter_into_lora_model", load)
    name, paths = architecture
    base, _ = make_architecture(name)
    base.config.use_cache = False
    task = "CAUSAL_LM" if base.can_generate() else None
    config = peft.XLoraConfig(task_type=task, hidden_size=32, adapters=paths, **gate_options(**options))
    return quietly(peft.get_peft_model, base, config).eval()


def tiny_tokenizer():
    """A byte-level tokenizer trained on nothing, with a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    fast.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    return fast


def mixture_by_loop(target, x, scalings, *, global_weight=1.0):
    """The formula as it stands, one expert after the other; `scalings` is [batch, seq, expert] or None.

    Args:
        target: peft's LoRA layer (linear or embedding).
    """
    embedding = isinstance(target, peft.tuners.lora.Embedding)
    result = target.base_layer(x)
    previous = result.dtype if embedding else x.dtype
    for column, name in enumerate(target.active_adapters):
        weight = 1 if scalings is None else scalings[:, :, column, None]
        outer = target.scaling.get(name, 0) * (1 if scalings is None else global_weight)
        if embedding:
            if name not in target.lora_embedding_A:
                continue
            looked_up = nn.functional.embedding(x, target.lora_embedding_A[name].T)
            delta = (looked_up * weight) @ target.lora_embedding_B[name].T * outer
            scale = getattr(target.base_layer, "embed_scale", None)
            delta = delta if scale is None else delta * scale
        else:
            if name not in target.lora_A:
                continue
            down, up = target.lora_A[name], target.lora_B[name]
            cast = x.to(down.weight.dtype)
            scaled = cast if scalings is None else cast * weight.to(cast.dtype)
            delta = up(down(target.lora_dropout[name](scaled))) * outer
        result = result + delta
    return result.to(previous)


def folder_files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def tensors_of(folder):
    return {file: load_file(Path(folder, file)) for file in folder_files(folder) if file.endswith(".safetensors")}


def assert_same_mixture(one, other):
    assert [file for file in folder_files(one) if not file.startswith("checkpoints")] == [
        file for file in folder_files(other) if not file.startswith("checkpoints")
    ]
    expected, found = weft.from_pretrained(one).state_dict(), weft.from_pretrained(other).state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=0, msg=key)
    assert_same_tensors(one, other)


def assert_same_tensors(one, other):
    expected, found = tensors_of(one), tensors_of(other)
    assert expected.keys() <= found.keys()
    for file, values in expected.items():
        torch.testing.assert_close(
            found[file], values, atol=1e-4, rtol=0, msg=lambda text, file=file: f"{file}: {text}"
        )


def let_the_gate_decide(folder):
    """Give the gate of a saved mixture weights that differ from token to token."""
    model = weft.from_pretrained(folder, is_trainable=True)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)


def adapters_of(name, folder):
    """(name, {expert: adapter folder}) with a rank of its own for each expert."""
    paths = {}
    for i in range(3):
        base, targets = make_architecture(name)
        task = "CAUSAL_LM" if base.can_generate() else None
        config = lora(r=2 + i, target_modules=targets, task_type=task)
        paths[str(i)] = save_adapter(base, config, folder / str(i), seed=i)
    return name, paths
