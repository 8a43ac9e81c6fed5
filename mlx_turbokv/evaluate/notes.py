"""Sentences below tables on how the configurations in them store keys and tokens."""

from __future__ import annotations


def centring_notes(centred: dict[str, str | None]) -> list[str]:
    """A sentence on the configurations whose keys are centred in the same way, for each way."""
    names: dict[str, list[str]] = {}
    for name, how in centred.items():
        if how and how.startswith("keys centred"):
            names.setdefault(how, []).append(name)
    return [f"{', '.join(found)}: {how}." for how, found in names.items()]


def protection_notes(protected: dict[str, str | None]) -> list[str]:
    """Sentences on which configurations protect tokens, and which could but do not.

    Args:
        protected: "SINK,RECENT" or None by configuration. Records made before protected tokens
            have none, and protected none.
    """
    names: dict[str | None, list[str]] = {}
    for name, found in protected.items():
        if found or may_protect(name):
            names.setdefault(found, []).append(name)
    notes = []
    for found in sorted(filter(None, names)):
        sink, recent = found.split(",")
        notes.append(
            f"The first {sink} and at least the newest {recent} tokens take 8.5 bits a value in "
            f"{', '.join(names[found])}."
        )
    if without := names.get(None):
        where = f" in {', '.join(without)}" if notes else ""
        notes.append(f"No tokens are protected{where}.")
    return notes


def may_protect(name: str) -> bool:
    """Whether some of a configuration's tokens could be stored in more bits than the others."""
    theirs = name.startswith(("mlx-kv", "llama-"))
    return "turbo" in name or not ("/" in name.partition("+")[0] or theirs)


def protected_rows(rows: list[dict]) -> list[str]:
    """The same of a record's rows."""
    return protection_notes({row["config"]: row.get("protected") for row in rows})
