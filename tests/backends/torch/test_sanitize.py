"""The script for compute-sanitizer runs, here in Triton's interpreter and without pytest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

WITHOUT_PYTEST = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "pytest" else find(name)
sys.path.insert(0, sys.argv[1])
import sanitize
sanitize.main(*sys.argv[2:])
assert type(sys.modules["pytest"]).__name__ == "MagicMock"
assert type(sanitize.elementwise.test_norms).__name__ == "function"
"""


@pytest.mark.parametrize("cases", [("by_row", "steps"), pytest.param((), marks=pytest.mark.slow)], ids=["few", "all"])
def test_it_runs(cases: tuple[str, ...]):
    here = str(Path(__file__).parents[2] / "tools")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTEST, here, *cases], env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ran = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert ran == [*(cases or ("attentions", "by_row", "gemms", "sampling_cases", "steps"))]
