"""The gate's losses: as functions, and in the loss of a call."""

import math

import pytest
import torch
import transformers

import weft
from models import VOCAB, is_expert, lora, make_architecture, quietly, save_adapter, tiny_llama
from weft.errors import ConfigError, DataError
from weft.gate.losses import balance_loss, entropy_loss, expert_label_loss

ALL = {"balance_loss_weight": 0.3, "entropy_loss_weight": -0.2, "expert_label_loss_weight": 0.5}


def random_shares(*shape):
    return torch.randn(*shape, dtype=torch.float64).softmax(-1).requires_grad_()


def mixture(adapters, **options):
    torch.manual_seed(1)
    return weft.from_adapters(tiny_llama(), adapters, layerwise_scalings=True, **options).train()


def batch(rows=2, length=7, seed=3):
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "expert_labels": torch.arange(rows) % 3}


def gate_gradients(model):
    return [parameter.grad.clone() for parameter in model.internal_xlora_classifier.parameters()]


def added(model, shares, labels, padding=None):
    """The weighted sum that the config asks for, written out."""
    config = model.xlora_config
    return (
        config.balance_loss_weight * balance_loss(shares, padding, top_k=config.top_k_lora)
        + config.entropy_loss_weight * entropy_loss(shares, padding)
        + config.expert_label_loss_weight * expert_label_loss(shares, labels, padding)
    )


# -------------------------------------------------------------------------------------- the functions


def test_balance_is_one_where_all_experts_are_used_alike_and_n_where_one_has_everything():
    one = torch.nn.functional.one_hot(torch.tensor([[2, 2], [2, 2]]), 4).float()[:, :, None].expand(2, 2, 3, 4)
    assert balance_loss(torch.full((2, 5, 3, 4), 0.25)) == pytest.approx(1)
    assert balance_loss(one) == pytest.approx(4)
    assert balance_loss(one, top_k=1) == pytest.approx(4)
    each = torch.eye(4)[None, :, None].expand(2, 4, 3, 4)  # sharp, but balanced
    assert balance_loss(each) == pytest.approx(1)
    assert balance_loss(each, top_k=1) == pytest.approx(1)


def test_balance_with_top_k_is_the_switch_transformers_loss():
    shares = random_shares(2, 5, 1, 4)
    tokens = shares[:, :, 0].flatten(0, 1)
    fraction = torch.stack([(tokens.argmax(-1) == e).double().mean() for e in range(4)])
    expected = 4 * (fraction * tokens.mean(0)).sum()
    torch.testing.assert_close(balance_loss(shares, top_k=1), expected)
    torch.testing.assert_close(balance_loss(shares, top_k=4), 4 * tokens.mean(0).square().sum())


def test_entropy_is_between_none_and_one():
    assert entropy_loss(torch.full((1, 2, 3, 4), 0.25)) == pytest.approx(1)
    assert entropy_loss(torch.eye(4)[None, :, None]) == 0
    assert entropy_loss(torch.ones(1, 2, 3, 1)) == 0
    half = torch.tensor([0.5, 0.5, 0, 0]).expand(1, 2, 3, 4)
    assert entropy_loss(half) == pytest.approx(math.log(2) / math.log(4))


def test_labels_are_a_cross_entropy_over_labelled_tokens():
    shares = random_shares(3, 2, 1, 4)
    labels = torch.tensor([1, -100, 3])
    logs = shares[:, :, 0].log()
    expected = -(logs[0, :, 1].sum() + logs[2, :, 3].sum()) / 4
    torch.testing.assert_close(expert_label_loss(shares, labels), expected)
    torch.testing.assert_close(expert_label_loss(shares, labels[:, None].expand(3, 2)), expected)
    assert expert_label_loss(shares, torch.full((3,), -100)) == 0


def test_labels_of_another_shape_are_an_error():
    with pytest.raises(DataError, match=r"expert_labels has shape \[2\], expected \[3\].*or \[3, 2\], one for each"):
        expert_label_loss(random_shares(3, 2, 1, 4), torch.tensor([0, 1]))


