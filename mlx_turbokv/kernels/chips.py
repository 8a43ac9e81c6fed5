"""Published memory bandwidths of GPUs, which decode cannot exceed, and how many cores they have."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """A chip as its maker describes it.

    Args:
        bandwidths: of memory in GB/s, 1e9 bytes a second; two where a chip was sold with either.
        cores: the most GPU cores (Apple) or multiprocessors (NVIDIA) it was sold with; each issues
            128 float32 operations a cycle.
        source: where the maker says so.
    """

    bandwidths: tuple[float, ...]
    cores: int
    source: str


LANES_A_CORE = 128
CHIPS = {
    "Apple M1": Chip((68.25,), 8, "LPDDR4X-4266, 128 bits"),
    "Apple M1 Pro": Chip((200,), 16, "Apple newsroom, October 2021"),
    "Apple M1 Max": Chip((400,), 32, "Apple newsroom, October 2021"),
    "Apple M1 Ultra": Chip((800,), 64, "Apple newsroom, March 2022"),
    "Apple M2": Chip((100,), 10, "Apple newsroom, June 2022"),
    "Apple M2 Pro": Chip((200,), 19, "Apple newsroom, January 2023"),
    "Apple M2 Max": Chip((400,), 38, "Apple newsroom, January 2023"),
    "Apple M2 Ultra": Chip((800,), 76, "Apple newsroom, June 2023"),
    "Apple M3": Chip((100,), 10, "technical specifications, MacBook Pro 2023"),
    "Apple M3 Pro": Chip((150,), 18, "technical specifications, MacBook Pro 2023"),
    "Apple M3 Max": Chip((300, 400), 40, "technical specifications, MacBook Pro 2023"),
    "Apple M3 Ultra": Chip((819,), 80, "technical specifications, Mac Studio 2025"),
    "Apple M4": Chip((120,), 10, "Apple newsroom, May 2024"),
    "Apple M4 Pro": Chip((273,), 20, "Apple newsroom, October 2024"),
    "Apple M4 Max": Chip((410, 546), 40, "technical specifications, MacBook Pro 2024"),
    "Apple M5": Chip((153,), 10, "Apple newsroom, October 2025"),
    "Apple M5 Pro": Chip((307,), 20, "Apple newsroom, March 2026"),
    "Apple M5 Max": Chip((460, 614), 40, "technical specifications, MacBook Pro 2026"),
    "NVIDIA H100 80GB HBM3": Chip((3350,), 132, "NVIDIA H100 datasheet"),
    "NVIDIA H200": Chip((4800,), 132, "NVIDIA H200 datasheet"),
}


def published(device: str) -> Chip | None:
    """The chip that MLX calls ``device``; None where it is not listed."""
    return CHIPS.get(device)
