"""Configurations of models that people run, by name: `plan` and `bench` need no network for them.

Sizes are those of the models' config.json files on the hub.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
# What mlx_lm.convert makes by default, and what gpt-oss comes in.
_FOUR_BITS = {"bits": 4, "group_size": 64}
_MXFP4_EXPERTS = {
    "bits": 8, "group_size": 64, "experts": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}  # fmt: skip


def _config(*values: Any, **others: Any) -> dict[str, Any]:
    return dict(zip(_FIELDS, values)) | others


def _qwen3(*sizes: int, **others: Any) -> dict[str, Any]:
    own = {"head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000}
    own["tie_word_embeddings"] = False
    return _config("qwen3", *sizes, 151936, 40960, **(own | others))


def _gemma3(*sizes: int, head_dim: int = 256, **others: Any) -> dict[str, Any]:
    return _config(
        "gemma3_text", *sizes, 262144, 131072, head_dim=head_dim, sliding_window=1024,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, **others,
    )  # fmt: skip


def _gpt_oss(n_layers: int, n_experts: int) -> dict[str, Any]:
    return _config(
        "gpt_oss", 2880, n_layers, 2880, 64, 8, 201088, 131072, head_dim=64,
        num_local_experts=n_experts, num_experts_per_tok=4, sliding_window=128, rope_theta=150000,
        layer_types=["sliding_attention", "full_attention"] * (n_layers // 2),
    )  # fmt: skip


def _llama(*sizes: int, **others: Any) -> dict[str, Any]:
    own = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 500000}
    return _config("llama", *sizes, 128256, 131072, **(own | others))


KNOWN: dict[str, dict[str, Any]] = {
    "phi-4": _config(
        "phi3", 5120, 40, 17920, 40, 10, 100352, 16384,
        original_max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=250000,
    ),
    "Qwen2.5-7B": _config(
        "qwen2", 3584, 28, 18944, 28, 4, 152064, 32768,
        rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "Qwen3-4B": _qwen3(2560, 36, 9728, 32, 8, tie_word_embeddings=True),
    "Qwen3-8B": _qwen3(4096, 36, 12288, 32, 8),
    "Qwen3-14B": _qwen3(5120, 40, 17408, 40, 8),
    "Qwen3-32B": _qwen3(5120, 64, 25600, 64, 8),
    "Qwen3-30B-A3B": _qwen3(
        2048, 48, 6144, 32, 4, model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
    ),
    "Qwen3.5-27B": {
        "model_type": "qwen3_5",
        "text_config": _config(
            "qwen3_5_text", 5120, 64, 17408, 24, 4, 248320, 262144,
            head_dim=256, full_attention_interval=4, linear_num_value_heads=48,
            linear_num_key_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
        ),
    },
    "Gemma-3-4B": _gemma3(2560, 34, 10240, 8, 4),
    "Gemma-3-12B": _gemma3(3840, 48, 15360, 16, 8),
    "Gemma-3-27B": _gemma3(5376, 62, 21504, 32, 16, head_dim=128, query_pre_attn_scalar=168),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "Llama-3.1-8B": _llama(4096, 32, 14336, 32, 8),
    "Llama-3.2-3B": _llama(3072, 28, 8192, 24, 8, tie_word_embeddings=True),
    "Llama-3.3-70B": _llama(8192, 80, 28672, 64, 8),
    "Mistral-7B-v0.3": _config(
        "mistral", 4096, 32, 14336, 32, 8, 32768, 32768, rms_norm_eps=1e-5, rope_theta=1_000_000,
        tie_word_embeddings=False,
    ),
    "Mistral-Small-24B": _config(
        "mistral", 5120, 40, 32768, 32, 8, 131072, 32768, head_dim=128, rms_norm_eps=1e-5,
        rope_theta=100_000_000, tie_word_embeddings=False,
    ),
}  # fmt: skip


def known_config(name: str) -> dict[str, Any] | None:
    """The configuration of a model that is known by name, or None."""
    key = known_name(name)
    return None if key is None else KNOWN[key]


def quantization(name: str) -> dict[str, Any]:
    """The entry of a known model's configuration for the bits that it is run in.

    4 bits, and gpt-oss's experts in MXFP4.
    """
    is_gpt_oss = KNOWN[name]["model_type"] == "gpt_oss"
    return {"quantization": _MXFP4_EXPERTS if is_gpt_oss else _FOUR_BITS}


def known_name(name: str) -> str | None:
    """A known name as it is written here, or None."""
    wanted = name.casefold()
    return next((key for key in KNOWN if key.casefold() == wanted), None)


def closest(name: str) -> str | None:
    """The known name that is most like another, such as a hub id; None where none is like it."""
    names = {key.casefold(): key for key in KNOWN}
    wanted = name.rpartition("/")[2].casefold()
    inside = [key for key in names if key in wanted]
    found = [max(inside, key=len)] if inside else get_close_matches(wanted, names, 1, 0.8)
    return names[found[0]] if found else None
