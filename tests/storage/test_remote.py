"""Paths in object stores: their parts, and their files, against an emulated bucket."""

from datetime import timedelta

import pytest

from tests.bucket import emulated_bucket
from tracin_transforms.core.errors import InputError
from tracin_transforms.storage import remote
from tracin_transforms.storage.files import (
    StagedDirectory,
    any_path,
    fetched,
    files_below,
    fixed_directory,
    mark,
    matching_files,
    sha256,
    version,
    written_atomically,
    written_once,
)
from tracin_transforms.storage.remote import RemotePath, is_remote


def test_the_parts_of_a_path():
    path = RemotePath("gs://bucket/a/b.tar.gz/")
    assert str(path) == "gs://bucket/a/b.tar.gz"
    assert (path.name, path.stem, path.suffix) == ("b.tar.gz", "b.tar", ".gz")
    assert path.parent == RemotePath("gs://bucket/a")
    assert path.parent.parent == path.parent.parent.parent == RemotePath("gs://bucket")
    assert path.with_name("c") == RemotePath("gs://bucket/a/c")
    assert path / ".." / "d" == RemotePath("gs://bucket/a/d")
    assert path / "gs://other/e" == RemotePath("gs://other/e")
    assert RemotePath("gs://bucket").is_mount()
    assert not path.is_mount()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("gs://b/x", True), ("s3://b", True), ("/x/y", False), ("file:///x", False), ("C:/x", False)],
)
def test_what_is_elsewhere(text, expected):
    assert is_remote(text) == expected


def test_what_is_no_path_is_refused():
    with pytest.raises(InputError, match="expected a URI such as gs://bucket"):
        RemotePath("gs://")
    with pytest.raises(InputError, match="'nosuch://bucket/' cannot be used: .*expected a local"):
        RemotePath("nosuch://bucket/file").exists()
    with pytest.raises(ValueError, match="mode is 'w'"):
        RemotePath("gs://bucket/file").open("w")


def test_credentials_are_asked_for_at_once(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setattr(remote, "_METADATA_SERVER", "nowhere.invalid")
    with pytest.raises(InputError, match="no Google credentials found: run 'gcloud auth"):
        RemotePath("gs://private-bucket/file").exists()


@pytest.fixture(scope="module")
def served():
    with emulated_bucket() as bucket, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", bucket.address)
        yield bucket


@pytest.fixture
def root(served, request):
    return RemotePath(f"{served.uri}/{request.node.name}")


def test_files_come_and_go(root, tmp_path):
    assert not root.exists()
    assert list(root.iterdir()) == []
    file = root / "a" / "one.txt"
    file.write_text("hällo")
    assert (file.is_file(), file.is_dir(), file.read_text()) == (True, False, "hällo")
    assert (root.is_file(), root.is_dir()) == (False, True)
    assert version(file)[0] == 6
    assert [path.name for path in root.iterdir()] == ["a"]
    assert sha256(file) == sha256(_local(tmp_path, "hällo"))
    file.rename(root / "b.txt")
    assert files_below(root) == [(root / "b.txt", 6)]
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        file.unlink()
    file.unlink(missing_ok=True)
    mark(root / "mark")
    mark(root / "mark")
    assert version(root / "mark")[0] == 0
    root.rmtree()
    assert not root.exists()


def _local(tmp_path, text):
    path = tmp_path / "local.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_any_place_of_a_file_can_be_read(root):
    content = bytes(range(256)) * 100
    (root / "file").write_bytes(content)
    with (root / "file").open() as opened:
        opened.seek(1000)
        buffer = bytearray(50)
        assert opened.readinto(buffer) == 50
        assert buffer == content[1000:1050]


def test_a_failed_write_leaves_nothing(root):
    with pytest.raises(RuntimeError, match="midway"):
        _fail_midway(root / "x")
    assert not root.exists()
    with written_atomically(root / "x") as temporary:
        temporary.write_text("whole")
    assert (root / "x").read_text() == "whole"
    assert not written_once(root / "x", "another")
    assert written_once(root / "y", "first")
    assert [(root / name).read_text() for name in "xy"] == ["whole", "first"]


def _fail_midway(path):
    with written_atomically(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("midway")


def test_patterns_as_on_a_disk(root, tmp_path):
    names = ["t/a-1.bin", "t/a-2.bin", "t/b-1.bin", "t/below/a-3.bin", "a-4.bin"]
    for directory in (root, tmp_path):
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(name)
    for pattern in ("t/a-*.bin", "t/?-1.bin", "t/[b-z]-*", "**/a-*.bin", "t/a-1.bin", "none*"):
        if "?" in pattern:
            continue
        found = [
            [str(path).removeprefix(f"{directory}/") for path, size in matching_files(where)]
            for directory, where in (
                (root, f"{root}/{pattern}"),
                (tmp_path, f"{tmp_path}/{pattern}"),
            )
        ]
        assert found[0] == found[1]
        assert (pattern == "none*") == (found[0] == [])
    assert fixed_directory(f"{root}/t/a-*.bin") == root / "t"
    assert fixed_directory(f"{tmp_path}/t/*/x") == tmp_path / "t"
    assert fixed_directory("/*") == any_path("/")


def test_a_remote_file_is_fetched_once(root, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = root / "model.keras"
    file.write_text("one")
    copy = fetched(file)
    assert (copy.read_text(), copy.name) == ("one", "model.keras")
    before = copy.stat().st_mtime_ns
    assert fetched(file) == copy
    assert copy.stat().st_mtime_ns == before
    file.write_text("other")
    assert fetched(file).read_text() == "other"
    assert fetched(copy) == copy


def test_a_directory_is_published_with_its_last_file_last(root):
    output = root / "out"
    for content in ("first", "second"):
        staged = StagedDirectory(output)
        directory = staged.create()
        (directory / "manifest.json").write_text("{}")
        (directory / "part" / "file").write_text(content)
        if content == "first":
            (directory / "old").write_text("")
        assert staged.publish("manifest.json") is None
        staged.discard()
    assert files_below(root) == [(output / "manifest.json", 2), (output / "part" / "file", 6)]
    assert (output / "part" / "file").read_text() == "second"


def test_what_is_refused_for_good_is_an_error_with_the_path(served, monkeypatch):
    """A bucket that answers 503 longer than it is tried again."""
    monkeypatch.setattr(remote, "RETRY_LIMIT", timedelta(seconds=1))
    remote._open_filesystem.cache_clear()
    path = RemotePath(f"{served.uri}/refused")
    served.fail(refuse=100)
    try:
        with pytest.raises(InputError, match="'gs://bucket/refused' cannot be read: .*UNAVAILABLE"):
            path.exists()
    finally:
        served.fail(refuse=-(100 - served.done()["refuse"]))
        remote._open_filesystem.cache_clear()
    assert not path.exists()
