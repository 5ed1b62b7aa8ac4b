"""From a SPEC on the command line to a source of examples.

To add a kind of source: write its module beside this one and register it in `_KINDS`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleSource
from tracin_transforms.core.specs import split_spec
from tracin_transforms.core.user_code import load_function
from tracin_transforms.examples.decoding import ImageDecoding
from tracin_transforms.examples.fields import Fields, InputField
from tracin_transforms.examples.images import ImageExamples
from tracin_transforms.examples.npz import NpzExamples
from tracin_transforms.examples.parquet import ParquetExamples
from tracin_transforms.examples.prepared_data import SUPERVISED
from tracin_transforms.examples.preprocess import PreprocessedExamples
from tracin_transforms.examples.tfds import TFDSExamples
from tracin_transforms.examples.tfrecord import TFRecordExamples

_ROLES = ("x", "y", "id", "weight")
_IMAGES = ("resize", "crop", "channels")
_FIELDS = (*_ROLES, "decode", "shape", *_IMAGES)
# Options that can be given for one of a model's inputs, as x.NAME.
_BY_INPUT = ("x", "decode", "shape")


def parse_spec(spec: str, parse: str | None = None, preprocess: str | None = None) -> ExampleSource:
    """Returns the source that a SPEC names, such as ``npz:train.npz?x=images&y=labels&id=ids``.

    Args:
        spec: Kind, path and options.
        parse: ``module:function``, which makes (x, y) of a record.
        preprocess: ``module:function``, which makes what the model takes of a batch of x.

    Raises:
        InputError: Unknown kind or option, or no path, or a function for another kind.
    """
    name, separator, rest = spec.partition(":")
    if not separator or name not in _KINDS:
        raise InputError(
            f"examples {spec!r}: unknown kind of source {name if separator else ''!r}, expected "
            f"one of {', '.join(f'{name}:' for name in sorted(_KINDS))} as in npz:train.npz"
        )
    kind = _KINDS[name]
    path, options = split_spec(rest, f"examples {name}:")
    if not path:
        raise InputError(f"examples {spec!r}: expected a path after {name + ':'!r}")
    if parse is not None and kind.parsed_options is None:
        parsed = [f"{name}:" for name in sorted(_KINDS) if _KINDS[name].parsed_options is not None]
        raise InputError(
            f"examples {spec!r}: --parse {parse!r} is for records, of {', '.join(parsed)}; "
            "--preprocess is for all kinds"
        )
    source = kind.build(_Spec(spec, path, options, parse).checked(kind))
    return source if preprocess is None else PreprocessedExamples(source, preprocess)


class _Kind(NamedTuple):
    """A kind of source.

    Attributes:
        build: Makes the source.
        options: Those it takes; None for any.
        parsed_options: Those it takes beside a function that parses records; None where there is
            no such function.
    """

    build: "Callable[[_Spec], ExampleSource]"
    options: tuple[str, ...] | None
    parsed_options: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Spec:
    """A SPEC in parts, with the texts of its options."""

    text: str
    path: str
    options: dict[str, str]
    parse: str | None

    def checked(self, kind: _Kind) -> "_Spec":
        """Returns the same, if it has only options of that kind."""
        expected = kind.options if self.parse is None else kind.parsed_options
        if expected is None:
            return self
        for name in self.options:
            option, _, input_name = name.partition(".")
            by_input = input_name and option in _BY_INPUT and option in expected
            if name not in expected and not by_input:
                beside = "" if self.parse is None else " beside --parse"
                raise InputError(
                    f"examples {self.text!r}: unknown option {name!r}, expected "
                    f"{_listed(expected)}{beside}"
                )
        if "x" in self.options and self.input_names:
            raise InputError(
                f"examples {self.text!r}: x and x.NAME: expected either one or the other"
            )
        for name in self.options:
            option, _, input_name = name.partition(".")
            if input_name and option != "x" and input_name not in self.input_names:
                raise InputError(
                    f"examples {self.text!r}: option {name!r} is for an input that has no "
                    f"'x.{input_name}': expected one"
                )
        return self

    @property
    def input_names(self) -> list[str]:
        """The names of the model's inputs, if there is an option for each."""
        return [name.removeprefix("x.") for name in self.options if name.startswith("x.")]

    def sizes(self, option: str, forms: Sequence[str], input_name: str = "") -> tuple[int, ...]:
        """Returns the numbers of an option such as ``224x192``, or () where it is not given."""
        text = self.options.get(f"{option}.{input_name}", self.options.get(option, ""))
        if not text:
            return ()
        parts = text.split("x")
        if not all(part.isdecimal() and int(part) for part in parts) or (
            len(parts) > len(forms) and "..." not in forms[-1]
        ):
            raise InputError(
                f"examples {self.text!r}: {option} is {text!r}, expected {' or '.join(forms)}"
            )
        return tuple(map(int, parts))

    def images(self) -> ImageDecoding:
        """Returns how images are decoded."""
        crop = self.sizes("crop", ("N", "HxW"))
        channels = self.sizes("channels", ("1, 3 or 4",))
        return ImageDecoding(
            resize=self.sizes("resize", ("N", "HxW")) or None,
            crop=(crop[0], crop[-1]) if crop else None,
            channels=channels[0] if channels else None,
        )

    def fields(self, x: str, y: str) -> Fields:
        """Returns which fields of a record are the example, x and y where that is not said."""
        inputs = tuple((n, self._input(n, self.options[f"x.{n}"])) for n in self.input_names)
        return Fields(
            inputs=inputs or self._input("", self.options.get("x", x)),
            targets=self.options.get("y", y),
            example_ids=self.options.get("id"),
            sample_weights=self.options.get("weight"),
            images=self.images(),
        )

    def _input(self, name: str, field: str) -> InputField:
        decode = self.options.get(f"decode.{name}", self.options.get("decode"))
        return InputField(field, decode, self.sizes("shape", ("N", "NxN..."), name) or None)


