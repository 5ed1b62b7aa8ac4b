import os
import subprocess
import sys

import apache_beam as beam
import numpy as np
import pytest

from pipelines.execution import Progress, as_input_error, run_pipeline, threads_per_process
from pipelines.stderr import captured_stderr
from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.job_notes import JobNotes


def test_an_input_error_is_recognised_wherever_it_was_raised():
    direct = InputError("example 'a' is bad [while running 'X/ParDo']")
    assert str(as_input_error(direct)) == "example 'a' is bad"
    remote = RuntimeError(
        "Traceback (most recent call last):\n  File ...\n"
        "tracin_transforms.core.errors.InputError: example 'a' is bad\n\n"
        "During handling of the above exception, another exception occurred:\n"
        "tracin_transforms.core.errors.InputError: example 'a' is bad [while running 'X']\n"
    )
    assert str(as_input_error(remote)) == "example 'a' is bad"
    assert as_input_error(RuntimeError("something else")) is None


@pytest.mark.parametrize(
    ("beam_args", "share"),
    [
        ([], 1),
        (["--direct_num_workers=4"], 1),
        (["--direct_running_mode=multi_processing", "--direct_num_workers=2"], 1 / 2),
        (["--direct_running_mode=multi_processing", "--direct_num_workers=99"], 0),
        (["--direct_running_mode=multi_processing", "--direct_num_workers=0"], 0),
        (["--runner=FlinkRunner"], 0),
    ],
)
def test_a_process_has_its_share_of_the_cores(beam_args, share):
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(beam_args) == max(1, int(cores * share))


def _fail(message):
    raise RuntimeError(message)


def test_what_a_pipeline_raises_is_raised(tmp_path):
    def build(pipeline):
        _ = pipeline | beam.Create(["no luck"]) | beam.Map(_fail)

    with pytest.raises(RuntimeError, match="no luck"):
        run_pipeline(build, [], _progress(tmp_path))


def _progress(directory, **more):
    notes = JobNotes(directory)
    notes.create()
    return Progress(notes, 1, **more)


def test_progress_tells_what_would_survive(tmp_path):
    progress = _progress(tmp_path, done=100, shards=5, shards_done=2)
    assert progress.stored() == "2 of 5 shards stored"
    progress.notes.finished("a", 0, 2, np.array(["x", "y"]))
    assert (progress.examples(), progress.stored()) == (102, "2 of 5 shards stored")
    for _ in range(2):
        progress.notes.stored("a")
    assert progress.stored() == "3 of 5 shards stored"
    assert _progress(tmp_path).stored() == ""


def _script(body):
    code = (
        "import os, sys\nfrom pipelines.stderr import captured_stderr\n"
        "from tracin_transforms.core.errors import InputError\n"
        "with captured_stderr() as terminal:\n"
        "    os.write(2, b'chatter'); os.system('echo child >&2'); print('seen', file=terminal)\n"
        f"    {body}\n"
        "os.write(2, b'after')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_chatter_is_shown_only_where_it_explains_something():
    assert _script("pass").stderr == "seen\nafter"
    expected = _script("raise InputError('bad')").stderr
    assert "chatter" not in expected
    assert "InputError: bad" in expected
    unexpected = _script("raise KeyError('why')").stderr
    assert unexpected.startswith("seen\nchatterchild\n")
    assert "KeyError: 'why'" in unexpected


def test_stderr_is_itself_again(capfd):
    with captured_stderr():
        os.write(2, b"hidden")
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"
