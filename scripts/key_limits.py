"""What limits centred keys now, and what was tried against it at equal bits; values in f16.

Parts: drift (what blocks leave of mu in the keys, with and without a slope), channels (layer by
layer, which pairs of dims and which tokens hold the keys' energy, and what scales and an
allocation of bits promise), exact (what is gained where the loudest pairs or
tokens stay exact), turbo (the formats themselves, and a norm per 32 values), scales (pairs divided
by a power of their energy over the queries', folded into q), energy (bits by the pairs' energy, as
arXiv 2606.24033 has it), norms (one norm for all heads of a layer). From exact on, the measure is
KLD on held-out text.

    python scripts/key_limits.py --text FILE --chunks 64 --json benchmarks/centred_keys_tried.json

A finished part is kept in the JSON file and not run again.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from key_quantisers import EXACT, Group, Scheme, allocated, uniform  # noqa: E402
from key_study import Study, key_energies, keys_of, query_energies, run_parts  # noqa: E402

from mlx_turbokv.centring.calibration import SINK_TOKENS  # noqa: E402
from mlx_turbokv.evaluate.configuration import Prepared  # noqa: E402
from mlx_turbokv.quant.formats import KVFormat  # noqa: E402

PARTS = ("drift", "channels", "exact", "turbo", "scales", "energy", "norms")
BITS = (2, 3, 4)
BLOCKS = (16, 32, 64, 128, 256)
LOUD_PAIRS = 4
LOUD_SHARE = 0.01  # of the tokens
CHANNEL_BITS = 3  # the budget of what channels promises
QUARTER = 0.25  # the power that makes the expected error of scores least


class Limits:
    """Energies of queries and of centred keys, and what follows from them."""

    def __init__(self, study: Study, chunks: int, bits: tuple[int, ...] = BITS) -> None:
        self.study, self.chunks, self.bits = study, chunks, bits

    @cached_property
    def queries(self) -> list[np.ndarray]:
        return query_energies(self.study)

    @cached_property
    def energies(self) -> dict[bool, list[np.ndarray]]:
        """Of keys in each pair by layer, centred or not."""
        return {centred: key_energies(self.study, centred) for centred in (False, True)}

    def dims(self, layer: int) -> np.ndarray:
        """The two dims of each pair, [pairs, 2]."""
        return np.stack(self.study.centres()[layer].rope.pairs(), axis=-1)

    def spread(self, layer: int, by_pair: np.ndarray) -> np.ndarray:
        """A value a pair, at both its dims: [H, pairs] to [H, head_dim]."""
        full = np.empty((len(by_pair), 2 * by_pair.shape[1]))
        full[:, self.dims(layer).T] = by_pair[:, None]
        return full

    def scaled(self, layer: int, bits: int, power: float) -> Scheme:
        """Keys divided by (their energy / the queries') ** power before one rotation."""
        scale = (self.energies[True][layer] / self.queries[layer]) ** power
        scale /= np.exp(np.log(scale).mean(axis=-1, keepdims=True))
        return uniform(bits, len(scale), 2 * scale.shape[1], self.spread(layer, scale))

    def by_energy(self, layer: int, bits: int, scaled: bool, shared: bool, centred: bool = True) -> tuple[Scheme, list[float]]:  # fmt: skip
        """Bits by energy, and the errors that are promised, over those of one group a head."""
        q, k = self.queries[layer], self.energies[centred][layer]
        scale = (k / q) ** QUARTER if scaled else np.ones_like(k)
        heads, errors = [], []
        for h in range(len(q)):
            found, error = allocated(q[h], k[h], bits, scaled, shared)
            groups = []
            for pairs, width in found:
                if shared:  # every group has the same root mean square then
                    scale[h, pairs] *= np.sqrt((k[h] / scale[h] ** 2)[pairs].mean())
                groups.append(Group(tuple(self.dims(layer)[pairs].reshape(-1).tolist()), width))
            heads.append(tuple(groups))
            errors.append(error)
        norm = "head" if shared else "group"
        return Scheme(tuple(heads), self.spread(layer, scale), norm), errors

    def one_norm(self, layer: int, bits: int) -> Scheme:
        """One norm for all heads, whose ratios calibration fixes."""
        energy = self.energies[True][layer].mean(axis=1, keepdims=True)
        scale = np.sqrt(energy) * np.ones_like(self.energies[True][layer])
        return uniform(bits, *self.spread(layer, scale).shape, self.spread(layer, scale), "layer")

    def loud_pairs_exact(self, layer: int, bits: int, quiet: bool) -> Scheme:
        """The pairs that weigh most (or least) in scores as they are, the rest in one group."""
        weight = self.energies[True][layer] * self.queries[layer]
        order = np.argsort(weight if quiet else -weight, axis=1)
        heads = [
            tuple(
                Group(tuple(self.dims(layer)[pairs].reshape(-1).tolist()), width)
                for pairs, width in ((row[:LOUD_PAIRS], EXACT), (row[LOUD_PAIRS:], bits))
            )
            for row in order
        ]
        return Scheme(tuple(heads), np.ones((len(heads), 2 * order.shape[1])))

    def configs(self, part: str) -> tuple[list[Prepared], dict[str, float]]:
        """What a part compares, f16 first, and the bits per value of K."""
        made, bits = [self.study.config("f16/f16")], {}

        def add(label: str, scheme_of, centred=True, exact=(0, 0), loud=None) -> None:
            schemes = [scheme_of(i) for i in range(len(self.queries))]
            bits[label] = float(np.mean([s.bits_per_value for s in schemes]))
            read = lambda i: _read(schemes[i], loud)  # noqa: E731
            made.append(self.study.simulated(label, read, exact, centred=centred))

        shapes = [e.shape for e in self.queries]
        for b in self.bits:
            plain = lambda i, b=b: uniform(b, shapes[i][0], 2 * shapes[i][1])  # noqa: E731
            if part == "exact":
                add(f"{b} bits", plain)
                add(f"{b} bits, first key exact", plain, exact=(1, 0))
                add(f"{b} bits, loudest tokens exact", plain, loud="norm")
                add(f"{b} bits, as many others exact", plain, loud="other")
                add(f"{b} bits, loudest pairs exact", lambda i, b=b: self.loud_pairs_exact(i, b, False))  # fmt: skip
                add(f"{b} bits, quietest pairs exact", lambda i, b=b: self.loud_pairs_exact(i, b, True))  # fmt: skip
            elif part == "scales":
                for power in (QUARTER / 2, QUARTER):
                    scheme = lambda i, b=b, p=power: self.scaled(i, b, p)  # noqa: E731
                    add(f"{b} bits, scales to the {power}", scheme)
                    add(f"{b} bits, scales to the {power}, first key exact", scheme, exact=(1, 0))
            elif part == f"energy {b}":
                for scaled, shared in ((False, False), (True, False), (True, True)):
                    label = f"{b} bits by energy" + ", scaled" * scaled + ", one norm" * shared
                    scheme = lambda i, b=b, s=scaled, n=shared: self.by_energy(i, b, s, n)[0]  # noqa: E731
                    add(label, scheme)
                    if scaled and shared:
                        add(label + ", first key exact", scheme, exact=(1, 0))
                bare = lambda i, b=b: self.by_energy(i, b, False, False, centred=False)[0]  # noqa: E731
                add(f"{b} bits by energy, not centred", bare, centred=False)
            elif part == "norms":
                add(f"{b} bits, one norm a layer", lambda i, b=b: self.one_norm(i, b))
                add(f"{b} bits, one norm a layer, first key exact", lambda i, b=b: self.one_norm(i, b), exact=(1, 0))  # fmt: skip
        return made, bits

    def turbo(self) -> tuple[list[Prepared], dict[str, float]]:
        """The formats as the package has them: the curve that others are held against."""
        made, bits = [self.study.config("f16/f16")], {}
        names = [f"turbo{b}" for b in range(2, 7)] + [f"turbo{b}:32" for b in BITS]
        for name in names:
            for centred in (False, True):
                made.append(self.study.config(f"{name}/f16", centred))
                bits[made[-1].name] = KVFormat.parse(name).bits_per_value(
                    2 * self.queries[0].shape[1]
                )
        return made, bits

    def measure(self, part: str) -> dict:
        """The entry of a part."""
        if part == "drift":
            return {
                "share_of": "the energy of centred keys, mean over layers",
                "rows": self.drift(),
            }
        if part == "channels":
            return {"budget": CHANNEL_BITS, "loud_pairs": LOUD_PAIRS, "loud_share": LOUD_SHARE,
                    "layers": self.channels()}  # fmt: skip
        configs, bits = self.turbo() if part == "turbo" else self.configs(part)
        windows = self.study.windows(512, self.chunks)
        entry = self.study.measured(part, windows, configs)
        for row in entry["rows"][1:]:
            row["k_bits"] = bits[row["config"]]
        return entry

    def drift(self) -> list[dict]:
        """What each size of a block leaves of mu, with its mean alone and with a slope too."""
        found = []
        for size in BLOCKS:
            shares = []
            for layer, centre in self.study.centres().items():
                first, second = centre.rope.pairs()
                mu = np.square(np.array(centre.mu, np.float64))
                energy = (mu[:, first] + mu[:, second]).sum(axis=0)
                left = np.stack(_left(np.array(centre.rope.angles), size))
                shares.append(left @ energy / self.energies[True][layer].sum())
            mean, slope = np.mean(shares, axis=0)
            found.append({"block": size, "mean": float(mean), "mean_and_slope": float(slope)})
            print(found[-1], flush=True)
        return found

    def channels(self) -> list[dict]:
        """Where the energy of each layer's keys is, and what could be gained by knowing it."""
        tokens = self.tokens()
        found = []
        for layer, (q, k) in enumerate(zip(self.queries, self.energies[True])):
            weight = q * k
            order = np.argsort(-k, axis=1)[:, :LOUD_PAIRS]
            uneven = (np.sqrt(weight).sum(axis=1) ** 2) / (q.sum(axis=1) * k.sum(axis=1))
            promised = {
                name: float(np.mean(self.by_energy(layer, CHANNEL_BITS, *kind)[1]))
                for name, kind in (("energy", (False, False)), ("energy_scaled", (True, True)))
            }
            found.append({
                "energy_left": float(k.sum() / self.energies[False][layer].sum()),
                "loud_pairs_share": float(np.take_along_axis(k, order, 1).sum() / k.sum()),
                "loud_pairs": order.tolist(),
                "loud_pairs_weight": float(np.take_along_axis(weight, order, 1).sum() / weight.sum()),
                "promised": {"scales": float(uneven.mean()), **promised},
                **tokens[layer],
            })  # fmt: skip
            print(
                layer,
                {key: value for key, value in found[-1].items() if key != "loud_pairs"},
                flush=True,
            )
        return found

    def tokens(self) -> list[dict]:
        """Of each layer: how loud tokens are, and which; on the text that is not calibrated on."""
        windows = self.study.windows(512, min(self.chunks, 16))
        norms: dict[int, list] = {}
        for window in windows:
            for i, keys in enumerate(keys_of(self.study, window)):
                rest = keys - self.study.centres()[i].rows(0, len(window))
                norms.setdefault(i, []).append(np.array(mx.square(rest).sum(axis=(0, 1, 3))))
        found = []
        for i in range(len(norms)):
            energy = np.stack(norms[i])
            rest, ids = energy[:, SINK_TOKENS:].reshape(-1), windows[:, SINK_TOKENS:].reshape(-1)
            n_loud = int(len(rest) * LOUD_SHARE)
            loud = np.argsort(-rest)[:n_loud]
            common = Counter(self.study.tokenizer.decode([int(t)]) for t in ids[loud]).most_common(
                3
            )
            found.append({
                "first_key_energy": float(energy[:, 0].mean() / rest.mean()),
                "loud_tokens_share": float(rest[loud].sum() / rest.sum()),
                "loudest_energy": float(rest.max() / rest.mean()),
                "loud_tokens": [[text, n / n_loud] for text, n in common],
            })  # fmt: skip
        return found


def _left(angles: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of a turning pair's energy that a block's mean leaves, and its mean and slope."""
    at = np.arange(size) - (size - 1) / 2
    turns = np.exp(1j * angles[:, None] * at)
    mean = 1 - np.abs(turns.mean(axis=1)) ** 2
    return mean, mean - np.abs((turns * at).sum(axis=1)) ** 2 / (size * np.sum(at**2))


def _read(scheme: Scheme, loud: str | None):
    """Keys through a scheme, values as they are; some tokens exact."""

    def read(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        back = scheme(keys)
        if loud is not None:
            n = keys.shape[2]
            count = max(1, round(LOUD_SHARE * n))
            energy = mx.square(keys).sum(axis=(0, 1, 3))
            order = mx.argsort(-energy)
            chosen = order[:count] if loud == "norm" else order[n // 2 : n // 2 + count]
            exact = (mx.arange(n)[:, None] == chosen).any(axis=1)[:, None]
            back = mx.where(exact, keys, back)
        return back, values

    return read


@click.command()
@click.option("--model", default=None, help="As the commands take it.")
@click.option("--text", default="wikitext-2", help="A text file, 'sample' or 'wikitext-2'.")
@click.option("--calibration", default="sample", help="The text of means and energies.")
@click.option("--calibration-windows", default=6, show_default=True)
@click.option("--backend", default=None, help="Of the part turbo.")
@click.option("--chunks", default=64, show_default=True, help="Windows of 512 tokens.")
@click.option("--bits", default=",".join(map(str, BITS)), show_default=True, help="Of the codes.")
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--json", "json_path", default=str(ROOT / "benchmarks/centred_keys_tried.json"))
def main(model, text, calibration, calibration_windows, backend, chunks, bits, parts, json_path):
    study = Study(model, text, calibration, calibration_windows, backend)
    limits = Limits(study, chunks, tuple(int(b) for b in bits.split(",")))
    names = []
    for part in parts.split(","):  # an allocation takes many small operations: its bits apart
        names += [f"energy {b}" for b in limits.bits] if part == "energy" else [part]
    run_parts(study, names, limits.measure, Path(json_path))


if __name__ == "__main__":
    main()
