"""The recommended settings, and what to type for a policy."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_turbokv.cli.plan import command
from mlx_turbokv.evaluate.names import parse_policy
from mlx_turbokv.policy.recommended import label, options, recommended


def formats_and_bytes(*args: str) -> tuple[list, dict]:
    args = ("--model", "phi-4", "-c", "4K", "--output", "json", *args)
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    (row,) = json.loads(result.stdout)["rows"]
    return row["formats"], row["bytes"]


@pytest.mark.parametrize(
    "name",
    [
        "turbo4:32/turbo3", "q8_0/q8_0+0,64", "turbo4/turbo3+32,128", "mode-10", "boundary-v",
        "la-v7+32,128",
    ],
)  # fmt: skip
def test_what_to_type_selects_the_policy(name) -> None:
    typed = options(parse_policy(name))
    assert typed is not None
    assert formats_and_bytes(*typed.split()) == formats_and_bytes("--config", name)


@pytest.mark.parametrize(
    "name", ["turbo4/turbo3@la-v7", "la-v5:turbo4", "boundary:2,2:f16", "last:8:q8_0/turbo4+32,0"]
)
def test_a_policy_that_takes_more_than_its_name_has_nothing_to_type(name) -> None:
    assert options(parse_policy(name)) is None


def test_labels_are_configurations_of_the_same_policies() -> None:
    policies = recommended()
    assert [parse_policy(label(policy)) for policy in policies] == policies
    assert len({label(policy) for policy in policies}) == len(policies)
