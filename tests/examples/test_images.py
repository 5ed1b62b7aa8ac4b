"""Image files in folders, or listed in a table."""

import numpy as np
import pytest

from tests.examples.writers import (
    CLASSES,
    encoded_image,
    random_images,
    write_image_files,
    write_labels,
)
from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.images import ImageExamples
from tracin_transforms.examples.spec import parse_spec

PNG = encoded_image(np.zeros((4, 4, 3), np.uint8))


def _read(source, batch_size=100):
    return [batch for shard in source.shards() for batch in source.read(shard, batch_size)]


@pytest.fixture
def directory(tmp_path):
    write_image_files(tmp_path / "images", random_images(40))
    return tmp_path / "images"


def test_only_images_count(directory):
    images = random_images(40)
    before = ImageExamples(str(directory)).describe()
    assert before["ignored"] == 0
    for name in ("dog/notes.txt", "README", "top.png", ".hidden.png", "dog/.DS_Store"):
        (directory / name).write_bytes(PNG)
    (directory / ".git").mkdir()
    (directory / ".git" / "a.png").write_bytes(PNG)
    source = ImageExamples(str(directory))
    (batch,) = _read(source)
    assert batch.example_ids.tolist() == images.ids.tolist()
    # The notes, the README, and the image that is in no folder.
    assert source.describe() == {**before, "ignored": 3}


def test_files_below_folders_and_suffixes_in_capitals(tmp_path):
    for name in ("b/deep/1.JPEG", "b/0.gif", "a/2.WebP", "a/3.bmp", "a/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"JPEG": "JPEG", "gif": "GIF", "WebP": "WEBP", "bmp": "BMP", "jpg": "JPEG"}
        content = encoded_image(np.zeros((4, 4, 3), np.uint8), kind[name.split(".")[1]])
        (tmp_path / name).write_bytes(content)
    (batch,) = _read(ImageExamples(str(tmp_path)))
    assert batch.example_ids.tolist() == ["a/2.WebP", "a/3.bmp", "a/4.jpg", "b/0.gif"] + [
        "b/deep/1.JPEG"
    ]
    assert batch.targets.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("images", "counts"),
    [(50, [50]), (150, [64, 64, 22]), (402, [101, 101, 101, 99]), (8200, [2048] * 4 + [8])],
)
def test_a_few_shards_at_least_of_2048_images_at_most(tmp_path, images, counts):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0000.png").write_bytes(PNG)
    for i in range(1, images):
        (tmp_path / "a" / f"{i:04d}.png").hardlink_to(tmp_path / "a" / "0000.png")
    source = ImageExamples(str(tmp_path))
    shards = source.shards()
    assert [shard.count for shard in shards] == counts
    assert shards[-1].name == f"images-{len(counts) - 1:05d}-of-{len(counts):05d}"
    batches = list(source.read(shards[-1], 50))
    assert batches[0].example_ids[0] == f"a/{sum(counts[:-1]):04d}.png"
    assert np.concatenate([b.indices for b in batches]).tolist() == list(range(counts[-1]))


def test_a_folder_without_images_is_a_class(directory):
    (directory / "bee").mkdir()
    (batch,) = _read(ImageExamples(str(directory)))
    expected = {"cat": 1, "dog": 2, "eel": 3, "fox": 4}
    folders = [example_id.split("/")[0] for example_id in batch.example_ids.tolist()]
    assert batch.targets.tolist() == [expected[folder] for folder in folders]


def test_a_file_of_classes_gives_the_indices(directory, tmp_path):
    (tmp_path / "classes.txt").write_text("fox\nowl\neel\ndog\ncat\n\n")
    source = parse_spec(f"images:{directory}?classes={tmp_path}/classes.txt")
    (batch,) = _read(source)
    expected = {"cat": 4, "dog": 3, "eel": 2, "fox": 0}
    folders = [example_id.split("/")[0] for example_id in batch.example_ids.tolist()]
    assert batch.targets.tolist() == [expected[folder] for folder in folders]
    assert source.describe()["sha256"] != ImageExamples(str(directory)).describe()["sha256"]

    (tmp_path / "classes.txt").write_text("fox\ndog\ncat\n")
    with pytest.raises(InputError, match="folder 'eel' is not in classes file .*add it, or move"):
        source.shards()
    (tmp_path / "classes.txt").write_text("fox\ndog\nfox\n")
    with pytest.raises(InputError, match="lists 'fox' twice: expected once"):
        source.shards()
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(InputError, match="classes file .*classes.txt' does not exist"):
        source.shards()


