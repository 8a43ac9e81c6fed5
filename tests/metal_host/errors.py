"""What can go wrong besides a wrong result."""

from __future__ import annotations


class HostError(Exception):
    """A defect of a kernel that the host layer caught; the text is the report."""


class ToolMissing(Exception):
    """A build tool is not installed; the text is one sentence saying which and how to get it."""