LOSSES = {
    "balance": balance_loss,
    "balance, top-k": lambda shares, padding=None: balance_loss(shares, padding, top_k=2),
    "entropy": entropy_loss,
    "labels": lambda shares, padding=None: expert_label_loss(shares, torch.tensor([2, 0]), padding),
}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_never_counts(name):
    shares = random_shares(2, 6, 3, 4)
    padding = torch.ones(2, 9)  # also of three cached tokens
    padding[:, :5] = 0
    torch.testing.assert_close(LOSSES[name](shares, padding), LOSSES[name](shares[:, 2:]))
    assert LOSSES[name](shares, torch.zeros(2, 6)) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences_and_are_finite_at_zero(name):
    logits = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x.softmax(-1)), logits)
    extreme = torch.tensor([0.0, -1e4, 1e4, 0.0]).expand(2, 3, 2, 4).clone().requires_grad_()
    LOSSES[name](extreme.softmax(-1)).backward()
    assert extreme.grad.isfinite().all()


def test_entropys_sign_makes_the_gate_sharper_or_softer():
    for weight, sharper in ((1.0, True), (-1.0, False)):
        logits = torch.randn(1, 4, 1, 3, requires_grad=True)
        before = entropy_loss(logits.softmax(-1))
        (weight * before).backward()
        after = entropy_loss((logits - logits.grad).softmax(-1))
        assert (after < before) == sharper


# -------------------------------------------------------------------------------------- in a call


@pytest.mark.parametrize(
    "options", [{}, {"top_k_lora": 2}, {"gate_layer": 1}, {"scaling_pass_layers": 1}, {"layerwise_scalings": False}]
)
@pytest.mark.parametrize("return_dict", [True, False])
def test_a_calls_loss_is_the_language_models_and_the_gates(llama_adapters, options, return_dict):
    options = {"layerwise_scalings": True, "xlora_dropout_p": 0.0, **options}
    torch.manual_seed(1)
    model = weft.from_adapters(tiny_llama(), llama_adapters, **options, **ALL).train()
    inputs = {**batch(), "attention_mask": torch.ones(2, 7).long(), "return_dict": return_dict}
    inputs["attention_mask"][0, :3] = 0
    found = model(**inputs)[0]
    shares = model.get_latest_scalings()[:, :, model.passes.routings.first_layer :]
    expected = added(model, shares, inputs["expert_labels"], inputs["attention_mask"])
    plain = model.eval()(**inputs)[0]  # evaluation's loss is the language model's
    torch.testing.assert_close(found, plain + expected)
    assert set(model.gate_metrics.latest_losses) == {"balance_loss", "entropy_loss", "expert_label_loss"}


def test_a_gate_with_softmax_over_the_kept_experts_has_shares_too(llama_adapters):
    options = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}
    model, inputs = mixture(llama_adapters, **options, **ALL), batch()
    found = model(**inputs).loss
    expected = added(model, model.get_latest_scalings().softmax(-1), inputs["expert_labels"])
    torch.testing.assert_close(found, model.eval()(**inputs).loss + expected)


def test_under_autocast_the_gates_losses_stay_in_float32(llama_adapters):
    model, inputs = mixture(llama_adapters, **ALL), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)
        shares = model.get_latest_scalings()
    assert model.gate_metrics.latest_losses["balance_loss"].dtype == torch.float32
    torch.testing.assert_close(model.gate_metrics.latest_losses["balance_loss"], balance_loss(shares.detach()))


def test_losses_stay_out_of_calls_that_do_not_train_the_gate(llama_adapters):
    model, plain, inputs = mixture(llama_adapters, **ALL), mixture(llama_adapters), batch()
    without = {name: value for name, value in inputs.items() if name != "expert_labels"}
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, plain(**without).loss)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).loss, tiny_llama()(**without).loss)
    with model.fixed_scalings({"math": 1.0}), plain.fixed_scalings({"math": 1.0}):
        assert torch.equal(model(**inputs).loss, plain(**without).loss)
    assert model(input_ids=inputs["input_ids"]).loss is None
    assert model.gate_metrics.latest_losses == {}


