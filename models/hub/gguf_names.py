"""Which files of a folder or a repository are GGUF models, and which of them a name means.

As in common/download.cpp of github.com/ggml-org/llama.cpp: some words in a file's name say that it is no model; a tag
such as Q4_K_M is matched in the path, whatever its case; Q4_K_M, then Q8_0 are the defaults of a repository. Unlike
there, a tag at the end of the name comes first, and where several files match, none is taken.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmrs.core.errors import ModelError, did_you_mean
from llmrs.models.files.gguf import PART, SUFFIX, part_names

# Projectors of images, importance matrices, draft models.
OTHER_KINDS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
DEFAULTS = ("Q4_K_M", "Q8_0")
QUANT = re.compile(
    r"(?<![a-z0-9])(?:ud-)?(?:i?q\d\w*|tq\d\w*|(?:mx|nv)?fp\d\w*|b?f(?:16|32))(?![\w])", re.ASCII | re.IGNORECASE
)
TAG = re.compile(r"\w[\w.-]*", re.ASCII)
SHOWN = 20  # names in an error


@dataclass(frozen=True)
class GGUFModel:
    """One file, or the files of a split set, in order: paths in the folder or repository."""

    files: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The path without number and suffix."""
        match = PART.fullmatch(self.files[0])
        return match[1] if match else self.files[0].removesuffix(SUFFIX)

    @property
    def tag(self) -> str:
        """The quantization in the file's name, or in its folder's; empty if there is none."""
        return (QUANT.findall(self.stem) or [""])[-1]

    def matches(self, tag: str) -> bool:
        return re.search(rf"(?<![a-z0-9]){re.escape(tag)}(?!\w)", self.stem, re.ASCII | re.IGNORECASE) is not None


def split_tag(name: str) -> tuple[str, str | None]:
    """`NAME:TAG` -> NAME and TAG; None for a name without a tag."""
    base, colon, tag = name.rpartition(":")
    return (base, tag) if colon and base and TAG.fullmatch(tag) else (name, None)


def gguf_models(names: Iterable[str], *, every: bool = False) -> list[GGUFModel]:
    """The models among files, by path. `every`: also files that are known as other things by their names."""
    models = dict[tuple[str, ...], None]()
    for name in sorted(n for n in names if n.endswith(SUFFIX)):
        folder, slash, file = name.rpartition("/")
        if every or not any(word in file for word in OTHER_KINDS):
            try:
                models[tuple(f"{folder}{slash}{part}" for part in part_names(file))] = None
            except ModelError:  # numbers of a split set that make no sense
                continue
    return [GGUFModel(files) for files in models]


def folder_models(folder: Path, *, nested: bool = True) -> list[GGUFModel]:
    """The models in a folder; `nested`: where it has none, those in its subfolders."""
    for pattern in (f"*{SUFFIX}", f"*/*{SUFFIX}")[: 1 + nested]:
        if models := gguf_models(p.relative_to(folder).as_posix() for p in folder.glob(pattern)):
            return models
    return []


def choose(
    models: Sequence[GGUFModel], name: str, tag: str | None, defaults: Sequence[str] = (), place: str = ""
) -> GGUFModel:
    """The model with a tag; without one the only model, else that with the first of `defaults`.

    `name`: of the folder or repository; `place`: more of it for errors. Raises ModelError that names the
    models and says how to choose.
    """
    where = name + place
    if not models:
        raise ModelError(f"{where} holds no GGUF file of a model", "leave out the tag, or give another model")
    found = [] if tag is None else _with_tag(models, tag)
    if tag is None:
        found = list(models) if len(models) == 1 else next(filter(None, (_with_tag(models, t) for t in defaults)), [])
    if len(found) == 1:
        return found[0]
    tags = {m.tag: m for m in models if m.tag}
    if tag is not None and not found:
        hint = did_you_mean(tag.upper(), map(str.upper, tags)) if tags else "give the path of a file"
        raise ModelError(f"{where} has no GGUF model {tag!r}: it has {_listed(models)}", hint)
    example = next(iter(tags), "Q4_K_M")
    hint = f"choose one by {name}:{example}, or by its path: {name}/{(found or models)[0].files[0]}"
    what = f"{len(found)} GGUF models {tag!r}" if tag else f"{len(models)} GGUF models"
    raise ModelError(f"{where} has {what}: {_listed(found or models)}", hint)


def choose_file(names: Iterable[str], where: str, file: str) -> GGUFModel:
    """The model that a file belongs to. Raises ModelError."""
    models = gguf_models(names, every=True)
    for model in models:
        if file in model.files:
            return model
    hint = did_you_mean(file, [m.files[0] for m in models]) if models else "give another model"
    raise ModelError(f"{where} has no file {file!r}", hint)


def _with_tag(models: Sequence[GGUFModel], tag: str) -> list[GGUFModel]:
    exact = [m for m in models if m.tag.lower() == tag.lower()]
    return exact or [m for m in models if m.matches(tag)]


def _listed(models: Sequence[GGUFModel]) -> str:
    """Tags where each model has its own, else paths."""
    tags = [m.tag for m in models]
    unique = "" not in tags and len({t.lower() for t in tags}) == len(tags)
    names = tags if unique else [m.files[0] for m in models]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
