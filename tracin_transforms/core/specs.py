"""What users write on the command line as ``NAME?option=value&option=value``."""

import json
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from tracin_transforms.core.errors import InputError


def split_spec(spec: str, what: str) -> tuple[str, dict[str, str]]:
    """Returns what stands before the question mark, and the options after it.

    Args:
        spec: As the user wrote it.
        what: What it is, for the message.

    Raises:
        InputError: The options are not of that form.
    """
    name, _, query = spec.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise InputError(
            f"{what} {spec!r}: {query!r} after '?' is not of the form name=value&name=value"
        ) from error
    return name, options


class LossSpec(NamedTuple):
    """A loss by its name.

    Attributes:
        name: Of Keras, or one of `core.losses.QUERY_LOSSES`.
        from_logits: Whether it takes logits; None where that is not said.
        options: Its other options; JSON values.
    """

    name: str
    from_logits: bool | None
    options: dict[str, Any]


def parse_loss(spec: str) -> LossSpec:
    """Returns the loss that a SPEC names, such as ``huber?delta=0.5``.

    Raises:
        InputError: It is not of that form.
    """
    name, given = split_spec(spec, "loss")
    options = {option: _value(text) for option, text in given.items()}
    from_logits = options.pop("from_logits", None)
    if not name or not isinstance(from_logits, bool | None):
        raise InputError(
            f"loss {spec!r}: expected a name and options, as in "
            "sparse_categorical_crossentropy?from_logits=true"
        )
    return LossSpec(name, from_logits, options)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
