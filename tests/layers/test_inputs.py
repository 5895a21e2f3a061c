"""What each layer sees is found out when the mixture is made, and what has no scalings is refused by its name."""

import peft
import pytest
import torch
import transformers
from torch import nn

import unusual_models
import weft
from models import VOCAB, lora, quietly, save_adapter, tiny_llama
from weft.errors import AdapterError
from weft.gate.routing import Sees


def adapters(make, folder, targets="all-linear", **options):
    return {
        name: save_adapter(make(), lora(task_type=None, target_modules=targets, **options), folder / name, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }


def mixture(make, paths, **options):
    torch.manual_seed(1)
    model = quietly(weft.from_adapters, make(), paths, layerwise_scalings=True, **options).eval()
    with torch.no_grad():  # so that the gate's answers differ from token to token
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def kinds(model):
    return dict(zip(model.xlora_config.layer_names, model.base_model.passes.routings.kinds, strict=True))


def text(batch=2, length=9):
    ids = torch.randint(4, VOCAB - 2, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_formula(make, paths, scalings, layer_names, aligned):
    """The base model, untouched but for hooks that add each expert's part by the formula.

    Args:
        scalings: λ `[batch, seq, layer, expert]`.
        aligned: (layer's name, its input, its λ) -> λ with the axes of its input.
    """
    base = make()
    for path in paths.values():
        config, weights = peft.LoraConfig.from_pretrained(path), peft.utils.load_peft_weights(path)
        expert = list(paths.values()).index(path)
        for number, name in enumerate(layer_names):
            key = f"base_model.model.{name}"
            down, up = (weights[f"{key}.lora_{factor}.weight"] for factor in "AB")

            def add(module, args, output, down=down, up=up, name=name, number=number, expert=expert, config=config):
                weight = aligned(name, args[0], scalings[:, :, number])[..., expert, None]
                return output + config.lora_alpha / config.r * ((args[0] * weight) @ down.T @ up.T)

            base.get_submodule(name).register_forward_hook(add)
    return base


# ---------------------------------------------------------------------- language models


def test_keys_and_values_of_an_image_are_refused_by_name_and_the_base_is_as_it_was(tmp_path):
    paths = adapters(unusual_models.mllama, tmp_path, r".*language_model.*(q_proj|k_proj|v_proj)")
    base = unusual_models.mllama()
    with pytest.raises(
        AdapterError, match=r"layer 'model\.language_model\.layers\.1\.cross_attn\.k_proj' is adapted, "
    ):
        weft.from_adapters(base, paths)
    before = unusual_models.mllama().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()


def test_beside_them_no_token_of_llama_vision_sees_a_later_one_and_cached_is_uncached(tmp_path):
    paths = adapters(
        unusual_models.mllama, tmp_path, r".*language_model.*(self_attn\.k_proj|q_proj|o_proj|up_proj)|lm_head"
    )
    model, inputs = mixture(unusual_models.mllama, paths), unusual_models.mllama_inputs(2)
    with torch.no_grad():
        logits = model(**inputs).logits
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][:, -1] = 7
        assert torch.equal(model(**changed).logits[:, :-1], logits[:, :-1])
        for name, path in paths.items():
            alone = quietly(peft.PeftModel.from_pretrained, unusual_models.mllama(), path)
            with model.fixed_scalings({name: 1.0}):
                torch.testing.assert_close(model(**inputs).logits, alone(**inputs).logits, rtol=1e-4, atol=1e-4)
    cached = quietly(model.generate, **inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, quietly(model.generate, **inputs, max_new_tokens=5, do_sample=False, use_cache=False))


def test_every_layer_behind_the_kept_positions_follows_them(tmp_path):
    make = unusual_models.ettin
    model, inputs = mixture(make, adapters(make, tmp_path)), text()
    assert kinds(model)["lm_head.dense"] is Sees.KEPT
    with torch.no_grad():
        whole = model(**inputs).logits
        for keep in (1, 4, torch.tensor([0, 3, 5])):
            kept = slice(-keep, None) if isinstance(keep, int) else keep
            torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, whole[:, kept])


def test_generation_with_a_head_of_several_layers_is_greedy_decoding_by_hand(tmp_path):
    make = unusual_models.ettin
    model, inputs = mixture(make, adapters(make, tmp_path)), text()
    expected = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), expected)


def test_a_table_of_positions_is_refused_by_name(tmp_path):
    paths = adapters(unusual_models.deberta, tmp_path)
    where = r"layer 'deberta\.encoder\.layer\.0\.attention\.self\.query_proj' is adapted, but .* its input has shape"
    with pytest.raises(AdapterError, match=where + r" \[1, 16, 'channels'\] for a text of 2 rows of 7 tokens"):
        weft.from_adapters(unusual_models.deberta(), paths)
    model = mixture(unusual_models.deberta, adapters(unusual_models.deberta, tmp_path, ["value_proj", "dense"]))
    inputs = text()
    with torch.no_grad():
        both = model(**inputs).logits
        torch.testing.assert_close(
            both, torch.cat([model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits for row in (0, 1)])
        )


