"""Where the packages lie: the top-level folders install as subpackages of `llmrs`; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("core", "backends", "models", "quant", "cli")

packages = [
    "llmrs",
    "llmrs.bench",
    *(f"llmrs.{p}" for p in find_packages(".", include=[g for f in FOLDERS for g in (f, f"{f}.*")])),
]
setup(packages=packages, package_dir={"llmrs": "llmrs", **{f"llmrs.{f}": f for f in FOLDERS}})
