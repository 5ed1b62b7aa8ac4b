import pytest

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.specs import parse_loss


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mean_squared_error", ("mean_squared_error", None, {})),
        ("huber?delta=0.5", ("huber", None, {"delta": 0.5})),
        ("margin?from_logits=true", ("margin", True, {})),
        ("my>Loss?name=text&from_logits=false", ("my>Loss", False, {"name": "text"})),
    ],
)
def test_losses(spec, expected):
    assert parse_loss(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "loss '': expected a name and options, as in"),
        ("margin?from_logits=yes", "expected a name and options"),
        ("huber?delta", "loss 'huber.delta': 'delta' after '.' is not of the form name=value"),
    ],
)
def test_bad_losses(spec, message):
    with pytest.raises(InputError, match=message):
        parse_loss(spec)
