"""Models that read images and text: experts of the language model, whose tokens some are of images."""

import inspect

import peft
import pytest
import torch
import transformers

import weft
from models import VOCAB, lora, quietly, save_adapter, tiny_llama
from weft.errors import AdapterError

IMAGE, START, END, VIDEO = VOCAB - 6, VOCAB - 5, VOCAB - 4, VOCAB - 3


def finished(model):
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def llava():
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=tiny_llama().config, image_token_id=IMAGE, vision_feature_layer=-1
    )
    return finished(transformers.LlavaForConditionalGeneration(config))


def qwen2_vl():
    torch.manual_seed(0)
    text = {
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None},
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "temporal_patch_size": 1},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=VIDEO,
    )
    return finished(transformers.Qwen2VLForConditionalGeneration(config))


def llava_inputs(batch):
    ids = torch.randint(1, IMAGE, (batch, 9))
    ids[:, 2:6] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 8, 8),
    }


def qwen2_vl_inputs(batch):
    ids = torch.randint(1, IMAGE, (batch, 10))
    ids[:, 2], ids[:, 3:7], ids[:, 7] = START, IMAGE, END
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch * 16, 48),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
    }
    if "mm_token_type_ids" in inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()  # of newer versions of transformers
    return inputs


KINDS = {"llava": (llava, llava_inputs), "qwen2_vl": (qwen2_vl, qwen2_vl_inputs)}
TARGETS = r".*language_model.*(q_proj|up_proj)|lm_head"


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(maker of the model, maker of inputs, {expert: folder})."""
    make, make_inputs = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    paths = {
        name: save_adapter(make(), lora(target_modules=TARGETS), folder / name, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }
    return make, make_inputs, paths


SCHEMES = [{}, {"gate_layer": 1}, {"scaling_pass_layers": 1}, {"scaling_pass_value": 0.5}]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_images_are_read_once_with_a_cache_and_the_tokens_are_those_without(kind, scheme, options):
    make, make_inputs, paths = kind
    model = weft.from_adapters(make(), paths, layerwise_scalings=True, **scheme).eval()
    inputs = make_inputs(2)
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    cached = quietly(model.generate, **inputs, **options)
    assert torch.equal(cached, quietly(model.generate, **inputs, **options, use_cache=False))


def test_the_gate_reads_the_image_too(kind):
    make, make_inputs, paths = kind
    model = weft.from_adapters(make(), paths, layerwise_scalings=True).eval()
    read, inputs = [], make_inputs(2)
    model.internal_xlora_classifier.register_forward_hook(lambda module, args, output: read.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        expected = make().model(**inputs).last_hidden_state
    assert torch.equal(read[0], expected)
    assert model.get_latest_scalings().shape[:2] == inputs["input_ids"].shape


def test_each_expert_alone_is_that_adapter(kind):
    make, make_inputs, paths = kind
    model, inputs = weft.from_adapters(make(), paths).eval(), make_inputs(1)
    for name, path in paths.items():
        alone = quietly(peft.PeftModel.from_pretrained, make(), path)
        with torch.no_grad(), model.fixed_scalings({name: 1.0}):
            torch.testing.assert_close(model(**inputs).logits, alone(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss_and_the_mixture_comes_back_as_saved(kind, tmp_path):
    make, make_inputs, paths = kind
    model, inputs = weft.from_adapters(make(), paths, layerwise_scalings=True), make_inputs(2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture", make())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("make", "targets", "layer"),
    [
        (llava, ["q_proj"], "vision_tower.*q_proj"),
        (llava, ["q_proj", "linear_1"], "(vision_tower|linear_1).*"),
        (qwen2_vl, ["qkv", "q_proj"], r"model\.visual\.blocks\.0\.attn\.qkv"),
        (qwen2_vl, ["mlp.0", "q_proj"], r"model\.visual\.merger\.mlp\.0"),
    ],
)
def test_adapters_of_the_part_that_sees_images_are_refused(make, targets, layer, tmp_path):
    path = save_adapter(make(), lora(target_modules=targets), tmp_path / "one", seed=1)
    base = make()
    with pytest.raises(AdapterError, match=rf"layer '.*{layer}' is adapted by \['one'\], but lies outside of the text"):
        weft.from_adapters(base, {"one": path})
    assert base.state_dict().keys() == make().state_dict().keys()
