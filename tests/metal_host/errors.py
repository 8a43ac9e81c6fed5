"""Errors of the host layer."""

from __future__ import annotations


class HostError(Exception):
    """A defect of a kernel that the host layer caught; the text is the report."""


class ToolMissingError(Exception):
    """A build tool is not installed; the text is one sentence saying which and how to get it."""