def _npz(spec: _Spec) -> ExampleSource:
    options = spec.options
    return NpzExamples(
        spec.path,
        inputs=tuple((n, options[f"x.{n}"]) for n in spec.input_names) or options.get("x", "x"),
        targets=options.get("y", "y"),
        example_ids=options.get("id"),
        sample_weights=options.get("weight"),
    )


def _tfrecord(spec: _Spec) -> ExampleSource:
    return TFRecordExamples(spec.path, spec.fields("x", "y"), spec.parse)


def _parquet(spec: _Spec) -> ExampleSource:
    columns = spec.options.get("columns")
    return ParquetExamples(
        spec.path,
        spec.fields("x", "y"),
        spec.parse,
        None if columns is None else tuple(columns.split(",")),
    )


def _images(spec: _Spec) -> ExampleSource:
    options = spec.options
    return ImageExamples(spec.path, options.get("classes"), options.get("labels"), spec.images())


def _tfds(spec: _Spec) -> ExampleSource:
    data_set, _, data_dir = spec.path.partition("@")
    depth = end = 0
    # The last colon that is not in the brackets of a split such as train[10%:20%].
    for i, character in enumerate(data_set):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == ":" and not depth:
            end = i
    name, split = data_set[:end], data_set[end + 1 :]
    if not name or not split:
        raise InputError(
            f"examples {spec.text!r}: expected tfds:NAME:SPLIT or tfds:NAME:SPLIT@DATA_DIR, as in "
            "tfds:mnist:train"
        )
    fields = spec.fields(SUPERVISED, SUPERVISED)
    return TFDSExamples(name, split, data_dir or None, fields, spec.parse)


def _own(spec: _Spec) -> ExampleSource:
    function = load_function(spec.path, "examples source:")
    try:
        inspect.signature(function).bind(**spec.options)
    except TypeError as error:
        raise InputError(
            f"examples {spec.text!r}: {error}: expected the arguments of {spec.path!r} as options"
        ) from error
    source = function(**spec.options)
    if ExampleSource not in type(source).__mro__:
        raise InputError(
            f"examples {spec.text!r} is {source!r:.60}: expected an instance of a class that "
            "derives from tracin_transforms.ExampleSource"
        )
    return source


def _listed(options: Sequence[str]) -> str:
    """Returns the options as an enumeration."""
    names = [
        "x (or x.NAME for each of a model's inputs)" if name == "x" else name for name in options
    ]
    if not names:
        return "none"
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


_KINDS = {
    "images": _Kind(_images, ("classes", "labels", *_IMAGES)),
    "npz": _Kind(_npz, _ROLES),
    "parquet": _Kind(_parquet, _FIELDS, parsed_options=("columns",)),
    "source": _Kind(_own, None),
    "tfds": _Kind(_tfds, _FIELDS, parsed_options=()),
    "tfrecord": _Kind(_tfrecord, _FIELDS, parsed_options=()),
}
