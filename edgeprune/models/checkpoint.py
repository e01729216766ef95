"""Checkpoints: read a file or a hub repository without running anything in it."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import (
    EnvironmentLackError,
    InputError,
    missing_package,
)

HUB_PREFIX = "hf-hub:"
SHOWN_KEYS = 8
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("model", "state_dict", "model_state")
EMA_WRAPPERS = ("model_ema", "state_dict_ema")
WRAPPING_PREFIXES = (
    "module.",
    "_orig_mod.",
    "base_model.",
    "model.",
)  # DDP, torch.compile, training frameworks


@dataclass(frozen=True)
class Checkpoint:
    """Weights as a file holds them.

    Attributes:
        tensors: name -> tensor, prefixes of wrappers stripped; mapped from the file, read when first touched.
        file: file name or hub reference.
        sha256: of the whole file.
        wrapper: key of the file's top dictionary the weights came from, None when it is flat.
        metadata: texts a safetensors file carries beside its tensors.
    """

    tensors: dict[str, Tensor]
    file: str
    sha256: str | None
    wrapper: str | None
    metadata: Mapping[str, str] = field(default_factory=dict)


def load_checkpoint(source: str | Path, *, ema: bool = False) -> Checkpoint:
    """Return the weights of a local file or of `hf-hub:owner/name[@revision]`.

    The format is told by the content. Pickled files are read by torch's weights-only reader, which runs no
    code; `argparse.Namespace` is the only class it may build besides tensors.

    Args:
        source: path or hub reference.
        ema: take the averaged weights instead of the ones the official evaluations read.

    Raises:
        InputError: `checkpoint-not-found`, `checkpoint-unreadable`, `checkpoint-unsafe`, `checkpoint-empty`,
            `checkpoint-ema`, `hub-not-found`.
        EnvironmentLackError: `hub-unreachable`, `package-missing`.
    """
    name, path = str(source), Path(source)
    if name.startswith(HUB_PREFIX):
        path = _download(name)
    else:
        _check_file(path)
        name = path.name
    loaded, metadata = _read(path)
    tensors, wrapper = _unwrap(loaded, name, ema)
    return Checkpoint(strip_prefixes(tensors), name, _sha256(path), wrapper, metadata)


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefixes DDP and training frameworks put in front of every key."""
    tensors = dict(tensors)
    while prefix := next((p for p in WRAPPING_PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        raise InputError(
            f"checkpoint '{path}' is a directory",
            code="checkpoint-unreadable",
            expected=f"a file ({', '.join(SUFFIXES)}) or {HUB_PREFIX}owner/name",
            hint=f"pass the file itself: {path / inside[0]}" if inside else "pass the file itself",
        )
    if not path.parent.is_dir():
        hint = f"the directory '{path.parent}' does not exist either; check the path"
    else:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
        close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        close = close or [n for n in names if n.endswith(SUFFIXES)][:3]
        hint = f"did you mean {', '.join(close)}?" if close else f"'{path.parent}' holds no checkpoint"
    raise InputError(
        f"checkpoint '{path}' does not exist",
        code="checkpoint-not-found",
        expected=f"a file ({', '.join(SUFFIXES)}) or {HUB_PREFIX}owner/name",
        hint=hint,
    )


def _download(source: str) -> Path:
    """Return the local copy of a hub repository's weights."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import utils as errors
    except ModuleNotFoundError as error:
        raise missing_package("huggingface_hub", "hub", f"checkpoint '{source}'") from error
    repo, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    expected = "a public repository with PyTorch weights"
    try:
        if path := _download_first(hub, repo, revision or None):
            return path
        what = f"holds none of {', '.join(HUB_FILES)}"
    except errors.HFValidationError:
        what, expected = "is not a repository name", f"{HUB_PREFIX}owner/name[@revision]"
    except errors.RevisionNotFoundError:
        what, expected = f"has no revision '{revision}'", "a branch, tag or commit of the repository"
    except errors.RepositoryNotFoundError:
        what, expected = "does not exist or is not open to you", "a public repository, or HF_TOKEN set"
    except Exception as error:  # requests and httpx, whichever is underneath, raise errors of their own
        raise EnvironmentLackError(
            f"checkpoint '{source}' cannot be fetched: {_first_line(error)}",
            code="hub-unreachable",
            expected="a network connection to the hub, or the file in its cache",
            hint="download the file elsewhere and pass its path to --checkpoint",
        ) from error
    raise InputError(
        f"hub repository '{source}' {what}",
        code="hub-not-found",
        expected=expected,
        hint="check the name on the hub, or download the file and pass its path",
    )


def _download_first(hub: Any, repo: str, revision: str | None) -> Path | None:
    """Return the first of `HUB_FILES` that a repository has, None when it has none."""
    for file in HUB_FILES:
        try:
            return Path(hub.hf_hub_download(repo, file, revision=revision))
        except hub.utils.EntryNotFoundError as error:  # noqa: PERF203
            # the local kind means: no network, and not in the cache either
            if isinstance(error, hub.utils.LocalEntryNotFoundError):
                raise
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _unreadable(path: Path, what: str, hint: str) -> InputError:
    return InputError(
        f"checkpoint '{path.name}' cannot be read: {what}",
        code="checkpoint-unreadable",
        expected="a safetensors file, or a state_dict written by torch.save",
        hint=hint,
    )


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """Return what the file holds, tensors by name or what torch.save was given, and its metadata."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "make the file readable for this user") from error
    again = "copy or download it again and compare its size"
    # safetensors: eight bytes of header length, little-endian and below 100 MB, then a JSON object
    if head[4:9] == b"\0\0\0\0{":
        try:
            from safetensors import safe_open
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise missing_package("safetensors", "export", f"checkpoint '{path.name}'") from error
        try:
            loaded = load_file(path)
            with safe_open(path, "pt") as file:
                return loaded, dict(file.metadata() or {})
        except Exception as error:
            raise _unreadable(path, f"it is truncated or damaged ({_first_line(error)})", again) from error
    if head[:4] == b"PK\3\4" or head[:1] == b"\x80":
        return _read_torch(path, mapped=head[:2] == b"PK"), {}
    if head.startswith(b"version https://git-lfs"):
        raise _unreadable(path, "it is a Git LFS pointer, not the file itself", "run `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise _unreadable(path, "it is a web page, not a checkpoint", "download the file itself, not its page")
    raise _unreadable(path, "it is empty (0 bytes)" if not head else "it is neither format", again)


def _read_torch(path: Path, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what matters is an error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        text, pickled = str(error), isinstance(error, pickle.UnpicklingError)
        found = re.search(r"GLOBAL (\S+)", text) if pickled else None
        if found or "TorchScript" in text:
            what = f"an object of '{found[1].rstrip('.')}'" if found else "a TorchScript program"
            raise InputError(
                f"checkpoint '{path.name}' holds {what}, which could run code when it is loaded",
                code="checkpoint-unsafe",
                expected="tensors, numbers, texts and argparse.Namespace only",
                hint="if you trust the file, load it where it was made and save its state_dict with "
                "safetensors.torch.save_file",
                details={"global": found[1].rstrip(".") if found else None},
            ) from error
        # torch's text for a bad pickle advises to switch the protection off; it is not passed on
        reason = "no state_dict that torch.save wrote" if pickled else _first_line(error)
        what = f"it is truncated or damaged ({reason})"
        raise _unreadable(path, what, "copy or download it again and compare its size") from error


def _unwrap(loaded: Any, name: str, ema: bool) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors and the wrapper they were under."""
    top = loaded if isinstance(loaded, Mapping) else {}
    under = {k: _tensors(v) for k, v in top.items() if k in WRAPPERS + EMA_WRAPPERS and isinstance(v, Mapping)}
    averaged = [k for k in EMA_WRAPPERS if under.get(k)]
    plain = [k for k in WRAPPERS if under.get(k)]
    if ema and not averaged:
        raise InputError(
            f"checkpoint '{name}' holds no averaged weights",
            code="checkpoint-ema",
            expected=f"one of the entries {', '.join(EMA_WRAPPERS)}",
            hint="leave out --ema",
        )
    wrapper = averaged[0] if ema else plain[0] if plain else None
    tensors = _tensors(top) if wrapper is None else under[wrapper]
    if not tensors:
        found = listed(map(str, top)) or f"a {type(loaded).__name__}"
        raise InputError(
            f"checkpoint '{name}' holds no weights; it holds {found}",
            code="checkpoint-empty",
            expected=f"tensors by name, flat or under one of {', '.join(WRAPPERS)}",
            hint="add --ema: only averaged weights are there" if averaged else "save the model's state_dict",
        )
    return tensors, wrapper


def _tensors(entries: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, Tensor)}


def listed(names: Iterable[str], shown: int = SHOWN_KEYS) -> str:
    """Return the first names and how many more there are, for messages."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
