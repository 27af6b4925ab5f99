"""Hugging Face repositories: snapshots in the shared Hugging Face cache, downloaded if missing.

Only files that llmrs reads are downloaded. Names from the Hub are checked before they become paths.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from llmrs.core.errors import ModelError
from llmrs.models.arch.families import read_config
from llmrs.models.files.gguf import SUFFIX
from llmrs.models.files.quant_config import MODELOPT_FILE
from llmrs.models.files.safetensors import INDEX, SINGLE, read_index
from llmrs.models.hub.download import AGAIN, TIMEOUT, RemoteFile, bytes_missing, fetch, fetch_beginning
from llmrs.models.hub.errors import DISK_HINT, explained
from llmrs.models.hub.gguf_check import check_beginning
from llmrs.models.hub.gguf_names import DEFAULTS, GGUFModel, choose, choose_file, gguf_models
from llmrs.models.text.template_files import FILES

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
TEMPLATES = [file for files in FILES.values() for file in files]
SMALL = ("generation_config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", *TEMPLATES)
MAX_SHARDS = 2000
MAX_FILE_BYTES = 2**45
ID_PART = r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?"
ID = re.compile(f"{ID_PART}/{ID_PART}", re.ASCII)
REVISION = re.compile(r"(?!.*(\.\.|//))[\w][\w./+-]*", re.ASCII)  # becomes a path in the cache
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
BROKEN = "the repository is broken: tell its owner, or use another"
SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
GGUF_PATH = re.compile(r"(\w[\w.+-]*(?<!\.)/){0,4}\w[\w.+@=,()\[\] -]*\.gguf", re.ASCII)
Progress = Callable[[int, int], None]  # bytes done, total bytes


def looks_like_id(name: str) -> bool:
    """Whether a name was meant as an id, well-formed or not."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def resolve_snapshot(
    name: str, revision: str | None, want: str | None, *, offline: bool, weights: bool, progress: Progress
) -> Path:
    """The snapshot folder of a repository, or a GGUF file in it. Raises ModelError.

    `want`: a GGUF file of the repository, or a tag such as Q4_K_M; None: safetensors if it has any. Without `weights`
    only config.json is downloaded.
    """
    _check_form(name, revision)
    from huggingface_hub import constants  # takes a second to import

    repository = cache_folder() / f"models--{name.replace('/', '--')}"
    if offline or constants.HF_HUB_OFFLINE:
        return _cached(name, repository, revision, want, weights)
    with explained(name, revision, constants.ENDPOINT):
        download = Download(name, revision, repository, constants.ENDPOINT)
        if (model := wanted_gguf(name, download.files, want)) is not None:
            return download.gguf(model, weights, progress)
        download.get([n for n in (CONFIG, MODELOPT_FILE) if n in download.files])
        read_config(download.snapshot)  # refuses unsupported models before the download
        if weights:
            download.get([CONFIG, *(n for n in SMALL if n in download.files), *download.weights()], progress)
        return download.snapshot


def wanted_gguf(name: str, files: Collection[str], want: str | None, place: str = "") -> GGUFModel | None:
    """The GGUF model among the files of a repository that is meant; None: its safetensors. Raises ModelError."""
    models = gguf_models(files)
    if want is None and (not models or any(n.endswith(".safetensors") for n in files)):
        return None
    if want is not None and want.endswith(SUFFIX):
        return choose_file(files, name + place, want)
    return choose(models, name, want, DEFAULTS, place)


def snapshot_files(folder: Path) -> set[str]:
    """The paths of its files; none where it can't be read."""
    try:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    except OSError:
        return set()


def cache_folder() -> Path:
    """The Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


class Download:
    """The files of one repository at one commit."""

    def __init__(self, name: str, revision: str | None, repository: Path, endpoint: str) -> None:
        """Lists the repository's files."""
        self.name, self.repository = name, repository
        commit, self.files = _list_files(name, revision, endpoint)
        if CONFIG not in self.files and not any(n.endswith(SUFFIX) for n in self.files):
            hint = "give the id of a model in the format of transformers, or of GGUF files"
            raise ModelError(f"{name} holds no {CONFIG}", hint)
        self.snapshot = repository / "snapshots" / commit
        self.snapshot.mkdir(parents=True, exist_ok=True)
        _write_ref(repository, revision or "main", commit)

    def get(self, names: list[str], progress: Progress = lambda done, total: None) -> None:
        """Downloads these files, in this order, unless cached. Raises ModelError if the disk has too little space."""
        files = [self.files[name] for name in names]
        total, before = sum(f.size for f in files), 0
        self._check_space(files)
        for file in files:
            fetch(file, self.repository, self.snapshot, lambda done: progress(before + done, total))  # noqa: B023  (called at once)
            before += file.size

    def _check_space(self, files: list[RemoteFile]) -> None:
        missing = sum(bytes_missing(f, self.repository, self.snapshot) for f in files)
        if missing > (free := shutil.disk_usage(self.snapshot).free):
            raise ModelError(f"{self.name} needs {missing:,} more bytes on the disk, and {free:,} are free", DISK_HINT)

    def gguf(self, model: GGUFModel, weights: bool, progress: Progress) -> Path:
        """Downloads a GGUF model; returns its first file. Raises ModelError."""
        for file in model.files:
            if file not in self.files:
                raise ModelError(f"{self.name} lacks {file}, a file of a split set", BROKEN)
            if not GGUF_PATH.fullmatch(file):
                raise ModelError(f"{self.name} has a file {file[:100]!r}, a name that is not allowed", BROKEN)
        path = self.snapshot / model.files[0]
        if not weights and not all((self.snapshot / file).exists() for file in model.files):
            hint = "download it with `llmrs run`, or give a model in safetensors"
            raise ModelError(f"{self.name}: {model.files[0]} is not in the Hugging Face cache", hint)
        files = [self.files[name] for name in model.files]
        self._check_space(files)
        if not path.exists():  # refuses unsupported models before the download
            first, total = files[0], sum(f.size for f in files)

            def beginning(size: int) -> Path:
                return fetch_beginning(first, self.repository, size, lambda done: progress(done, total))

            check_beginning(Path(self.name, first.name), first.size, beginning, whole=len(files) == 1)
        self.get(list(model.files), progress)
        return path

    def weights(self) -> list[str]:
        """The names of the safetensors files and their index. Raises ModelError without any."""
        if SINGLE in self.files:
            return [SINGLE]
        if INDEX not in self.files:
            others = ", ".join(sorted(n for n in self.files if n.endswith((".bin", ".gguf", ".pt", ".pth")))[:3])
            problem = f"{self.name} holds no {SINGLE}" + (f", only {others}" if others else "")
            raise ModelError(problem, "give the id of a model with safetensors weights")
        self.get([INDEX])
        shards = shard_names(self.snapshot)
        for missing in (s for s in shards if s not in self.files):
            raise ModelError(f"{self.name} lacks {missing}, which its index names", BROKEN)
        return [INDEX, *shards]


