"""The source of a model: the headers of its files, config.json, or a module on meta. No weight is read."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlib.checkpoint import choose
from quantlib.checkpoint.files import Slot
from quantlib.checkpoint.folder import CONFIG, Model
from quantlib.checkpoint.stored import Contents

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """The header of a safetensors file."""

    name: str
    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]
    size: int  # bytes


@dataclass
class Source:
    """A model, as far as it is known.

    Attributes
    ----------
    name : str
    shapes : dict of str to tuple of int
        Every parameter once, by its name: of a quantized weight the shape of the float one.
    nbytes : int
        Bytes of the parameters as they are.
    config : dict
        config.json, or the ``config`` of the module.
    model : nn.Module, optional
        On meta.
    files : list of File
        The safetensors files, if any.
    missing : list of str
        The unknown parts, with the reason.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    nbytes: int
    config: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    files: list[File] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    quantized: str | None = None  # the evidence that the files hold codes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the parameters."""
        sizes: dict[torch.dtype, int] = {}
        if self.model is not None:
            for p in self.model.parameters():
                sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
        for file in self.files:
            for slot in file.slots.values():
                sizes[slot.dtype] = sizes.get(slot.dtype, 0) + slot.nbytes // slot.dtype.itemsize
        floats = {dtype: n for dtype, n in sizes.items() if dtype.is_floating_point and dtype.itemsize >= 2}
        return max(floats, key=lambda dtype: floats[dtype], default=torch.float32)


def source_of(model: Any) -> Source:
    """Describe ``model``: an ``nn.Module``, a folder, a safetensors file, or a config.json.

    Raises
    ------
    FileNotFoundError
        For a path that is absent, and a folder with neither config.json nor safetensors files.
    TypeError
        For anything else than a module or a path.
    ValueError
        For a file that is truncated or foreign, and a config.json that is no JSON object.
    """
    if isinstance(model, nn.Module):
        return of_module(model)
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be an nn.Module or a path, got {type(model).__name__}")
    path = Path(model)
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"model must be a folder, a safetensors file or a config.json, got {str(path)!r}, not there"
        )
    if path.suffix == ".json":
        return with_module(Source(str(path), {}, 0, read_config(path)))
    found = Source(str(path), {}, 0)
    without = "activations, cache and training: {} has no " + CONFIG
    if not path.is_dir():
        found.missing.append(without.format("a single file"))
    else:
        held = any(entry.name.endswith(".safetensors") for entry in path.iterdir())
        if (path / CONFIG).is_file():
            found.config = read_config(path / CONFIG)
        elif not held:
            raise FileNotFoundError(
                f"model must have a {CONFIG} or safetensors files, got a folder with neither: {path}"
            )
        else:
            found.missing.append(without.format(path))
        if not held:
            return with_module(found)
    read_headers(path, found)
    return with_module(found) if found.config else found


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, which must be a JSON object."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def read_headers(path: Path, found: Source) -> None:
    """Tensors of the files at ``path`` into ``found``."""
    with Model.open(path) as model:
        for reader in model.readers:
            contents = Contents.of(reader)
            found.files.append(File(reader.path.name, dict(reader.slots), reader.metadata, reader.path.stat().st_size))
            parts = {slot.name for n, stored in contents.weights.items() for slot in stored.slots(n)[1:]}
            found.shapes |= {n: slot.shape for n, slot in reader.slots.items() if n not in parts}
            found.shapes |= {n: stored.shape for n, stored in contents.weights.items()}
            found.nbytes += sum(slot.nbytes for slot in reader.slots.values())
            if contents.weights:
                found.quantized = "weights that quantlib has quantized"
        slots = model.slots
        found.quantized = found.quantized or choose.codes_of_others(slots, found.config)
        if found.quantized and "quantlib" not in found.quantized:
            found.missing.append(f"parameters: {path} holds {found.quantized}, and the counts are those of its tensors")


def of_module(model: nn.Module) -> Source:
    """A module, on any device, as one on meta."""
    config = getattr(model, "config", None)
    told: dict[str, Any] = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    if told and not told.get("architectures"):
        told["architectures"] = [type(model).__name__]
    found = Source(type(model).__name__, {}, 0, told, on_meta(model))
    fill_from_module(found)
    return found


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on meta; nothing of its memory is copied, and what is shared in it is shared in the copy."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = like(tensor, data) if isinstance(tensor, nn.Parameter) else data
    return copy.deepcopy(model, memo)


def like(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """``data`` as a parameter of the class of ``parameter``, which requires a gradient where that does."""
    new = type(parameter)(data, requires_grad=parameter.requires_grad)
    assert isinstance(new, nn.Parameter)
    return new


def fill_from_module(found: Source) -> None:
    """Shapes and bytes of the parameters of ``found.model``, each once."""
    assert found.model is not None
    for name, p in found.model.named_parameters():
        found.shapes[name] = tuple(p.shape)
        found.nbytes += p.numel() * p.element_size()


def with_module(found: Source) -> Source:
    """``found`` with the module that transformers builds of its config; or with the reason why there is none."""
    why = None
    try:
        found.model = build(found.config)
    except Exception as error:  # whatever a configuration of anybody does to a constructor
        why = " ".join(str(error).split())[:200] or type(error).__name__
        log.debug("no module of %s", found.name, exc_info=True)
    if found.model is None and not found.shapes:
        raise ValueError(
            f"{found.name} must be a model that transformers builds, or come with safetensors files: {why}"
        )
    if found.model is None:
        found.missing.append(f"activations: no module of {found.config.get('model_type', 'this config')}: {why}")
    elif not found.shapes:
        fill_from_module(found)
    return found


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config.json on meta, built by transformers from its own code; nothing is fetched.

    Raises
    ------
    ImportError
        Without transformers.
    ValueError
        For an architecture that it does not know.
    """
    import transformers
    from transformers.models import auto

    kind = config.get("model_type")
    if kind not in auto.CONFIG_MAPPING:
        raise ValueError(f"transformers {transformers.__version__} does not know the model_type {kind!r}")
    names = config.get("architectures") or ()
    cls = getattr(transformers, str(names[0]), None) if names else None
    if cls is None:
        cls = transformers.AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        made = transformers.AutoConfig.for_model(**config)
        dtype = getattr(made, "dtype", None) or torch.float32
        built = (
            cls._from_config(made, dtype=dtype) if hasattr(cls, "_from_config") else cls.from_config(made, dtype=dtype)
        )
    assert isinstance(built, nn.Module)
    return built.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers below errors."""
    from transformers.utils import logging as words

    before = words.get_verbosity()
    words.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        words.set_verbosity(before)
