import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models.conftest import batch_of, save_series
from tracin_transforms.core.errors import InputError
from tracin_transforms.models.extractor import KerasFactorExtractor
from tracin_transforms.models.precision import can_be_widened, set_precision, widen, widen_head


def _many_layers():
    """One of each common kind of layer, in a model within a model."""
    layers = keras.layers
    inner = keras.Sequential(
        [
            keras.Input((4, 6)),
            layers.Conv1D(6, 3, padding="same"),
            layers.BatchNormalization(),
            layers.LayerNormalization(),
            layers.Dense(6, activation="gelu", name="per_position"),
        ],
        name="inner",
    )
    inputs = keras.Input((4, 6))
    x = inner(layers.Rescaling(1 / 3)(inputs))
    x = layers.MultiHeadAttention(2, 3)(x, x)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dense(5, activation="tanh", name="hidden")(x)
    x = layers.Dropout(0.5)(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x))


def _many_layers_in_float64():
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")
    try:
        return _many_layers()
    finally:
        keras.config.set_dtype_policy("float32")
        keras.config.set_floatx("float32")


@pytest.fixture
def model_and_inputs():
    model = _many_layers()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.path.endswith(("gamma", "beta", "bias", "mean", "variance")):
            variable.assign(rng.random(variable.shape) + 0.5)
    return model, rng.standard_normal((20, 4, 6)).astype(np.float32)


def test_a_widened_model_equals_one_built_in_float64(model_and_inputs):
    model, inputs = model_and_inputs
    assert can_be_widened(keras.models.clone_model(model))
    exact = _many_layers_in_float64()
    exact.set_weights(model.get_weights())
    expected = exact(inputs.astype(np.float64)).numpy()
    single = model(inputs).numpy()
    widen(model)
    found = model(inputs).numpy()

    assert (found.dtype, single.dtype) == (np.float64, np.float32)
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert np.abs(found - expected).max() < 1e-13 * np.abs(expected).max()
    assert 1e-9 < np.abs(single - expected).max() < 1e-4


def test_the_head_is_what_is_applied_once_per_example(model_and_inputs):
    model, inputs = model_and_inputs
    before = model(inputs).numpy()
    widen_head(model)

    wide = {layer.name for layer in model._flatten_layers() if layer.compute_dtype == "float64"}
    assert wide == {"hidden", "logits"}
    np.testing.assert_allclose(model(inputs).numpy(), before, atol=1e-5)


@keras.saving.register_keras_serializable("tests")
class _WithFloat32InItsCode(keras.layers.Layer):
    def call(self, inputs):
        return tf.add(inputs, tf.ones(1, tf.float32))


def test_a_model_that_cannot_be_widened_says_so():
    source = keras.Input((3,))
    model = keras.Model(source, keras.layers.Dense(2)(_WithFloat32InItsCode()(source)))
    assert not can_be_widened(model)
    mixed = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="mixed_bfloat16")])
    assert not can_be_widened(mixed)
    assert mixed(np.ones((1, 3))).dtype == "bfloat16"


def test_queries_of_a_model_that_cannot_be_widened(tmp_path):
    """They are computed as training examples are."""
    source = keras.Input((3,))
    model = keras.Model(source, keras.layers.Dense(5)(_WithFloat32InItsCode()(source)))
    series = save_series(tmp_path, [model])
    batch = batch_of(np.ones((4, 3), np.float32), np.arange(4))
    single, double = (
        KerasFactorExtractor(series, float64=float64).load().extract(batch).losses
        for float64 in (False, True)
    )
    np.testing.assert_array_equal(single, double)


@keras.saving.register_keras_serializable("tests")
class _OperationOfFloat32(keras.Operation):
    def call(self, inputs):
        return tf.add(inputs, tf.constant(1.0))

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, "float32")


@keras.saving.register_keras_serializable("tests")
def gelu_of_float32(x):
    return x * tf.nn.sigmoid(x * tf.constant(1.702))


@keras.saving.register_keras_serializable("tests")
def weighted_squares(y_true, y_pred):
    weights = tf.constant([1.0, 2.0, 3.0])
    return tf.reduce_mean(weights * (tf.cast(y_true, tf.float32) - y_pred) ** 2, axis=-1)