def test_labels_are_taken_out_also_where_their_loss_is_off(llama_adapters):
    model, inputs = mixture(llama_adapters), batch()
    without = {name: value for name, value in inputs.items() if name != "expert_labels"}
    assert torch.equal(model(**inputs).loss, model(**without).loss)


def test_unlabelled_batches_leave_the_loss_from_labels_out(llama_adapters):
    model, inputs = mixture(llama_adapters, **ALL), batch()
    del inputs["expert_labels"]
    model(**inputs)
    assert set(model.gate_metrics.latest_losses) == {"balance_loss", "entropy_loss"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"expert_labels has 3, expected 0 to 2, an expert's place in \['math', 'code', 'adapt"),
        (torch.tensor([0.5, 1.0]), r"expert_labels \(torch.float32\) must be a tensor of whole numbers"),
        ([0, 1], r"expert_labels \(list\) must be a tensor of whole numbers"),
    ],
)
def test_labels_that_are_no_experts_are_an_error(llama_adapters, labels, message):
    model = mixture(llama_adapters, **ALL)
    with pytest.raises(DataError, match=message):
        model(**{**batch(), "expert_labels": labels})
    model(**batch())  # nothing is left behind


def test_an_error_in_the_call_leaves_nothing_behind(llama_adapters):
    model = mixture(llama_adapters, **ALL)
    handle = model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch())
    handle.remove()
    assert model.passes.losses._call is None


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_count_source_and_target_tokens(tmp_path, name):
    def base():
        torch.manual_seed(0)
        if name == "t5":
            config = transformers.T5Config(
                vocab_size=VOCAB,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                dropout_rate=0,
            )
            return transformers.T5ForConditionalGeneration(config)
        sizes = {f"{side}_{kind}": 2 for side in ("encoder", "decoder") for kind in ("layers", "attention_heads")}
        config = transformers.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            dropout=0,
            **sizes,
        )
        return transformers.BartForConditionalGeneration(config)

    targets = ["q", "v"] if name == "t5" else ["q_proj", "v_proj"]
    config = lora(target_modules=targets, task_type="SEQ_2_SEQ_LM")
    paths = {str(i): save_adapter(base(), config, tmp_path / str(i), seed=i) for i in range(2)}
    model = quietly(weft.from_adapters, base(), paths, layerwise_scalings=True, **ALL).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = {**batch(2, 5), "labels": batch(2, 4)["labels"].clone(), "attention_mask": torch.ones(2, 5).long()}
    inputs["attention_mask"][1, 3:] = 0
    inputs["labels"][0, 2:] = -100
    inputs["expert_labels"] = torch.tensor([1, 0])
    found = model(**inputs).loss
    shares = torch.cat([model.passes.latest_source_scalings, model.get_latest_scalings()], 1)
    padding = torch.cat([inputs["attention_mask"], inputs["labels"] != -100], 1)
    expected = added(model, shares, inputs["expert_labels"], padding)
    torch.testing.assert_close(found - expected, model.eval()(**inputs).loss)


