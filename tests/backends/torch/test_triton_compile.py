"""Every kernel compiles for an H100 in every configuration, without a GPU, and fits into shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run here")
@pytest.mark.parametrize("part", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_kernels_compile(part: str, tmp_path: Path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = TOOLS / "triton_compile.py"
    done = subprocess.run([sys.executable, script, part], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "paged_attention_kernel" in done.stdout
    assert " PDL" in done.stdout
    assert "LOCAL MEMORY" not in done.stdout
