import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models.conftest import batch_of, save_series
from tracin_transforms.models import batch_size
from tracin_transforms.models.batch_size import BatchSize, peak_bytes_per_example
from tracin_transforms.models.extractor import KerasFactorExtractor


def _concrete(function, *shape):
    spec = tf.TensorSpec([None, *shape], tf.float32)
    return tf.function(function, input_signature=[spec], autograph=False).get_concrete_function()


def test_peak_of_a_chain_and_of_what_is_kept():
    chain = _concrete(lambda x: tf.tile(tf.exp(tf.tile(x, [1, 100])), [1, 2])[:, :1], 10)
    # 1,000 numbers become 2,000; the 10 of the input are no longer needed.
    assert peak_bytes_per_example(chain.graph) == pytest.approx(4 * 3000, rel=0.02)
    kept = _concrete(lambda x: [tf.exp(x) for _ in range(5)], 1000)
    assert peak_bytes_per_example(kept.graph) == pytest.approx(4 * 6000, rel=0.02)


@pytest.mark.parametrize(
    ("width", "expected"), [(1, 512), (300_000, 128), (600_000, 64), (10**9, 1)]
)
def test_the_largest_power_of_two_that_fits(width, expected):
    function = _concrete(lambda x: x * 2.0 + 1.0, width)
    found = BatchSize(None).of(function)
    assert found == expected
    peak = peak_bytes_per_example(function.graph)
    assert found == 1 or found * peak <= batch_size._BUDGET_BYTES
    assert BatchSize(7).of(function) == 7


@keras.saving.register_keras_serializable("tests")
class Hungry(keras.layers.Layer):
    """Wants more memory than there is for more than five examples."""

    def call(self, inputs):
        size = tf.where(tf.shape(inputs)[0] > 5, tf.constant(2**46, tf.int64), 1)
        noise = tf.random.stateless_uniform(size[None], seed=[1, 2])
        return inputs + 0 * tf.cast(tf.reduce_max(noise), inputs.dtype)


def test_batches_are_halved_when_memory_runs_out(tmp_path, caplog):
    model = keras.Sequential([keras.Input((3,)), Hungry(), keras.layers.Dense(4)])
    series = save_series(tmp_path, [model])
    rng = np.random.default_rng(0)
    batch = batch_of(rng.standard_normal((40, 3)).astype(np.float32), rng.integers(0, 4, 40))
    found = KerasFactorExtractor(series, batch_size=12).load().extract(batch)
    expected = KerasFactorExtractor(series, batch_size=3).load().extract(batch)
    assert found.example_ids.tolist() == expected.example_ids.tolist()
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
    # TensorFlow waits ten seconds for memory each time.
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"out of memory with {n} examples at a time: going on with {n // 2}" for n in (12, 6)
    ]


@keras.saving.register_keras_serializable("tests")
class Insatiable(Hungry):
    def call(self, inputs):
        return super().call(tf.repeat(inputs, 6, axis=0))[::6]


def test_one_example_that_is_too_large_fails(tmp_path):
    model = keras.Sequential([keras.Input((3,)), Insatiable(), keras.layers.Dense(4)])
    extractor = KerasFactorExtractor(save_series(tmp_path, [model]), batch_size=1).load()
    with pytest.raises(MemoryError, match="not even one example"):
        extractor.extract(batch_of(np.zeros((2, 3), np.float32), np.zeros(2, int)))
