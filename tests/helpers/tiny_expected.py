"""What must be compressed in the tiny models, by reading mlx-lm's model files."""

from __future__ import annotations

WINDOW = "sliding window of 16 tokens"
RECURRENT = "recurrent state"
LATENT = "MLA latent"
INDEXER = "several caches a layer, with keys of an indexer"
CHUNKED = "chunked attention of 16 tokens"
UNUSED = "unused: the layer stores no K and V of its own"

Position = tuple[int, "int | None"]


def _at(*indices: int, sub: int | None = None) -> list[Position]:
    return [(index, sub) for index in indices]


_ALL = _at(0, 1, 2)
_ODD = _at(1, 3, 5)

_WINDOWED = """afmoe cohere2 exaone4 exaone_moe gemma3 gemma3_text gpt_oss laguna mellum
    mimo_v2_flash ministral3 muse_glimmer muse_spark olmo3 plamo3 spark2_5 step3p5""".split()
_HYBRID = """granitemoehybrid jamba lfm2 lfm2-vl lfm2_moe nemotron_h olmo_hybrid plamo2
    prism_hadamard_qwen35 qwen3_5 qwen3_5_moe qwen3_next""".split()
_MLA = """deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_k25 kimi_vl longcat_flash
    mistral4""".split()
_MLA_HYBRID = """bailing_hybrid bailing_moe_v3 kimi_k3 kimi_linear longcat_flash_ngram""".split()

# architecture -> (positions of compressed caches, reasons of those left alone).
# What is not listed compresses every layer.
EXPECTED: dict[str, tuple[list[Position], set[str]]] = {
    **{name: (_ODD, {WINDOW}) for name in _WINDOWED},
    **{name: (_ODD, {RECURRENT}) for name in _HYBRID},
    **{name: ([], {LATENT}) for name in _MLA},
    **{name: ([], {LATENT, RECURRENT}) for name in _MLA_HYBRID},
    **{name: (_at(1, 3), {WINDOW}) for name in ("gemma3n", "gemma4", "gemma4_text")},
    **{name: ([], {RECURRENT}) for name in ("mamba", "mamba2", "rwkv7")},
    "baichuan_m1": (_at(0, 2, sub=1), {RECURRENT, WINDOW}),
    "bailing_moe_linear": (_at(1, 2), {RECURRENT}),
    "deepseek_v41": ([], {"a cache of its own kind, LayerCache"}),
    "falcon_h1": (_at(0, 1, 2, sub=1), {RECURRENT}),
    "gear": (_at(0, 3, 6), {WINDOW, RECURRENT}),
    "hunyuan": (_at(0, 1, 2, 3), set()),
    "iquestloopcoder": (_ALL, {WINDOW}),
    "llama4": (_at(3, 7), {CHUNKED}),
    "minimax_m3_vl": ([], {INDEXER}),
    "nemotron-nas": (_at(0, 1, 2), {UNUSED}),
    "recurrent_gemma": ([], {RECURRENT, WINDOW}),
}


def expected(name: str) -> tuple[list[Position], set[str]]:
    """Positions of the compressed caches and the reasons of the others."""
    return EXPECTED.get(name, (_ALL, set()))