def shard_names(folder: Path) -> list[str]:
    """The shards in the index. Raises ModelError for names that are no safetensors files of the folder."""
    names = sorted(read_index(folder))
    if not 0 < len(names) <= MAX_SHARDS:
        raise ModelError(f"{INDEX} names {len(names)} files; 1 to {MAX_SHARDS} are allowed", BROKEN)
    for name in names:
        if not SHARD.fullmatch(name):
            raise ModelError(f"{INDEX} names {name!r}, which is no safetensors file of the repository", BROKEN)
    return names


def _check_form(name: str, revision: str | None) -> None:
    if not ID.fullmatch(name) or name.endswith(".git") or len(name) > 96:
        allowed = "letters, digits, -, _ and ."
        raise ModelError(f"{name!r} is neither a folder nor a Hugging Face id", f"an id is owner/name, of {allowed}")
    if revision is not None and (not REVISION.fullmatch(revision) or len(revision) > 200):
        raise ModelError(f"revision: {revision!r} is no revision", "give a branch, a tag or a commit, such as main")


def _cached(name: str, repository: Path, revision: str | None, want: str | None, weights: bool) -> Path:
    """The snapshot folder of a revision in the cache, or a GGUF file in it. Raises ModelError if files are missing."""
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text("utf-8").strip() if reference.is_file() else revision or "main"
    folder = repository / "snapshots" / commit
    label = name if revision is None else f"{name} at {revision}"
    hint = "download it once without offline and HF_HUB_OFFLINE, or give a folder"
    if not COMMIT.fullmatch(commit) or not folder.is_dir():
        raise ModelError(f"{label} is not in the Hugging Face cache, and offline nothing is downloaded", hint)
    files = snapshot_files(folder)
    model = wanted_gguf(name, files, want, " in the Hugging Face cache")
    if model is not None:
        needed = list(model.files)
    else:
        needed = [CONFIG]
        if weights:
            sharded = INDEX in files and SINGLE not in files
            needed += [TOKENIZER, *(shard_names(folder) if sharded else [SINGLE])]
    for missing in (n for n in needed if n not in files):
        raise ModelError(f"{label} lacks {missing} in the Hugging Face cache, and offline nothing is downloaded", hint)
    return folder if model is None else folder / model.files[0]


def _list_files(name: str, revision: str | None, endpoint: str) -> tuple[str, dict[str, RemoteFile]]:
    """The commit of a revision, and its files by name. Files without a valid size or hash are left out."""
    from huggingface_hub import HfApi, hf_hub_url

    try:
        info = HfApi(endpoint).model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
        commit, siblings = str(info.sha), list(info.siblings or ())
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # huggingface_hub does not validate the response
        raise ModelError(f"{endpoint} gave no list of {name}'s files", f"is HF_ENDPOINT right? {AGAIN}") from error
    if not COMMIT.fullmatch(commit):
        raise ModelError(f"{endpoint} names no commit for {name}", "is HF_ENDPOINT right?")
    files = {}
    for s in siblings:
        size, digest = (s.lfs.size, s.lfs.sha256) if s.lfs else (s.size, s.blob_id)
        if type(size) is int and 0 <= size <= MAX_FILE_BYTES and HASH.fullmatch(str(digest)):
            url = hf_hub_url(name, s.rfilename, revision=commit, endpoint=endpoint)
            files[s.rfilename] = RemoteFile(s.rfilename, url, size, str(digest))
    return commit, files


def _write_ref(repository: Path, revision: str, commit: str) -> None:
    """Stores the commit of a branch or tag, for offline use."""
    if revision != commit:
        reference = repository / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        new = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")  # replaced atomically
        new.write_text(commit, "utf-8")
        os.replace(new, reference)
