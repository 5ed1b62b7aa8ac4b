"""`tracin influence` over a store: pruned or not, in groups, and with all scores."""

import json

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest

import pipelines.queries
from pipelines.cli import main
from tests.integration.conftest import tracin

WORKERS = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
ROWS, QUERIES = 3000, 20


@pytest.fixture(scope="module")
def asked(trained, tmp_path_factory):
    """What a user types for a question to a store."""
    directory = tmp_path_factory.mktemp("asked")
    rng = np.random.default_rng(2)
    np.savez(
        directory / "many.npz",
        x=(rng.standard_normal((ROWS, 5)) * 3).astype(np.float32),
        y=rng.integers(0, 4, ROWS),
    )
    examples = f"npz:{directory / 'many.npz'}"
    done = tracin(
        "extract",
        {
            "--checkpoints": trained / "run",
            "--examples": examples,
            "--output": directory / "store",
        },
    )
    assert done.returncode == 0, done.stderr
    return {
        "--store": directory / "store",
        "--queries": f"npz:{trained / 'queries.npz'}?id=id",
        "--k": 6,
    }


def _rows(directory):
    files = sorted(directory.glob("influence-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def _summary(directory):
    return json.loads((directory / "manifest.json").read_text())["summary"]


def _in_process(arguments):
    return main(["influence", *(f"{name}={value}" for name, value in arguments.items())])


def test_pruning_changes_nothing_but_the_time(asked, tmp_path):
    results = []
    for name, more in (("all", ["--no-prune"]), ("pruned", []), ("workers", WORKERS)):
        done = tracin("influence", asked | {"--output": tmp_path / name}, *more)
        assert done.returncode == 0, done.stderr
        results.append(_rows(tmp_path / name))
        share = _summary(tmp_path / name)["scored_share"]
        if name == "all":
            assert share == 1
            assert "pairs were multiplied" not in done.stdout
        else:
            assert 0 < share < 0.95
            assert f"{share:.1%} of all pairs were multiplied" in done.stdout
    assert len(results[0]) == 2 * 6 * QUERIES
    assert results[0] == results[1] == results[2]


def test_groups_of_queries_are_taken_one_after_the_other(asked, tmp_path, monkeypatch, capsys):
    assert _in_process(asked | {"--output": tmp_path / "at-once"}) == 0
    # Three groups: of 8, 8 and 4.
    monkeypatch.setattr(pipelines.queries, "_GROUP_BYTES", 8 * 8_000)
    monkeypatch.setattr(pipelines.queries, "_bytes_per_query", lambda *_: 8_000)
    assert _in_process(asked | {"--output": tmp_path / "in-groups"}) == 0
    assert "The queries took 3 passes over the store." in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "in-groups").glob("influence-*"))
    assert files == [f"influence-{i:05d}-of-00003.parquet" for i in range(3)]
    assert _rows(tmp_path / "in-groups") == _rows(tmp_path / "at-once")
    expected, found = (_summary(tmp_path / name) for name in ("at-once", "in-groups"))
    for key in ("examples", "queries", "fewer_than_k", "without_gradient"):
        assert found[key] == expected[key]
    assert (expected["passes"], found["passes"]) == (1, 3)


def test_too_many_queries_without_a_store(trained, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipelines.queries, "_GROUP_BYTES", 1)
    spec = f"npz:{trained / 'queries.npz'}?id=id"
    assert _in_process(arguments | {"--queries": spec}) == 1
    assert "store their gradient factors first, with 'tracin extract'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_many_queries_for_a_matrix(asked, tmp_path, monkeypatch, capsys):
    """Of two passes, the second would write over what the first one wrote."""
    monkeypatch.setattr(pipelines.queries, "_GROUP_BYTES", 1)
    arguments = asked | {"--output": tmp_path / "out"}
    line = ["influence", *(f"{name}={value}" for name, value in arguments.items())]
    assert main([*line, "--score-matrix"]) == 1
    assert "ask fewer at a time, or leave out --score-matrix" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("from_store", [True, False])
