"""The gate's losses, metrics and means read the mask of the gate's own positions, whatever the call's mask counts."""

import pytest
import torch
import transformers

import unusual_models
import weft
from models import VOCAB, lora, quietly, save_adapter
from weft.gate.losses import balance_loss, entropy_loss
from weft.gate.routing import present_positions
from weft.passes.padding import padding_of


def mixture(make, folder, targets, **options):
    paths = {
        name: save_adapter(make(), lora(task_type=None, target_modules=targets), folder / name, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }
    model = quietly(weft.from_adapters, make(), paths, layerwise_scalings=True, **options)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def clips():
    """Two clips of 400 and 200 samples; the second is padded, so that of its 38 frames (by the strides, 5 and 2) the
    first (((200 - 10) // 5 + 1) - 3) // 2 + 1 = 19 are sound."""
    values, mask = torch.randn(2, 400), torch.ones(2, 400, dtype=torch.long)
    values[1, 200:], mask[1, 200:] = 0, 0
    frames = torch.ones(2, 39)
    frames[1, 19:] = 0
    return {"input_values": values, "attention_mask": mask}, frames


def test_padded_clips_of_sound_count_as_far_as_they_are_sound(tmp_path):
    make = unusual_models.wav2vec2
    model = mixture(make, tmp_path, ["q_proj", "v_proj"], balance_loss_weight=0.5, entropy_loss_weight=0.25).train()
    model.get_base_model().config.apply_spec_augment = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gate_metrics.enabled = True
    inputs, frames = clips()
    labels = torch.tensor([0, 1])
    loss = model(**inputs, labels=labels).loss
    shares = model.get_latest_scalings()
    assert shares.shape[:2] == frames.shape
    balance, entropy = balance_loss(shares, frames), entropy_loss(shares, frames)
    torch.testing.assert_close(model.gate_metrics.latest_losses["balance_loss"], balance)
    plain = mixture(make, tmp_path / "again", ["q_proj", "v_proj"]).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            loss, plain(**inputs, labels=labels).loss + 0.5 * balance + 0.25 * entropy, rtol=1e-4, atol=1e-4
        )
    by_hand = shares[frames.bool()].mean(dim=(0, 1))
    found = model.gate_metrics.read()
    assert [found["gate/share/one"], found["gate/share/two"]] == pytest.approx(by_hand.tolist(), abs=1e-5)


def test_a_padded_clip_has_the_mean_of_its_own_frames_in_a_pooled_layer(tmp_path):
    make = unusual_models.wav2vec2
    model = mixture(make, tmp_path, ["classifier", "q_proj"]).eval()
    inputs, _ = clips()
    with torch.no_grad():
        both = model(**inputs).logits
        alone = model(input_values=inputs["input_values"][1:, :200], attention_mask=torch.ones(1, 200).long()).logits
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_frames_of_an_encoder_decoder_of_speech_are_told_by_the_encoder():
    config = transformers.Speech2TextConfig(
        **{"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48},
        **{"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "conv_channels": 16},
        **{"input_feat_per_channel": 8, "max_source_positions": 64, "max_target_positions": 64},
    )
    encoder = transformers.Speech2TextForConditionalGeneration(config).get_encoder()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:] = 0
    found = padding_of(encoder, {"attention_mask": mask, "input_features": torch.zeros(2, 40, 8)}, 10, mask.device)
    assert found.sum(1).tolist() == [10, 5]


@pytest.mark.parametrize(("lengths", "expected"), [(lambda n: n // 4, 3), (lambda n: (n // 2, n // 4), 3)])
def test_models_that_tell_lengths_only_are_understood(lengths, expected):
    model = torch.nn.Module()
    model._get_feat_extract_output_lengths = lengths
    mask = torch.zeros(1, 16)
    mask[:, :12] = 1
    assert padding_of(model, {"attention_mask": mask}, 4, mask.device).sum() == expected


def test_a_mask_that_nobody_can_read_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"attention_mask has 16 columns for the 4 positions .* Module does not tell"):
        padding_of(torch.nn.Module(), {"attention_mask": torch.ones(1, 16)}, 4, torch.device("cpu"))


def test_a_mask_with_too_few_columns_is_refused_where_it_matters():
    with pytest.raises(ValueError, match="attention_mask has 3 columns, expected at least 5"):
        present_positions(torch.ones(1, 3), 5)
    assert present_positions(torch.tensor([[0, 1, 0, 1]]), 3).tolist() == [[True, False, True]]
