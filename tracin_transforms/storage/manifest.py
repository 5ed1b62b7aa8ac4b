"""The manifest of a result directory: what was computed, from what, and by which versions."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from tracin_transforms.core.errors import InputError

FILE_NAME = "manifest.json"
FORMAT = 1
_PACKAGES = ("tracin-transforms", "apache-beam", "keras", "numpy", "pyarrow", "tensorflow")


def write_manifest(directory: Path, run: dict[str, Any], summary: dict[str, Any]) -> None:
    """Writes the manifest, the last file of a complete result.

    Args:
        directory: The result directory.
        run: What determines the result (command, options, hashes of the inputs); JSON values.
        summary: What is worth knowing about the result, such as counts; JSON values.
    """
    document = {
        "format": FORMAT,
        "run": run,
        "summary": summary,
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    (directory / FILE_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest of a result directory.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise InputError(f"{str(directory)!r} has no {FILE_NAME}: expected a finished result")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{str(path)!r} is not a manifest of format {FORMAT}")
    return document


def is_finished(output: Path, run: dict[str, Any]) -> bool:
    """Returns whether the output directory already holds the result of exactly this run.

    Raises:
        InputError: It holds something else; the message says what differs.
    """
    if output.is_file():
        raise InputError(f"output {str(output)!r} is a file: expected a directory")
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / FILE_NAME).is_file():
        raise InputError(
            f"output {str(output)!r} is not empty and holds no result of this command: choose "
            "another directory, or replace it with --overwrite"
        )
    known = read_manifest(output)["run"]
    # As read back from JSON, where tuples have become lists.
    wanted = json.loads(json.dumps(run))
    if known == wanted:
        return True
    differences = [
        f"{name} is {_short(known.get(name))} there and {_short(wanted.get(name))} here"
        for name in sorted(known.keys() | wanted.keys())
        if known.get(name) != wanted.get(name)
    ]
    raise InputError(
        f"output {str(output)!r} holds the result of another run: {'; '.join(differences)}. "
        "Choose another directory, or replace it with --overwrite"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
