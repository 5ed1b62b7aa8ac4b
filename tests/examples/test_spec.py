"""From SPECs to sources."""

import pytest

from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.decoding import ImageDecoding
from tracin_transforms.examples.fields import Fields, InputField
from tracin_transforms.examples.images import ImageExamples
from tracin_transforms.examples.npz import NpzExamples
from tracin_transforms.examples.parquet import ParquetExamples
from tracin_transforms.examples.preprocess import PreprocessedExamples
from tracin_transforms.examples.spec import parse_spec
from tracin_transforms.examples.tfds import TFDSExamples
from tracin_transforms.examples.tfrecord import TFRecordExamples


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("tfrecord:a/*", TFRecordExamples("a/*")),
        (
            "tfrecord:gs://b/a-*?x=image/encoded&y=image/class/label&id=key&weight=w",
            TFRecordExamples(
                "gs://b/a-*", Fields(InputField("image/encoded"), "image/class/label", "key", "w")
            ),
        ),
        (
            "tfrecord:a?x.a=b&x.c=d&decode=uint8&decode.c=text&shape.a=2x3x1",
            TFRecordExamples(
                "a",
                Fields(
                    (("a", InputField("b", "uint8", (2, 3, 1))), ("c", InputField("d", "text")))
                ),
            ),
        ),
        (
            "parquet:a?resize=256&crop=224&channels=1",
            ParquetExamples("a", Fields(images=ImageDecoding((256,), (224, 224), 1))),
        ),
        (
            "images:a?classes=b&resize=3x4&crop=1x2",
            ImageExamples("a", classes="b", images=ImageDecoding((3, 4), (1, 2))),
        ),
        ("images:a?labels=b.csv", ImageExamples("a", labels="b.csv")),
        ("tfds:mnist:train", TFDSExamples("mnist", "train")),
        (
            "tfds:a/b:1.0.0:train[10%:20%]+test@gs://anonymous@c/d?y=z",
            TFDSExamples(
                "a/b:1.0.0",
                "train[10%:20%]+test",
                "gs://anonymous@c/d",
                Fields(InputField(""), "z"),
            ),
        ),
    ],
)
def test_what_a_spec_says(spec, expected):
    assert parse_spec(spec) == expected


def test_functions():
    assert parse_spec("tfrecord:a", parse="m:f") == TFRecordExamples("a", parse="m:f")
    assert parse_spec("tfds:a:b", parse="m:f") == TFDSExamples("a", "b", parse="m:f")
    expected = ParquetExamples("a", parse="m:f", columns=("b", "c"))
    assert parse_spec("parquet:a?columns=b,c", parse="m:f") == expected
    expected = PreprocessedExamples(NpzExamples("a"), "m:g")
    assert parse_spec("npz:a", preprocess="m:g") == expected


@pytest.mark.parametrize(
    ("spec", "parse", "message"),
    [
        ("tfrecord:a?z=1", None, r"unknown option 'z', expected x \(or x.NAME .*\), y, id, weight"),
        ("tfrecord:a?columns=1", None, "unknown option 'columns', expected x"),
        ("images:a?x=b", None, "unknown option 'x', expected classes, labels, resize, crop or cha"),
        ("images:a?x.b=b", None, "unknown option 'x.b', expected classes"),
        ("npz:a?decode.b=text", None, "unknown option 'decode.b', expected x"),
        ("tfrecord:a?x=b", "m:f", "unknown option 'x', expected none beside --parse"),
        ("parquet:a?id=b", "m:f", "unknown option 'id', expected columns beside --parse"),
        ("parquet:a?x=b&x.c=d", None, "x and x.NAME: expected either one or the other"),
        ("tfrecord:a?x.a=b&decode.c=text", None, "'decode.c' is for an input that has no 'x.c'"),
        ("images:a", "m:f", "--parse 'm:f' is for records, of parquet:, tfds:, tfrecord:; --prep"),
        ("npz:a", "m:f", "--parse 'm:f' is for records"),
        ("tfrecord:a?resize=big", None, "resize is 'big', expected N or HxW"),
        ("tfrecord:a?resize=0", None, "resize is '0', expected N or HxW"),
        ("tfrecord:a?crop=1x2x3", None, "crop is '1x2x3', expected N or HxW"),
        ("tfrecord:a?channels=1x3", None, "channels is '1x3', expected 1, 3 or 4"),
        ("tfrecord:a?channels=2", None, "channels is 2, expected 1, 3 or 4"),
        ("tfrecord:a?shape=2,3", None, "shape is '2,3', expected N or NxN..."),
        (
            "tfrecord:a?decode=float",
            None,
            "decode is 'float', expected image, text or one of uint8",
        ),
        ("tfrecord:a?decode=text&shape=3", None, "shape is for arrays, not for decode=text"),
        ("tfds:mnist", None, "expected tfds:NAME:SPLIT or tfds:NAME:SPLIT@DATA_DIR, as in tfds:mn"),
        ("tfds::train", None, "expected tfds:NAME:SPLIT"),
        ("images:?classes=a", None, "expected a path after 'images:'"),
    ],
)
def test_bad_specs(spec, parse, message):
    with pytest.raises(InputError, match=message):
        parse_spec(spec, parse)
