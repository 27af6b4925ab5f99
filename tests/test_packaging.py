"""What gets installed: the wheel's content, and that it and the editable install import as one package."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from measure import FOLDERS, ROOT

IMPORT = """
import importlib.metadata, json, llmrs, llmrs.core
direct = json.loads(importlib.metadata.distribution("llmrs").read_text("direct_url.json") or "{}")
editable = direct.get("dir_info", {}).get("editable", False)
print(json.dumps({"files": [llmrs.__file__, llmrs.core.__file__], "editable": editable}))
"""


def output(*command: str | Path, cwd: Path, **env: str) -> str:
    """The standard output of a command, which must succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


KERNELS = re.compile(r"llmrs/backends/torch/cpu/kernels_\w+\.so")  # compiled where there is a compiler


def repository_files() -> list[str]:
    """Files that git tracks or would add, as paths from the root."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git checkout")
    listed = output("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    return sorted({f for f in listed if f and os.path.lexists(ROOT / f)})


def copy_tree(files: list[str], target: Path) -> Path:
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def pip(*arguments: str | Path, cwd: Path) -> None:
    """pip that asks no index."""
    output(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd, PIP_NO_INDEX="1")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("wheel")
    tree = copy_tree(repository_files(), tmp / "tree")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp / "out", tree, cwd=tmp)
    (built,) = (tmp / "out").iterdir()
    return built


def installed_as(name: str) -> str:
    """core/ir.py -> llmrs/core/ir.py, llmrs/api.py -> llmrs/api.py"""
    return name if name.startswith("llmrs/") else f"llmrs/{name}"


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith("/")}
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"llmrs"}
    code = {installed_as(f): f for f in repository_files() if f.split("/")[0] in FOLDERS}
    assert not [f for n, f in code.items() if n not in names and not f.endswith(".md")], "left out of the wheel"
    rest = {n for n in names if ".dist-info/" not in n and n not in code}
    assert {n for n in rest if not KERNELS.fullmatch(n)} == set(), "not in the repository"
    assert "-py3-none-" in wheel.name, "one wheel for every version of Python"


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    scripts = archive.read(f"{info}/entry_points.txt").decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, target in {**project["scripts"], **project["entry-points"]["llmrs.backends"]}.items():
        assert f"{name} = {target}" in scripts
        module = target.partition(":")[0].replace(".", "/")
        assert {f"{module}.py", f"{module}/__init__.py"} & set(archive.namelist()), f"{target} is not there"


def test_installed_wheel_imports(wheel, tmp_path):
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    found = json.loads(output(sys.executable, "-c", IMPORT, cwd=tmp_path, PYTHONPATH=str(site)))
    assert [Path(f) for f in found["files"]] == [site / "llmrs/__init__.py", site / "llmrs/core/__init__.py"]


def test_editable_install_is_this_repository(tmp_path):
    found = json.loads(output(sys.executable, "-c", IMPORT, cwd=tmp_path))
    if not found["editable"]:
        pytest.skip("llmrs is not installed with pip install -e")
    expected = [ROOT / "llmrs/__init__.py", ROOT / "core/__init__.py"]
    assert [Path(f).resolve() for f in found["files"]] == [p.resolve() for p in expected]
