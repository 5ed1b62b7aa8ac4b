"""Stores of sketches as users fill and ask them, and shortlists that are scored again."""

import io
import json
import re
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pyarrow.parquet as pq
import pytest

import pipelines.queries
from pipelines.cli import main
from tests.integration.conftest import TRACIN, edit_series, tracin
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.storage.factor_store import FactorStore

WORKERS = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
ROWS, QUERIES, K = 280, 20, 5
# The last layer is of 4 outputs and 8 inputs: this keeps half of the activations' numbers.
SKETCH = "8"


def _here(command, arguments, *more):
    """Runs a command in this process, which has loaded already what takes a while to load."""
    line = [command, *(f"{name}={value}" for name, value in arguments.items()), *more]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        try:
            status = main(line)
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(line, status, out.getvalue(), errors.getvalue())


def _extract(trained, directory, *more, examples="train.npz", run=_here):
    spec = {"--examples": f"npz:{trained / examples}?id=id", "--output": directory}
    done = run("extract", {"--checkpoints": trained / "run", **spec}, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stores(trained, tmp_path_factory):
    """Directories of stores: factors, sketches and whole, a sketch that leaves all as it is."""
    directory = tmp_path_factory.mktemp("stores")
    found = {"factors": (), "sketches": (f"--sketch={SKETCH}",), "whole": ("--sketch=100",)}
    for name, more in found.items():
        said = _extract(trained, directory / name, "--dtype=float32", *more)
        assert ("Sketches of 8 numbers" in said) == (name == "sketches")
    return {name: directory / name for name in found}


@pytest.fixture
def asked(trained, stores, tmp_path):
    """What a user types for a question to the sketches."""
    return {
        "--store": stores["sketches"],
        "--queries": f"npz:{trained / 'queries.npz'}?id=id",
        "--k": K,
        "--output": tmp_path / "out",
    }


def _asking(arguments, *more, run=_here):
    done = run("influence", arguments, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _rows(directory, name="influence"):
    files = sorted(directory.glob(f"{name}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def _manifest(directory):
    return json.loads((directory / "manifest.json").read_text())


def _refused(arguments, *more, status=1):
    done = _here("influence", arguments, *more)
    assert done.returncode == status, done.stdout
    return done.stderr


def test_a_sketch_that_keeps_everything_changes_nothing(asked, stores, tmp_path):
    results = []
    for name in ("factors", "whole"):
        arguments = asked | {"--store": stores[name], "--output": tmp_path / name}
        said = _asking(arguments, "--score-matrix")
        assert ("estimates from sketches of 100 numbers" in said) == (name == "whole")
        results.append((_rows(tmp_path / name), _rows(tmp_path / name, "scores")))
    assert results[0] == results[1]
    assert len(results[0][1]) == ROWS
    runs = [_manifest(tmp_path / name)["run"] for name in ("factors", "whole")]
    assert runs[1].pop("sketch") == Sketch("activations", 100).to_json()
    assert runs[0] == runs[1]


@pytest.mark.parametrize("more", [[], ["--no-prune"]], ids=str)
def test_influence_by_sketches(asked, stores, tmp_path, trained, more):
    said = _asking(asked, "--score-matrix", *more)
    assert "Influences are estimates from sketches of 8 numbers; --rescore" in said
    scores = {row["example_id"]: row for row in _rows(tmp_path / "out", "scores")}
    _asking(
        asked | {"--store": stores["factors"], "--output": tmp_path / "exact"}, "--score-matrix"
    )
    exact = {row["example_id"]: row for row in _rows(tmp_path / "exact", "scores")}
    names = [name for name in next(iter(exact.values())) if name.startswith("z")]
    pairs = np.array([[(scores[z][q], exact[z][q]) for q in names] for z in exact])
    assert np.corrcoef(pairs.reshape(-1, 2).T)[0, 1] > 0.8
    for row in _rows(tmp_path / "out"):
        score = scores[row["example_id"]][row["query_id"]]
        assert row["influence"] == pytest.approx(score, rel=1e-4, abs=1e-6)


def test_a_shortlist_of_all_gives_exact_influence(asked, stores, tmp_path):
    more = [f"--rescore={stores['factors']}", f"--shortlist={ROWS}"]
    said = _asking(asked, *more, *WORKERS, run=tracin)
    assert re.search(
        r"Found by sketches of 8 numbers: the 280 strongest of each .* 5,600 pairs\. "
        r"They were scored again in .* influences are exact",
        said,
    )
    exact = asked | {"--store": stores["factors"], "--output": tmp_path / "exact"}
    _asking(exact)
    assert _rows(tmp_path / "out") == _rows(tmp_path / "exact")
    manifest = _manifest(tmp_path / "out")
    assert manifest["run"]["shortlist"] == ROWS
    assert manifest["run"]["rescore"]["factors"]["dtype"] == "float32"
    assert manifest["summary"]["rescored_pairs"] == ROWS * QUERIES
    assert "Already done" in _asking(asked, *more)


def test_a_shortlist_is_ten_times_k(asked, stores, tmp_path):
    said = _asking(asked, f"--rescore={stores['factors']}")
    assert "the 50 strongest of each query and direction" in said
    exact = asked | {"--store": stores["factors"], "--output": tmp_path / "exact", "--k": ROWS}
    _asking(exact)
    influence = {
        (r["query_id"], r["example_id"]): r["influence"] for r in _rows(tmp_path / "exact")
    }
    rows = _rows(tmp_path / "out")
    assert len(rows) == 2 * K * QUERIES
    assert all(row["influence"] == influence[row["query_id"], row["example_id"]] for row in rows)


def test_groups_of_queries_count_the_shortlist(asked, stores, tmp_path, monkeypatch):
    def ask(output):
        arguments = asked | {"--output": output, "--rescore": stores["factors"], "--shortlist": 30}
        return main(["influence", *(f"{name}={value}" for name, value in arguments.items())])

    assert ask(tmp_path / "at-once") == 0
    counted = []

    def bytes_per_query(block, k):
        counted.append(k)
        return 8_000

    monkeypatch.setattr(pipelines.queries, "_GROUP_BYTES", 8 * 8_000)
    monkeypatch.setattr(pipelines.queries, "_bytes_per_query", bytes_per_query)
    assert ask(tmp_path / "in-groups") == 0
    assert set(counted) == {30}
    assert _manifest(tmp_path / "in-groups")["summary"]["passes"] == 3
    assert _rows(tmp_path / "in-groups") == _rows(tmp_path / "at-once")


def test_self_influence_is_exact(stores, tmp_path):
    results = []
    for name in ("factors", "sketches"):
        arguments = {"--store": stores[name], "--output": tmp_path / name}
        assert _here("self-influence", arguments).returncode == 0
        results.append(_rows(tmp_path / name, "self_influence"))
    assert results[0] == results[1]


def test_queries_from_stores(asked, trained, stores, tmp_path):
    """Of factors, which are projected, and of the same sketch, which are not again."""
    _asking(asked)
    for name, more in (("factors", ()), ("sketches", (f"--sketch={SKETCH}",))):
        store = tmp_path / f"queries-{name}"
        _extract(trained, store, "--dtype=float32", *more, examples="queries.npz")
        _asking(asked | {"--queries": f"store:{store}", "--output": tmp_path / name})
        rows, expected = _rows(tmp_path / name), _rows(tmp_path / "out")
        for row, other in zip(rows, expected, strict=True):
            keys = ("query_id", "direction", "example_id")
            assert [row[key] for key in keys] == [other[key] for key in keys]
            assert row["influence"] == pytest.approx(other["influence"], rel=1e-4)

    sketches = {"--queries": f"store:{tmp_path / 'queries-sketches'}"}
    refused = asked | sketches | {"--output": tmp_path / "refused"}
    error = _refused(refused | {"--store": stores["factors"]})
    assert "it holds sketches of gradient factors, which say nothing beside the factors" in error
    error = _refused(refused | {"--store": stores["whole"]})
    assert "its sketch is {'kind': 'activations', 'numbers': 8, 'seed': 0}, that of the" in error
    error = _refused(refused, f"--rescore={stores['factors']}")
    assert "are sketches: expected the query examples, or a store without --sketch" in error
    direct = {"--checkpoints": trained / "run", "--examples": f"npz:{trained / 'train.npz'}?id=id"}
    del refused["--store"]
    assert "which say nothing beside the factors" in _refused(refused | direct)


def test_stores_that_do_not_fit_are_refused(asked, trained, stores, tmp_path):
    error = _refused(asked | {"--store": stores["factors"]}, f"--rescore={stores['factors']}")
    assert "holds gradient factors themselves, whose influence need not be computed again" in error
    error = _refused(asked, f"--rescore={stores['whole']}")
    assert "it holds sketches, too: expected a store without --sketch" in error
    assert "is no factor store" in _refused(asked, f"--rescore={tmp_path / 'none'}")

    with np.load(trained / "train.npz") as data:
        np.savez(tmp_path / "fewer.npz", **{key: data[key][:-1] for key in data})
    _extract(trained, tmp_path / "fewer", examples=tmp_path / "fewer.npz")
    error = _refused(asked, f"--rescore={tmp_path / 'fewer'}", f"--shortlist={ROWS}")
    assert "lacks 1 of the 280 examples on the shortlist (first: 'z279')" in error
    assert not (tmp_path / "out").exists()

    _extract(trained, tmp_path / "other", "--layers=all-dense")
    error = _refused(asked, f"--rescore={tmp_path / 'other'}")
    assert "layers is 'all-dense', that of the training examples 'last': expected the same" in error

    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    files = sorted(run.glob("*.keras"))
    shutil.copy(files[0], files[1])
    arguments = {"--examples": f"npz:{trained / 'train.npz'}?id=id", "--output": tmp_path / "hash"}
    assert _here("extract", {"--checkpoints": run, **arguments}).returncode == 0
    error = _refused(asked, f"--rescore={tmp_path / 'hash'}")
    assert "is another one than that of the training examples: expected the same file" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shortlist=30"], "--shortlist: expected --rescore"),
        (["--rescore=store", "--shortlist=4"], "--shortlist 4: expected at least --k, 5"),
    ],
)
def test_options_that_do_not_fit_each_other(asked, more, message):
    assert message in _refused(asked, *more, status=2)


def test_other_options_that_do_not_fit_each_other(trained, arguments):
    queries = f"--queries=npz:{trained / 'queries.npz'}"
    assert "--rescore: expected --queries and --store" in _refused(
        arguments, queries, "--rescore=store", status=2
    )
    done = _here("plan", arguments, queries, "--sketch=8")
    assert done.returncode == 2
    assert "--sketch is for a plan of 'tracin extract'" in done.stderr


def test_sketches_that_cannot_be(arguments, trained):
    done = _here("extract", arguments, "--sketch=many")
    assert done.returncode == 1
    assert "--sketch: sketch 'many': expected how many numbers" in done.stderr
    done = _here("extract", arguments, "--sketch=4")
    assert "layer 'outputs' has 4 outputs" in done.stderr
    assert "ask for more than 4 numbers, or for two-sided:4" in done.stderr
    # What failed does not bind.
    done = _here("extract", arguments, "--sketch=two-sided:4")
    assert done.returncode == 0, done.stderr


def test_a_sketch_store_goes_on_and_refuses_others(trained, stores, tmp_path):
    run, store = tmp_path / "run", tmp_path / "store"
    shutil.copytree(trained / "run", run)
    edit_series(run, lambda series: series["checkpoints"].pop(1))
    arguments = {"--examples": f"npz:{trained / 'train.npz'}?id=id", "--output": store}
    more = ["--dtype=float32", f"--sketch={SKETCH}"]
    assert _here("extract", {"--checkpoints": run, **arguments}, *more).returncode == 0
    _extract(trained, store, *more)
    assert _files(store) == _files(stores["sketches"])
    # As when a process died before the shard was complete.
    next((store / "examples").iterdir()).unlink()
    _extract(trained, store, *more)
    assert _files(store) == _files(stores["sketches"])
    assert "Already done" in _extract(trained, store, *more)
    refused = _here("extract", {"--checkpoints": trained / "run", **arguments}, "--dtype=float32")
    assert refused.returncode == 1
    assert '"numbers": 8, "seed": 0} there and null here' in refused.stderr
    assert FactorStore.open(store).description.sketch == Sketch.parse(SKETCH)


def _files(store):
    return {
        path.name: path.read_bytes()
        for part in ("factors", "examples")
        for path in (store / part).iterdir()
    }


def test_what_a_store_of_sketches_holds(stores):
    for name in ("sketches", "factors"):
        done = subprocess.run(
            [TRACIN, "store", "info", stores[name]], capture_output=True, text=True
        )
        assert ("sketch       8: at most 8 numbers" in done.stdout) == (name == "sketches")
    done = subprocess.run(
        [TRACIN, "store", "verify", stores["sketches"]], capture_output=True, text=True
    )
    assert "is whole: 2 shards" in done.stdout


def test_plans(asked, arguments):
    sizes = []
    for more in ([], ["--sketch=5"]):
        plan = _here("plan", arguments, "--dtype=float32", *more)
        assert plan.returncode == 0, plan.stderr
        sizes.append(int(re.search(r"([0-9,]+) bytes an example", plan.stdout)[1].replace(",", "")))
    assert sizes[1] < sizes[0]
    plan = _here("influence", asked, "--dry-run")
    assert plan.returncode == 0, plan.stderr
