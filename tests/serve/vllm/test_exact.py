"""vLLM with a mixture in it writes what weft's own `generate` writes: the same tokens, the same probabilities."""

import pytest
import torch
import transformers

import weft
from engines import (
    PROJECTIONS,
    assert_same,
    chosen,
    engine,
    generated,
    log_probs,
    prompts,
    served,
    served_log_probs,
    sharpen,
)
from models import lora, save_adapter, tiny_tokenizer
from weft.serve.requests import Choice

pytestmark = pytest.mark.serve

pytest_plugins = ["engines"]

# The gate with a LoRA of its own in the scaling pass.
OWN_LORA = {"scaling_pass_layers": 2, "scaling_pass_rank": 3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling_pass_layers": 1},
        OWN_LORA,
        {"gate_layer": 1},
        {"layerwise_scalings": False, "softmax_temperature": 0.7, "global_scaling_weight": 1.5},
        {"gate_layer": 1, "layerwise_scalings": False},
        {"top_k_lora": 1},
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
        {"xlora_depth": 2, "xlora_size": 16},
        {"scaling_pass_value": 0.3},
        {"enable_softmax": False},
    ],
    ids=str,
)
def test_every_scheme_and_option_alone_and_in_a_batch(options, base, make_mixture):
    folder, model = make_mixture(**options)
    expected = generated(model, prompts())
    with engine(base, folder) as llm:
        assert_same(served(llm, prompts()), expected)
        assert_same(served(llm, prompts()[2:3]), expected[2:3])


@pytest.mark.parametrize("options", [{}, OWN_LORA, {"gate_layer": 1}], ids=str)
def test_chunked_prefill_prefix_caching_and_preemption_change_nothing(options, base, make_mixture, preempted):
    folder, model = make_mixture(**options)
    common = prompts((64,))[0]
    texts = [common + more for more in prompts((26, 27, 28, 30))] + prompts((70, 3))
    expected = generated(model, texts)
    # Steps of 32 tokens; a cache of so few blocks that texts, which come to need one more, are put off and read again.
    small = {"max_num_batched_tokens": 32, "enable_prefix_caching": True, "num_gpu_blocks_override": 10}
    with engine(base, folder, **small) as llm:
        assert_same(served(llm, texts), expected)
        assert_same(served(llm, texts), expected)  # from the cache of prefixes
    assert preempted


@pytest.mark.parametrize("options", [{}, {"scaling_pass_layers": 1}, OWN_LORA, {"gate_layer": 1}], ids=str)
def test_compiled_which_is_vllms_default_it_is_the_same(options, base, make_mixture):
    folder, model = make_mixture(**options)
    expected = generated(model, prompts())
    with engine(base, folder, enforce_eager=False) as llm:
        assert_same(served(llm, prompts()), expected)
        assert_same(served(llm, prompts()[2:3]), expected[2:3])


@pytest.mark.parametrize("eager", [True, False])
def test_half_precision_rounds_and_no_more(eager, base, make_mixture):
    """The products of the experts are others there: see `Product`."""
    folder, model = make_mixture(gate_layer=1)
    with torch.no_grad():  # less sharp, or rounding turns the gate
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.mul_(0.2)
    model.save_pretrained(folder)
    right = log_probs(model, prompts())
    with model.disable_adapter():
        without = log_probs(model, prompts())
    with engine(base, folder, dtype="bfloat16", enforce_eager=eager) as llm:
        found = served_log_probs(llm, prompts())
    assert (found - right).abs().mean() < (without - right).abs().mean() / 10


def test_two_processes_with_a_part_of_each_layer_change_nothing(base, make_mixture, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder, model = make_mixture(**OWN_LORA)
    choices = [Choice(), Choice(alone="math"), Choice(weights=(0.5, 0.0, -0.3)), Choice(top_k=1)]
    expected = [chosen(model, folder, *each) for each in zip(choices, prompts(), strict=True)]
    with engine(base, folder, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert_same(served(llm, prompts(), choices), expected)


@pytest.mark.parametrize("changed", ["gate", "expert"])
def test_gate_and_experts_matter_to_these_tokens(changed, make_mixture):
    _, model = make_mixture()
    expected = generated(model, prompts())
    with torch.no_grad():
        if changed == "gate":
            model.internal_xlora_classifier.layers[-1].weight.mul_(-1)
        else:
            next(p for name, p in model.named_parameters() if "lora_B.law" in name).mul_(-1)
    assert [tokens for tokens, _ in generated(model, prompts())] != [tokens for tokens, _ in expected]


H = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
WINDOW = {"head_dim": 32, "sliding_window": 16}
BASES = {
    "Mistral": (WINDOW, PROJECTIONS),
    "Qwen2": ({}, PROJECTIONS),
    "Qwen3": ({"head_dim": 32}, PROJECTIONS),
    "Gemma2": ({**WINDOW, "query_pre_attn_scalar": 32}, PROJECTIONS),
    "Gemma3": ({**WINDOW, "query_pre_attn_scalar": 32}, PROJECTIONS),
    "Phi3": ({}, FUSED),
    "OPT": ({"ffn_dim": 96, "word_embed_proj_dim": 128}, ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    "GPT2": ({"n_positions": 512}, ["c_attn", "c_proj", "c_fc"]),
    "Qwen3Moe": (
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
}


def other_base(name):
    """A model of another family, with weights so large that its tokens differ."""
    options, _ = BASES[name]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    # Eager: some versions of transformers leave soft-capped attention scores as they are elsewhere.
    model = transformers.AutoModelForCausalLM.from_config(
        config(**{**H, **options}), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("options", [{}, {"scaling_pass_layers": 1}, {"gate_layer": 1}], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_bases_through_vllms_own_classes(name, options, tmp_path):
    other_base(name).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    targets = BASES[name][1]
    adapters = {
        expert: save_adapter(
            other_base(name),
            lora(r=rank, target_modules=targets, fan_in_fan_out=name == "GPT2"),
            tmp_path / expert,
            rank,
        )
        for expert, rank in (("code", 4), ("law", 5))
    }
    model = sharpen(weft.from_adapters(other_base(name), adapters, **options)).eval()
    model.save_pretrained(tmp_path / "mixture")
    texts = prompts((5, 40, 23))
    expected = generated(model, texts)
    with engine(tmp_path / "base", tmp_path / "mixture") as llm:
        assert_same(served(llm, texts), expected)


def test_the_scaling_pass_takes_no_memory_and_is_nowhere_without_any(base, make_mixture):
    with engine(base, make_mixture()[0]) as llm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        backbone, scaling = model.weft_passes[0].backbones
        own = {id(tensor) for part in backbone.modules() for tensor in (*part.parameters(), *part.buffers())}
        for part in scaling.modules():
            for tensor in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    assert not tensor.is_meta
            for tensor in part._parameters.values():
                assert tensor is None or id(tensor) in own
