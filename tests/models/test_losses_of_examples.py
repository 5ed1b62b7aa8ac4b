"""What a loss is of: an output of several, positions, weights, a query; and custom losses."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models.conftest import batch_of, save_series
from tests.models.reference import assert_factors, example_gradients, load_model, sparse_loss
from tracin_transforms.core.errors import InputError
from tracin_transforms.models.extractor import KerasFactorExtractor
from tracin_transforms.models.training_loss import loss_of_model

layers = keras.layers
N, CLASSES = 10, 3


def _batch(shape=(4,), targets=None, inputs=None):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, *shape)).astype(np.float32) if inputs is None else inputs
    return batch_of(x, rng.integers(0, CLASSES, N) if targets is None else targets)


def _check(series, batch, names, loss=sparse_loss, layers_="all-dense", output=lambda y: y):
    """Compares factors of the named layers with gradients of the loss."""
    block = KerasFactorExtractor(series, layers_, batch_size=4).load().extract(batch)
    exact = load_model(series.checkpoints[0], exact=True)
    assert [layer.name for layer in block.gradients[0].layers] == names
    for found in block.gradients[0].layers:
        kernel, bias = example_gradients(
            exact,
            batch,
            exact.get_layer(found.name).trainable_variables,
            lambda t, y: loss(t, output(y)),
        )
        assert_factors(found, kernel.transpose(0, 2, 1), bias)
    return block


# Several inputs


def _two_inputs(as_dictionary=True):
    left, right = keras.Input((4,), name="left"), keras.Input((2, 3), name="right")
    x = layers.Concatenate()([layers.Dense(5, name="a")(left), layers.Flatten()(right)])
    sources = {"left": left, "right": right} if as_dictionary else [left, right]
    return keras.Model(sources, layers.Dense(CLASSES, name="b")(layers.ReLU()(x)))


def _two_arrays():
    rng = np.random.default_rng(1)
    # Not in the order of the model's inputs.
    return {
        "right": rng.standard_normal((N, 2, 3)).astype(np.float32),
        "left": rng.standard_normal((N, 4)).astype(np.float32),
    }


@pytest.mark.parametrize("as_dictionary", [True, False])
@pytest.mark.parametrize("float64", [True, False])
def test_two_inputs(tmp_path, as_dictionary, float64):
    series = save_series(tmp_path, [_two_inputs(as_dictionary)])
    batch = _batch(inputs=_two_arrays())
    _check(series, batch, ["a", "b"])
    found = KerasFactorExtractor(series, float64=float64).load().extract(batch).gradients[0]
    kernel, bias = example_gradients(
        (exact := load_model(series.checkpoints[0], exact=True)),
        batch,
        exact.get_layer("b").trainable_variables,
    )
    assert_factors(found.layers[0], kernel.transpose(0, 2, 1), bias, 2e-7 if float64 else 1e-5)


@keras.saving.register_keras_serializable("tests")
class TakesDictionary(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = layers.Dense(5, name="a"), layers.Dense(CLASSES, name="b")

    def call(self, inputs):
        flat = keras.ops.reshape(inputs["right"], (-1, 6))
        return self.b(self.a(inputs["left"]) + flat[:, :5])


def test_a_subclassed_model_of_two_inputs(tmp_path):
    model = TakesDictionary()
    model(_two_arrays())
    _check(save_series(tmp_path, [model]), _batch(inputs=_two_arrays()), ["a", "b"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((N, 4)), "takes inputs named 'left', 'right', the examples have one input"),
        ({"left": np.zeros((N, 4))}, r"the examples have inputs named 'left'; name .*x\.NAME="),
        (
            {"left": np.zeros((N, 5)), "right": np.zeros((N, 2, 3))},
            r"takes input 'left' of shape \(4,\), the examples have \(5,\)",
        ),
        (
            {"left": np.full((N, 4), np.nan), "right": np.zeros((N, 2, 3))},
            "example 'z000' .*: has a NaN or infinite input",
        ),
    ],
)
def test_inputs_that_do_not_fit(tmp_path, inputs, message):
    extractor = KerasFactorExtractor(save_series(tmp_path, [_two_inputs()])).load()
    with pytest.raises(InputError, match=message):
        extractor.extract(_batch(inputs=inputs))


def test_text_as_input(tmp_path):
    vectorize = layers.TextVectorization(output_sequence_length=3, vocabulary=["red", "blue"])
    source = keras.Input((), dtype="string")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(9, 4, name="words")(vectorize(source)))
    series = save_series(tmp_path, [keras.Model(source, layers.Dense(CLASSES, name="b")(x))])
    words = np.array(
        [["red", "blue", "green", "red blue", "blue red red"][i % 5] for i in range(N)]
    )
    batch = _batch(inputs=words)
    block = KerasFactorExtractor(series, "all", batch_size=4).load().extract(batch)
    model = load_model(series.checkpoints[0])
    (table,) = example_gradients(model, batch, model.get_layer("words").trainable_variables)
    found = {layer.name: layer for layer in block.gradients[0].layers}
    assert list(found) == ["words", "b"]
    assert_factors(found["words"], table.transpose(0, 2, 1))


# Several outputs


def _two_outputs(as_dictionary):
    source = keras.Input((4,))
    shared = layers.Dense(5, "tanh", name="shared")(source)
    kind, size = layers.Dense(CLASSES, name="kind")(shared), layers.Dense(1, name="size")(shared)
    return keras.Model(source, {"kind": kind, "size": size} if as_dictionary else [kind, size])


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_one_output_of_two(tmp_path, as_dictionary):
    series = save_series(tmp_path, [_two_outputs(as_dictionary)])
    select = {"kind": 0, "size": 1}

    def output(name):
        return lambda y: y[name] if as_dictionary else y[select[name]]

    kinds = dataclasses.replace(series, output="kind")
    _check(kinds, _batch(), ["shared", "kind"], output=output("kind"))
    sizes = dataclasses.replace(series, output="size", loss="mean_squared_error", from_logits=None)
    batch = _batch(targets=np.linspace(-1, 1, N))
    _check(
        sizes,
        batch,
        ["shared", "size"],
        lambda t, y: keras.losses.mean_squared_error(t[:, None], y),
        output=output("size"),
    )
    # The last layer that leads to the output, though another is called after it.
    _check(kinds, _batch(), ["kind"], output=output("kind"), layers_="last")
    with pytest.raises(InputError, match="the outputs 'kind', 'size': name the one.*model-output"):
        KerasFactorExtractor(series).load()
    with pytest.raises(InputError, match="'kind', 'size', none called 'colour'"):
        KerasFactorExtractor(dataclasses.replace(series, output="colour")).load()
    with pytest.raises(InputError, match="does not depend on all of the layers 'kind', 'size'"):
        KerasFactorExtractor(kinds, "kind,size").load()


def test_outputs_by_name_have_losses_by_name():
    model = _two_outputs(as_dictionary=True)
    names = list(model.output)
    model.compile(loss=["mean_squared_error"] * 2)
    with pytest.raises(InputError, match="outputs by name and a list of losses: expected losses"):
        loss_of_model(model, names[0])
    model.compile(loss=dict.fromkeys(names, "mean_squared_error"))
    assert loss_of_model(model, names[0]).name == "mean_squared_error"
    with pytest.raises(InputError, match="no loss of an output 'other'"):
        loss_of_model(model, "other")


def test_the_name_of_a_single_output(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(CLASSES, name="kind")])
    series = save_series(tmp_path, [model])
    _check(dataclasses.replace(series, output="kind"), _batch(), ["kind"])


# Positions


def _at_positions(mask=False):
    source = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=mask)(source)
    return keras.Model(
        source, layers.Dense(CLASSES, name="tags")(layers.Dense(6, "relu", name="a")(x))
    )


def _tokens():
    tokens = np.random.default_rng(2).integers(1, 9, (N, 5)).astype(np.int32)
    # Of different lengths; the last has no token at all.
    for i in range(N):
        tokens[i, i // 2 + 1 :] = 0
    tokens[-1] = 0
    return tokens


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
@pytest.mark.parametrize("mask", [True, False])
def test_an_examples_loss_is_that_of_a_batch_of_it_alone(tmp_path, mask, reduction):
    series = save_series(tmp_path, [_at_positions(mask)])
    tags = np.random.default_rng(3).integers(0, CLASSES, (N, 5))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    if reduction == "sum":
        series = dataclasses.replace(series, loss_options={"reduction": "sum"})
    batch = _batch(inputs=_tokens(), targets=tags)
    block = _check(series, batch, ["a", "tags"], loss)
    model = load_model(series.checkpoints[0])
    expected = [loss(tags[i : i + 1], model(batch.inputs[i : i + 1])).numpy() for i in range(N)]
    np.testing.assert_allclose(block.losses[:, 0], expected, rtol=1e-5)
    assert block.losses[-1, 0] == 0 or not mask


def test_positions_whose_class_is_ignored(tmp_path):
    """By automatic differentiation: the formula knows no such option."""
    series = save_series(tmp_path, [_at_positions()])
    series = dataclasses.replace(series, loss_options={"ignore_class": 0})
    tags = np.random.default_rng(3).integers(0, CLASSES, (N, 5))
    tags[3] = 0
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    block = _check(series, _batch(inputs=_tokens(), targets=tags), ["a", "tags"], loss)
    assert block.losses[3, 0] == 0


def test_a_class_to_ignore_that_the_model_does_not_have(tmp_path):
    series = save_series(tmp_path, [_at_positions()])
    series = dataclasses.replace(series, loss_options={"ignore_class": 255})
    tags = np.random.default_rng(3).integers(0, CLASSES, (N, 5))
    tags[:, 1] = 255
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    block = _check(series, _batch(inputs=_tokens(), targets=tags), ["a", "tags"], loss)
    np.testing.assert_array_equal(block.labels, tags)


def test_a_bad_reduction_is_named(tmp_path):
    series = save_series(tmp_path, [_at_positions()])
    series = dataclasses.replace(series, loss_options={"reduction": "best"})
    with pytest.raises(InputError, match="'reduction' is 'best', expected 'sum' or none"):
        KerasFactorExtractor(series).load()


# Weights


def _plain(end="linear"):
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "tanh", name="a"), layers.Dense(CLASSES, end, name="b")]
    )


def test_sample_and_class_weights_multiply_the_loss(tmp_path):
    series = save_series(tmp_path, [_plain()])
    batch = _batch()
    plain = KerasFactorExtractor(series, "all-dense").load().extract(batch)
    weights = np.linspace(0.5, 3, N)
    classes = {0: 2.0, 2: 0.5}
    weighted = (
        KerasFactorExtractor(dataclasses.replace(series, class_weights=classes), "all-dense")
        .load()
        .extract(dataclasses.replace(batch, sample_weights=weights))
    )
    factor = weights * np.array([2.0, 1.0, 0.5])[batch.targets]
    np.testing.assert_allclose(weighted.losses[:, 0], plain.losses[:, 0] * factor, rtol=1e-6)
    for a, b in zip(weighted.gradients[0].layers, plain.gradients[0].layers, strict=True):
        np.testing.assert_allclose(
            a.error_signals, b.error_signals * factor[:, None], rtol=1e-5, atol=1e-7
        )
        np.testing.assert_array_equal(a.activations, b.activations)


def test_weights_are_those_of_keras(tmp_path):
    """A step of gradient descent on one example moves the kernel by rate times its gradient."""
    model = _plain()
    series = dataclasses.replace(
        save_series(tmp_path, [model]), class_weights={0: 2.0, 1: 3.0, 2: 0.5}
    )
    batch = dataclasses.replace(_batch(), sample_weights=np.linspace(0.5, 3, N))
    layer = KerasFactorExtractor(series).load().extract(batch).gradients[0].layers[0]
    before = model.get_weights()
    for row in range(3):
        for options in ({"class_weight": series.class_weights}, {}):
            model.set_weights(before)
            model.compile(
                keras.optimizers.SGD(1.0),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
            x, y = batch.inputs[row : row + 1], batch.targets[row : row + 1]
            expected = np.outer(layer.activations[row], layer.error_signals[row])
            if options:
                # Keras takes either class weights or weights of examples.
                expected = expected / batch.sample_weights[row]
            else:
                weight = batch.sample_weights[row] * series.class_weights[int(y[0])]
                options = {"sample_weight": np.array([weight])}
            model.fit(x, y, verbose=0, **options)
            moved = before[2] - model.get_weights()[2]
            np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_bad_weights_are_named(tmp_path, value):
    extractor = KerasFactorExtractor(save_series(tmp_path, [_plain()])).load()
    weights = np.ones(N)
    weights[4] = value
    with pytest.raises(InputError, match="example 'z004' of shard 'shard-0': has the weight"):
        extractor.extract(dataclasses.replace(_batch(), sample_weights=weights))


# Losses of queries


@pytest.mark.parametrize("end", ["linear", "softmax"])
@pytest.mark.parametrize("name", ["margin", "logit", "entropy"])
@pytest.mark.parametrize("one_hot", [True, False])
def test_losses_of_queries(tmp_path, name, end, one_hot):
    series = save_series(tmp_path, [_plain(end)], name, end == "linear")
    batch = _batch()

    def loss(t, y):
        p = tf.nn.softmax(y) if end == "linear" else y
        row = tf.one_hot(t, CLASSES, dtype=p.dtype) if len(t.shape) == 1 else tf.cast(t, p.dtype)
        of_label = tf.reduce_sum(row * p, axis=1)
        return {
            "margin": lambda: -tf.math.log(of_label / (1 - of_label)),
            "entropy": lambda: -tf.reduce_sum(p * tf.math.log(p), axis=1),
            # The logits of a softmax are known to be its input only.
            "logit": lambda: -tf.reduce_sum(row * (y if end == "linear" else y._keras_logits), 1),
        }[name]()

    if one_hot:
        batch = _batch(targets=np.eye(CLASSES)[batch.targets])
    block = _check(series, batch, ["a", "b"], loss)
    assert block.labels.shape == (N,)


@pytest.mark.parametrize("end", ["linear", "sigmoid"])
def test_the_margin_of_a_binary_model(tmp_path, end):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, end, name="b")])
    series = save_series(tmp_path, [model], "binary_margin", end == "linear")
    labels = np.arange(N) % 2

    def loss(t, y):
        p = tf.nn.sigmoid(y) if end == "linear" else y
        return tf.where(t[:, None] == 1, -1.0, 1.0) * tf.cast(tf.math.log(p / (1 - p)), tf.float32)

    _check(series, _batch(targets=labels), ["b"], loss)


def test_labels_that_query_losses_take(tmp_path):
    (tmp_path / "binary").mkdir()
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, name="b")])
    binary = save_series(tmp_path / "binary", [model], "binary_margin", True)
    signs = KerasFactorExtractor(binary).load().extract(_batch(targets=np.arange(N) % 2 * 2 - 1))
    digits = KerasFactorExtractor(binary).load().extract(_batch(targets=np.arange(N) % 2))
    np.testing.assert_array_equal(signs.losses, digits.losses)
    many = dataclasses.replace(binary, loss="margin")
    with pytest.raises(InputError, match="one output, .* or binary_margin for queries"):
        KerasFactorExtractor(many).load().extract(_batch(targets=np.zeros(N, int)))

    series = save_series(tmp_path, [_plain()], "margin", True)
    hard = KerasFactorExtractor(series).load().extract(_batch())
    soft = np.eye(CLASSES)[_batch().targets] * 0.9 + 0.1 / CLASSES
    np.testing.assert_array_equal(
        KerasFactorExtractor(series).load().extract(_batch(targets=soft)).losses, hard.losses
    )
    unlabelled = dataclasses.replace(series, loss="entropy")
    found = KerasFactorExtractor(unlabelled).load().extract(_batch(targets=np.full(N, -1)))
    assert found.labels.tolist() == [-1] * N
    np.testing.assert_array_equal(found.predictions, hard.predictions)


def test_predictions_of_a_sigmoid_that_keras_does_not_know_of(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, "sigmoid"), layers.Reshape((1,))])
    series = save_series(tmp_path, [model], "binary_crossentropy", False)
    batch = _batch(targets=np.arange(N) % 2)
    found = KerasFactorExtractor(series).load().extract(batch).predictions
    expected = model(batch.inputs).numpy()[:, 0] > 0.5
    assert 0 < expected.sum() < N
    np.testing.assert_array_equal(found[:, 0], expected)


def test_a_softmax_that_keras_does_not_know_of(tmp_path):
    """Its logits are hidden: the loss is differentiated as a whole."""
    source = keras.Input((4,))
    logits = layers.Dense(CLASSES, name="b")(layers.Dense(5, "tanh", name="a")(source))
    exponentials = keras.ops.exp(logits)
    model = keras.Model(source, exponentials / keras.ops.sum(exponentials, axis=-1, keepdims=True))
    series = save_series(tmp_path, [model], from_logits=False)
    loss = keras.losses.SparseCategoricalCrossentropy()
    _check(series, _batch(), ["a", "b"], loss)
    queries = dataclasses.replace(series, loss="margin")

    def margin(t, y):
        of_label = tf.reduce_sum(tf.one_hot(t, CLASSES, dtype=y.dtype) * y, axis=1)
        return -tf.math.log(of_label / (1 - of_label))

    _check(queries, _batch(), ["a", "b"], margin)


# Custom losses


@keras.saving.register_keras_serializable("tests")
class Quartic(keras.losses.Loss):
    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, y_true, y_pred):
        return self.scale * keras.ops.mean((y_true - y_pred) ** 4, axis=-1)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


@keras.saving.register_keras_serializable("tests")
def quartic(y_true, y_pred):
    return keras.ops.mean((y_true - y_pred) ** 4, axis=-1)


@pytest.mark.parametrize(
    ("loss", "name", "options"),
    [(Quartic(3.0), "tests>Quartic", {"scale": 3.0}), (quartic, "tests>quartic", {})],
)
def test_registered_losses(tmp_path, loss, name, options):
    model = _plain()
    model.compile(loss=loss)
    found = loss_of_model(model)
    assert (found.name, found.from_logits, found.options) == (name, None, options)
    series = save_series(tmp_path, [model], found.name, None)
    series = dataclasses.replace(series, loss_options=found.options)
    targets = np.random.default_rng(4).standard_normal((N, CLASSES)).astype(np.float32)
    function = loss.call if isinstance(loss, Quartic) else loss
    _check(
        series,
        _batch(targets=targets),
        ["a", "b"],
        lambda t, y: function(tf.cast(t, y.dtype), y),
    )


@keras.saving.register_keras_serializable("tests")
def normal_likelihood(y_true, y_pred):
    """Of outputs that are a mean and a log-variance; labels have one number."""
    mean, log_variance = y_pred[:, :1], y_pred[:, 1:]
    squares = (y_true - mean) ** 2 * keras.ops.exp(-log_variance)
    return keras.ops.mean(log_variance + squares, axis=-1)


def test_labels_of_another_shape_than_the_outputs(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="b")])
    series = save_series(tmp_path, [model], "tests>normal_likelihood", None)
    targets = np.random.default_rng(4).standard_normal((N, 1)).astype(np.float32)
    block = _check(
        series,
        _batch(targets=targets),
        ["b"],
        lambda t, y: normal_likelihood(tf.cast(t, y.dtype), y),
    )
    np.testing.assert_array_equal(block.labels, targets[:, 0])
    with pytest.raises(InputError, match=r"labels have shape \(10,\), outputs \(10, 2\): expected"):
        KerasFactorExtractor(series).load().extract(_batch(targets=targets[:, 0]))
    with pytest.raises(InputError, match=r"'epoch-0': .* Incompatible shapes: \[10,2,3\]"):
        KerasFactorExtractor(series).load().extract(_batch(targets=np.ones((N, 2, 3))))
    squares = dataclasses.replace(series, loss="tests>quartic")
    with pytest.raises(InputError, match="does not take labels of shape .*3.* and outputs of"):
        KerasFactorExtractor(squares).load().extract(_batch(targets=np.ones((N, 3))))


def test_ctc(tmp_path):
    model = keras.Sequential([keras.Input((4, 3)), layers.Dense(5, name="b")])
    series = save_series(tmp_path, [model], "ctc", None)
    rng = np.random.default_rng(4)
    inputs, words = rng.random((N, 4, 3)).astype(np.float32), rng.integers(1, 5, (N, 2))
    block = _check(series, _batch(inputs=inputs, targets=words), ["b"], keras.losses.ctc)
    np.testing.assert_array_equal(block.labels, words)


class _Unregistered(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.mean((y_true - y_pred) ** 2, axis=-1)


def mean_squared_error(y_true, y_pred):
    """Has the name of one of Keras's."""
    return keras.ops.sum((y_true - y_pred) ** 2, axis=-1)


