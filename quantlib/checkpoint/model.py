"""A quantized model to disk, and from disk into a model that is built but not trained."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from quantlib.api import experts_of, places_of, put, quantized_type, reasons_to_skip, share_weight
from quantlib.backends.packing import kept_zero_points
from quantlib.checkpoint import files
from quantlib.checkpoint.card import HUB_ID, Card
from quantlib.checkpoint.files import Batch, Reader, Slot
from quantlib.checkpoint.folder import CONFIG, Model
from quantlib.checkpoint.manifest import finish
from quantlib.checkpoint.publish import INDEX, replacing
from quantlib.checkpoint.stored import Contents, Stored, words
from quantlib.nn import QUANTIZED, QuantModule
from quantlib.nn.experts import QuantExperts, number_of, ways_of
from quantlib.nn.forms import TransposedLinear, form_of, with_likes
from quantlib.nn.module import check_whole, stored_dtype
from quantlib.nn.qat import QATModule
from quantlib.nn.qat_experts import QATExperts
from quantlib.ops.check import dtype_of
from quantlib.record import of_config, record_
from quantlib.spec import QuantSpec

log = logging.getLogger(__name__)


def save_quantized(
    model: nn.Module, path: str | Path, *, max_shard_bytes: int = 5_000_000_000, overwrite: bool = False
) -> None:
    """Write the state of ``model``: codes, scales, and every other parameter and persistent buffer.

    Parameters
    ----------
    model : nn.Module
        A model with modules of codes: `QuantLinear` and the like.
    path : path
        A ``.safetensors`` file, or a folder for ``model.safetensors``, which appears whole or not at all.
    max_shard_bytes : int
        A folder's model is cut into files of about this size, with an index.
    overwrite : bool
        Whether an existing ``path`` is replaced, once the new one is complete.

    Raises
    ------
    FileExistsError, FileNotFoundError, OSError
        For a ``path`` that is there, a folder to write in that is not, a disk that is full.
    TypeError
        For a ``model`` that is no module.
    ValueError
        For a model without a module of codes, a state that is not tensors with values, a model that fully_shard has
        sharded, and a ``max_shard_bytes`` below 1.
    """
    check_module(model)
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be an integer of at least 1, got {max_shard_bytes!r}")
    check_whole(
        model,
        "load get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into one that is not, "
        "and save that",
    )
    path = Path(path)
    batches, contents = state_of(model)
    if not contents.weights:
        prepared = any(isinstance(module, (QATModule, QATExperts)) for module in model.modules())
        help = "convert_ it first" if prepared else "quantize_ it first"
        raise ValueError(f"model must have a module of codes to save, got none: {help}")
    single = path.suffix == ".safetensors"
    with replacing(path, overwrite, folder=not single) as scratch:
        new = scratch.new
        shards = [batches] if single else list(cut(batches, max_shard_bytes))
        weight_map: dict[str, str] = {}
        checksums: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            names = [slot.name for batch in shard for slot in batch.slots]
            part = Contents(
                {name: stored for name, stored in contents.weights.items() if name in names},
                {alias: name for alias, name in contents.tied.items() if name in names},
            )
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            metadata = {"format": "pt", **part.metadata()}
            checksums[name] = files.write(new if single else new / name, shard, metadata)
            weight_map |= dict.fromkeys(names, name)
        if len(shards) > 1:
            size = sum(batch.nbytes for batch in batches)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            files.write_bytes(new / f"model{INDEX}", f"{json.dumps(index, indent=2)}\n".encode())
        if not single:
            finish(new, card_of(model, batches, contents), checksums)


def card_of(model: nn.Module, batches: list[Batch], contents: Contents) -> Card:
    """Return the card of a model in memory; the errors of its codes are not known any more."""
    specs = [stored.spec for stored in contents.weights.values()]
    most = max(sorted(set(specs)), key=specs.count)
    sizes = {slot.name: slot for batch in batches for slot in batch.slots}
    parts = {slot.name for name, stored in contents.weights.items() for slot in stored.slots(name)}
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    return Card(
        most,
        "python: quantlib.checkpoint.save_quantized(model, PATH)",
        quantized=sum(math.prod(stored.shape) for stored in contents.weights.values()),
        floats=sum(math.prod(s.shape) for n, s in sizes.items() if n not in parts and s.dtype.is_floating_point),
        base_model=name if isinstance(name, str) and HUB_ID.fullmatch(name) else "",
    )


@torch.inference_mode(False)  # a tensor made in inference mode could never take part in a backward pass
def load_quantized(model: nn.Module, path: str | Path, *, device: Any = None) -> nn.Module:
    """Fill ``model`` from what `save_quantized` or `quantize_file` wrote.

    Where the file holds codes, ``nn.Linear`` becomes `QuantLinear`, ``nn.Embedding`` `QuantEmbedding`, and so on, and
    experts and ``Conv1D`` of transformers become their forms of codes.
    Parameters take the dtypes of the file. Everything is checked, from the headers alone, before the model is touched.

    Parameters
    ----------
    model : nn.Module
        A model of this architecture, with float layers or made by `quantize_`; its values do not matter, it may be on
        ``meta``. Changed in place.
    path : path
        A ``.safetensors`` file, or a folder of them.
    device : torch.device, optional
        For codes and for what is on ``meta``: by default that of the first parameter which is not on ``meta``, else
        the CPU. The rest stays where it is.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    FileNotFoundError
        For a path that is absent.
    TypeError
        For a ``model`` that is no module.
    ValueError
        For a file that is truncated, foreign, or holds nothing that quantlib quantized, and for one that does not fit
        the model, naming what is missing, unexpected or of another shape; for a model that fully_shard has sharded.

    Notes
    -----
    A layer that cannot hold codes, because there is no module of codes for it or its owner reads its weight directly,
    gets the values that the codes stand for, with a warning in the log.
    """
    check_module(model)
    check_whole(model, "load before fully_shard")
    untile(model)
    with ExitStack() as stack:
        stored = stack.enter_context(Model.open(Path(path)))
        readers = stored.readers
        weights = weights_in(model)
        held = {file_name(name, weights): Entry(reader, name) for reader in readers for name in reader.slots}
        contents = Contents()
        for reader in readers:
            found = Contents.of(reader)
            contents.weights.update(found.weights)
            contents.tied.update(found.tied)
        entry = of_config(stored.config.get("quantization_config"))
        said = entry["weights"] if entry and isinstance(entry.get("weights"), dict) else {}
        codes = [name for name in held if held[name].name != name or (name in said and name not in contents.weights)]
        if codes:  # a state as torch saves it says nothing of formats itself
            contents.weights.update(formats_of(codes, entry, stored.path, model))
        if not contents.weights:
            raise ValueError(f"{path} must hold weights that quantlib quantized, got none among {len(held)} tensors")
        skeleton = Skeleton(model, contents)
        if problems := skeleton.misfits(held):
            raise ValueError(f"{path} must fit the model, got {files.some(problems)}")
        if skeleton.values:
            log.warning("dequantized, as their layers cannot hold codes: %s", files.some(sorted(skeleton.values)))
        skeleton.fill(held, device)
    record_(model)
    return model


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def formats_of(names: list[str], entry: dict[str, Any] | None, path: Path, model: nn.Module) -> dict[str, Stored]:
    """Return the formats of the weights ``names``: from ``entry`` of config.json, or else as in ``model`` already."""
    known = Contents.parse(entry | {"tied": {}}, str(path / CONFIG)).weights if entry else {}
    for name, (module, key) in weights_in(model).items():
        if is_quantized(module):
            known.setdefault(name, Stored(str(module.spec), shape_of(module, key)))
        if name in known:  # config.json does not say how a weight lies: the class does
            known[name] = replace(known[name], layout=layout_of(module, key))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{path} must say what its codes are quantized to, got codes without a format, {files.some(unknown)}: "
            "quantize_ the model to the spec of the file first"
        )
    shared: dict[int, list[str]] = defaultdict(list)  # id of a weight -> the names that it has in the model
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key in ("weight", "weight_codes"):
            if (parameter := module._parameters.get(key)) is not None:
                shared[id(parameter)].append(join(prefix, "weight"))
    for tied in shared.values():  # an embedding's spec tells nothing of activations, that of its head does
        told = next((known[name] for name in tied if name in known and "@" in known[name].spec), None)
        known.update((name, told) for name in tied if name in known and told is not None)
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, which the file may call by another name than the model of files does."""

    reader: Reader
    name: str

    @property
    def slot(self) -> Slot:
        return self.reader.slots[self.name]

    def read(self) -> Tensor:
        return self.reader.read(self.name)


