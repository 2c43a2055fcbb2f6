"""The peak of a forward pass and of a training step, found by running them on fake tensors."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantlib.api import places_of, put
from quantlib.nn import LoRALinear, QuantLinear
from quantlib.plan.fakes import MODE, Peak, faked, peak_of
from quantlib.plan.sizes import quantized_skeleton
from quantlib.plan.source import on_meta
from quantlib.qat import prepare_qat_
from quantlib.report import unwarned
from quantlib.spec import QuantSpec

Inputs = Mapping[str, Any]


def inputs_of(model: nn.Module, batch: int, context: int) -> dict[str, Any]:
    """Arguments for ``model.forward``: ``batch`` sequences of ``context`` ids, or images of the size in its config.

    Raises
    ------
    ValueError
        For a model whose forward takes neither.
    """
    names = parameters_of(model)
    config = getattr(model, "config", None)
    with MODE:
        if "input_ids" in names:
            found: dict[str, Any] = {"input_ids": torch.zeros(batch, context, dtype=torch.int64)}
            if getattr(config, "is_encoder_decoder", False):
                found["decoder_input_ids"] = torch.zeros(batch, context, dtype=torch.int64)
            return found
        size = getattr(config, "image_size", None)
        if "pixel_values" in names and size:
            high, wide = size if isinstance(size, (list, tuple)) else (size, size)
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            return {"pixel_values": torch.zeros(batch, getattr(config, "num_channels", 3), high, wide, dtype=dtype)}
    got = ", ".join(names) or "no argument"
    raise ValueError(f"inputs must be given for a model whose forward takes neither input_ids nor images, got {got}")


def parameters_of(model: nn.Module) -> list[str]:
    """Names of the arguments of ``model.forward``."""
    return list(inspect.signature(model.forward).parameters)


def as_fake(value: Any) -> Any:
    """A tensor as a fake one of its shape; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    with MODE:
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")


def forward_peak(model: nn.Module, batch: int, context: int, inputs: Inputs | None = None) -> Peak:
    """The peak of a forward of a `faked` model over ``context`` new tokens, with logits of the last one only."""
    model.eval()
    given = made_inputs(model, batch, context, inputs)
    names = parameters_of(model)
    given |= {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in names}

    def run(model: nn.Module) -> Any:
        with torch.no_grad():
            return model(**given)

    return peak_of(run, model)


def made_inputs(model: nn.Module, batch: int, context: int, inputs: Inputs | None) -> dict[str, Any]:
    if inputs is None:
        return inputs_of(model, batch, context)
    return {name: as_fake(value) for name, value in inputs.items()}


def step_peak(
    skeleton: nn.Module,
    batch: int,
    context: int,
    inputs: Inputs | None = None,
    *,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    keep: bool = True,
) -> Peak:
    """The peak of forward and backward, gradients included; with ``keep`` they stay until the end."""
    model = faked(skeleton).train()
    for p in () if keep else trainable(model):
        p.register_post_accumulate_grad_hook(drop)
    given = made_inputs(model, batch, context, inputs)
    return peak_of(training_step(model, given, checkpointing, autocast), model)


def drop(p: Tensor) -> None:
    p.grad = None


def training_step(
    model: nn.Module, given: dict[str, Any], checkpointing: bool = False, autocast: torch.dtype | None = None
) -> Callable[[nn.Module], Any]:
    """Forward and backward over ``given``; with labels where the model takes them.

    Raises
    ------
    ValueError
        For checkpointing of a model that has none to switch on.
    """
    names = parameters_of(model)
    if checkpointing:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(
                f"checkpointing must be of a model with gradient_checkpointing_enable, got {type(model).__name__}"
            )
        old: Any = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False, "preserve_rng_state": False})
    ids = given.get("decoder_input_ids", given.get("input_ids"))
    given = dict(given)
    if "labels" in names and "labels" not in given and ids is not None:
        given["labels"] = ids
        given.pop("decoder_input_ids", None)
    if "use_cache" in names:
        given["use_cache"] = False

    def run(model: nn.Module) -> Any:
        context = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
        with context:
            out = model(**given)
            loss = out.get("loss") if isinstance(out, Mapping) else None
            if loss is None:
                first = next(t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())
                loss = first.float().mean()
            del out
        loss.backward()

    return run


def lora_skeleton(model: nn.Module, spec: QuantSpec, rank: int) -> nn.Module:
    """``model`` on meta, its linear layers of codes and frozen with everything else, and an adapter beside each."""
    new = quantized_skeleton(model, spec)
    new.requires_grad_(False)
    places = places_of(new)
    for layer in [m for m in new.modules() if isinstance(m, QuantLinear)]:
        put(LoRALinear(layer, min(rank, *layer.weight_shape)), layer, places)
    return new


def qat_skeleton(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """``model`` on meta, its linear layers trained as codes."""
    new = on_meta(model)
    with unwarned():
        prepare_qat_(new, spec)
    return new


def trainable(skeleton: nn.Module) -> Sequence[Tensor]:
    """The parameters that get gradients."""
    return [p for p in skeleton.parameters() if p.requires_grad]
