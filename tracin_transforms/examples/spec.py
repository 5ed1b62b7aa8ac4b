"""From a SPEC on the command line to a source of examples.

To add a kind of source: write its module beside this one and register it in `_KINDS`.
"""

from collections.abc import Callable
from urllib.parse import parse_qsl

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleSource
from tracin_transforms.examples.npz import NpzExamples


def parse_spec(spec: str) -> ExampleSource:
    """Returns the source that a SPEC names, such as ``npz:train.npz?x=images&y=labels&id=ids``.

    Raises:
        InputError: Unknown kind or option, or no path.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or kind not in _KINDS:
        raise InputError(
            f"examples {spec!r}: unknown kind of source {kind if separator else ''!r}, expected "
            f"one of {', '.join(f'{name}:' for name in sorted(_KINDS))} as in npz:train.npz"
        )
    path, _, query = rest.partition("?")
    if not path:
        raise InputError(f"examples {spec!r}: expected a path after {kind + ':'!r}")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise InputError(
            f"examples {spec!r}: {query!r} after '?' is not of the form name=value&name=value"
        ) from error
    return _KINDS[kind](spec, path, options)


def _npz(spec: str, path: str, options: dict[str, str]) -> ExampleSource:
    unknown = sorted(options.keys() - {"x", "y", "id"})
    if unknown:
        raise InputError(f"examples {spec!r}: unknown option {unknown[0]!r}, expected x, y or id")
    return NpzExamples(
        path,
        inputs=options.get("x", "x"),
        targets=options.get("y", "y"),
        example_ids=options.get("id"),
    )


_KINDS: dict[str, Callable[[str, str, dict[str, str]], ExampleSource]] = {"npz": _npz}
