"""Figures of the checks that take longer than the tests may."""

from __future__ import annotations

from mlx_turbokv.evaluate.tables import bytes_text

from . import figure, read


@figure
def long_checks() -> dict[str, str]:
    """What the records of the long checks say, by script."""
    simulation, greedy = read("simulation_agreement"), read("greedy_agreement")
    memory, load = read("decode_memory"), read("serve_load")
    parted = [abs(row["gap"]) for row in greedy["prompts"] if row["gap"] is not None]
    return {
        "simulation": f"{simulation['worst']:.0e} nats over {simulation['n_windows']} windows",
        "greedy": f"with {greedy['formats']} {len(greedy['prompts']) - len(parted)} of {len(greedy['prompts'])} texts are "
        f"the same, the others part where two tokens are at most {max(parted):.2f} nats apart",
        "memory": f"{bytes_text(memory['peak_above'])} above a cache of "
        f"{bytes_text(memory['packed_bytes'])} in {memory['steps']} steps",
        "load": f"{load['requests']} requests from {load['clients']} clients, "
        f"{load['disconnected']} of which hang up: {load['answered_as_without_load']} of "
        f"{load['answered']} answers are those without load, resident memory grows by "
        f"{load['growth_after_load']:.2%}",
    }
