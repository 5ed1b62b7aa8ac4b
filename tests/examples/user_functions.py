"""What users write: functions for --parse and --preprocess, and sources of their own."""

import tensorflow as tf

from tracin_transforms.core.protocols import ExampleSource

FEATURES = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "label": tf.io.FixedLenFeature([], tf.int64),
    "name": tf.io.FixedLenFeature([], tf.string),
}
traces = 0


def pair(serialized):
    global traces
    traces += 1
    features = tf.io.parse_single_example(serialized, FEATURES)
    return tf.io.decode_png(features["image"]), features["label"]


def everything(serialized):
    features = tf.io.parse_single_example(serialized, FEATURES)
    x = {"image": tf.io.decode_png(features["image"]), "name": features["name"]}
    return {"x": x, "y": tf.stack([features["label"], 0]), "id": features["name"], "weight": 0.5}


def of_columns(columns):
    x = tf.cast(columns["a"], tf.float64) + tf.reduce_sum(columns["several"])
    return {"x": x[tf.newaxis], "y": tf.shape(columns["nested"])[0], "id": columns["name"]}


def of_features(features):
    return tf.cast(features["image"], tf.float32) / 255, features["label"]


def only_x(serialized):
    return tf.strings.length(serialized)


def with_text_as_label(serialized):
    return 0, serialized


def scaled(x):
    return tf.image.resize(tf.cast(x, tf.float32) / 255, (3, 3))


def lengths(x):
    return {"length": tf.strings.length(x["name"]), "name": tf.strings.upper(x["name"])}


def halved(x):
    return x[::2]


def no_source():
    return "a source"


class Nothing(ExampleSource):
    def __init__(self, path: str) -> None:
        self.path = path

    def shards(self):
        return ()

    def read(self, shard, batch_size):
        yield from ()
