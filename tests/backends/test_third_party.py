"""An external package adds a backend and passes the conformance suite."""

import json
import os
import subprocess
import sys

import pytest
from measure import ROOT

EXAMPLE = ROOT / "examples" / "backend"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The example, copied and installed into its own folder."""
    folder = tmp_path_factory.mktemp("third-party")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "llmrs_counting.py", "test_counting.py"):
        (tree / name).write_text((EXAMPLE / name).read_text("utf-8"), "utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index"]
    run([*pip, "--no-deps", "--no-build-isolation", "--target", folder / "site", tree], folder, folder)
    return folder


def run(command, cwd, folder):
    path = os.pathsep.join(p for p in (str(folder / "site"), os.environ.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_it_passes_the_suite(site):
    test = site / "tree" / "test_counting.py"
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test], site, site)
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_the_command_line_accepts_it(site):
    options = ["--backend", "counting", "--prompts", "What is 7 + 5?", "--json", "--temperature", "0"]
    done = run([sys.executable, "-m", "llmrs.cli", "run", *options], site, site)
    assert json.loads(done.stdout)["text"] == "7 + 5 = 12."
    assert "operations" in done.stderr
