"""The text of an evaluation: a file, the package's sample, or wikitext-2."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..errors import InputError
from ..files import cache_dir, read_bytes, replacing

WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
# llama.cpp's copy of the raw test split is the file whose digest is above.
WIKITEXT_REPO = "ggml-org/ci"
WIKITEXT_FILE = "wikitext-2-raw-v1.zip"
WIKITEXT_MEMBER = "wikitext-2-raw/wiki.test.raw"


@dataclass(frozen=True)
class TextSource:
    """A text with its name and the sha256 of its bytes."""

    name: str
    text: str
    sha256: str

    def record(self) -> dict:
        """The text in a record."""
        return {"name": self.name, "sha256": self.sha256}


def load_text(source: str | None = None, option: str = "--text") -> TextSource:
    """The text named by `source`: a file, 'sample', or 'wikitext-2' (also None).

    Args:
        option: what it was given by, for messages.

    Raises: InputError for a missing, unreadable or empty file, and where wikitext-2 cannot be
    fetched.
    """
    if source == "sample":
        data = (files("mlx_turbokv.evaluate") / "sample.txt").read_bytes()
        return _decoded("sample", data)
    if source is None or source == "wikitext-2":
        return _decoded("wikitext-2-raw test", _wikitext(option))
    path = Path(source).expanduser()
    try:
        data = read_bytes(path)
    except OSError as error:
        raise InputError(
            f"Text file {source} cannot be read ({error.strerror}); give a UTF-8 text file, "
            "'sample' or 'wikitext-2'."
        ) from None
    return _decoded(path.name, data)


def _decoded(name: str, data: bytes) -> TextSource:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"Text file {name} is not UTF-8 text.") from None
    if not text.strip():
        raise InputError(f"Text file {name} is empty: at least one window of text is needed.")
    return TextSource(name, text, hashlib.sha256(data).hexdigest())


def _wikitext(option: str) -> bytes:
    kept = cache_dir() / "wikitext-2-raw-test.txt"
    if kept.is_file():
        data = kept.read_bytes()
        if hashlib.sha256(data).hexdigest() == WIKITEXT_SHA256:
            return data
    data = _fetch_wikitext(option)
    if hashlib.sha256(data).hexdigest() != WIKITEXT_SHA256:
        raise InputError(
            f"The fetched wikitext-2 is not the expected file (sha256 {WIKITEXT_SHA256[:12]}…); "
            f"{_advice(option)}."
        )
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary:
            temporary.write_bytes(data)
    except OSError:
        pass  # fetched again next time
    return data


def _fetch_wikitext(option: str) -> bytes:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(WIKITEXT_REPO, WIKITEXT_FILE, repo_type="dataset")
        with zipfile.ZipFile(path) as archive:
            return archive.read(WIKITEXT_MEMBER)
    except Exception as error:  # the hub's client raises many kinds of errors
        raise InputError(
            f"Wikitext-2 could not be fetched from the hub ({type(error).__name__}); "
            f"{_advice(option)}."
        ) from None


def _advice(option: str) -> str:
    other = "none" if option == "--held-out" else "sample"
    return f"give a text with {option} FILE or {option} {other}"
