"""Which fields of a record are the example, and how their values become arrays."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import BadExample
from tracin_transforms.examples.assembly import ONLY_INPUT, Example
from tracin_transforms.examples.decoding import Broken, ImageDecoding, decode_images

_DTYPES = (
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64"),
)
_NUMBERS = "iufb"


@dataclass(frozen=True)
class InputField:
    """A field that holds an input of the model.

    Attributes:
        field: Its name.
        decode: What its bytes are: ``image``, ``text``, or the dtype of an array's values, as
            ``uint8``, little-endian. None for images.
        shape: Shape of an array; None for that which it has.
    """

    field: str = "x"
    decode: str | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.decode not in (None, "image", "text", *_DTYPES):
            raise InputError(
                f"decode is {self.decode!r}, expected image, text or one of {', '.join(_DTYPES)}"
            )
        if self.shape is not None and self.decode in ("image", "text"):
            raise InputError(
                f"shape is for arrays, not for decode={self.decode}: images take resize and crop"
            )

    def rows(self, values: Sequence[Any], images: ImageDecoding) -> list[np.ndarray | Broken]:
        """Returns the arrays that values of the field are, or why they are none."""
        rows = [self._row(value) for value in values]
        encoded = [i for i, row in enumerate(rows) if isinstance(row, bytes)]
        decoded = decode_images([rows[i] for i in encoded], images)
        for i, image in zip(encoded, decoded, strict=True):
            if isinstance(image, Broken):
                image = Broken(f"{self.field!r} cannot be decoded as an image: {image.reason}")
            rows[i] = image
        return rows

    def _row(self, value: Any) -> Any:
        """Returns an array or Broken, or the bytes of an image that is yet to be decoded."""
        if isinstance(value, bytes):
            return self._of_bytes(value)
        if isinstance(value, str):
            if self.decode in (None, "text"):
                return np.array(value)
            return Broken(f"{self.field!r} is text, expected bytes, for decode={self.decode}")
        if isinstance(value, Broken):
            return value
        if self.decode is not None:
            return Broken(f"{self.field!r} holds numbers, expected bytes, for decode={self.decode}")
        return self._shaped(np.asarray(value))

    def _of_bytes(self, value: bytes) -> Any:
        if self.decode in (None, "image"):
            return value
        if self.decode == "text":
            try:
                return np.array(value.decode())
            except UnicodeDecodeError as error:
                return Broken(f"{self.field!r} is not text in UTF-8: {error}")
        dtype = np.dtype(self.decode).newbyteorder("<")
        if len(value) % dtype.itemsize:
            return Broken(
                f"{self.field!r} has {len(value)} bytes, expected a multiple of {dtype.itemsize}, "
                f"for decode={self.decode}"
            )
        return self._shaped(np.frombuffer(value, dtype).astype(self.decode))

    def _shaped(self, array: np.ndarray) -> np.ndarray | Broken:
        if self.shape is None:
            return array
        if array.size != math.prod(self.shape):
            size = "x".join(map(str, self.shape))
            return Broken(
                f"{self.field!r} has {array.size} values, expected {math.prod(self.shape)}, for "
                f"shape={size}"
            )
        return array.reshape(self.shape)


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are the example.

    Attributes:
        inputs: The field of the model's input, or pairs of the names of a model's inputs and of
            their fields.
        targets: Name of the field of the label: a number, or several.
        example_ids: Name of the field of the id, a string or an integer; None for none.
        sample_weights: Name of the field of the weight of the example's loss; None for none.
        images: How images are decoded.
    """

    inputs: InputField | tuple[tuple[str, InputField], ...] = InputField()
    targets: str = "y"
    example_ids: str | None = None
    sample_weights: str | None = None
    images: ImageDecoding = ImageDecoding()

    @property
    def by_input(self) -> tuple[tuple[str, InputField], ...]:
        """The inputs' names and fields; the name of a single one is `ONLY_INPUT`."""
        if isinstance(self.inputs, InputField):
            return ((ONLY_INPUT, self.inputs),)
        return self.inputs

    @property
    def names(self) -> tuple[str, ...]:
        """All fields that are read."""
        others = filter(None, (self.targets, self.example_ids, self.sample_weights))
        return tuple(dict.fromkeys([*(field.field for _, field in self.by_input), *others]))

    def describe(self) -> dict[str, Any]:
        """Returns which fields are read and how; JSON values."""
        fields = {name: _given(asdict(field)) for name, field in self.by_input}
        return _given(
            {
                "x": fields.get(ONLY_INPUT, fields),
                "y": self.targets,
                "id": self.example_ids,
                "weight": self.sample_weights,
                "images": _given(asdict(self.images)) or None,
            }
        )


