"""From a SPEC on the command line to a source of examples.

To add a kind of source: write its module beside this one and register it in `_KINDS`.
"""

from collections.abc import Callable

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleSource
from tracin_transforms.core.specs import split_spec
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
    path, options = split_spec(rest, f"examples {kind}:")
    if not path:
        raise InputError(f"examples {spec!r}: expected a path after {kind + ':'!r}")
    return _KINDS[kind](spec, path, options)


def _npz(spec: str, path: str, options: dict[str, str]) -> ExampleSource:
    by_input = {n.removeprefix("x."): v for n, v in options.items() if n.startswith("x.")}
    known = {"x", "y", "id", "weight"}
    unknown = sorted(name for name in options.keys() - known if not name.startswith("x."))
    if unknown:
        raise InputError(
            f"examples {spec!r}: unknown option {unknown[0]!r}, expected x (or x.NAME for each of "
            "a model's inputs), y, id or weight"
        )
    if by_input and "x" in options:
        raise InputError(f"examples {spec!r}: x and x.NAME: expected either one or the other")
    return NpzExamples(
        path,
        inputs=tuple(by_input.items()) or options.get("x", "x"),
        targets=options.get("y", "y"),
        example_ids=options.get("id"),
        sample_weights=options.get("weight"),
    )


_KINDS: dict[str, Callable[[str, str, dict[str, str]], ExampleSource]] = {"npz": _npz}