def test_float32_in_the_code_of_activations_losses_and_operations(tmp_path):
    source = keras.Input((4,))
    x = keras.layers.Dense(6, gelu_of_float32, name="body")(source)
    outputs = keras.layers.Dense(3, name="head")(x)
    model = keras.Model(source, _OperationOfFloat32()(outputs))
    series = save_series(tmp_path, [model], "tests>weighted_squares", None)
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((8, 4)), rng.standard_normal((8, 3))
    batch = batch_of(inputs.astype(np.float32), targets)
    expected = weighted_squares(targets, model(batch.inputs))
    for float64 in (False, True):
        block = KerasFactorExtractor(series, "all-dense", float64=float64).load().extract(batch)
        np.testing.assert_allclose(block.losses[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_another_precision_than_the_model_was_saved_with(tmp_path, precision):
    model = _many_layers()
    series = save_series(tmp_path, [model])
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((20, 4, 6)).astype(np.float32)
    batch = batch_of(inputs, rng.integers(0, 3, 20))
    exact, mixed = (
        KerasFactorExtractor(series, precision=kind).load().extract(batch).gradients[0].layers[0]
        for kind in (None, precision)
    )
    difference = np.abs(mixed.activations - exact.activations).max()
    assert 1e-5 < difference < 3e-2 * np.abs(exact.activations).max()

    set_precision(model, precision)
    computes = {layer.name: layer.compute_dtype for layer in model._flatten_layers()}
    assert computes["inner"] == precision.removeprefix("mixed_")
    assert computes["logits"] == "float32"
    widen_head(model)
    assert model.get_layer("logits").compute_dtype == "float64"


def test_a_mixed_model_in_float32(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = _many_layers()
    finally:
        keras.config.set_dtype_policy("float32")
    series = save_series(tmp_path, [model])
    inputs = np.random.default_rng(0).standard_normal((20, 4, 6)).astype(np.float32)
    batch = batch_of(inputs, np.arange(20) % 3)
    found = KerasFactorExtractor(series, precision="float32").load().extract(batch)
    single = _many_layers()
    single.set_weights(model.get_weights())
    (tmp_path / "single").mkdir()
    expected = (
        KerasFactorExtractor(save_series(tmp_path / "single", [single])).load().extract(batch)
    )
    for a, b in zip(found.gradients[0].layers, expected.gradients[0].layers, strict=True):
        np.testing.assert_array_equal(a.activations, b.activations)
        np.testing.assert_array_equal(a.error_signals, b.error_signals)


def test_float64_for_training_examples(tmp_path):
    series = save_series(tmp_path, [_many_layers()])
    inputs = np.random.default_rng(0).standard_normal((20, 4, 6)).astype(np.float32)
    batch = batch_of(inputs, np.arange(20) % 3)
    wide = KerasFactorExtractor(series, precision="float64").load().extract(batch)
    query = KerasFactorExtractor(series, float64=True).load().extract(batch)
    np.testing.assert_array_equal(wide.losses, query.losses)
    for a, b in zip(wide.gradients[0].layers, query.gradients[0].layers, strict=True):
        np.testing.assert_array_equal(a.error_signals, b.error_signals)
    source = keras.Input((3,))
    model = keras.Model(source, keras.layers.Dense(5)(_WithFloat32InItsCode()(source)))
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="cannot compute in float64: expected layers of Keras's"):
        KerasFactorExtractor(save_series(tmp_path / "other", [model]), precision="float64").load()


def test_a_precision_that_there_is_not(tmp_path):
    with pytest.raises(InputError, match="precision is 'float8', expected one of float64"):
        KerasFactorExtractor(save_series(tmp_path, [_many_layers()]), precision="float8")


def test_xla_gives_the_same(tmp_path):
    series = save_series(tmp_path, [_many_layers()])
    inputs = np.random.default_rng(0).standard_normal((20, 4, 6)).astype(np.float32)
    batch = batch_of(inputs, np.arange(20) % 3)
    plain, xla = (
        KerasFactorExtractor(series, "all-dense", xla=xla).load().extract(batch).gradients[0].layers
        for xla in (False, True)
    )
    for a, b in zip(plain, xla, strict=True):
        scale = np.abs(a.error_signals).max()
        np.testing.assert_allclose(b.error_signals, a.error_signals, atol=1e-5 * scale)


@pytest.mark.parametrize("width", [128, 129, 1000])
def test_large_kernels_add_up_in_parts(width):
    source = keras.Input((width,))
    hidden = keras.layers.Dense(200, "tanh", name="large")(source)
    model = keras.Model(source, keras.layers.Dense(3, name="logits")(hidden))
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((50, width)).astype(np.float32)
    kernel, bias = (w.astype(np.float64) for w in model.get_layer("large").get_weights())
    tap = keras.Model(source, hidden)
    plain = tap(inputs).numpy()
    widen_head(model)
    found = tap(inputs).numpy()
    exact = np.tanh(inputs.astype(np.float64) @ kernel + bias)
    assert (found.dtype, plain.dtype) == (np.float64, np.float32)
    assert model(inputs).dtype == "float64"
    assert np.sqrt(np.mean((found - exact) ** 2)) < np.sqrt(np.mean((plain - exact) ** 2))
    assert np.abs(found - exact).max() < 3e-6
