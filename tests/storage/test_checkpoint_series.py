import pytest

from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.checkpoint_series import (
    checkpoint_hash,
    is_run,
    series_of_files,
)


def _touch(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True, parents=True)
        (directory / name).write_text(name)


def _files(directory, pattern, rates=None):
    series = series_of_files(
        str(directory / pattern), rates, loss="mean_squared_error", from_logits=None
    )
    return [(c.id, c.path.removeprefix(f"{directory}/")) for c in series.checkpoints]


def test_a_pattern_is_ordered_by_numbers(tmp_path):
    _touch(tmp_path, "e-10.weights.h5", "e-9.weights.h5", "e-100.weights.h5", "f-1.weights.h5")
    assert _files(tmp_path, "e-*.weights.h5") == [
        (f"e-{i}", f"e-{i}.weights.h5") for i in (9, 10, 100)
    ]


def test_tensorflow_checkpoints_are_named_by_their_prefix(tmp_path):
    for step in (5, 40):
        _touch(tmp_path, f"model.ckpt-{step}.index", f"model.ckpt-{step}.data-00000-of-00001")
    expected = [(f"model.ckpt-{step}", f"model.ckpt-{step}") for step in (5, 40)]
    assert _files(tmp_path, "model.ckpt-*") == expected
    assert _files(tmp_path, "model.ckpt-*.index") == expected
    assert _files(tmp_path, "model.ckpt-5.index") == expected[:1]


def test_a_list_keeps_its_order_and_saved_models_their_directories(tmp_path):
    _touch(tmp_path, "b/saved_model.pb", "b/variables/variables.index", "a.keras")
    series = series_of_files(
        f"{tmp_path / 'b'}, {tmp_path / 'a.keras'}",
        [0.1, 0.2],
        loss="mean_squared_error",
        from_logits=None,
    )
    assert [(c.id, c.learning_rate, c.step) for c in series.checkpoints] == [
        ("b", 0.1, 0),
        ("a", 0.2, 1),
    ]
    before = checkpoint_hash(str(tmp_path / "b"))
    _touch(tmp_path, "b/variables/variables.data-00000-of-00001")
    assert checkpoint_hash(str(tmp_path / "b")) != before


def test_files_of_the_same_name_are_told_apart_by_their_directories(tmp_path):
    _touch(tmp_path, "10/w.weights.h5", "2/w.weights.h5", "1/w.weights.h5")
    ids = [name for name, _ in _files(tmp_path, "*/w.weights.h5")]
    assert ids == [str(tmp_path / d / "w.weights.h5") for d in ("1", "2", "10")]


def test_what_is_a_run(tmp_path):
    _touch(tmp_path, "run/checkpoints.json", "sm/saved_model.pb", "a.keras", "c.index")
    assert is_run(str(tmp_path / "run"))
    assert is_run(str(tmp_path / "missing"))
    for files in ("sm", "a.keras", "c", "*.keras", "run,sm"):
        assert not is_run(str(tmp_path / files))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"--checkpoints .*e-\*' *: no such files"):
        _files(tmp_path, "e-*")
    with pytest.raises(InputError, match=r"checkpoint 'e': file .*e.keras' does not exist"):
        _files(tmp_path, "e.keras")
    _touch(tmp_path, "e.keras")
    with pytest.raises(InputError, match="--learning-rates gives 2 for 1 checkpoints"):
        _files(tmp_path, "e.keras", [0.1, 0.2])
