"""What the names of fields do not tell: settings that a type needs so that a small model of it can be built.

They only serve to build models for `sp-attention verify` and the sweep. The library itself knows no names of models.
By the type of a configuration, or the name of its class where it has no type, those inside others included.
"""

from typing import Any

# Three axes of rotary positions share the halves of a head of 8 dims.
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# Hybrids whose default pattern is longer than a small model: a layer of either kind, in their own words.
_LINEAR_THEN_FULL = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_CONV_THEN_FULL = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
_FULL_THEN_SLIDING = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    # Heads and widths that must fit each other in ways of their own.
    "bit": {"num_groups": 8},
    "bros": {"hidden_size": 192},
    "codegen": {"n_head": 4, "n_embd": 32},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    "esmc": {"num_key_value_heads": 6},
    "falcon_h1": {"mamba_d_ssm": 96},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 12},
    "mamba2": {"head_dim": 16},
    "mobilebert": {"embedding_size": 48},
    "mimi": {"upsample_groups": 48},
    "moonshine": {"encoder_num_key_value_heads": 6, "decoder_num_key_value_heads": 6},
    "moonshine_streaming": {"num_key_value_heads": 6},
    "mpnet": {"relative_attention_num_buckets": 32},
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_kpool": 4},
    "neomme": {"head_dim": 16},
    "xlstm": {"num_heads": 4, "hidden_size": 64, "embedding_dim": 64},
    "zaya": {"num_experts_per_tok": 1},
    # Rotary positions on several axes.
    **{
        name: {"rope_parameters": _AXES}
        for name in (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "qwen2_5_omni_text",
            "glm4v_text",
            "glm_ocr_text",
            "glmga_text",
            "glm46v_text",
            "paddleocr_vl_text",
            "cosmos3_edge_text",
        )
    },
    "glm4v_moe_text": {"rope_parameters": _AXES | {"partial_rotary_factor": 1.0}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _AXES}},
    # Kinds of layers.
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "granitemoehybrid": _LINEAR_THEN_FULL,
    "deepseek_ocr2_text": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _CONV_THEN_FULL,
    "lfm2_moe": _CONV_THEN_FULL,
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    # Numbers of their own.
    "blip-2": {"image_token_index": 3},
    "instructblip": {"image_token_index": 3},
    "instructblipvideo": {"video_token_index": 3},
    "blt": {"num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGAZ": 4}},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "efficientnet": {"width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 256},
    "dots3_note_vision_encoder": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "emu3_vqgan": {"codebook_size": 64},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4, "<|visual token 000000|>": 5}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], "rope_parameters": _AXES},
    "qwen4_exp_text": {
        "indexer_n_heads": 3,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "local_attn_chunk_length": 11,
        "lsh_attn_chunk_length": 11,
        "num_buckets": 4,
        "attn_layers": ["local", "lsh"],
        # Else it hashes by other random numbers each time.
        "hash_seed": 1,
    },
    "xmod": {"default_language": "en_XX"},
}