@keras.saving.register_keras_serializable("tests")
class NotOfJson(Quartic):
    def get_config(self):
        return {**super().get_config(), "scale": object()}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (_Unregistered(), "expected one of Keras's, or a function or class registered"),
        (mean_squared_error, "expected one of Keras's, or a function or class registered"),
        (NotOfJson(), "expected values that JSON can hold"),
        (["mse"], "expected one loss"),
        (None, "the model's loss is None: expected one loss"),
    ],
)
def test_losses_that_cannot_be_recorded(loss, message):
    model = _plain()
    model.compile(loss=loss)
    with pytest.raises(InputError, match=message):
        loss_of_model(model)


# What cannot be factored


@keras.saving.register_keras_serializable("tests")
class Folded(keras.Model):
    """Puts positions on the axis of the examples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = layers.Dense(3, name="a"), layers.Dense(CLASSES, name="b")

    def call(self, inputs):
        folded = self.a(keras.ops.reshape(inputs, (-1, 2)))
        return self.b(keras.ops.reshape(folded, (-1, 6)))


@keras.saving.register_keras_serializable("tests")
class Tied(keras.Model):
    """Uses a layer's kernel a second time."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = layers.Dense(4, name="a"), layers.Dense(CLASSES, name="b")

    def call(self, inputs):
        return self.b(keras.ops.matmul(keras.ops.tanh(self.a(inputs)), self.a.kernel))


