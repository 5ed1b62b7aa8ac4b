import argparse
import os
import signal

import numpy as np
import pytest

from pipelines.outputs import Output, shown, staged_output
from pipelines.training import open_examples
from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.files import StagedDirectory
from tracin_transforms.storage.manifest import write_manifest

RUN = {"command": "influence", "k": 20}


def _finish(directory, run):
    (directory / "influence-00000-of-00001.parquet").write_text(str(run["k"]))
    write_manifest(directory, run, {})


def test_a_complete_result_appears_at_its_place(tmp_path):
    output = Output(tmp_path / "out", RUN, overwrite=False)
    with staged_output(output) as staging:
        (staging.work / "scratch").write_text("")
        _finish(staging.result, RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "Already done" in output.already_done()


def _fail(output, error):
    with staged_output(Output(output, RUN, overwrite=False)) as staging:
        (staging.result / "half").write_text("")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_incomplete_result_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        _fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def _take_meanwhile(output, overwrite):
    """Another job, with another k, finishes in the same place while this one runs."""
    with staged_output(Output(output, RUN, overwrite)) as staging:
        output.mkdir()
        _finish(output, {**RUN, "k": 10})
        _finish(staging.result, RUN)


def test_an_output_taken_meanwhile_is_kept_and_so_is_the_result(tmp_path):
    with pytest.raises(InputError, match=r"k is 10 there and 20 here.*kept in .*\.partial$"):
        _take_meanwhile(tmp_path / "out", overwrite=False)
    texts = {path.parent.name: path.read_text() for path in tmp_path.glob("*/*.parquet")}
    assert texts.pop("out") == "10"
    assert list(texts.values()) == ["20"]


def test_with_overwrite_the_last_job_wins(tmp_path):
    _take_meanwhile(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert next((tmp_path / "out").glob("*.parquet")).read_text() == "20"


def test_an_interrupt_while_the_result_is_moved_comes_too_late(tmp_path, monkeypatch):
    publish = StagedDirectory.publish

    def interrupted(self, last):
        os.kill(os.getpid(), signal.SIGINT)
        return publish(self, last)

    monkeypatch.setattr(StagedDirectory, "publish", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    _take_meanwhile(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_examples_that_change_meanwhile_are_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), y=np.zeros(3, int))
    options = argparse.Namespace(examples=f"npz:{tmp_path / 'a.npz'}", parse=None, preprocess=None)
    training = open_examples(options, series=None, weights=np.ones(1))
    training.check_unchanged()
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2)), y=np.zeros(3, int))
    with pytest.raises(InputError, match=r"examples 'npz:.*a\.npz' changed while the job ran"):
        training.check_unchanged()


def test_what_a_summary_shows():
    assert shown("ä 1") == "ä 1"
    assert shown("a\n\x1b[31m") == r"'a\n\x1b[31m'"
    assert (shown(3), shown(0.123456)) == ("3", "0.1235")
    assert shown([1.0, 2.5, 3.0, 4.0, 5.0]) == "[1, 2.5, 3, 4, ...]"