@dataclass(frozen=True, eq=False)
class Record:
    """What a source has read.

    Attributes:
        index: Its index within the shard.
        default_id: Its id, where it has no field for it.
        values: By field: bytes, text, numbers and arrays of them; or what a function of the user's
            is to make an example of. Broken where there is nothing.
    """

    index: int
    default_id: str
    values: Any


def examples_of(
    shard: str, records: Sequence[Record], fields: Fields
) -> list[Example | BadExample]:
    """Returns the example that each record is, or what is wrong with it."""
    ids = [_example_id(record, fields.example_ids) for record in records]
    targets = [_target(record, fields.targets) for record in records]
    weights = [_weight(record, fields.sample_weights) for record in records]
    broken = [_first_broken(row) for row in zip(ids, targets, weights, strict=True)]
    columns: dict[str, list[Any]] = {}
    for name, field in fields.by_input:
        # What is broken already need not be decoded.
        values = [
            why or _value(record, field.field) for record, why in zip(records, broken, strict=True)
        ]
        columns[name] = field.rows(values, fields.images)
        broken = [_first_broken(row) for row in zip(broken, columns[name], strict=True)]
    return [
        Example(
            record.index,
            ids[i],
            {name: rows[i] for name, rows in columns.items()},
            targets[i],
            weights[i],
        )
        if broken[i] is None
        else bad_example(shard, record, ids[i], broken[i])
        for i, record in enumerate(records)
    ]


def bad_example(shard: str, record: Record, example_id: Any, broken: Broken) -> BadExample:
    """Returns what is wrong with a record, under its id or, without one, shard and index."""
    name = example_id if isinstance(example_id, str) else record.default_id
    return BadExample(name, shard, record.index, broken.reason)


def id_of(value: Any, what: str) -> str | Broken:
    """Returns a value as an example id."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Broken(f"{what} is not text in UTF-8: {error}")
    if isinstance(value, str | Broken):
        return value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    return Broken(f"{what} is {value!r:.40}, expected one string or integer, for an id")


def target_of(value: Any, what: str) -> np.ndarray | Broken:
    """Returns a value as a target; one number in a list is that number."""
    if isinstance(value, Broken):
        return value
    target = np.asarray(value)
    if target.dtype.kind not in _NUMBERS or not target.size:
        return Broken(f"{what} is {value!r:.40}, expected a number or several, for a label")
    if target.dtype.kind == "b":
        target = target.astype(np.int64)
    return target.reshape(()) if target.shape == (1,) else target


def weight_of(value: Any, what: str) -> float | Broken:
    """Returns a value as a sample weight."""
    if isinstance(value, Broken):
        return value
    weight = np.asarray(value)
    if weight.dtype.kind not in _NUMBERS or weight.size != 1:
        return Broken(f"{what} is {value!r:.40}, expected one number, for a weight")
    return float(weight.item())


def _example_id(record: Record, field: str | None) -> Any:
    return record.default_id if field is None else id_of(_value(record, field), repr(field))


def _target(record: Record, field: str) -> Any:
    return target_of(_value(record, field), repr(field))


def _weight(record: Record, field: str | None) -> Any:
    return None if field is None else weight_of(_value(record, field), repr(field))


def _value(record: Record, field: str) -> Any:
    if isinstance(record.values, Broken):
        return record.values
    if field not in record.values:
        found = ", ".join(sorted(record.values)) or "none"
        return Broken(
            f"{field!r} is missing: found {found}; name them as in ?x=image&y=label&id=name"
        )
    return record.values[field]


def _first_broken(values: tuple[Any, ...]) -> Any:
    return next((value for value in values if isinstance(value, Broken)), None)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value is not None
    }
