"""The demo's main path, and its report in a real browser."""

import json
import os
import shutil
import subprocess

import pytest

from tests.integration.conftest import tracin

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "demo output"
    done = tracin("demo", {"--output": output})
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_the_demo_finds_the_flipped_labels(demo):
    output, text = demo
    assert "130 of 1,297 training digits have a wrong label" in text
    line = next(line for line in text.splitlines() if line.startswith("  by self-influence"))
    loss = next(line for line in text.splitlines() if line.startswith("  by loss of"))
    found, found_by_loss = (
        [int(word.rstrip("%")) for word in words.split()[-3:]] for words in (line, loss)
    )
    assert found[2] >= 80
    assert all(a >= b for a, b in zip(found, found_by_loss, strict=True))
    accuracy = text[text.index("Test accuracy ") :].split()
    assert float(accuracy[2].rstrip("%")) + 3 < float(accuracy[8].rstrip("%"))
    assert f"Report: {output / 'report.html'}" in text
    assert ".partial" not in text


def test_what_the_demo_leaves(demo):
    output, _ = demo
    assert sorted(p.name for p in output.iterdir()) == [
        "influence",
        "manifest.json",
        "queries.npz",
        "report.html",
        "run",
        "self-influence",
        "train.npz",
    ]
    again = tracin("demo", {"--output": output})
    assert (again.returncode, "Already done" in again.stdout) == (0, True)


def test_the_report_in_a_real_browser(demo, tmp_path):
    """Headless Chromium renders the page: nothing is fetched or blocked, all images decode."""
    if CHROMIUM is None:
        assert os.environ.get("CI") != "true", "CI needs chromium: apt-get install chromium"
        pytest.skip("no chromium on this machine: apt-get install chromium")
    page = (demo[0] / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    # The page allows no script, so what it shows is measured from outside it, in a frame.
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "frame.html").write_text(
        "<iframe src='report.html' width=1000 height=800></iframe><p id=seen></p><script>"
        "onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "const i = [...d.images]; document.getElementById('seen').textContent = JSON.stringify({"
        "images: i.length, decoded: i.filter(x => x.naturalWidth == 8).length,"
        "lines: d.querySelectorAll('polyline').length, title: d.title,"
        "wide: d.documentElement.scrollWidth > d.documentElement.clientWidth,"
        "card: d.defaultView.getComputedStyle(d.querySelector('section')).borderRadius}) }</script>"
    )
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = json.loads(done.stdout.split('<p id="seen">')[1].split("</p>")[0])
    assert seen["images"] == seen["decoded"] == page.count("<img ")
    assert seen["images"] > 100
    assert seen["lines"] == 4
    assert seen["card"] == "12px"
    assert not seen["wide"]
    assert seen["title"] == "Which training digits are behind a prediction"
    assert "Content Security Policy" not in done.stderr