def test_all_scores(asked, trained, arguments, tmp_path, from_store):
    inputs = asked if from_store else arguments | {"--queries": asked["--queries"], "--k": 6}
    output = tmp_path / "out"
    done = tracin("influence", inputs | {"--output": output}, "--score-matrix")
    assert done.returncode == 0, done.stderr
    assert f"All scores: {output}/scores-*.parquet" in done.stdout
    matrix = pq.read_table(sorted(output.glob("scores-*.parquet")))
    with np.load(trained / "queries.npz") as queries:
        assert matrix.column_names == ["example_id", "label", *queries["id"]]
    ids = matrix["example_id"].to_pylist()
    assert len({*ids}) == len(ids) == (ROWS if from_store else 280)
    for query in matrix.column_names[2:]:
        scores = dict(zip(ids, matrix[query].to_pylist(), strict=True))
        mine = [row for row in _rows(output) if row["query_id"] == query]
        largest = max(map(abs, scores.values()))
        for row in mine:
            assert scores[row["example_id"]] == pytest.approx(row["influence"], abs=1e-6 * largest)
        for direction, sign in (("proponent", 1), ("opponent", -1)):
            weakest = min(sign * r["influence"] for r in mine if r["direction"] == direction)
            beyond = sum(sign * score > weakest + 1e-6 * largest for score in scores.values())
            assert beyond <= 5


def test_queries_without_gradient_are_told(asked, trained, tmp_path):
    """So far from all others that the softmax is 1, and its error 0, to the last digit."""
    with np.load(trained / "queries.npz") as arrays:
        inputs, labels = arrays["x"].copy(), arrays["y"].copy()
    inputs[:5] *= 1e5
    run = trained / "run"
    for path in run.glob("*.keras"):
        model = keras.models.load_model(path)
        predicted = model.predict(inputs[:5], verbose=0).argmax(axis=1)
        assert (predicted == predicted).all()
    labels[:5] = predicted
    ids = np.array([f"q{i}" for i in range(len(labels))])
    np.savez(tmp_path / "far.npz", x=inputs, y=labels, id=ids)
    question = asked | {"--queries": f"npz:{tmp_path / 'far.npz'}?id=id"}
    done = tracin("influence", question | {"--output": tmp_path / "out"})
    assert done.returncode == 0, done.stderr
    assert "5 of 20 queries have a gradient of 0" in done.stdout
    assert _summary(tmp_path / "out")["without_gradient"] == 5
    rows = _rows(tmp_path / "out")
    assert {row["query_id"] for row in rows} == {f"q{i}" for i in range(5, 20)}
    done = tracin("influence", question | {"--output": tmp_path / "matrix"}, "--score-matrix")
    assert done.returncode == 0, done.stderr
    matrix = pq.read_table(sorted((tmp_path / "matrix").glob("scores-*.parquet")))
    assert matrix.column_names[2:] == ids.tolist()
    assert {*matrix["q0"].to_pylist()} == {0}
    np.savez(tmp_path / "none.npz", x=inputs[:5], y=labels[:5], id=ids[:5])
    question = asked | {"--queries": f"npz:{tmp_path / 'none.npz'}?id=id"}
    done = tracin("influence", question | {"--output": tmp_path / "none"})
    assert done.returncode == 0, done.stderr
    assert "5 of 5 queries have a gradient of 0" in done.stdout
    assert _rows(tmp_path / "none") == []


@pytest.mark.parametrize("from_store", [True, False])
def test_queries_of_which_there_are_none(asked, arguments, tmp_path, capsys, from_store):
    (tmp_path / "none.tfrecord").write_bytes(b"")
    inputs = asked if from_store else arguments
    question = {"--queries": f"tfrecord:{tmp_path / 'none.tfrecord'}?x=x&y=y"}
    assert _in_process(inputs | question | {"--output": tmp_path / "out"}) == 1
    assert "none.tfrecord" in (errors := capsys.readouterr().err)
    assert "expected at least one" in errors
    assert not (tmp_path / "out").exists()