def test_a_table_gives_the_labels(directory, tmp_path):
    images = random_images(40)
    table = write_labels(tmp_path / "labels.csv", images)
    source = parse_spec(f"images:{directory}?labels={table}")
    (batch,) = _read(source)
    assert batch.targets.tolist() == images.labels.tolist()
    assert batch.example_ids.tolist() == images.ids.tolist()

    table.write_text(f"label,file\n0.5,{images.ids[3]}\n-2,{images.ids[1]}\n")
    (batch,) = _read(source)
    assert batch.example_ids.tolist() == images.ids[[1, 3]].tolist()
    assert batch.targets.tolist() == [-2, 0.5]
    assert {batch.targets.dtype for batch in _read(source, 1)} == {np.dtype(float)}
    assert source.describe()["ignored"] == 38


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\n", r"has columns \['file', 'class'\], expected file and label"),
        ("", "has columns .*, expected file and label"),
        ("file,label\n", "lists no file: expected one on each line"),
        ("file,label\n\ncat/none.png,1\n", "line 3: there is no image 'cat/none.png'"),
        ("file,label\ncat/00000.png,cat\n", "line 2: label 'cat': expected a class index"),
        ("file,label\ncat/00000.png\n", "line 2: label '': expected a class index"),
    ],
)
def test_bad_tables(directory, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        ImageExamples(str(directory), labels=str(tmp_path / "labels.csv")).shards()


def test_bad_directories(directory, tmp_path):
    with pytest.raises(InputError, match="none' is no directory: expected one"):
        ImageExamples(str(tmp_path / "none")).shards()
    with pytest.raises(InputError, match="are in no folders.*expected a folder .*labels=FILE.csv"):
        ImageExamples(str(directory / CLASSES[0])).shards()
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "a" / "b.txt").write_text("")
    with pytest.raises(InputError, match=r"has no images among its 1 files: expected .*\.jpg"):
        ImageExamples(str(tmp_path / "empty")).shards()
    with pytest.raises(InputError, match="classes and labels: expected one or the other"):
        ImageExamples(str(directory), "a", "b")


def test_a_broken_image_is_bad(directory):
    images = random_images(40)
    name = images.ids[2]
    (directory / name).write_bytes(PNG[:30])
    (batch,) = _read(ImageExamples(str(directory)))
    assert len(batch) == 39
    assert [(bad.example_id, bad.index) for bad in batch.bad] == [(name, 2)]
    assert "cannot be decoded as an image" in batch.bad[0].error


def test_images_of_different_sizes(directory):
    images = random_images(40)
    (directory / images.ids[5]).write_bytes(PNG)
    message = (
        rf"\[12, 12, 3\] for example '{images.ids[0]}', \[4, 4, 3\] for '{images.ids[5]}'.*"
        "resize=HxW, or resize=N and crop=N"
    )
    with pytest.raises(InputError, match=message):
        _read(ImageExamples(str(directory)))
    (batch,) = _read(parse_spec(f"images:{directory}?resize=5x7&channels=1"))
    assert batch.inputs.shape == (40, 5, 7, 1)


def test_a_directory_that_changed_is_not_read(directory):
    source = ImageExamples(str(directory))
    (shard,) = source.shards()
    name = random_images(40).ids[0]
    (directory / name).write_bytes(PNG)
    with pytest.raises(InputError, match=rf"{name}' changed: it has {len(PNG)} bytes and had"):
        list(source.read(shard, 10))
    (directory / name).unlink()
    with pytest.raises(InputError, match=rf"{name}' changed: it has 0 bytes and had"):
        list(source.read(shard, 10))
    # Who lists the directory only now finds another shard in it.
    assert source.shards() != (shard,)
    with pytest.raises(InputError, match="shard 'images-00000-of-00001' is no longer what it was"):
        list(source.read(shard, 10))
