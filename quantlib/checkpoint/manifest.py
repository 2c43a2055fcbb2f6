"""``checksums.sha256`` of a model folder, which ``sha256sum -c`` reads too, and the check of a folder against it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlib.checkpoint.card import NAME as CARD
from quantlib.checkpoint.card import Card
from quantlib.checkpoint.files import checksum_of, write_bytes
from quantlib.checkpoint.folder import CONFIG, Model
from quantlib.checkpoint.stored import Contents
from quantlib.record import of_config

MANIFEST = "checksums.sha256"
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def finish(folder: Path, card: Card, known: Mapping[str, str]) -> None:
    """The card and the manifest of a folder that has all else."""
    write_bytes(folder / CARD, str(card).encode())
    write_manifest(folder, known)


def write_manifest(folder: Path, known: Mapping[str, str]) -> None:
    """A line for every file of ``folder`` but its card, with which people go on; ``known`` are checksums by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}
    lines = [
        f"{known.get(name) or checksum_of(path)}  {name}\n"
        for name, path in names.items()
        if name not in (CARD, MANIFEST) and "\n" not in name
    ]
    write_bytes(folder / MANIFEST, "".join(lines).encode())


@dataclass
class Check:
    """The result of `check_checkpoint`.

    Attributes
    ----------
    files : int
        Files whose checksums were compared.
    tensors, weights : int
        Tensors of the model, and weights of it that quantlib quantized.
    problems : list of str
        The faults, a line each; the checkpoint is whole if there is none.
    notes : list of str
        Parts that could not be compared, and files that the manifest does not list.
    """

    files: int = 0
    tensors: int = 0
    weights: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_checkpoint(path: str | Path, *, progress: Callable[[str, int, int], None] | None = None) -> Check:
    """Check that a checkpoint is whole: its files against their checksums, its tensors against its description.

    Parameters
    ----------
    path : path
        A model folder or a safetensors file. Without a ``checksums.sha256`` only the second is checked.
    progress : callable (name, bytes done, bytes in all), optional
        Called after each file.

    Returns
    -------
    Check

    Raises
    ------
    FileNotFoundError
        For a path that is absent.
    """
    path, check = Path(path), Check()
    if not path.exists():
        raise FileNotFoundError(f"{path} must be a safetensors file or a model folder, got nothing there")
    if path.is_dir():
        check_files(path, check, progress)
    else:
        check.notes.append("a file alone has no checksums: compared are its header and its tensors")
    try:
        with Model.open(path) as model:
            check_contents(model, check)
    except (ValueError, OSError) as error:
        check.problems.append(str(error))
    return check


def check_files(folder: Path, check: Check, progress: Callable[[str, int, int], None] | None) -> None:
    """Compare every file with its line of the manifest."""
    try:
        text = (folder / MANIFEST).read_bytes().decode()
    except FileNotFoundError:
        check.notes.append(f"no {MANIFEST}: compared are headers and tensors only")
        return
    except (OSError, ValueError) as error:
        check.problems.append(f"{MANIFEST} must be text, got {error}")
        return
    listed: dict[str, str] = {}
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if match is None or match[2].startswith("/") or ".." in Path(match[2]).parts:
            check.problems.append(f"{MANIFEST} must have a checksum and a name of the folder a line, got {line[:80]!r}")
        else:
            listed[match[2]] = match[1]
    there = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    total = sum(there[name].stat().st_size for name in listed if name in there)
    done = 0
    for name, expected in listed.items():
        if name not in there:
            check.problems.append(f"{name} must be there, got no such file")
            continue
        try:
            if (got := checksum_of(there[name])) != expected:
                check.problems.append(f"{name} must have the SHA-256 {expected}, got {got}")
        except OSError as error:
            check.problems.append(f"{name} must be readable, got {error.strerror}")
            continue
        check.files += 1
        done += there[name].stat().st_size
        if progress is not None:
            progress(name, done, total)
    if more := sorted(there.keys() - listed.keys() - {CARD, MANIFEST}):
        check.notes.append(f"not listed in {MANIFEST}: {', '.join(more)}")


def check_contents(model: Model, check: Check) -> None:
    """Every weight as the metadata says, and config.json and the metadata of one mind."""
    check.tensors = len(model.slots)
    weights: dict[str, Any] = {}
    for reader in model.readers:
        try:
            weights.update(Contents.of(reader).weights)
        except ValueError as error:
            check.problems.append(str(error))
    check.weights = len(weights)
    entry = of_config(model.config.get("quantization_config"))
    said = entry["weights"] if entry and isinstance(entry.get("weights"), dict) else None
    if said is not None and weights:
        told = {name: (stored.spec, list(stored.shape)) for name, stored in weights.items()}
        for name in sorted(told.keys() | said.keys()):
            of_file, of_entry = told.get(name), said.get(name)
            of_entry = (of_entry.get("spec"), of_entry.get("shape")) if isinstance(of_entry, dict) else of_entry
            if of_file != of_entry:
                check.problems.append(f"{CONFIG} must say of {name} what its file says, {of_file}, got {of_entry}")
