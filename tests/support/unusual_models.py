"""Tiny models whose layers see something else than a text's tokens in order, or that keep their state elsewhere."""

from __future__ import annotations

import torch
import transformers

from models import VOCAB

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(model_class, config):
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    if model.can_generate():
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    return model


def mllama():
    """Llama-3.2-Vision: some decoder layers look at the image by cross-attention."""
    vision = transformers.models.mllama.configuration_mllama.MllamaVisionConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1},
        **{"attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 32, "max_num_tiles": 2},
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    text = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **{**SIZES, "num_hidden_layers": 3, "intermediate_size": 48, "num_key_value_heads": 2},
        **{"cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        rope_scaling={"rope_type": "default"},
        max_position_embeddings=128,
    )
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB - 1)
    model = build("MllamaForConditionalGeneration", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn_gate", "mlp_gate")):  # 0, so that the image would not matter
                parameter.fill_(0.7)
    return model


def mllama_inputs(batch=1, length=9):
    ids = torch.randint(3, VOCAB - 1, (batch, length))
    ids[:, 1] = VOCAB - 1
    sees_image = torch.zeros(batch, length, 1, 2, dtype=torch.long)
    sees_image[:, 1:, 0, 0] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 1, 2, 3, 8, 8),
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]] * batch),
        "cross_attention_mask": sees_image,
    }


def ettin():
    """The ModernBERT decoder: its head has a layer of its own before the output embeddings."""
    config = transformers.ModernBertDecoderConfig(
        **SIZES,
        **{"intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": None, "cls_token_id": 2, "sep_token_id": 3},
    )
    return build("ModernBertDecoderForCausalLM", config)


def deberta():
    """DeBERTa-v3: the keys' and queries' layers also see a table of relative positions."""
    config = transformers.DebertaV2Config(
        **SIZES,
        **{"intermediate_size": 48, "max_position_embeddings": 64, "relative_attention": True, "position_buckets": 8},
        **{"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        **{"position_biased_input": False, "type_vocab_size": 0},
    )
    return build("DebertaV2ForSequenceClassification", config)


def xlnet():
    """Tokens before samples."""
    return build(
        "XLNetLMHeadModel", transformers.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48)
    )


def longformer():
    """Texts filled up to whole attention windows; in the attention, tokens before samples."""
    config = transformers.LongformerConfig(
        **SIZES, intermediate_size=48, max_position_embeddings=130, attention_window=4, pad_token_id=0
    )
    return build("LongformerForMaskedLM", config)


def big_bird():
    """Texts filled up to whole blocks."""
    config = transformers.BigBirdConfig(
        **SIZES, intermediate_size=48, max_position_embeddings=512, block_size=4, num_random_blocks=1
    )
    return build("BigBirdForMaskedLM", config)


def bert(**options):
    config = transformers.BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=64, **options)
    return build("BertForSequenceClassification", config)


def recurrent_gemma():
    """A recurrent state in the modules themselves."""
    config = transformers.RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "intermediate_size": 96, "lru_width": 32},
        **{"attention_window_size": 16, "pad_token_id": 0, "eos_token_id": None},
    )
    return build("RecurrentGemmaForCausalLM", config)


def _mamba(kind, **options):
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0, "eos_token_id": None},
        bos_token_id=0,
        **options,
    )
    return build(f"{kind}ForCausalLM", config)


def mamba():
    return _mamba("Mamba", state_size=4)


def mamba2():
    return _mamba("Mamba2", state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)


def falcon_mamba():
    return _mamba("FalconMamba", state_size=4)


def rwkv():
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, eos_token_id=None
    )
    return build("RwkvForCausalLM", config)


def llama4():
    """A backbone under another name than the class says."""
    config = transformers.Llama4TextConfig(
        **SIZES,
        **{"intermediate_size": 48, "intermediate_size_mlp": 48, "num_key_value_heads": 2, "num_local_experts": 2},
        **{"interleave_moe_layer_step": 4, "head_dim": 8, "max_position_embeddings": 128, "attention_chunk_size": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    )
    return build("Llama4ForCausalLM", config)


def blip2():
    """The language model is a whole causal language model, whose `generate` it calls by itself."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 8, "patch_size": 4},
        qformer_config={**small, "vocab_size": VOCAB, "encoder_hidden_size": 16},
        text_config=text.to_dict(),
        num_query_tokens=3,
        image_token_index=VOCAB - 1,
    )
    return build("Blip2ForConditionalGeneration", config)


def _joined(kind, encoder, decoder):
    config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(encoder, decoder)
    model = build(f"{kind}Model", config)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id = 1, 0
    return model


def vision_encoder_decoder(width=32):
    encoder = transformers.ViTConfig(
        **{"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": 8, "patch_size": 4},
    )
    decoder = transformers.GPT2Config(
        **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
        **{"is_decoder": True, "add_cross_attention": True, "eos_token_id": None},
    )
    return _joined("VisionEncoderDecoder", encoder, decoder)


def encoder_decoder():
    options = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
    decoder = transformers.BertConfig(**options, is_decoder=True, add_cross_attention=True)
    return _joined("EncoderDecoder", transformers.BertConfig(**options), decoder)


def wav2vec2():
    """An encoder of sound, whose mask counts samples and whose positions are frames."""
    config = transformers.Wav2Vec2Config(
        **SIZES,
        **{"intermediate_size": 48, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2]},
        **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        **{"classifier_proj_size": 16, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    )
    return build("Wav2Vec2ForSequenceClassification", config)


def tiny_vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=2
    )
    return transformers.ViTForImageClassification(config).eval()


def tiny_convnext():
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=32)
    return transformers.ConvNextForImageClassification(config).eval()


VISION = {
    "vit": (tiny_vit, ["projection", "q_proj", "fc1"], 8, 17),
    "convnext": (tiny_convnext, ["embeddings.patch_embeddings", "pwconv1", "downsampling_layer.1"], 32, 16),
}