# -------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("counted", [True, False])
def test_accumulated_batches_give_the_gradient_of_their_mean(llama_adapters, counted):
    """As a Trainer does it: with the number of all labels, or dividing by the number of batches."""
    model = mixture(llama_adapters, **{**ALL, "balance_loss_weight": 0.0})
    whole = batch(6)
    model(**whole).loss.backward()
    expected = gate_gradients(model)
    model.zero_grad()
    for start in (0, 2, 4):
        part = {name: value[start : start + 2] for name, value in whole.items()}
        if counted:
            model(**part, num_items_in_batch=torch.tensor(6 * 6)).loss.backward()
        else:
            (model(**part).loss / 3).backward()
    for found, gradient in zip(gate_gradients(model), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


def test_balance_of_accumulated_batches_is_the_mean_of_each(llama_adapters):
    model = mixture(llama_adapters, balance_loss_weight=5.0)
    parts = [batch(2, 7, seed) for seed in (1, 2)]
    sum(model(**part).loss / 2 for part in parts).backward()
    expected = gate_gradients(model)
    model.zero_grad()
    for part in parts:
        model(**part, num_items_in_batch=24).loss.backward()
    for found, gradient in zip(gate_gradients(model), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"gate_layer": 1}, {"top_k_lora": 2}, {"use_trainable_adapters": True}], ids=str
)
def test_checkpointing_keeps_the_gradients_of_a_preference_loss_with_the_gates(llama_adapters, options, reentrant):
    """Two forwards before one backward, as in direct preference optimisation, and a reference without experts."""
    chosen, rejected = batch(2, 7, 1), batch(2, 5, 2)

    def log_likelihood(model, inputs):
        output = model(**inputs)
        targets = inputs["input_ids"][:, 1:, None]
        return output.logits[:, :-1].log_softmax(-1).gather(-1, targets).sum((1, 2)), output.loss

    def gradients(checkpointed):
        model = mixture(llama_adapters, **options, **ALL)
        if checkpointed:
            quietly(model.gradient_checkpointing_enable, {"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with torch.no_grad(), model.disable_adapter():
            reference = quietly(log_likelihood, model, chosen)[0] - quietly(log_likelihood, model, rejected)[0]
        (good, first), (bad, second) = log_likelihood(model, chosen), log_likelihood(model, rejected)
        preference = -torch.nn.functional.logsigmoid(0.1 * (good - bad - reference)).mean()
        (preference + first - 0.5 * second).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all((gradient is None) == (checkpointed[name] is None) for name, gradient in plain.items())
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())


def test_gates_and_experts_gradients_agree_with_finite_differences(tmp_path):
    targets = make_architecture("gpt2")[1]  # whose norms stay in float64
    paths = {
        str(i): save_adapter(make_architecture("gpt2")[0], lora(target_modules=targets), tmp_path / str(i), seed=i)
        for i in range(3)
    }
    model = weft.from_adapters(
        make_architecture("gpt2")[0].double(), paths, layerwise_scalings=True, use_trainable_adapters=True, **ALL
    ).double()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # The loss in float64 too: transformers' own is in float32.
    inputs = batch(2, 5)

    def loss():
        output = model(**inputs)
        likelihood = output.logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).mean()
        return added(model, model.get_latest_scalings(), inputs["expert_labels"]) - likelihood

    loss().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = [name for name in trained if "internal_xlora" in name] + [name for name in trained if is_expert(name)][::5]
    for name in chosen:
        values, place = trained[name], tuple(size // 2 for size in trained[name].shape)
        original, step = values[place].item(), 1e-5
        with torch.no_grad():
            values[place] = original + step
            above = loss()
            values[place] = original - step
            below = loss()
            values[place] = original
        expected = (above - below) / (2 * step)
        torch.testing.assert_close(trained[name].grad[place], expected, rtol=1e-5, atol=1e-9)


# -------------------------------------------------------------------------------------- options


def test_losses_need_shares(llama_adapters):
    with pytest.raises(ConfigError) as error:
        weft.XLoraConfig(adapters=llama_adapters, enable_softmax=False, **ALL)
    for name, value in ALL.items():
        assert f"{name} ({value!r}) needs shares that sum to one: set enable_softmax or enable" in str(error.value)


def test_weights_are_saved(llama_adapters, tmp_path):
    mixture(llama_adapters, **ALL).save_pretrained(tmp_path / "saved")
    loaded = weft.from_pretrained(tmp_path / "saved", tiny_llama())
    assert {name: getattr(loaded.xlora_config, name) for name in ALL} == ALL
