"""The manifest of a result directory: what was computed, from what, and by which versions."""

import importlib.metadata
import json
from typing import Any

from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.files import (
    AnyPath,
    files_below,
    is_temporary,
    is_temporary_name,
    written_atomically,
)

FILE_NAME = "manifest.json"
FORMAT = 1
_PACKAGES = ("tracin-transforms", "apache-beam", "keras", "numpy", "pyarrow", "tensorflow")


def write_manifest(
    directory: AnyPath, run: dict[str, Any], summary: dict[str, Any], **more: Any
) -> None:
    """Writes the manifest, the last file of a complete result.

    Args:
        directory: The result directory.
        run: What determines the result (command, options, hashes of the inputs); JSON values.
        summary: What is worth knowing about the result, such as counts; JSON values.
        more: Other entries; JSON values.
    """
    document = {
        "format": FORMAT,
        "run": run,
        "summary": summary,
        "files": _files(directory),
        "versions": versions(),
        **more,
    }
    with written_atomically(directory / FILE_NAME) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: AnyPath) -> dict[str, Any]:
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
    known = isinstance(document, dict) and document.get("format") == FORMAT
    if not (
        known and isinstance(document.get("run"), dict) and isinstance(document.get("files"), list)
    ):
        raise InputError(f"{str(path)!r} is not a manifest of format {FORMAT}")
    return document


def is_finished(output: AnyPath, run: dict[str, Any], overwrite: bool = False) -> bool:
    """Returns whether the output directory already holds the result of exactly this run.

    Args:
        output: The directory.
        run: What determines the result.
        overwrite: A result of the same command may be replaced, so it does not count. Anything
            else may not: a slip must not cost more than what can be computed again.

    Raises:
        InputError: It holds something else; the message says what differs.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"output {str(output)!r} is a file: expected a directory")
    if output.is_mount():
        raise InputError(f"output {str(output)!r} is a mount point: choose a directory in it")
    paths: list[AnyPath] = list(output.iterdir()) if output.exists() else []
    if all(is_temporary(path) for path in paths):
        return False
    if not (output / FILE_NAME).is_file():
        raise InputError(
            f"output {str(output)!r} is not empty and holds no result of this command: choose "
            "another directory"
        )
    manifest = read_manifest(output)
    command = manifest["run"].get("command")
    if command != run["command"]:
        raise InputError(
            f"output {str(output)!r} holds a result of {command!r}, not of {run['command']!r}: "
            "choose another directory"
        )
    if overwrite:
        _check_replaceable(output, manifest)
        return False
    # As read back from JSON, where tuples have become lists.
    found = differences(manifest["run"], json.loads(json.dumps(run)))
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(
            f"output {str(output)!r} holds the result of another run: "
            f"{'; '.join(found[:3])}{more}. "
            "Choose another directory, or replace it with --overwrite"
        )
    missing = sorted(set(manifest["files"]) - set(_files(output)))
    if missing:
        raise InputError(
            f"output {str(output)!r} holds this result without its file {missing[0]!r}: compute it "
            "anew with --overwrite"
        )
    return True


def _files(directory: AnyPath) -> list[str]:
    """Returns the paths of all files in a directory, relative to it, in order.

    The manifest is left out, and temporary files, which other runs may have there.
    """
    names = (str(path).removeprefix(f"{directory}/") for path, _ in files_below(directory))
    return sorted(
        name
        for name in names
        if name != FILE_NAME and not any(map(is_temporary_name, name.split("/")))
    )


def _check_replaceable(output: AnyPath, manifest: dict[str, Any]) -> None:
    """Raises InputError if the directory holds more than the result."""
    foreign = sorted(set(_files(output)) - {*manifest["files"]})
    if foreign:
        raise InputError(
            f"output {str(output)!r} holds {foreign[0]!r}, which is no part of the result: move "
            "it away or choose another directory"
        )


def differences(known: Any, wanted: Any, name: str = "") -> list[str]:
    """Returns what differs, as "checkpoints[1].weight is 0.1 there and 0.2 here".

    Args:
        known: JSON values.
        wanted: Others.
        name: What they are, for the description.
    """
    if isinstance(known, dict) and isinstance(wanted, dict):
        keys = sorted(known.keys() | wanted.keys())
        parts = [(f"{name}.{key}".lstrip("."), known.get(key), wanted.get(key)) for key in keys]
    elif isinstance(known, list) and isinstance(wanted, list) and len(known) == len(wanted):
        parts = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(known, wanted, strict=True))]
    else:
        same = known == wanted
        return [] if same else [f"{name} is {_short(known)} there and {_short(wanted)} here"]
    return [found for part, a, b in parts for found in differences(a, b, part)]


def versions() -> dict[str, str | None]:
    """Returns the versions of the packages that a result depends on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