def file_name(name: str, weights: Container[str] = ()) -> str:
    """The name in a file of a parameter ``name``: codes are stored under the name of the weight."""
    weight = name.removesuffix("_codes")
    return weight if weight in weights or name.rpartition(".")[2] == "weight_codes" else name


def weights_in(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name of each weight that is codes, or can be, under every name that it has -> its module, its name there."""
    found: dict[str, tuple[nn.Module, str]] = {}
    types = (*with_likes(tuple(QUANTIZED)), QuantModule)
    for prefix, module in model.named_modules(remove_duplicate=False):
        keys = module.stacks if isinstance(module, QuantExperts) else ways_of(module)
        for key in (*keys, *(("weight",) if isinstance(module, types) else ())):
            found[join(prefix, key)] = module, key
    return found


def is_quantized(module: nn.Module) -> TypeGuard[QuantModule | QuantExperts]:
    return isinstance(module, (QuantModule, QuantExperts))


def shape_of(module: Any, key: str) -> tuple[int, ...]:
    """The shape of the float weight ``key``."""
    if isinstance(module, QuantExperts):
        return module.stacks[key].shape
    return module.weight_shape if isinstance(module, QuantModule) else tuple(module._parameters[key].shape)


def layout_of(module: nn.Module, key: str) -> str:
    """Return how the float weight ``key`` lies: see `quantlib.checkpoint.stored`."""
    ways = ways_of(module)
    if isinstance(module, QuantExperts):
        E, _, _, way = module.stacks[key]
    elif key in ways:
        E, way = number_of(module), ways[key]
    else:
        form = type(module) if isinstance(module, QuantModule) else form_of(type(module))
        return "kn" if form is not None and issubclass(form, TransposedLinear) else ""
    return way if way in ("enk", "ekn") else f"{way}/{E}"


Place = tuple[dict[str, Any], str]  # a module's parameters or buffers, and the name there


def state_of(model: nn.Module) -> tuple[list[Batch], Contents]:
    """Every tensor of the state once, a weight's codes with its scales, and what the metadata says of them."""
    quantized = {name: found for name, found in weights_in(model).items() if is_quantized(found[0])}
    state = {file_name(name, quantized): tensor for name, tensor in model.state_dict().items()}
    objects = {file_name(name, quantized): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.dtype not in files.NAMES:
            got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"state {name} must be a tensor with values that safetensors can hold, got {got}")
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in objects.items():
        if (known := first.setdefault(id(tensor), name)) != name:
            tied[name] = known
    weights: dict[str, Stored] = {}
    for name, (module, key) in quantized.items():
        assert is_quantized(module)
        known = tied.get(name, name)  # of those that share it, an embedding's spec tells nothing of activations
        if name in state and (known not in weights or module.spec.activation is not None):
            weights[known] = Stored(str(module.spec), shape_of(module, key), layout_of(module, key))
    parts = {slot.name for name, stored in weights.items() for slot in stored.slots(name)[1:]}
    batches = []
    for name, tensor in state.items():
        if name in weights:
            slots = weights[name].slots(name)
        elif name in tied or name in parts:
            continue
        else:
            slots = [Slot(name, tensor.dtype, tuple(tensor.shape))]

        def make(slots: list[Slot] = slots) -> list[Tensor]:
            """The tensors as the file has them: codes with their axes of ones, FP8 by its own dtype."""
            return [state[s.name] if s.name not in weights else in_file(state[s.name], s) for s in slots]

        batches.append(files.whole(slots, make))
    return batches, Contents(weights, tied)


def in_file(codes: Tensor, slot: Slot) -> Tensor:
    """``codes`` of a parameter in the dtype and shape of ``slot``."""
    return codes.contiguous().view(slot.dtype).view(slot.shape)


def cut(batches: list[Batch], size: int) -> Iterator[list[Batch]]:
    """``batches`` in runs of at most ``size`` bytes, or of one batch that is larger."""
    run: list[Batch] = []
    for batch in batches:
        if run and sum(b.nbytes for b in run) + batch.nbytes > size:
            yield run
            run = []
        run.append(batch)
    yield run


def untile(model: nn.Module) -> None:
    """Make the codes of every weight of ``model`` a matrix, as they are in files."""
    for module in model.modules():
        if isinstance(module, QuantModule):
            module.untile_()


class Skeleton:
    """A model as it will be once ``contents`` is in it. The model itself changes in `fill` only."""

    def __init__(self, model: nn.Module, contents: Contents) -> None:
        self.model, self.contents = model, contents
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.weights = weights_in(model)
        self.values: set[str] = set()  # weights whose layers cannot hold codes
        self.replacements = self._replacements()  # id of a float layer -> what takes its place
        self.places = dict(self._places())
        self.unused = {slot.name for name in self.values for slot in contents.weights[name].slots(name)[1:]}
        self.extra: dict[str, nn.Module] = {}  # name of a state that is no parameter -> the module that takes it
        for prefix, module in self.modules.items():  # older checkpoints hold buffers that models now make themselves
            self.unused |= {join(prefix, key) for key in module._non_persistent_buffers_set}
            if type(module).set_extra_state is not nn.Module.set_extra_state:
                self.extra[join(prefix, "_extra_state")] = module

    def misfits(self, held: dict[str, Entry]) -> list[str]:
        """List what keeps the tensors of the files from filling the model, a few words each."""
        filled = {id_of(place) for name in held if name in self.places for place in self.targets[name]}
        problems = [f"no {name}" for name, place in self.places.items() if id_of(place) not in filled]
        for name, entry in held.items():
            slot = entry.slot
            if name in self.unused or name in self.extra:
                continue
            if name not in self.places:
                problems.append(f"{name}, which the model does not have")
                continue
            store, key = self.places[name]
            stored = self.contents.weights.get(name)
            if stored is not None and slot_of_codes(stored, slot):
                spec = QuantSpec.parse(stored.spec)
                slot = Slot(name, stored_dtype(spec), stored.kept_shape)
            if older := self._zero_points(name, slot.dtype):
                slot = older
            if name in self.values:
                slot = replace(slot, shape=self.contents.weights[name].shape, dtype=store[key].dtype)
            same_kind = slot.dtype == store[key].dtype or slot.dtype.is_floating_point == store[key].is_floating_point()
            if tuple(store[key].shape) != slot.shape or not same_kind:
                expected = Slot(name, store[key].dtype, tuple(store[key].shape))
                problems.append(f"{name} {words(entry.slot)} for {words(expected)}")
        for name, (module, key) in self.weights.items():
            stored = self.contents.weights.get(name)
            if stored is None or not is_quantized(module):
                continue
            if QuantSpec.parse(stored.spec).weight_only != (mine := module.spec.weight_only):
                problems.append(f"{name.removesuffix('.weight')}: codes of {stored.spec} for {mine}")
            elif stored.layout != layout_of(module, key):
                problems.append(f"{name} of a weight that lies otherwise, {stored.layout or 'nk'}")
        for prefix, module in self.modules.items():
            for key in module._non_persistent_buffers_set:
                if isinstance(buffer := module._buffers[key], Tensor) and buffer.is_meta:
                    problems.append(f"{join(prefix, key)} on meta, which no file fills")
        return problems

    def fill(self, held: dict[str, Entry], device: Any) -> None:
        """Put the replacements in, and one tensor after another into its places."""
        there = next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))
        there = there if device is None else torch.device(device)
        parents = places_of(self.model)
        for module in set(self.modules.values()):
            if id(module) in self.replacements:
                put(self.replacements[id(module)], module, parents)
        for name, entry in held.items():
            if name in self.unused:
                continue
            if name in self.extra:
                self.extra[name].set_extra_state(entry.read())
                continue
            store, key = self.places[name]
            old = store[key]
            if name in self.values:
                tensor = self.contents.weights[name].values(entry.reader, name, old.dtype)
            elif name in self.weights and key.endswith("_codes"):
                tensor = entry.read().view(old.dtype).reshape(old.shape)
            else:
                tensor = entry.read()
                if self._zero_points(name, tensor.dtype):
                    weight = self.contents.weights[name.removesuffix("_zero_point")]
                    tensor = kept_zero_points(tensor, QuantSpec.parse(weight.spec).row)
            tensor = tensor.to(there if old.is_meta else old.device)
            new = type(old)(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            for store, key in self.targets[name]:
                store[key] = new  # one object in all of them: what is tied stays tied

    def _zero_points(self, name: str, dtype: torch.dtype) -> Slot | None:
        """The slot of the zero points ``name`` as they are kept now, where a file has them as int32; else None."""
        stored = self.contents.weights.get(name.removesuffix("_zero_point"))
        if stored is None or not name.endswith("_zero_point") or dtype != torch.int32:
            return None
        return replace(stored, wide_zero_points=False).slots(name.removesuffix("_zero_point"))[2]

    def _replacements(self) -> dict[int, QuantModule | QuantExperts]:
        stored = dict(self.contents.weights)
        stored.update({alias: stored[name] for alias, name in self.contents.tied.items() if name in stored})
        types = with_likes(tuple(QUANTIZED))
        skipped = reasons_to_skip(self.model, types=types)
        experts = experts_of(self.model, None, skipped)
        unable = {id(self.modules[name]) for name in skipped}
        specs: dict[int, QuantSpec] = {}  # id of a float weight -> what it becomes
        for name, weight in stored.items():
            module, key = self.weights.get(name, (None, ""))
            if module is not None and is_quantized(module):
                continue
            known = None if module is None else (shape_of(module, key), layout_of(module, key))
            if module is not None and id(module) not in unable and known == (weight.shape, weight.layout):
                specs[id(module._parameters[key])] = QuantSpec.parse(weight.spec)
            elif name in self.contents.weights:
                self.values.add(name)
        done: dict[int, QuantModule] = {}
        replacements: dict[int, QuantModule | QuantExperts] = {}
        for prefix, module in experts.items():
            found = [specs.get(id(module._parameters[key])) for key in ways_of(module)]
            if found[0] is not None and found.count(found[0]) == len(found):
                replacements[id(module)] = QuantExperts.like(module, found[0])
            else:  # some of its weights are floats, or of another spec: a module has one
                self.values |= {name for key in ways_of(module) if (name := join(prefix, key)) in stored}
        for module in self.modules.values():
            if not isinstance(module, types) or id(module) in replacements or id(module.weight) not in specs:
                continue
            tied = id(module.weight)
            if tied in done:
                new = share_weight(done[tied], module, specs[tied])
            else:
                done[tied] = new = quantized_type(module).like(module, specs[tied])
            replacements[id(module)] = new
        return replacements

    def _places(self) -> Iterator[tuple[str, Place]]:
        """Name and place of each parameter and persistent buffer, under every name that it has."""
        placed: dict[int, nn.Module] = {**self.replacements}
        for prefix, old in self.modules.items():
            module: nn.Module = placed.get(id(old), old)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    yield file_name(join(prefix, key), self.weights), (module._parameters, key)
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    yield join(prefix, key), (module._buffers, key)

    @cached_property
    def targets(self) -> dict[str, list[Place]]:
        """Name -> the places of the object that is at this name, and of those that the file ties to it."""
        by_object: dict[int, list[Place]] = defaultdict(list)
        for store, key in self.places.values():
            by_object[id(store[key])].append((store, key))
        groups = {name: by_object[id(store[key])] for name, (store, key) in self.places.items()}
        for alias, name in self.contents.tied.items():
            if alias in groups and name in groups:
                groups[name] = groups[name] + groups[alias]
        return groups


def slot_of_codes(stored: Stored, slot: Slot) -> bool:
    """True if ``slot`` holds codes in the shape and dtype of a file or of a parameter."""
    spec = QuantSpec.parse(stored.spec)
    shapes = stored.slots(slot.name)[0].shape, stored.kept_shape
    return slot.shape in shapes and slot.dtype in (dtype_of(spec.row), stored_dtype(spec))


def id_of(place: Place) -> tuple[int, str]:
    store, key = place
    return id(store), key


def join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
