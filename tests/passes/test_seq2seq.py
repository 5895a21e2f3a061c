"""Encoder-decoders: every layer follows the scalings of the tokens that it sees, cached or not."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import unusual_models
import weft
from models import VOCAB, gate_options, lora, mixture_by_loop, quietly, save_adapter
from weft.errors import CacheError, ConfigError
from weft.gate.routing import keep_top_k
from weft.passes.base import Passes
from weft.passes.cache import XLoraCache

SOURCE, TARGET = 7, 5


def t5(**options):
    values = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    config = transformers.T5Config(
        vocab_size=VOCAB, decoder_start_token_id=0, initializer_factor=0.5, **values, **options
    )
    return transformers.T5ForConditionalGeneration(config)


def bart_like(name):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **sizes, **heads, **tokens)
    model = "MarianMTModel" if name == "Marian" else f"{name}ForConditionalGeneration"
    return getattr(transformers, model)(config)


_BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
# architecture -> (model maker, modules to adapt)
MODELS = {
    "t5": (t5, ["q", "k", "v", "o", "wi", "wo"]),
    "t5 gated, head and embeddings": (
        lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        ["q", "k", "v", "wi_0", "embed_tokens", "lm_head"],
    ),
    "bart": (lambda: bart_like("Bart"), _BART),
    "mbart": (lambda: bart_like("MBart"), ["k_proj", "v_proj", "fc2"]),
    "marian": (lambda: bart_like("Marian"), _BART),
}
OPTIONS = {
    "layerwise": {},
    "shared": {"layerwise_scalings": False},
    "top-k": {"top_k_lora": 2},
    "scaling pass with experts": {"scaling_pass_value": 0.4},
    "softmax over top-k": {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
}


def make_base(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    return model


def save_adapters(name, folder):
    config = {"target_modules": MODELS[name][1], "task_type": "SEQ_2_SEQ_LM"}
    return name, {
        expert: save_adapter(make_base(name), lora(r=2 + seed, **config), folder / expert, seed=seed)
        for seed, expert in enumerate(("a", "b", "c"))
    }


@pytest.fixture(scope="session", params=MODELS)
def adapters(request, tmp_path_factory):
    """(architecture, {expert: folder})"""
    return save_adapters(request.param, tmp_path_factory.mktemp("seq2seq"))


@pytest.fixture(scope="session", params=["t5", "bart"])
def two(request, tmp_path_factory):
    """The same of two architectures, for what does not depend on details."""
    return save_adapters(request.param, tmp_path_factory.mktemp("seq2seq"))


@pytest.fixture(scope="session")
def t5_adapters(tmp_path_factory):
    return save_adapters("t5", tmp_path_factory.mktemp("t5"))


def mixture(adapters, **options):
    name, paths = adapters
    base = make_base(name)
    torch.manual_seed(1)
    model = quietly(weft.from_adapters, base, paths, **gate_options(**options)).eval()
    with torch.no_grad():  # a gate that varies from token to token and from layer to layer
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.mul_(4)
    return model


def source(padded=True):
    input_ids = torch.randint(3, VOCAB, (2, SOURCE), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, -3:] = 0
        input_ids[0, -3:] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def target():
    return torch.randint(3, VOCAB, (2, TARGET), generator=torch.Generator().manual_seed(4))


def batch():
    return {**source(), "decoder_input_ids": target()}


# -------------------------------------------------------------------------------------- the definition


def follow(model, by_length):
    """Let the LoRA layers of a model without hooks follow `by_length[number of tokens in x]`, or be left out."""
    layers = [module for module in model.get_base_model().modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(layers):

        def forward(x, layer=layer, number=number):
            if by_length is None:
                return layer.base_layer(x)
            return mixture_by_loop(layer, x, by_length[x.shape[1]][:, :, number])

        layer.forward = forward


def check_definition(model, oracle, options):
    """Compare a mixture with the definition, written out with a model of the same weights that loses its hooks."""
    gate, base = model.internal_xlora_classifier, oracle.get_base_model()
    Passes.detach(base)
    value = options.get("scaling_pass_value")
    columns = len(model.xlora_config.layer_names)
    constant = {length: torch.full((2, length, columns, gate.num_experts), value or 0.0) for length in (SOURCE, TARGET)}
    follow(oracle, None if value is None else constant)
    hidden = base.get_encoder()(**source()).last_hidden_state
    mask = source()["attention_mask"]
    decoded = base.get_decoder()(input_ids=target(), encoder_hidden_states=hidden, encoder_attention_mask=mask)
    scalings = {SOURCE: gate(hidden), TARGET: gate(decoded.last_hidden_state)}
    renormalise = options.get("enable_softmax_topk", False)
    follow(oracle, {n: keep_top_k(s, options.get("top_k_lora"), renormalise=renormalise) for n, s in scalings.items()})

    torch.testing.assert_close(model(**batch()).logits, base(**batch()).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.get_latest_scalings(), scalings[TARGET], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.passes.latest_source_scalings, scalings[SOURCE], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_every_layer_follows_the_scalings_of_the_tokens_that_it_sees(adapters, options):
    check_definition(mixture(adapters, **options), mixture(adapters, **options), options)


@torch.no_grad()
def test_an_embedding_that_encoder_and_decoder_share_follows_the_one_that_runs(tmp_path):
    config = lora(target_modules=["shared", "q"], task_type="SEQ_2_SEQ_LM")
    paths = {name: save_adapter(make_base("t5"), config, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    models = [mixture(("t5", paths)) for _ in range(2)]
    for model in models:
        base = model.get_base_model()
        base.set_input_embeddings(base.shared)  # T5 has three embeddings with one weight otherwise
        assert isinstance(base.encoder.embed_tokens, LoraLayer)
    check_definition(*models, {})


@torch.no_grad()
def test_padding_of_the_source_never_changes_a_result(adapters):
    model, inputs = mixture(adapters), batch()
    alone = model(input_ids=inputs["input_ids"][:1, :-3], decoder_input_ids=target()[:1]).logits
    torch.testing.assert_close(model(**inputs).logits[:1], alone, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- cached = uncached


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_cached_logits_are_those_of_reading_the_whole_text(adapters, options):
    model, ids = mixture(adapters, **options), target()
    whole = model(**batch(), use_cache=False)
    assert whole.past_key_values is None
    scalings = model.get_latest_scalings()
    cache, logits, found = None, [], []
    for start, stop in ((0, 1), (1, 2), (2, 5)):
        output = model(**source(), decoder_input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
        found.append(model.get_latest_scalings())
    assert isinstance(cache, XLoraCache)
    assert isinstance(cache, EncoderDecoderCache)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(found, 1), scalings, rtol=1e-4, atol=1e-4)


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_generate_gives_the_same_tokens_with_and_without_a_cache(adapters, strategy, padded):
    model, texts = mixture(adapters), []
    for use_cache in ({}, {"use_cache": False}):
        torch.manual_seed(7)
        texts.append(model.generate(**source(padded), max_new_tokens=6, **strategy, **use_cache))
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(two):
    model = mixture(two)
    texts = [model.generate(**source(), max_new_tokens=6, cache_implementation=kind) for kind in ("static", "dynamic")]
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_model_of_speech(tmp_path):
    def base():
        torch.manual_seed(0)
        sizes = {"max_source_positions": 20, "max_target_positions": 32, "num_mel_bins": 8, "decoder_start_token_id": 3}
        config = {**bart_like("Bart").config.to_dict(), **sizes}
        return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config)).eval()

    config = lora(target_modules=["q_proj", "k_proj"], task_type=None)
    paths = {name: save_adapter(base(), config, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    model = quietly(weft.from_adapters, base(), paths, layerwise_scalings=True).eval()
    assert model.peft_config["default"].task_type is None  # peft's class for the task hands on input_ids
    features, ids = torch.randn(2, 8, 40), target()
    whole = model(input_features=features, decoder_input_ids=ids).logits
    first = model(input_features=features, decoder_input_ids=ids[:, :3])
    rest = model(input_features=features, decoder_input_ids=ids[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_adapted_head_that_sees_few_tokens_follows_those(tmp_path):
    def base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 4}
        part = {"vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
        decoder = {**part, "cross_attention_hidden_size": 32}
        options = {"vocab_size": VOCAB, "tie_word_embeddings": False, "initializer_range": 0.3}
        config = transformers.T5GemmaConfig(encoder=part, decoder=decoder, **options)
        return transformers.T5GemmaForConditionalGeneration(config).eval()

    config = lora(target_modules=["q_proj", "k_proj", "out_proj"], task_type=None)
    paths = {name: save_adapter(base(), config, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    model = quietly(weft.from_adapters, base(), paths, layerwise_scalings=True).eval()
    whole = model(**batch(), use_cache=False).logits
    assert whole.std() > 0.1
    torch.testing.assert_close(model(**batch(), logits_to_keep=2).logits, whole[:, -2:], rtol=1e-4, atol=1e-4)
    first = model(**source(), decoder_input_ids=target()[:, :3])
    rest = model(**source(), decoder_input_ids=target()[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_generation_equals_a_loop_over_whole_forwards(adapters):
    model = mixture(adapters)
    found = model.generate(**source(), max_new_tokens=4, do_sample=False)
    expected = found[:, :1]
    for _ in range(4):
        logits = model(**source(), decoder_input_ids=expected).logits[:, -1:]
        expected = torch.cat([expected, logits.argmax(-1)], dim=1)
    assert torch.equal(found, expected)


@torch.no_grad()
def filled(model):
    return model(**batch(), use_cache=True).past_key_values


@torch.no_grad()
def next_logits(model, cache, rows=slice(None), token=3):
    inputs = {name: value[rows] for name, value in source().items()}
    ids = torch.full((len(inputs["input_ids"]), 1), token)
    return model(**inputs, decoder_input_ids=ids, past_key_values=cache).logits


def test_both_passes_have_keys_and_values_of_their_own(two):
    cache = filled(mixture(two))
    for part in ("self_attention_cache", "cross_attention_cache"):
        ours, scaling = getattr(cache, part), getattr(cache.scaling, part)
        assert ours.get_seq_length() == scaling.get_seq_length() == (SOURCE if "cross" in part else TARGET)
        assert not torch.allclose(ours.layers[1].keys, scaling.layers[1].keys)
    assert all(cache.is_updated.values())
    assert all(cache.scaling.is_updated.values())


def test_repeat_select_reorder_and_crop_act_on_both(two):
    model = mixture(two)
    expected = next_logits(model, filled(model))
    cache = filled(model)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.reorder_cache(torch.tensor([1, 0]))
    next_logits(model, cache, rows=[1, 0], token=9)
    cache.crop(-1)
    torch.testing.assert_close(next_logits(model, cache, rows=[1, 0]), expected.flip(0), rtol=1e-4, atol=1e-5)


def test_reset_empties_both(two):
    model = mixture(two)
    expected, cache = filled(model), filled(model)
    cache.reset()
    assert not any({**cache.is_updated, **cache.scaling.is_updated}.values())
    with torch.no_grad():
        model(**batch(), past_key_values=cache)
    torch.testing.assert_close(next_logits(model, cache), next_logits(model, expected))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_a_copied_cache_goes_on_alone(t5_adapters, copied):
    model = mixture(t5_adapters)
    cache = filled(model)
    twin = copied(cache)
    assert type(twin) is type(cache)
    torch.testing.assert_close(next_logits(model, twin), next_logits(model, cache))


def test_an_empty_cache_of_the_user_is_filled_by_generate(two):
    model = mixture(two)
    cache = EncoderDecoderCache(DynamicCache(config=model.get_decoder().config), DynamicCache())
    texts = [model.generate(**source(), max_new_tokens=5, **given) for given in ({}, {"past_key_values": cache})]
    assert torch.equal(*texts)
    assert isinstance(cache, XLoraCache)
    assert cache.get_seq_length() == cache.scaling.get_seq_length() == 5


def test_a_cache_that_cannot_be_gone_on_with_is_refused(t5_adapters):
    model = mixture(t5_adapters)
    with pytest.raises(
        CacheError, match=r"\(DynamicCache\) must be an EncoderDecoderCache.*\(EncoderDecoderCache\(Dyn"
    ):
        next_logits(model, DynamicCache(config=model.config))
    with torch.no_grad():
        plain = make_base("t5")(**batch(), use_cache=True).past_key_values
    with pytest.raises(CacheError, match=r"with 5 tokens\) was not filled by this.*cache \(EncoderDecoderCache\("):
        next_logits(model, plain)
    plain.crop(-TARGET)
    with pytest.raises(CacheError, match=r"with 7 tokens\) was not filled by this"):  # in its cross-attention
        next_logits(model, plain)
    cache = filled(model)
    with model.disable_adapter():
        next_logits(model, cache)
    with pytest.raises(CacheError, match="lacks the scaling pass of some tokens"):
        next_logits(model, cache)


# -------------------------------------------------------------------------------------- the encoder's own call


@torch.no_grad()
def test_an_encoder_output_serves_forward_and_generate(adapters):
    model, inputs = mixture(adapters), batch()
    expected = model(**inputs).logits
    encoded = model.get_encoder()(**source())
    mask = inputs["attention_mask"]
    found = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=target()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for strategy in STRATEGIES.values():
        torch.manual_seed(7)
        texts = model.generate(**source(), max_new_tokens=5, **strategy)
        torch.manual_seed(7)
        # A copy, as transformers repeats the rows for beams in place.
        again = model.generate(
            encoder_outputs=copy.deepcopy(encoded), attention_mask=mask, max_new_tokens=5, **strategy
        )
        assert torch.equal(again, texts)


@torch.no_grad()
def test_the_encoders_own_call_leaves_nothing_behind(two):
    model = mixture(two)
    model.get_encoder()(**source())
    assert model.carrier.routing is None
    with model.fixed_scalings({"a": 1.0}):
        model.get_encoder()(**source())
        assert model.carrier.routing is None
    with pytest.raises(ValueError, match=r"(exactly one of|either) input_ids or inputs_embeds"):
        model.get_encoder()()
    assert model.carrier.routing is None
    assert not model.carrier.in_scaling_pass


@torch.no_grad()
def test_an_encoder_output_that_the_gate_cannot_read_is_refused(two):
    model = mixture(two)
    expected = (
        r"encoder_outputs \(BaseModelOutput\w*\) must have scaling_pass_hidden_state, .* get_encoder\(\) returned"
    )
    hidden = model.get_encoder()(**source())[0]
    with pytest.raises(ValueError, match=expected):
        model(encoder_outputs=BaseModelOutput(hidden), decoder_input_ids=target())
    with pytest.raises(ValueError, match=r"encoder_outputs \(tuple\) must have"):
        model(encoder_outputs=(hidden,), decoder_input_ids=target())
    with model.disable_adapter():
        off = model.get_encoder()(**source())
        model(encoder_outputs=off, decoder_input_ids=target())
    with pytest.raises(ValueError, match=expected):
        model.generate(encoder_outputs=off, max_new_tokens=2)
    with model.fixed_scalings({"a": 1.0}):
        fixed = model.get_encoder()(**source())
        model(encoder_outputs=fixed, decoder_input_ids=target())
    with pytest.raises(ValueError, match=expected):
        model(encoder_outputs=fixed, decoder_input_ids=target())


@torch.no_grad()
def test_a_decoder_called_by_itself_is_refused(two):
    model = mixture(two)
    hidden = model.get_encoder()(**source())[0]
    with pytest.raises(RuntimeError, match=r"the decoder \(\w+\) was called by itself"):
        model.get_decoder()(input_ids=target(), encoder_hidden_states=hidden)
    with model.disable_adapter():
        model.get_decoder()(input_ids=target(), encoder_hidden_states=hidden)


@torch.no_grad()
def test_outputs_that_a_caller_asks_for_are_those_of_the_adapted_pass(two):
    model = mixture(two)
    output = model(**batch(), output_hidden_states=True)
    plain = model(**batch())
    assert torch.equal(output.logits, plain.logits)
    assert torch.equal(output.encoder_hidden_states[-1], plain.encoder_last_hidden_state)
    assert len(output.decoder_hidden_states) == 3
    as_tuple = model(**batch(), return_dict=False)
    assert torch.equal(as_tuple[0], plain.logits)


# -------------------------------------------------------------------------------------- training


def gate_gradients(model, **inputs):
    model.zero_grad()
    model(**{**source(), "labels": target(), **inputs}).loss.backward()
    return [parameter.grad.clone() for parameter in model.internal_xlora_classifier.parameters()]


def test_gradients_of_the_gate_are_finite_differences(two):
    model = mixture(two).double()
    weight = model.internal_xlora_classifier.layers[-1].weight
    gradient = gate_gradients(model)[-2]
    names = model.xlora_config.layer_names
    step = 1e-3  # T5 normalises in float32, also in a float64 model
    keys = next(number for number, name in enumerate(names) if "EncDecAttention.k" in name or "encoder_attn.k" in name)
    for layer in (0, keys, len(names) - 1):
        for expert in range(3):
            row = layer * 3 + expert
            column = int(gradient[row].abs().argmax())
            losses = []
            with torch.no_grad():
                for change in (step, -2 * step):
                    weight[row, column] += change
                    losses.append(model(**source(), labels=target()).loss)
                weight[row, column] += step
            assert gradient[row, column] != 0
            torch.testing.assert_close(
                gradient[row, column], (losses[0] - losses[1]) / (2 * step), rtol=1e-3, atol=5e-5
            )


def test_labels_give_the_loss_of_their_shifted_tokens(two):
    model = mixture(two)
    with torch.no_grad():
        output = model(**source(), labels=target())
        shifted = model.get_base_model().prepare_decoder_input_ids_from_labels(target())
        logits = model(**source(), decoder_input_ids=shifted).logits
    assert output.past_key_values is None
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target().flatten())
    torch.testing.assert_close(output.loss, loss)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(two, reentrant):
    model = mixture(two, use_trainable_adapters=True, xlora_dropout_p=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    model.train()
    expected = gate_gradients(model)
    experts = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    quietly(model.gradient_checkpointing_enable, {"use_reentrant": reentrant})
    found = gate_gradients(model)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in experts:
            torch.testing.assert_close(parameter.grad, experts[name], rtol=1e-4, atol=1e-6)


def test_a_seq2seq_trainer_lowers_the_loss_and_the_mixture_comes_back_as_saved(two, tmp_path):
    model = mixture(two, use_trainable_adapters=True)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(source()["input_ids"], target(), strict=True)]
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        learning_rate=0.01,
        max_steps=5,
        predict_with_generate=True,
        generation_max_length=4,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    trainer = transformers.Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = quietly(trainer.evaluate)["eval_loss"]
    quietly(trainer.train)
    assert quietly(trainer.evaluate)["eval_loss"] < before
    predicted = torch.as_tensor(quietly(trainer.predict, rows).predictions)
    model.save_pretrained(tmp_path / "mixture")
    loaded = quietly(weft.from_pretrained, tmp_path / "mixture", make_base(two[0]))
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model.eval()(**batch()).logits)
        assert torch.equal(loaded.generate(input_ids=source()["input_ids"], max_length=4), predicted[:, :4])


# -------------------------------------------------------------------------------------- on, off, out and back


@torch.no_grad()
def test_one_expert_with_all_the_weight_is_that_adapter_alone(adapters):
    name, paths = adapters
    model = mixture(adapters)
    for expert, path in paths.items():
        alone = quietly(peft.PeftModel.from_pretrained, make_base(name), path).eval()
        with model.fixed_scalings({expert: 1.0}):
            torch.testing.assert_close(model(**batch()).logits, alone(**batch()).logits, rtol=1e-5, atol=1e-5)
            texts = [one.generate(**source(), max_new_tokens=5, num_beams=2) for one in (model, alone)]
            assert torch.equal(*texts)


@torch.no_grad()
def test_disabled_is_exactly_the_base_model_and_unload_gives_it_back(adapters):
    model, base = mixture(adapters), make_base(adapters[0])
    expected = base(**batch()).logits
    text = base.generate(**source(), max_new_tokens=5)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, expected)
        assert torch.equal(model.generate(**source(), max_new_tokens=5), text)
    assert not torch.allclose(model(**batch()).logits, expected)
    unloaded = model.base_model.unload()
    assert torch.equal(unloaded(**batch()).logits, expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unloaded.modules())
    assert [p.requires_grad for p in unloaded.parameters()] == [p.requires_grad for p in base.parameters()]


@torch.no_grad()
def test_saved_and_loaded_is_as_before_also_with_the_base_by_name(two, tmp_path):
    name, paths = two
    make_base(name).save_pretrained(tmp_path / "base")
    model = quietly(weft.from_adapters, str(tmp_path / "base"), paths, layerwise_scalings=True).eval()
    assert isinstance(model, peft.PeftModelForSeq2SeqLM)
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture")
    assert isinstance(loaded, peft.PeftModelForSeq2SeqLM)
    assert torch.equal(loaded(**batch()).logits, expected)


@torch.no_grad()
def test_a_folded_mixture_is_the_constant_one(two, tmp_path):
    model, weights = mixture(two), {"a": 0.5, "b": 0.25}
    weft.fold(model, tmp_path / "folded", weights)
    folded = quietly(peft.PeftModel.from_pretrained, make_base(two[0]), tmp_path / "folded").eval()
    with model.fixed_scalings(weights):
        torch.testing.assert_close(model(**batch()).logits, folded(**batch()).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_copied_model_goes_on_alone(two):
    model = mixture(two)
    expected = model(**batch()).logits
    twin = copy.deepcopy(model)
    for parameter in model.internal_xlora_classifier.parameters():
        parameter.zero_()
    assert torch.equal(twin(**batch()).logits, expected)
    assert twin.passes.latest_source_scalings is not None
    assert not torch.equal(model(**batch()).logits, expected)


# -------------------------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize("option", ["gate_layer", "scaling_pass_layers"])
def test_shorter_passes_are_refused(t5_adapters, option):
    base = make_base("t5")
    expected = rf"{option} \(1\) must be None for an encoder-decoder \(T5ForConditionalGeneration\): leave it out"
    with pytest.raises(ConfigError, match=expected):
        weft.from_adapters(base, t5_adapters[1], **{option: 1})
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def test_a_layer_of_which_it_cannot_be_told_what_it_sees_is_refused(tmp_path):
    def foreign():
        base = make_base("t5")
        for block in base.decoder.block:
            attention = block.layer[1]._modules
            attention["looks_across"] = attention.pop("EncDecAttention")
        return base

    path = save_adapter(foreign(), lora(target_modules=["q"]), tmp_path / "a", seed=0)
    with pytest.raises(ConfigError, match=r"\(T5ForConditionalGeneration\) has no cross-attention .*'EncDecAttention'"):
        weft.from_adapters(foreign(), {"a": path, "b": path})

    def fused():
        base = make_base("t5")
        for block in base.decoder.block:
            block.layer[1].EncDecAttention.kv = torch.nn.Linear(32, 64)
        return base

    path = save_adapter(fused(), lora(target_modules=["kv"]), tmp_path / "b", seed=0)
    with pytest.raises(ConfigError, match=r"layer 'decoder.block.0.layer.1.EncDecAttention.kv' is adapted, of which"):
        weft.from_adapters(fused(), {"a": path, "b": path})


def test_a_head_that_is_no_lm_head_is_refused(tmp_path):
    def base():
        torch.manual_seed(0)
        config = bart_like("Bart").config
        return transformers.BartForSequenceClassification(config).eval()

    path = save_adapter(base(), lora(target_modules=["dense", "q_proj"], task_type=None), tmp_path / "a", seed=0)
    with pytest.raises(
        ConfigError, match=r"'classification_head.dense' is adapted, .* whether it sees source or target"
    ):
        quietly(weft.from_adapters, base(), {"a": path, "b": path})


def test_a_decoder_without_a_last_hidden_state_is_refused(t5_adapters, monkeypatch):
    model = mixture(t5_adapters)
    decoder = model.get_base_model().get_decoder()
    monkeypatch.setattr(decoder, "forward", lambda input_ids=None, past_key_values=None, **others: None)
    with pytest.raises(ValueError, match=r"base model's T5Stack gives no last_hidden_state .* like T5 or BART"):
        model(**batch())


def test_the_mean_of_a_gate_that_reads_two_texts_is_refused(t5_adapters):
    with pytest.raises(ConfigError, match=r"\(T5ForConditionalGeneration\) is an encoder-decoder, whose layers do not"):
        weft.mean_scalings(mixture(t5_adapters), [[3, 4, 5]])


# -------------------------------------------------------------------------------------- what needs one text only


def test_streaming_and_freezing_are_refused(t5_adapters):
    model = mixture(t5_adapters)
    with pytest.raises(ConfigError, match=r"model \(T5ForConditionalGeneration\) is an encoder-decoder"):
        weft.stream(model, torch.ones(1, 3).long())
    with pytest.raises(ConfigError, match=r"freeze_scalings_after \(2\) is not supported with an encoder-decoder"):
        model.generate(input_ids=torch.ones(1, 3).long(), freeze_scalings_after=2)


@pytest.mark.parametrize(
    ("make", "inputs", "targets"),
    [
        (
            unusual_models.vision_encoder_decoder,
            lambda: {"pixel_values": torch.randn(2, 3, 8, 8)},
            ["c_attn", "q_attn", "c_fc", "q_proj", "fc1"],
        ),
        (
            unusual_models.encoder_decoder,
            lambda: {"input_ids": torch.randint(3, VOCAB, (2, 6))},
            ["query", "key", "value", "intermediate.dense"],
        ),
    ],
    ids=["images to text", "joined language models"],
)
def test_encoders_and_decoders_that_were_joined_work_end_to_end(make, inputs, targets, tmp_path):
    paths = {
        name: save_adapter(make(), lora(task_type=None, target_modules=targets), tmp_path / name, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }
    model, inputs = quietly(weft.from_adapters, make(), paths, layerwise_scalings=True).eval(), inputs()
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    ids = torch.randint(3, VOCAB, (2, 5))
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=ids).logits
        shorter = model(**inputs, decoder_input_ids=ids[:, :3]).logits
        torch.testing.assert_close(shorter, whole[:, :3], rtol=1e-4, atol=1e-4)  # no token sees a later one
        for name, path in paths.items():
            alone = quietly(peft.PeftModel.from_pretrained, make(), path)
            with model.fixed_scalings({name: 1.0}):
                expected = alone(**inputs, decoder_input_ids=ids).logits
                torch.testing.assert_close(
                    model(**inputs, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4
                )
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        cached = quietly(model.generate, **inputs, **options)
        assert torch.equal(cached, quietly(model.generate, **inputs, **options, use_cache=False))


def test_an_encoder_and_a_decoder_of_different_widths_are_refused(tmp_path):
    def make():
        return unusual_models.vision_encoder_decoder(width=16)

    path = save_adapter(make(), lora(task_type=None, target_modules=["c_fc"]), tmp_path / "a", seed=1)
    with pytest.raises(ConfigError, match="has an encoder of width 16 and a decoder of width 32: expected one width"):
        weft.from_adapters(make(), {"a": path})
