"""The property list of docs/server.md is one, and its options are accepted."""

from __future__ import annotations

import plistlib
import re
from pathlib import Path

from mlx_turbokv.cli.serve import command
from mlx_turbokv.serve.options import parse

PAGE = Path(__file__).parents[2] / "docs" / "server.md"


def test_the_property_list_is_readable_and_its_options_are_accepted() -> None:
    (text,) = re.findall(r"```xml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    job = plistlib.loads(text.encode())
    program, *options = job["ProgramArguments"]
    assert program.endswith("/mlx_turbokv.serve")
    context = command.make_context("serve", options)
    assert context.params["memory_limit"] == 12_000_000_000
    assert parse(context.args).max_tokens == 8192
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["SoftResourceLimits"] == {"NumberOfFiles": 4096}
