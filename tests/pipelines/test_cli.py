"""The commands without running a pipeline: usage, options, errors."""

import re
import subprocess
import sys

import pytest

from pipelines.cli import main
from pipelines.options import COMMANDS, parse

JOB = ["--checkpoints", "run", "--examples", "npz:a.npz", "--output", "out"]


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert "Exit status" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: tracin {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], ""),
        (["dance"], "unknown command 'dance'"),
        (["influence", *JOB], "required: --queries"),
        (["influence", *JOB, "--queries", "npz:q.npz", "--k", "0"], "'0': expected a whole number"),
        (["influence", *JOB, "--queries", "npz:q.npz", "--k", "x"], "'x': expected a whole number"),
        (["self-influence", *JOB[2:]], "expected --checkpoints, or --store"),
        (["self-influence", *JOB, "--batch-size", "-3"], "'-3': expected a whole number"),
        (["self-influence", *JOB, "--ouput=x"], r"--ouput (did you mean --output?)"),
        (["self-influence", *JOB, "--direct_num_worker=2"], "(did you mean --direct_num_workers?)"),
        (["self-influence", *JOB, "--direct_num_workers=two"], "invalid int value: 'two'"),
        (["self-influence", *JOB, "--runner=Magic"], "'Magic' cannot be used: Unexpected pipeline"),
        (["self-influence", *JOB, "stray"], "unknown option(s): stray"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_versions(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"tracin \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main(["--version", "--verbose"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "python 3.",
        "cores ",
        "memory ",
        "apache-beam 2.77",
        "pyarrow 25",
        "tensorflow 2",
    ):
        assert part in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--workers=2", "--worker-kind=a"], "expected both --worker-kind and --worker-kinds"),
        (["--worker-kind=a", "--worker-kinds=b"], "--worker-kind: expected --workers, too"),
        (["--store=s", "--queries=npz:q"], "--examples says how gradient factors are computed"),
    ],
)
def test_options_that_do_not_fit_each_other(more, message, capsys):
    assert main(["plan", "--checkpoints=r", "--examples=npz:x", *more]) == 2
    assert message in capsys.readouterr().err
    assert main(["extract", *JOB, "--workers=3"]) == 2
    assert "--workers is for a plan: expected --dry-run" in capsys.readouterr().err


def test_options_and_their_defaults():
    options, beam_args = parse(
        "influence",
        [*JOB, "--queries=npz:q.npz", "--runner=FnApiRunner", "--direct_num_workers=2"],
    )
    assert (options.checkpoints, options.examples, options.output) == ("run", "npz:a.npz", "out")
    assert (options.k, options.batch_size, options.overwrite) == (20, None, False)
    assert options.checkpoint_weights == "recorded"
    assert beam_args == ["--runner=FnApiRunner", "--direct_num_workers=2"]
    assert parse("demo", [])[0].output == "demo-output"


def test_modules_are_commands_too():
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.influence", "--k", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "tracin influence: error" in done.stderr


def test_every_precision_of_the_library_can_be_asked_for():
    from tracin_transforms.models.precision import PRECISIONS

    for precision in PRECISIONS:
        options, _ = parse("self-influence", [*JOB, "--precision", precision])
        assert options.precision == precision
