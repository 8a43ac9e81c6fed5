"""Small values for the fields of mlx-vlm's language models that no table of mlx-lm's has."""

from __future__ import annotations

from typing import Any

from tiny_configs import HYBRID, INNER, N_MIXED, ROPE, SLIDING

# packages of mlx_vlm.models that hold no model which reads tokens through a cache
WITHOUT_CACHES = set(
    """bert bonsai d1_omni dinov2 embedding_gemma2 ernie_image flux2 flux3 gemma3_embedding
    gliner2_5 ideogram4 laya lfm2_colbert lfm2_embedding lfm2_encoder llada_image
    llama_bidirec llama_nemotron_vl_embedding mage_flow ming_image minimax_h3
    ministral3_embedding mistral4 modernbert moge3 moss_image nemotron_voicechat
    openai_privacy_filter pp_doclayout_v3 qwen3_embedding qwen_image rfdetr rt_detr_v2 sam3
    sam3_1 sam3d_body sam3d_objects sapiens2 siglip video_depth_anything xlm_roberta yolo11
    z_image""".split()
)

# not run: it writes blocks, it reads an image first, its caches cannot be asked for a trim
NOT_BY_TOKENS = {"diffusion_gemma", "nemotron_parse", "z1t"}
# their layers call kernels that mlx-vlm has for Metal alone
NEEDS_METAL = {"bitnet", "muse_spark"}

_SLIDING = {"num_hidden_layers": N_MIXED, "layer_types": SLIDING}
_INTERVAL = {"num_hidden_layers": N_MIXED, "full_attention_interval": 2}
_MROPE = {
    **ROPE,
    "type": "mrope",
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
    "partial_rotary_factor": 0.5,
}
_MROPE_ALL = {**_MROPE, "mrope_section": [8, 4, 4]}
_QWEN3_5 = {**_INTERVAL, "rope_parameters": _MROPE}
_LFM2 = {"num_hidden_layers": N_MIXED, "layer_types": HYBRID, "block_dim": 128}

_NAS_BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}
_NAS_LINEAR = {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}}
_MINIMAX_M3 = {
    "dense_intermediate_size": 96,
    "rotary_dim": 16,
    "moe_layer_freq": [0, 1, 1],
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_attention_freq": [0, 1, 1],
        "sparse_index_dim": 32,
        "sparse_num_index_heads": 2,
        "sparse_block_size": 8,
        "sparse_topk_blocks": 2,
        "sparse_local_block": 1,
    },
}

# fields of whole configurations
WHOLE: dict[str, dict[str, Any]] = {"diffusion_gemma": {"vision_config": None}}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2, "num_layers": 5},
    "aya_vision": {"num_hidden_layers": N_MIXED, "sliding_window_pattern": 2},
    "clef": _QWEN3_5,
    "cohere2_moe": _SLIDING,
    "d1": _LFM2,
    "decider2": _QWEN3_5,
    "deepseek_v4": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
                    "compress_ratios": [0, 4, 0], "o_groups": 2, "o_lora_rank": 32, "hc_mult": 2,
                    "num_hash_layers": 0, "scoring_func": "sqrtsoftplus"},
    "deepseek_v41": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
                     "compress_ratios": [0, 4, 0], "kv_source_layer_ids": [1],
                     "index_source_layer_ids": [1], "candidate_source_layer_id": 1,
                     "qk_rope_head_dim": 32, "q_lora_rank": 64,
                     "o_groups": 2, "o_lora_rank": 32, "hc_mult": 2, "engram_layer_ids": [],
                     "scoring_func": "sqrtsoftplus"},
    "diffusion_gemma": {**_SLIDING, "top_k_experts": 2, "global_head_dim": 64},
    "gemma3": {"num_hidden_layers": N_MIXED, "sliding_window_pattern": 2},
    "ernie4_5_moe_vl": {"rope_scaling": {"type": "default", "mrope_section": [6, 6, 4]},
                        "moe_num_experts": 2, "moe_intermediate_size": 96},
    "gemma3n": {"intermediate_size": [96] * N_MIXED,
                "activation_sparsity_pattern": [0.0] * N_MIXED},
    "gemma4_unified": INNER["gemma4"][2],
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "index_kpool": 4,
                  "layer_types": ["linear_attention", "deepseek_sparse_attention"] * 3,
                  "num_hidden_layers": N_MIXED, "hc_mult": 2},
    "hunyuan_vl": {"rope_scaling": {"type": "xdrope", "alpha": 1000.0,
                                    "xdrope_section": [4, 4, 4, 4]}},
    "indic_ocr": _QWEN3_5,
    "kolibri1": _SLIDING,
    "lfm2_vl": _LFM2,
    "limite": {"rope_n_pairs": 8, "attn_gate_channels": 32, "ve_dim": 32,
               "softcap_logits": {"kind": "sigmoid", "a": 23.0, "b": 5.0, "c": 7.5}},
    "llava": {"model_type": "llama"},
    "llava_next": {"model_type": "llama"},
    "llmjpvl": {"model_type": "llama"},
    "mimo_v2": {"moe_layer_freq": [0, 1, 1, 1, 1, 1], "hybrid_layer_pattern": [1, 0] * 3,
                "num_hidden_layers": N_MIXED},
    "minimax_m3": _MINIMAX_M3,
    "minimax_m3_vl": _MINIMAX_M3,
    "minicpmv4_6": {**_QWEN3_5, "head_dim": 32},
    "minicpmv4_7": {**_QWEN3_5, "head_dim": 32},
    "mistral3": _SLIDING,
    "moondream3": {"num_key_value_heads": 4, "rope_dim": 16},
    "multi_modality": {"model_type": "llama"},
    "nemotron_h_nano_omni": {"hybrid_override_pattern": "M*M*M*", "num_hidden_layers": N_MIXED},
    "nemotron_nas": {"block_configs": [_NAS_BLOCK, _NAS_BLOCK, _NAS_LINEAR]},
    "paligemma": {"model_type": "gemma", "query_pre_attn_scalar": 32},
    "phi4mm": {"partial_rotary_factor": 0.5},
    "plamo2vl": {"model_type": "plamo2", "full_attention_idx": [1, 3, 5],
                 "num_hidden_layers": N_MIXED, "mamba_num_heads": 4},
    "qwen2_5_vl": {"rope_scaling": _MROPE_ALL},
    "qwen2_vl": {"rope_scaling": _MROPE_ALL},
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_omni_moe": {"rope_scaling": _MROPE_ALL},
    "qwen3_vl": {"rope_scaling": _MROPE_ALL},
    "qwen3_vl_embedding": {"rope_scaling": _MROPE_ALL},
    "qwen3_vl_moe": {"rope_scaling": _MROPE_ALL},
    "qwen4_exp": {**_QWEN3_5, "hc_count": 2, "hc_lowrank": 32, "indexer_head_dim": 32,
                  "indexer_budget": 8},
    "step3p7": _SLIDING,
}  # fmt: skip