@keras.saving.register_keras_serializable("tests")
class Scaled(layers.Dense):
    """Does something else than the layer it derives from, and does it after the activation."""

    def call(self, inputs, training=None):
        return super().call(inputs * inputs)


@keras.saving.register_keras_serializable("tests")
class OnlyScaled(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = Scaled(5, name="a"), layers.Dense(CLASSES, name="b")

    def call(self, inputs):
        return self.b(self.a(inputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Folded, "layer 'a' is called with 20 rows for 10 examples: expected each"),
        (Tied, "layer 'a' with loss .* differ from .* its weights are used elsewhere in the model"),
        (OnlyScaled, "layer 'a' is a Scaled of tests.*which seems to compute something else"),
    ],
)
def test_layers_that_cannot_be_factored_are_named(tmp_path, make, message):
    model = make()
    model(np.zeros((1, 4), np.float32))
    extractor = KerasFactorExtractor(save_series(tmp_path, [model]), "all-dense").load()
    with pytest.raises(InputError, match=message):
        extractor.extract(_batch())


def test_a_layer_that_is_distributed_over_time(tmp_path):
    source = keras.Input((3, 4))
    x = layers.TimeDistributed(layers.Dense(2, name="inner"))(source)
    model = keras.Model(source, layers.Dense(CLASSES, name="b")(layers.Flatten()(x)))
    series, batch = save_series(tmp_path, [model]), _batch((3, 4))
    block = KerasFactorExtractor(series, "all-dense").load().extract(batch)
    exact = load_model(series.checkpoints[0], exact=True)
    inner = exact.layers[1].layer
    kernel, bias = example_gradients(exact, batch, inner.trainable_variables)
    assert_factors(block.gradients[0].layers[0], kernel.transpose(0, 2, 1), bias)


@keras.saving.register_keras_serializable("tests")
class Cell(layers.Layer):
    """A step of a recurrent network, with a layer in it."""

    state_size = 4

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(4, name="inner")

    def build(self, shape):
        self.inner.build((shape[0], shape[1] + 4))

    def call(self, inputs, states):
        state = self.inner(keras.ops.concatenate([inputs, states[0]], axis=1))
        return state, [state]


def test_a_layer_within_a_loop_is_named(tmp_path):
    source = keras.Input((3, 4))
    model = keras.Model(source, layers.Dense(CLASSES, name="b")(layers.RNN(Cell())(source)))
    series = save_series(tmp_path, [model])
    _check(series, _batch((3, 4)), ["b"], layers_="last")
    with pytest.raises(InputError, match="layer 'inner' is called within a loop"):
        KerasFactorExtractor(series, "all-dense").load()
