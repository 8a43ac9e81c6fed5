"""Small values for the configuration fields of mlx-lm's architectures."""

from __future__ import annotations

from typing import Any

N_LAYERS = 3
WINDOW = 16
HYBRID = ["linear_attention", "full_attention"] * N_LAYERS
SLIDING = ["sliding_attention", "full_attention"] * N_LAYERS

COMMON: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "model_dim", "hidden_dim", "block_dim"), 128
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "num_layers",
            "n_layers",
            "n_layer",
            "num_transformer_layers",
        ),
        N_LAYERS,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "mlp_hidden_size",
            "ffn_hidden_size",
            "expert_ffn_hidden_size",
            "ff_intermediate_size",
            "intermediate_size_mlp",
            "n_inner",
            "share_expert_dim",
            "block_ff_dim",
        ),
        96,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_query_heads"), 4
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups"), 2
    ),
    **dict.fromkeys(("head_dim", "kv_channels", "hidden_size_per_head", "attention_head_dim"), 32),
    **dict.fromkeys(("vocab_size", "num_vocab", "embedding_size"), 96),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "original_max_position_embeddings",
            "n_positions",
            "n_ctx",
            "block_size",
            "model_max_length",
        ),
        512,
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon"),
        1e-5,
    ),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "swa_rope_theta"), 10000.0),
    **dict.fromkeys(
        (
            "num_experts",
            "n_routed_experts",
            "num_local_experts",
            "moe_num_experts",
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_topk",
            "moe_top_k",
            "moe_k",
        ),
        2,
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "topk_group", "decoder_sparse_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "bias"), False),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "post_norm", "tie_word_embeddings"), True),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 0.5),
    **dict.fromkeys(("kv_lora_rank",), 32),
    **dict.fromkeys(("q_lora_rank",), 48),
    **dict.fromkeys(("qk_rope_head_dim",), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 32),
    "layer_group_size": 2,
    "group_norm_size": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # state-space and linear attention
    **dict.fromkeys(("mamba_d_conv", "conv_kernel", "conv_L_cache"), 4),
    **dict.fromkeys(("linear_conv_kernel_dim", "short_conv_kernel_size", "conv1d_width"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_expand": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("use_conv_bias", "conv_bias", "mamba_conv_bias"), True),
    **dict.fromkeys(("mamba_proj_bias",), False),
    "time_step_limit": (0.0, 100.0),
    "time_step_rank": 8,
    # scales
    **dict.fromkeys(
        (
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
            "scale_emb",
            "scale_depth",
        ),
        1.0,
    ),
    "dim_model_base": 128,
    # indexers
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
}

N_MIXED = len(SLIDING)
YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
ROPE = {"rope_type": "default", "type": "default", "rope_theta": 10000.0}
ROPE_BY_KIND = {"full_attention": ROPE, "sliding_attention": ROPE}

_SLIDING = {"num_hidden_layers": N_MIXED, "layer_types": SLIDING}
_HYBRID = {"num_hidden_layers": N_MIXED, "layer_types": HYBRID}
_PATTERN = {"num_hidden_layers": N_MIXED, "sliding_window_pattern": 2}
_INTERVAL = {"num_hidden_layers": N_MIXED, "full_attention_interval": 2}
_QWEN3_5_MOE = {**_INTERVAL, "num_experts": 2, "num_experts_per_tok": 2}
_LINEAR_ATTENTION = {
    "num_hidden_layers": 6,
    "linear_attn_config": {
        "kda_layers": [1, 3, 5],
        "full_attn_layers": [2, 4, 6],
        "num_heads": 4,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
}
_GEMMA3N = {
    **_SLIDING,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 96,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.0] * N_MIXED,
    "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 16,
}
_GEMMA4 = {
    **_SLIDING,
    "num_kv_shared_layers": 2,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "num_experts": None,
}
_LLAMA4 = {
    "num_hidden_layers": 8,
    "attention_chunk_size": WINDOW,
    "interleave_moe_layer_step": 2,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
    "rope_scaling": None,
}
_LONGCAT = {
    "num_layers": 3,
    "zero_expert_num": 1,
    "moe_topk": 3,
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
_MUSE_SPARK = {
    **_SLIDING,
    "post_norm_eps": 1e-5,
    "rope_parameters": ROPE,
    "layer_rope_theta": [10000.0] * N_MIXED,
    "final_logit_softcapping": 30.0,
    "output_multiplier": 1.0,
    "moe_hidden_size": 128,
    "num_shared_experts": 0,
}
_MINIMAX_M3 = {
    "dense_intermediate_size": 96,
    "rotary_dim": 16,
    "sparse_attention_freq": [0, 1, 1],
    "moe_layer_freq": [0, 1, 1],
    "index_block_size": 8,
    "index_topk_blocks": 2,
}

# wrapper -> (module and class of its text model's configuration, changes of that one's fields)
INNER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", "ModelArgs", _PATTERN),
    "gemma3n": ("gemma3n", "TextConfig", _GEMMA3N),
    "gemma4": ("gemma4_text", "ModelArgs", _GEMMA4),
    "kimi_k25": ("deepseek_v3", "ModelArgs", {}),
    "kimi_k3": (
        "kimi_k3",
        "TextArgs",
        {
            **_LINEAR_ATTENTION,
            "attn_res_block_size": 2,
            "routed_expert_hidden_size": 64,
            "activation_situ_beta": 1.0,
        },
    ),
    "kimi_vl": ("kimi_vl", "TextArgs", {}),
    "lfm2-vl": ("lfm2", "ModelArgs", _HYBRID),
    "llama4": ("llama4", "TextArgs", _LLAMA4),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs", _MINIMAX_M3),
    "mistral3": ("llama", "ModelArgs", {"layer_types": None, "sliding_window": None}),
    "muse_spark": ("muse_spark", "TextArgs", _MUSE_SPARK),
    "pixtral": ("llama", "ModelArgs", {"layer_types": None, "sliding_window": None}),
    "qwen2_vl": ("qwen2", "ModelArgs", {}),
    "qwen3_5": ("qwen3_5", "TextModelArgs", {**_INTERVAL, "num_experts": 0}),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs", _QWEN3_5_MOE),
    "qwen3_vl": ("qwen3", "ModelArgs", {}),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs", {}),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs", {**_INTERVAL, "num_experts": 0}),
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2, "num_layers": 5},
    "afmoe": _SLIDING,
    "baichuan_m1": {
        "num_hidden_layers": 4,
        "sliding_window_layers": [1, 3],
        "conv_window": 2,
        "tie_word_embeddings": False,
    },
    "cohere2": _PATTERN,
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 2, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN, "topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v41": {
        "head_dim": 64,
        "compress_ratios": (0, 4, 0),
        "kv_source_layer_ids": (0, 1, 2),
        "index_source_layer_ids": (0, 1, 2),
        "o_groups": 2,
        "o_lora_rank": 32,
        "hc_mult": 2,
        "scoring_func": "sqrtsoftplus",
    },
    "exaone4": {**_PATTERN, "sliding_window_pattern": "LG", "rope_scaling": {"type": "default"}},
    "exaone_moe": {**_SLIDING, "is_moe_layer": [False] + [True] * (N_MIXED - 1)},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "gear": {
        "num_hidden_layers": 3 * N_LAYERS,
        "layer_types": ["full_attention", "sliding_attention", "conv_mixer"] * N_LAYERS,
        "attn_logit_softcapping": 20.0,
    },
    "gemma3_text": _PATTERN,
    "gemma4_text": _GEMMA4,
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"rope_parameters": ROPE},
    "gpt_oss": _SLIDING,
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {
        "num_hidden_layers": N_MIXED,
        "layer_types": ["mamba", "attention"] * N_LAYERS,
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "num_hidden_layers": 4,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "jamba": {
        "num_hidden_layers": N_MIXED,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_linear": _LINEAR_ATTENTION,
    "laguna": _SLIDING,
    "lfm2": {
        **_HYBRID,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {**_HYBRID, "use_expert_bias": True},
    "llama": {"layer_types": None, "sliding_window": None},
    "llama4_text": {"no_rope_layers": [1, 1, 0]},
    "longcat_flash": {**_LONGCAT, "attention_method": "MLA"},
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 2,
        "emb_split_num": 2,
    },
    "mellum": {**_SLIDING, "rope_parameters": ROPE_BY_KIND},
    "mimo_v2_flash": {
        "num_hidden_layers": N_MIXED,
        "hybrid_layer_pattern": [1, 0] * N_LAYERS,
        "moe_layer_freq": [0] + [1] * (N_MIXED - 1),
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": True,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 64,
        "v_head_dim": 64,
    },
    "minicpm3": {
        "rope_scaling": {
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "original_max_position_embeddings": 512,
        }
    },
    "minimax": {"rotary_dim": 16},
    "ministral3": {**_SLIDING, "rope_parameters": YARN},
    "mistral4": {"rope_parameters": YARN},
    "muse_glimmer": _SLIDING,
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "num_hidden_layers": 5,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
        ],
    },
    "nemotron_h": {"hybrid_override_pattern": list("M*-" * N_LAYERS), "layer_types": None},
    "olmo3": _SLIDING,
    "olmo_hybrid": {**_HYBRID, "linear_allow_neg_eigval": True},
    "openelm": {
        "num_query_heads": [4, 8, 4],
        "num_kv_heads": [1, 2, 4],
        "ffn_multipliers": [1.0] * N_LAYERS,
        "ffn_dim_divisor": 8,
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
    "phixtral": {"rotary_dim": 16},
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "num_hidden_layers": N_MIXED,
        "mamba_step": 2,
        "full_attention_idx": [],
        "attention_window_size": 512,
    },
    "plamo3": {**_PATTERN, "window_size": WINDOW},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.0.mlp.gate_proj",
                "embedding": False,
                "block": 0,
                "dtype": "float16",
            }
        ],
    },
    "qwen3_next": _INTERVAL,
    "recurrent_gemma": {
        "num_hidden_layers": 6,
        "block_types": ["recurrent", "attention"],
        "logits_soft_cap": 30.0,
    },
    "rwkv7": {
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 16,
    },
    "smollm3": {"layer_types": None, "sliding_window": None},
    "spark2_5": {**_SLIDING, "rope_parameters": ROPE_BY_KIND},
    "step3p5": {
        **_SLIDING,
        "partial_rotary_factors": [0.5] * N_MIXED,
        "attention_other_setting": {
            "num_attention_heads": 4,
            "num_attention_groups": 2,
            "head_dim": 32,
        },
    },
}
