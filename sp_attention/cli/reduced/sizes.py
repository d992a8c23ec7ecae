"""What a field of a configuration becomes in a reduced one, by the name of the field."""

from typing import Any

VOCABULARY = 97
# Random tokens are FIRST_TOKEN and above; below it are the special ones, all different.
FIRST_TOKEN = 32
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, EXPERTS = 48, 6, 3, 8, 2, 4
# What may be as long as a batch: room for a few dozen tokens, so that tables of positions stay small.
POSITIONS = 128

_NAMES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size src_vocab_size "
    "tgt_vocab_size codebook_vocab_size pronunciation_vocab_size shape_vocab_size t2u_vocab_size "
    "char_vocab_size entity_vocab_size encoder_hash_byte_group_vocab num_embeddings ngram_vocab_size_base",
    HIDDEN: "hidden_size d_model n_embd embed_dim emb_dim dim projection_dim out_hidden_size text_hidden_size "
    "projection_size embedding_size output_dim adapter_out_dim projector_hidden_size encoder_hidden_size "
    "vision_hidden_size cross_attention_hidden_size attention_hidden_size word_embed_proj_dim "
    "input_embedding_size output_embedding_size backbone_hidden_size embedding_dim image_text_hidden_size "
    "decoder_hidden_size hidden_dim patch_embed_hidden_size output_proj_dims pooler_output_size "
    "shape_embed_dim pronunciation_embed_dim lru_width conv_dim intra_bottleneck_size lang_embed_dim "
    "unit_embed_dim spkr_embed_dim vision_output_dim adapter_in_dim mm_embed_dim "
    "speech_decoder_postnet_units d_latents entity_emb_size audio_hidden_size hidden_size_global "
    "cross_hidden_size projector_input_dim projector_output_dim moe_hidden_size image_token_embed_dim "
    "output_channels subsampling_conv_channels shared_experts_intermediate_size hc_lowrank "
    "post_conv_in_channels post_conv_mid_channels post_conv_out_channels audio_embed_dim codebook_dim "
    "vector_quantization_hidden_dimension conv_channels",
    64: "intermediate_size ffn_dim d_ff n_inner d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "mlp_dim router_hidden_size dim_ff t2u_encoder_ffn_dim t2u_decoder_ffn_dim "
    "speech_encoder_intermediate_size alignment_intermediate_size mamba_d_ssm feed_forward_size",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size base_channels latent_channels intermediate_size_mlp "
    "moe_shared_expert_intermediate_size share_expert_dim dense_intermediate_size",
    HEADS: "num_attention_heads decoder_num_attention_heads encoder_num_attention_heads num_heads n_head n_heads "
    "encoder_attention_heads decoder_attention_heads attention_heads mamba_n_heads mamba_num_heads "
    "linear_num_value_heads swa_num_attention_heads linear_num_heads t2u_encoder_attention_heads "
    "t2u_decoder_attention_heads speech_encoder_attention_heads index_n_heads n_mamba_heads "
    "num_sliding_attention_heads resampler_n_heads",
    KV_HEADS: "num_key_value_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_kv_heads "
    "decoder_num_key_value_heads encoder_num_key_value_heads",
    HEAD_DIM: "head_dim d_kv d_head attention_head_dim dim_head v_head_dim qk_nope_head_dim qk_rope_head_dim "
    "linear_key_head_dim linear_value_head_dim swa_head_dim index_head_dim hidden_size_per_layer_input "
    "mamba_d_state ssm_state_size state_size kv_channels resampler_head_dim linear_head_dim mamba_dt_rank "
    "time_step_rank query_pre_attn_scalar coordinate_size shape_size index_topk num_latents "
    "frequency_embedding_size rotary_dim laurel_rank d_rel o_lora_rank cross_head_dim",
    16: "q_lora_rank max_image_size kv_lora_rank mamba_d_head mamba_head_dim xpath_unit_hidden_size "
    "relative_attention_num_buckets num_buckets relative_attention_max_distance num_mel_bins "
    "input_feat_per_channel feature_projection_input_dim image_size min_image_size force_image_size",
    LAYERS: "num_hidden_layers num_filters num_layers n_layer n_layers encoder_layers decoder_layers depth layers "
    "num_decoder_layers num_encoder_layers t2u_encoder_layers t2u_decoder_layers speech_encoder_layers "
    "num_blocks num_adapter_layers resampler_depth num_global_layers encoder_num_hidden_layers "
    "decoder_num_hidden_layers num_hidden_groups num_experts_per_tok moe_top_k top_k_experts moe_topk "
    "moe_k expert_layer_period spatial_merge_size num_codebooks",
    1: "first_k_dense_replace n_group topk_group n_groups mamba_n_groups num_dense_layers n_shared_experts "
    "num_shared_experts moe_num_shared_experts max_window_layers num_nextn_predict_layers "
    "moe_layer_start_index expert_layer_offset num_mem_blocks num_random_blocks temporal_patch_size "
    "insert_layer_id",
    0: "num_kv_shared_layers num_mtp_layers",
    EXPERTS: "num_experts num_local_experts n_routed_experts moe_num_experts patch_size chunk_size "
    "num_query_tokens mm_tokens_per_image",
    POSITIONS: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "original_max_position_embeddings max_2d_position_embeddings position_embedding_size "
    "num_position_embeddings rel_extent t2u_max_position_embeddings max_speech_positions "
    "max_text_positions",
    5: "sliding_window sliding_window_size local_attention attention_window_size attention_chunk_size",
}
SIZES: dict[str, Any] = {name: value for value, names in _NAMES.items() for name in names.split()}

# Numbers of tokens up to which a type does one thing and beyond which another: capacities of experts, sparse blocks,
# distances, memories, positional scales. Set so that a sequence of BEYOND tokens is beyond all of them.
BEYOND = 101
THRESHOLDS: dict[str, Any] = {
    "attention_window": 16,
    "bias_max_distance": 16,
    "block_size": 8,
    "expert_capacity": 8,
    "floor_scale": 16,
    "index_block_size": 16,
    "keep_window_size": 16,
    "local_attention_window_len": 16,
    "local_radius": 7,
    "local_transformer_stride": 16,
    "log_scaling_n_floor": 16,
    "mamba_chunk_size": 16,
    "original_max_position_embeddings": 64,
    "position_bias_max_distance": 16,
    "relative_max_distance": 16,
    "sliding_window": 5,
    "speech_encoder_chunk_size": 16,
}

# Of a list, such as one number per stage, every element.
STAGES: dict[str, int] = {
    "depths": 1,
    "hidden_sizes": HIDDEN,
    "embed_dims": HIDDEN,
    "num_heads": 3,
    "num_attention_heads": 3,
    "block_sizes": 1,
}
# The first number of every stage, doubled from one to the next.
DOUBLED: dict[str, int] = {"embed_dim": 24, "neck_hidden_sizes": 12}
