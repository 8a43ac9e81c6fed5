"""Small values for the fields of mlx-vlm's language models that no table of mlx-lm's has."""

from __future__ import annotations

from typing import Any

from tiny_configs import HYBRID, N_MIXED, ROPE, SLIDING

# packages of mlx_vlm.models that hold no model which reads tokens through a cache
WITHOUT_CACHES = set(
    """bert bonsai d1_omni dinov2 embedding_gemma2 ernie_image flux2 flux3 gemma3_embedding gliner2_5
    ideogram4 laya lfm2_colbert lfm2_embedding lfm2_encoder llada_image llama_bidirec
    llama_nemotron_vl_embedding mage_flow ming_image minimax_h3 ministral3_embedding mistral4
    modernbert moge3 moss_image openai_privacy_filter pp_doclayout_v3 qwen3_embedding qwen_image
    rfdetr rt_detr_v2 sam3 sam3_1 sam3d_body sam3d_objects sapiens2 siglip video_depth_anything
    xlm_roberta yolo11 z_image""".split()
)

_SLIDING = {"num_hidden_layers": N_MIXED, "layer_types": SLIDING}
_INTERVAL = {"num_hidden_layers": N_MIXED, "full_attention_interval": 2}
_MROPE = {"type": "mrope", "rope_type": "default", "rope_theta": 10000.0,
          "mrope_section": [4, 2, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5}  # fmt: skip
_MROPE_ALL = {**_MROPE, "mrope_section": [8, 4, 4]}
_QWEN3_5 = {**_INTERVAL, "rope_parameters": _MROPE}
_LFM2 = {"num_hidden_layers": N_MIXED, "layer_types": HYBRID, "block_dim": 128}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2, "num_layers": 3},
    "aya_vision": {"num_hidden_layers": N_MIXED, "sliding_window_pattern": 2},
    "clef": _QWEN3_5,
    "cohere2_moe": _SLIDING,
    "d1": _LFM2,
    "decider2": _QWEN3_5,
    "diffusion_gemma": {**_SLIDING, "top_k_experts": 2, "global_head_dim": 64},
    "gemma3": {"num_hidden_layers": N_MIXED, "sliding_window_pattern": 2},
    "gemma3n": {"activation_sparsity_pattern": [0.0] * N_MIXED},
    "gemma4_unified": _SLIDING,
    "indic_ocr": _QWEN3_5,
    "kolibri1": _SLIDING,
    "lfm2_vl": _LFM2,
    "llava": {"model_type": "llama"},
    "llava_next": {"model_type": "llama"},
    "llmjpvl": {"model_type": "llama"},
    "minicpmv4_6": {**_QWEN3_5, "head_dim": 32},
    "minicpmv4_7": {**_QWEN3_5, "head_dim": 32},
    "mistral3": _SLIDING,
    "multi_modality": {"model_type": "llama"},
    "nemotron_h_nano_omni": {"hybrid_override_pattern": "M*M*M*", "num_hidden_layers": N_MIXED},
    "nemotron_voicechat": {"hybrid_override_pattern": "M*M*M*", "num_hidden_layers": N_MIXED},
    "paligemma": {"query_pre_attn_scalar": 32},
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
    "step3p7": _SLIDING,
}  # fmt: skip
