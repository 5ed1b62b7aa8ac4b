"""Temporary names: whose they are, and what happens with those of the dead."""

import os
import subprocess
import sys

import pytest

from tracin_transforms.storage.files import (
    StagedDirectory,
    is_temporary_name,
    others_at_work,
    remove_dead,
    temporary_name,
    written_atomically,
)


@pytest.fixture
def dead_pid():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _name_of(pid, suffix=""):
    return temporary_name(suffix).replace(f"~{os.getpid()}~", f"~{pid}~")


def test_names_are_hidden_unique_and_known():
    first, second = temporary_name(".arrow"), temporary_name(".arrow")
    assert first != second
    assert first.startswith(".")
    assert first.endswith(".arrow")
    assert is_temporary_name(first)
    for name in ("train.arrow", ".gitignore", ".a~b~c", ""):
        assert not is_temporary_name(name)


def test_only_what_the_dead_left_is_removed(tmp_path, dead_pid):
    kept = {"data.arrow", ".hidden", temporary_name(), _name_of(os.getppid())}
    # Of another machine, and new: it may be at work.
    kept.add(temporary_name().replace(".", ".elsewhere", 1))
    gone = {_name_of(dead_pid, ".arrow"), _name_of(dead_pid, ".out.work")}
    old = temporary_name().replace(".", ".elsewhere2", 1)
    for name in kept | gone | {old}:
        (tmp_path / name).write_text("")
    (tmp_path / _name_of(dead_pid, ".directory")).mkdir()
    os.utime(tmp_path / old, (0, 0))
    remove_dead(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_dead(tmp_path, own=True)
    assert len(list(tmp_path.iterdir())) == len(kept) - 1
    remove_dead(tmp_path / "nothing")


def test_another_process_at_work_is_noticed(tmp_path, dead_pid):
    output = tmp_path / "out"
    StagedDirectory(output, "work").create()
    (tmp_path / _name_of(dead_pid, ".out.work")).mkdir()
    (tmp_path / _name_of(os.getppid(), ".other.work")).mkdir()
    (tmp_path / _name_of(os.getppid(), ".out.partial")).mkdir()
    assert not others_at_work(output, "work")
    (tmp_path / _name_of(os.getppid(), ".out.work")).mkdir()
    assert others_at_work(output, "work")
    assert not others_at_work(tmp_path / "nothing" / "out", "work")


def test_a_write_leaves_its_file_alone(tmp_path):
    with written_atomically(tmp_path / "x.txt") as temporary:
        assert is_temporary_name(temporary.name)
        assert temporary.parent == tmp_path
        temporary.write_text("text")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
