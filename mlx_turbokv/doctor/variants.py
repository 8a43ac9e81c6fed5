"""The kernel variants that doctor checks: formats of K and V, head_dims, shapes and edges."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..policy import settings
from ..quant.formats import FORMAT_NAMES, KVFormat
from ..quant.layout import KVLayout

FORMATS = (*FORMAT_NAMES, *(f"turbo{bits}:32" for bits in (2, 3, 4, 5, 6)))
HEAD_DIMS = (64, 72, 80, 96, 112, 128, 160, 192, 256, 512)
COMMON_DIMS = (128, 64)
# of the settings by name, which protect tokens, also a wide head, and one whose scale groups lie in
# two rotation groups
SETTING_DIMS = (*COMMON_DIMS, 256, 160)
QUICK = (("q8_0", "turbo2"), settings.PAIRS[settings.DEFAULT])
PROTECTED = {*QUICK, *settings.PAIRS.values()}
# head_dims that differ, as models with multi-head latent attention have them
UNEQUAL_DIMS = (192, 128)
# (GQA factor, queries, edge): a variant gets the next one, besides one query with a GQA factor of 4
SHAPES = (
    (1, 1, "plain"),
    (8, 2, "causal"),
    (3, 1, "sinks"),
    (4, 8, "causal"),
    (7, 1, "starts"),
    (16, 1, "plain"),
    (2, 4, "sinks"),
)
DTYPES = ("float16", "float16", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Variant:
    """One pair of formats, and the shape that decode is checked on besides the plain one.

    ``centred``: keys have a large constant part, which is taken out.
    """

    k_format: str
    v_format: str
    k_head_dim: int
    v_head_dim: int
    dtype: str = "float16"
    gqa_factor: int = 1
    n_queries: int = 1
    edge: str = "plain"
    centred: bool = False

    def __str__(self) -> str:
        dims = f"{self.k_head_dim}"
        if self.v_head_dim != self.k_head_dim:
            dims += f"/{self.v_head_dim}"
        centred = " centred" * self.centred
        return f"{self.k_format}/{self.v_format}{centred} head_dim {dims} {self.dtype}"

    @property
    def protected(self) -> bool:
        """Whether it is checked with protected tokens as well: a setting's or preset's pair."""
        return (self.k_format, self.v_format) in PROTECTED

    @property
    def layout(self) -> KVLayout:
        """The stored layout of the pair."""
        formats = KVFormat.parse(self.k_format), KVFormat.parse(self.v_format)
        return KVLayout(*formats, self.k_head_dim, self.v_head_dim, self.dtype)

    def as_json(self) -> dict:
        """The fields, to make the same variant elsewhere."""
        return asdict(self)


def variant_set(which: str = "default") -> list[Variant]:
    """The variants of a set.

    ``quick``: the two recommended pairs at the two most common head_dims. ``default``: every
    format on K and on V at those head_dims, and at every other one three pairs that take the
    formats in turn; and the pairs of the settings. ``full``: every pair of formats, and every
    format on K and V at every head_dim.
    """
    pairs: dict[tuple[str, str, int, int], None] = {}

    def add(k: str, v: str, k_dim: int, v_dim: int | None = None) -> None:
        pairs.setdefault((k, v, k_dim, v_dim or k_dim))

    for dim in COMMON_DIMS:
        for k, v in QUICK:
            add(k, v, dim)
    if which != "quick":
        n = len(FORMATS)
        per_dim = n if which == "full" else 3
        for shift, dim in enumerate(COMMON_DIMS, 1):
            for i, k in enumerate(FORMATS):
                add(k, FORMATS[(i + 2 * shift) % n], dim)
        rest = [(d, d) for d in HEAD_DIMS if d not in COMMON_DIMS] + [UNEQUAL_DIMS]
        for j, dims in enumerate(rest):
            for i in range(per_dim):
                at = j * per_dim + i
                add(FORMATS[at % n], FORMATS[(at + 3 + j) % n], *dims)
        for k, v in settings.PAIRS.values():
            for dim in SETTING_DIMS:
                add(k, v, dim)
    if which == "full":
        for k in FORMATS:
            for v in FORMATS:
                add(k, v, COMMON_DIMS[0])
    found = []
    for i, pair in enumerate(pairs):
        gqa, queries, edge = SHAPES[i % len(SHAPES)]
        centred = i % 2 == 1 and KVFormat.parse(pair[0]).is_turbo
        found.append(Variant(*pair, DTYPES[i % len(DTYPES)], gqa, queries, edge, centred))
    return found