def test_positions_that_all_rows_share_are_refused(tmp_path):
    def make():
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4))

    paths = adapters(make, tmp_path, ["wpe", "c_attn"])
    with pytest.raises(AdapterError, match=r"layer 'transformer\.wpe' is adapted, but .* without an axis for the rows"):
        weft.from_adapters(make(), paths)


class Pooling(nn.Module):
    """A decoder layer with a linear layer that sees the text's first token only."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.gate = layer, nn.Linear(32, 32)
        nn.init.normal_(self.gate.weight)

    def forward(self, hidden, *args, **kwargs):
        return self.layer(hidden + self.gate(hidden[:, :1]), *args, **kwargs)


def test_what_is_pooled_inside_of_a_causal_model_is_refused(tmp_path):
    def make():
        model = tiny_llama()
        model.model.layers[1] = Pooling(model.model.layers[1])
        return model.eval()

    paths = adapters(make, tmp_path, ["q_proj", "gate"])
    with pytest.raises(AdapterError, match=r"layer 'model\.layers\.1\.gate' .* let tokens depend on later ones"):
        weft.from_adapters(make(), paths)


# ---------------------------------------------------------------------- encoders


def padded_to(length, weight):
    return nn.functional.pad(weight, (0, 0, 0, length - weight.shape[1]))


def align_longformer(name, x, weight):
    if x.shape[0] == len(weight):
        return padded_to(x.shape[1], weight)
    return padded_to(x.shape[0], weight).transpose(0, 1)


def align_big_bird(name, x, weight):
    return weight.mean(1) if x.dim() == 2 else padded_to(x.shape[1], weight)


@pytest.mark.parametrize(
    ("make", "aligned", "length"),
    [
        (unusual_models.longformer, align_longformer, 9),
        (unusual_models.longformer, align_longformer, 12),
        (unusual_models.big_bird, align_big_bird, 33),
        (unusual_models.xlnet, lambda name, x, weight: weight.transpose(0, 1), 9),
    ],
    ids=["longformer", "longformer, whole windows", "big bird", "xlnet"],
)
def test_padded_and_transposed_tokens_have_their_own_scalings(make, aligned, length, tmp_path):
    paths = adapters(make, tmp_path)
    model, inputs = mixture(make, paths), text(length=length)
    with torch.no_grad():
        found = quietly(model, **inputs).logits
        base = by_formula(make, paths, model.get_latest_scalings(), model.xlora_config.layer_names, aligned)
        torch.testing.assert_close(found, quietly(base, **inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [unusual_models.big_bird, unusual_models.recurrent_gemma])
def test_finding_out_leaves_no_trace(make, tmp_path):
    base = make().train()
    weft.from_adapters(base, adapters(make, tmp_path)).base_model.unload()
    assert not [
        value for module in base.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)
    ]
    assert all(module.training for module in base.modules())
    if make is unusual_models.big_bird:  # which would give its sparse attention up for a short text
        assert base.bert.attention_type == "block_sparse"


def test_parts_of_a_text_are_refused(tmp_path):
    def make():
        return unusual_models.bert(chunk_size_feed_forward=1)

    paths = adapters(make, tmp_path)
    with pytest.raises(AdapterError, match=r"layer 'bert\.encoder\.layer\.0\.intermediate\.dense' .*, in 7 parts"):
        weft.from_adapters(make(), paths)


def test_a_model_that_cannot_be_tried_says_at_the_call_which_layer_sees_something_else(tmp_path):
    def make():
        return unusual_models.bert(chunk_size_feed_forward=4)  # 7 tokens are no whole chunks

    model = mixture(make, adapters(make, tmp_path, ["intermediate.dense"]))
    with pytest.raises(ValueError, match=r"layer 'bert\.encoder\.layer\.0\.intermediate\.dense' sees something else"):
        model(**text(length=8))


def test_a_pooler_has_the_mean_over_the_unpadded_tokens(tmp_path):
    make = unusual_models.bert
    paths = adapters(make, tmp_path, ["pooler.dense"])
    model, inputs = mixture(make, paths), text()
    inputs["attention_mask"][0, 5:] = 0
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        found = model(**inputs).logits
        base = by_formula(
            make,
            paths,
            model.get_latest_scalings(),
            model.xlora_config.layer_names,
            lambda name, x, weight: (weight * mask).sum(1) / mask.sum(1),
        )
        torch.testing.assert_close(found, base(**inputs).logits, rtol=1e-4, atol=1e-4)
