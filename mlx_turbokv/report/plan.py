"""Plans: bits per value and bytes of policies on a model, and the context that fits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..cache.rotating import SLACK_TOKENS
from ..centring import AUTO
from ..centring.references import paths_for
from ..errors import InputError
from ..evaluate.configuration import shape_bits
from ..loading.model_shape import ModelShape
from ..model.shapes import KVShape
from ..policy import LayerList, Pair, Policy, Protection, Uniform
from ..policy.protection import UNPROTECTED
from ..policy.recommended import options
from ..quant.formats import KVFormat, as_format, check_head_dim

MOST_TOKENS = 1 << 40  # what more tokens would take is not asked
F16_BYTES = 2
STEP = 2048  # prompt tokens at a time
# What a boundary is measured against: the next uniform step up from turbo2.
RIVAL_V = "turbo3"


@dataclass(frozen=True)
class Row:
    """One configuration on one model.

    Args:
        name: as it was given.
        policy: what it names.
        formats: (K, V) of every KV layer.
        k_bits, v_bits, bits: bits per value of K, of V and of both, scales included.
        bytes_at: bytes of all caches of a sequence by context length, those left alone included.
        notes: sentences about this configuration.
        max_tokens: tokens that fit the memory, or None without a limit.
        typed: the options that select it, where there are such.
    """

    name: str
    policy: Policy
    formats: list[Pair]
    k_bits: float
    v_bits: float
    bits: float
    bytes_at: dict[int, int]
    notes: list[str] = field(default_factory=list)
    max_tokens: int | None = None
    typed: str | None = None


@dataclass(frozen=True)
class Plan:
    """Several configurations side by side.

    Args:
        f16_bytes_at: bytes of the same caches in 16 bits, by context length.
        uncompressed_bytes_at: of these, bytes of sliding windows and states that are not packed.
        weight_bytes: what the weights take, or None where they are not known.
        memory_bytes: what the GPU may use, or None.
        machine_bytes: the memory of which this is a part, or None.
        step: prompt tokens at a time.
    """

    model: ModelShape
    contexts: list[int]
    rows: list[Row]
    f16_bytes_at: dict[int, int]
    weight_bytes: int | None = None
    memory_bytes: int | None = None
    uncompressed_bytes_at: dict[int, int] = field(default_factory=dict)
    machine_bytes: int | None = None
    step: int = STEP

    def free_bytes(self) -> int | None:
        """Memory that the weights leave."""
        if self.memory_bytes is None:
            return None
        return self.memory_bytes - (self.weight_bytes or 0)

    def scratch(self, n_tokens: int) -> int:
        """Bytes above weights and caches while a prompt is read."""
        return self.model.scratch(n_tokens, self.step)

    def fits(self, row: Row, n_tokens: int) -> bool:
        """Whether caches of one of the contexts fit."""
        free = self.free_bytes()
        return free is None or row.bytes_at[n_tokens] + self.scratch(n_tokens) <= free


def make_plan(
    model: ModelShape,
    policies: Iterable[tuple[str, Policy]],
    contexts: Iterable[int],
    memory_bytes: int | None = None,
    weight_bytes: int | None = None,
    centre: bool | str = True,
    machine_bytes: int | None = None,
    step: int = STEP,
) -> Plan:
    """Compute a plan.

    Args:
        policies: (name, policy), a row each.
        memory_bytes, weight_bytes, machine_bytes, step: as ``Plan`` has them.
        centre: as ``make_prompt_cache`` takes it.

    Raises:
        InputError: no KV layer to compress, a context below 1, a policy that does not fit, or a
            head_dim that a format cannot store.
    """
    contexts = list(contexts)
    if contexts and min(contexts) < 1:
        raise InputError(f"Context {min(contexts)} is not accepted: it must be 1 or more.")
    if not model.layers.layers:
        reasons = " ".join(model.layers.notes()) or "It keeps no KV cache."
        raise InputError(f"{model.name} has no KV layer that can be compressed. {reasons}")
    f16 = Uniform("f16", "f16").formats(len(model.shapes))
    plan = Plan(
        model=model,
        contexts=contexts,
        rows=[],
        f16_bytes_at={n: _bytes_at(f16, model, n) for n in contexts},
        weight_bytes=weight_bytes,
        memory_bytes=memory_bytes,
        uncompressed_bytes_at={n: sum(x.bytes_at(n) for x in model.uncompressed) for n in contexts},
        machine_bytes=machine_bytes,
        step=step,
    )
    plan.rows.extend(_row(plan, name, policy, centre) for name, policy in policies)
    return plan


def raw_index_v_bits(policy: Policy, model: ModelShape) -> tuple[float, int, int] | None:
    """V's bits per value if the policy counted raw layer indices, as upstream does.

    Returns:
        (bits per value, KV layers that got other formats than the middle, those that should), or
        None where raw indices and KV ordinals give the same.
    """
    if model.n_caches == len(model.shapes) or isinstance(policy, LayerList):
        return None
    if len(set(policy.formats(len(model.shapes)))) == 1:
        return None
    raw = policy.formats(model.n_caches)
    hit = [raw[layer.index] for layer in model.layers.layers]
    right = policy.formats(len(hit))
    middle = right[len(right) // 2]
    shapes = model.shapes
    bits = shape_bits(hit, shapes)[1]
    return bits, sum(pair != middle for pair in hit), sum(pair != middle for pair in right)


def runs(formats: list[Pair]) -> list[tuple[int, int, Pair]]:
    """Consecutive layers with the same formats: (first ordinal, last ordinal, pair)."""
    found: list[tuple[int, int, Pair]] = []
    for ordinal, pair in enumerate(formats):
        if found and found[-1][2] == pair:
            found[-1] = (found[-1][0], ordinal, pair)
        else:
            found.append((ordinal, ordinal, pair))
    return found


def _row(plan: Plan, name: str, policy: Policy, centre: bool | str) -> Row:
    shapes = plan.model.shapes
    formats = policy.formats(len(shapes))
    for (k, v), shape in zip(formats, shapes):
        check_head_dim(k, shape.k_head_dim)
        check_head_dim(v, shape.v_head_dim)
    k_bits, v_bits, bits = shape_bits(formats, shapes)
    free, protection = plan.free_bytes(), policy.protection
    return Row(
        name=name,
        policy=policy,
        formats=formats,
        k_bits=k_bits,
        v_bits=v_bits,
        bits=bits,
        bytes_at={n: _bytes_at(formats, plan.model, n, protection) for n in plan.contexts},
        notes=[
            *policy.notes(len(shapes)),
            *_unprofitable(name, formats, shapes, v_bits),
            *_centring(name, plan.model, formats, policy, centre),
        ],
        max_tokens=None if free is None else _most_tokens(plan, formats, free, protection),
        typed=options(policy),
    )


def _unprofitable(
    name: str, formats: list[Pair], shapes: list[KVShape], v_bits: float
) -> list[str]:
    """A note where protecting a few layers costs more than the next format in all of them."""
    v_formats = [v for _, v in formats]
    if len(set(v_formats)) < 2:
        return []
    cheapest = min(v_formats, key=lambda v: v.bits)
    if not cheapest.is_turbo or cheapest.bits >= as_format(RIVAL_V).bits:
        return []
    rival = KVFormat("turbo", as_format(RIVAL_V).bits, cheapest.group)
    uniform = shape_bits([(k, rival) for k, _ in formats], shapes)[1]
    if v_bits < uniform:
        return []
    return [
        f"{name} takes more bits than {rival} in every layer: V takes {v_bits:.2f} bits per value "
        f"over {len(formats)} KV layers, and {uniform:.2f} with {rival}."
    ]


def _centring(
    name: str, model: ModelShape, formats: list[Pair], policy: Policy, centre: bool | str
) -> list[str]:
    """A note on whether turbo keys will be centred, and by what."""
    n = sum(k.is_turbo for k, _ in formats)
    if n == 0 or model.key_bias is None:
        return []
    file = getattr(policy, "path", None)
    if isinstance(centre, str) and centre != AUTO:
        file = centre
    elif file and not paths_for(file)[1].is_file():
        file = None
    if centre is False:
        how = "stay as they are (--no-centre)"
        if model.key_bias:
            how += ", although the key projection has a bias"
    elif file:
        how = f"are centred by the calibrated means in {paths_for(file)[1].name}"
    elif centre == AUTO:
        how = "are centred and scaled by what is measured at the model's first use"
    elif model.key_bias:
        how = "are centred by the bias of the key projection"
    else:
        how = "are not centred: the model has no key bias, and no calibrated means were given"
    return [f"{name}: the turbo keys of {n} layer{'s' * (n > 1)} {how}."]


def _bytes_at(
    formats: list[Pair],
    model: ModelShape,
    n: int,
    protection: Protection = UNPROTECTED,
    rows_of: Callable[[Protection, int], tuple[int, int]] = Protection.rows_after,
) -> int:
    """Bytes of all caches after ``n`` tokens.

    Args:
        rows_of: how many rows are unprotected and protected, of a protection and of ``n``.
    """
    protected = rows_of(protection, n)
    total = sum(x.bytes_at(n) for x in model.uncompressed)
    for layer, shape, (k, v) in zip(model.layers.layers, model.shapes, formats):
        rows = n
        if layer.window is not None:
            spare = 0 if k.is_f16 and v.is_f16 else SLACK_TOKENS
            rows = min(n, layer.window + spare)
        sides = ((k, shape.k_head_dim), (v, shape.v_head_dim))
        counts = rows, 0
        if layer.window is None and any(fmt.protected != fmt for fmt, _ in sides):
            counts = protected
        for fmt, dim in sides:
            for n_rows, stored in zip(counts, (fmt, fmt.protected)):
                total += n_rows * shape.n_kv_heads * stored.row_bytes(dim, F16_BYTES)
    return total


def _most_tokens(plan: Plan, formats: list[Pair], free: int, protection: Protection) -> int | None:
    """The longest context that fits, or None if every context fits."""

    def most_bytes(n: int) -> int:
        caches = _bytes_at(formats, plan.model, n, protection, Protection.most_rows)
        return caches + plan.scratch(n)

    more = bisect_right(range(1, MOST_TOKENS + 1), free, key=most_bytes)
    return None if more == MOST_TOKENS else more
