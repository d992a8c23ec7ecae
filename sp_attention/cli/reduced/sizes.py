"""What a field of a configuration becomes in a reduced one, by the name of the field."""

from typing import Any

VOCABULARY = 97
# Random tokens are FIRST_TOKEN and above; below it are the special ones, all different.
FIRST_TOKEN = 32
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, EXPERTS = 48, 6, 3, 8, 2, 4
# What may be as long as a batch: room for a few dozen tokens, so that tables of positions stay small.
POSITIONS = 128

_NAMES: dict[Any, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size src_vocab_size "
    "tgt_vocab_size codebook_vocab_size pronunciation_vocab_size shape_vocab_size embedding_vocab_size n_token t2u_vocab_size char_vocab_size",
    HIDDEN: "hidden_size d_model n_embd embed_dim emb_dim dim projection_dim out_hidden_size text_hidden_size "
    "projection_size embedding_size output_dim adapter_out_dim projector_hidden_size encoder_hidden_size "
    "vision_hidden_size cross_attention_hidden_size attention_hidden_size word_embed_proj_dim input_embedding_size "
    "output_embedding_size backbone_hidden_size embedding_dim text_embed_dim vision_embed_dim output_hidden_size "
    "audio_hidden_size mm_hidden_size image_text_hidden_size decoder_hidden_size hidden_dim patch_embed_hidden_size "
    "output_proj_dims query_dim text_config_hidden_size pooler_output_size shape_embed_dim pronunciation_embed_dim "
    "lru_width conv_dim tpa_dim dim_model true_hidden_size intra_bottleneck_size encoder_hidden_dim lang_embed_dim "
    "unit_embed_dim spkr_embed_dim hidden_size_per_layer_input_dim vision_output_dim adapter_in_dim mm_embed_dim "
    "speech_decoder_postnet_units qk_embed_dim value_head_dim_total",
    64: "intermediate_size ffn_dim d_ff n_inner d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_feedforward "
    "expansion_dim hidden_size_mlp mlp_dim router_hidden_size word_embed_intermediate dim_ff ff_dim "
    "t2u_encoder_ffn_dim t2u_decoder_ffn_dim speech_encoder_intermediate_size projector_intermediate_size "
    "alignment_intermediate_size text_intermediate_size vision_intermediate_size mamba_d_ssm ffn_intermediate_size hidden_dim_ff",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size expert_dim share_expert_dim kv_proj_dim dense_intermediate_size lora_rank",
    HEADS: "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
    "attention_heads mamba_n_heads mamba_num_heads linear_num_value_heads swa_num_attention_heads linear_num_heads "
    "t2u_encoder_attention_heads t2u_decoder_attention_heads speech_encoder_attention_heads num_query_heads "
    "index_n_heads n_mamba_heads vision_num_attention_heads num_sliding_attention_heads resampler_n_heads "
    "cross_attention_heads compressor_heads lightning_nh linear_attn_num_heads",
    KV_HEADS: "num_key_value_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_kv_heads "
    "num_global_key_value_heads decoder_num_key_value_heads encoder_num_key_value_heads num_global_kv_heads",
    HEAD_DIM: "head_dim d_kv d_head attention_head_dim dim_head v_head_dim qk_nope_head_dim qk_rope_head_dim "
    "linear_key_head_dim linear_value_head_dim swa_head_dim index_head_dim global_head_dim hidden_size_per_layer_input "
    "mamba_d_state ssm_state_size state_size mamba_state_dim kv_channels kv_head_dim resampler_head_dim "
    "linear_head_dim mamba_dt_rank time_step_rank query_pre_attn_scalar rotary_dim altup_dim laurel_rank d_rel "
    "lightning_head_dim o_lora_rank cross_head_dim",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim o_groups_dim xpath_unit_hidden_size audio_dim "
    "relative_attention_num_buckets num_buckets relative_attention_max_distance max_sequence_bucket "
    "num_mel_bins input_feat_per_channel mel_bins input_size_mel feature_projection_input_dim image_size "
    "min_image_size force_image_size n_mels",
    LAYERS: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers depth layers num_decoder_layers "
    "num_encoder_layers t2u_encoder_layers t2u_decoder_layers speech_encoder_layers num_blocks num_adapter_layers "
    "resampler_depth num_global_layers encoder_num_hidden_layers decoder_num_hidden_layers num_hidden_groups "
    "num_experts_per_tok moe_top_k top_k_experts moe_topk moe_k num_selected_experts top_k "
    "expert_layer_period num_hidden_layers_per_stage spatial_merge_size "
    "codebook_num num_codebooks depth_num_layers mem_blocks",
    1: "first_k_dense_replace n_group topk_group n_groups mamba_n_groups num_dense_layers n_shared_experts "
    "num_shared_experts moe_num_shared_experts max_window_layers num_nextn_predict_layers "
    "moe_layer_start_index dense_layers_num expert_layer_offset num_mem_blocks num_random_blocks num_conv_layers "
    "temporal_patch_size insert_layer_id num_inner_groups moe_n_shared_experts",
    0: "num_kv_shared_layers num_mtp_layers mtp_num_layers mtp_num_hidden_layers num_dummy",
    EXPERTS: "num_experts num_local_experts n_routed_experts moe_num_experts patch_size expert_num num_memory_blocks "
    "hc_num block_length mamba_d_conv_dim chunk_size num_query_tokens mm_tokens_per_image",
    POSITIONS: "max_position_embeddings n_positions n_ctx seq_length max_seq_len max_target_positions "
    "max_source_positions max_sequence_length original_max_position_embeddings max_2d_position_embeddings "
    "position_embedding_size num_position_embeddings decoder_max_position_embeddings rel_extent "
    "t2u_max_position_embeddings max_speech_positions max_text_positions max_position_embedding model_max_length",
    5: "sliding_window sliding_window_size local_attention attention_window_size",
}
SIZES: dict[str, Any] = {name: value for value, names in _NAMES.items() for name in names.split()}

# Of a list, such as one number per stage, every element.
STAGES: dict[str, int] = {
    "depths": 1,
    "hidden_sizes": HIDDEN,
    "embed_dims": HIDDEN,
    "num_heads": 3,
    "num_attention_heads": 3,
    "encoder_hidden_sizes": HIDDEN,
    "block_sizes": 1,
    "layers_per_stage": 1,
}
# The first number of every stage, doubled from one to the next.
DOUBLED: dict[str, int] = {"embed_dim": 24, "neck_hidden_sizes": 12}
