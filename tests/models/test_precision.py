import keras
import numpy as np
import pytest

from tracin_transforms.models.precision import widen, widen_head


def _many_layers(dtype):
    """One of each common kind of layer, in a model within a model."""
    layers = keras.layers
    inner = keras.Sequential(
        [
            keras.Input((4, 6), dtype=dtype),
            layers.Conv1D(6, 3, padding="same", dtype=dtype),
            layers.BatchNormalization(dtype=dtype),
            layers.LayerNormalization(dtype=dtype),
            layers.Dense(6, activation="gelu", dtype=dtype, name="per_position"),
        ],
        name="inner",
    )
    inputs = keras.Input((4, 6), dtype=dtype)
    x = inner(layers.Rescaling(1 / 256, dtype=dtype)(inputs))
    x = layers.MultiHeadAttention(2, 3, dtype=dtype)(x, x)
    x = layers.GlobalAveragePooling1D(dtype=dtype)(x)
    x = layers.Dense(5, activation="tanh", dtype=dtype, name="hidden")(x)
    x = layers.Dropout(0.5, dtype=dtype)(x)
    return keras.Model(inputs, layers.Dense(3, dtype=dtype, name="logits")(x))


@pytest.fixture
def model_and_inputs():
    model = _many_layers("float32")
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.path.endswith(("gamma", "beta", "bias", "mean", "variance")):
            variable.assign(rng.random(variable.shape) + 0.5)
    return model, rng.standard_normal((20, 4, 6)).astype(np.float32)


def test_a_widened_model_equals_one_built_in_float64(model_and_inputs):
    model, inputs = model_and_inputs
    exact = _many_layers("float64")
    exact.set_weights(model.get_weights())
    expected = exact(inputs.astype(np.float64)).numpy()
    single = model(inputs).numpy()
    widen(model)
    found = model(inputs).numpy()

    assert (found.dtype, single.dtype) == (np.float64, np.float32)
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert np.abs(found - expected).max() < 1e-13
    assert 1e-9 < np.abs(single - expected).max() < 1e-5


def test_the_head_is_what_is_applied_once_per_example(model_and_inputs):
    model, inputs = model_and_inputs
    before = model(inputs).numpy()
    widen_head(model)

    wide = {layer.name for layer in model._flatten_layers() if layer.compute_dtype == "float64"}
    assert wide == {"hidden", "logits"}
    np.testing.assert_allclose(model(inputs).numpy(), before, atol=1e-5)
