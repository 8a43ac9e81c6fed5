"""What the paper "Layer-Aware V Compression" prints, by the roles of its configurations.

Roles: q8 (q8_0 for K and V), turbo3 and turbo2 (V alone), la-v5, la-v6, la-v7, 4+4 (mode 10), and
f16 2+2 and f16 4+4 (boundary layers with V in f16).
"""

from __future__ import annotations

# title: (columns of models, {role: cells}); perplexity.
QUALITY = {
    "Quality at 512 tokens, 4 windows": (
        ("phi-4", "Qwen2.5-7B", "Qwen3.5-27B", "Qwen3.5-35B"),
        {
            "q8": (4.690, 6.577, None, None),
            "turbo3": (4.742, 6.707, 6.273, 5.137),
            "turbo2": (4.835, 6.911, 6.534, 5.257),
            "la-v5": (4.784, 6.892, None, None),
            "la-v6": (4.805, None, None, None),
            "la-v7": (4.784, 6.835, 6.423, 5.148),
        },
    ),
    "Boundary precision at 512 tokens, 8 windows": (
        ("phi-4", "Qwen3.5-27B"),
        {
            "q8": (6.001, 6.888),
            "4+4": (6.047, 7.038),
            "f16 4+4": (6.065, 7.043),
            "f16 2+2": (6.090, 7.050),
            "la-v7": (6.110, 7.051),
            "turbo2": (6.106, 7.159),
        },
    ),
}
LONG = {
    "At 8,192 tokens, 2 windows": (
        ("phi-4", "Qwen2.5-7B", "Qwen3.5-27B"),
        {
            "turbo2": (5.082, 5.524, 6.496),
            "la-v7": (5.078, 5.480, 6.454),
            "4+4": (5.055, 5.459, 6.476),
            "turbo3": (5.004, 5.354, 6.323),
        },
    ),
}
# V's bits per value. The 27B's were counted over all 64 layers, of which 16 have a cache.
V_BITS = {
    "Bits per value of V": (
        ("phi-4", "Qwen2.5-7B", "Qwen3.5-27B"),
        {
            "turbo2": (2.5, 2.5, 2.5),
            "la-v7": (3.10, 3.36, 2.88),
            "4+4": (3.70, 4.21, 3.25),
            "turbo3": (3.5, 3.5, 3.5),
        },
    ),
}
# Share of the gap between turbo2 and turbo3 that LA-V7 closes.
GAP = {
    "Share of the gap from turbo2 to turbo3 closed, 512 tokens": (
        ("phi-4", "Qwen2.5-7B", "Qwen3.5-27B", "Qwen3.5-35B"),
        {"la-v7": ("55 %", "62 %", "43 %", "91 %")},
    ),
}
GAP_LONG = {
    "Share of the gap from turbo2 to turbo3 closed, 8,192 tokens": (
        ("phi-4", "Qwen2.5-7B", "Qwen3.5-27B"),
        {"la-v7": ("5 %", "26 %", "24 %"), "4+4": ("35 %", "38 %", "12 %")},
    ),
}
# phi-4 at 8,192 tokens on an M5 Max: prompt and generation tokens a second.
SPEED = {"turbo2": (634.24, 30.08), "turbo3": (612.56, 29.65), "la-v7": (628.53, 30.90)}
