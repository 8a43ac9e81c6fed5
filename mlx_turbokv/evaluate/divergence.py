"""KL divergence and related distances between two runs' logits, position by position.

Everything is computed from two sets of logits over the same positions, in float32 MLX ops: the
vocabulary is large, so each quantity costs as few passes over it as it can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import InputError

# Rows at a time. On a CPU the passes over a block then find it in the cache; on a GPU a block is
# large enough to fill it.
CPU_BLOCK, GPU_BLOCK = 16, 256
LOWEST = -1e30
SUMS = 64


@dataclass(frozen=True)
class PositionStats:
    """Per-position results of one configuration, each a NumPy array of n positions.

    nll: loss of the true next token, in nats.
    kld: KL(reference || this), in nats.
    delta_p: probability of the true next token, this minus the reference's.
    same_top: whether both give the highest probability to the same token.
    top_right: whether this run's most probable token is the true one.
    """

    nll: np.ndarray
    kld: np.ndarray
    delta_p: np.ndarray
    same_top: np.ndarray
    top_right: np.ndarray

    def to_json(self) -> dict:
        """Plain lists, which read back to the same bits."""
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_json(cls, record: dict) -> PositionStats:
        """The statistics that ``to_json`` gave."""
        dtypes = {"same_top": np.bool_, "top_right": np.bool_}
        return cls(**{k: np.array(x, dtypes.get(k, np.float32)) for k, x in record.items()})


def check_finite(values: np.ndarray, config: str) -> None:
    """Check what was computed from a run's logits.

    Raises: InputError naming the configuration, or a change of one, where values are not numbers.
    """
    if not np.all(np.isfinite(values)):
        raise InputError(
            f"The model's logits are not finite with {config}: its weights or its cache hold "
            "values that are no numbers."
        )


class Reference:
    """The reference run's distribution over one window, in place of its logits.

    Shapes: logits [n, vocabulary], targets [n].
    """

    def __init__(self, logits: mx.array, targets: mx.array):
        self.targets = targets
        parts = []
        for rows in _blocks(targets.size):
            logp, p, top = _distribution(logits[rows])
            mx.eval(logp, p, top)
            parts.append((logp, p, top))
        self.logp, self.p, self.top = (mx.concatenate(list(x)) for x in zip(*parts))
        self.target_logp = _pick(self.logp, targets)
        mx.eval(self.logp, self.p, self.target_logp, self.top)

    def compare(self, logits: mx.array) -> PositionStats:
        """Statistics of another run's logits over the same positions.

        KL is summed as p_c - p_r - p_r (log p_c - log p_r), which is zero or more at every token:
        the rounding of the two normalisations, all that a plain sum would show where the
        distributions nearly agree, drops out.
        """
        blocks = []
        for block in self._compared(logits):
            mx.eval(block)
            blocks.append(block)
        kld, target_logp, top = (np.array(mx.concatenate(list(parts))) for parts in zip(*blocks))
        return PositionStats(
            nll=-target_logp,
            kld=np.maximum(kld, 0.0),
            delta_p=np.exp(target_logp) - np.exp(np.array(self.target_logp)),
            same_top=top == np.array(self.top),
            top_right=top == np.array(self.targets),
        )

    def kld(self, logits: mx.array) -> np.ndarray:
        """The KLD of `compare` alone, [n]; nothing else is computed."""
        parts = []
        for kld, _, _ in self._compared(logits):
            mx.eval(kld)
            parts.append(kld)
        return np.maximum(np.array(mx.concatenate(parts)), 0.0)

    def _compared(self, logits: mx.array) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
        """KLD, log-probability of the true token and most probable token, in blocks of rows."""
        for rows in _blocks(self.targets.size):
            logp, p, top = _distribution(logits[rows])
            p_ref = self.p[rows]
            kld = _sum_rows(p - p_ref - p_ref * (logp - self.logp[rows]))
            yield kld, _pick(logp, self.targets[rows]), top

    def own_stats(self) -> PositionStats:
        """The reference against itself."""
        n = self.targets.size
        return PositionStats(
            nll=-np.array(self.target_logp),
            kld=np.zeros(n, np.float32),
            delta_p=np.zeros(n, np.float32),
            same_top=np.ones(n, np.bool_),
            top_right=np.array(self.top == self.targets),
        )


def _blocks(n: int) -> list[slice]:
    """Slices of n rows that are worked on one after the other."""
    step = GPU_BLOCK if mx.default_device().type == mx.DeviceType.gpu else CPU_BLOCK
    return [slice(i, i + step) for i in range(0, n, step)]


def _distribution(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Log-probabilities, probabilities and most probable token of each row."""
    # A token masked with -inf has probability zero; 0 * -inf must not become NaN in the sums.
    logits = mx.maximum(logits.astype(mx.float32), LOWEST)
    # Shifted first, normalised second: small numbers round less, and one exponential a token
    # gives both the probability and the normaliser.
    shifted = logits - mx.max(logits, axis=-1, keepdims=True)
    e = mx.exp(shifted)
    total = _sum_rows(e)[:, None]
    return shifted - mx.log(total), e * (1.0 / total), mx.argmax(logits, axis=-1)


def _sum_rows(x: mx.array) -> mx.array:
    """Sums of rows in two stages.

    A vocabulary is long, and MLX's CPU sums a row one by one: in float32 that loses 1e-4 of the sum
    of 50,000 probabilities. 64 sums of every 64th value lose a hundredth of it, and are faster.

    Shapes: x [n, values]; returns [n].
    """
    whole = x.shape[-1] // SUMS * SUMS
    if not whole:
        return mx.sum(x, axis=-1)
    total = mx.sum(mx.sum(x[:, :whole].reshape(x.shape[0], -1, SUMS), axis=1), axis=-1)
    return total if whole == x.shape[-1] else total + mx.sum(x[:, whole:], axis=-1)


def _pick(rows: mx.array, targets: mx.array) -> mx.array:
    return mx.take_along_axis(rows, targets[:, None], axis=-1)[:, 0]
