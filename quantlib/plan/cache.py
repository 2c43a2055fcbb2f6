"""The cache of a decoder for each token that it has seen: keys and values, latents, or a state of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantlib.plan.lines import Line, Section
from quantlib.spec import QuantSpec

EIGHT = QuantSpec.parse("int8:row")  # a scale for the keys, and one for the values, of a token and a head


@dataclass(frozen=True)
class Layer:
    """The cache of one layer for a sequence.

    Attributes
    ----------
    kind : str
        "full", "sliding", "latent", "cross" or "state".
    vectors : int
        A token: keys and values of every head, or latents.
    size : int
        Elements of a vector; of a state, of all of it.
    tokens : int
        How many tokens are kept; 1 of a state.
    """

    kind: str
    vectors: int
    size: int
    tokens: int

    def nbytes(self, dtype: torch.dtype | None) -> int:
        """Bytes in ``dtype``; if that is None in 8 bits with scales, while a state stays in 16 bits."""
        if dtype is None and self.kind != "state":
            return self.tokens * EIGHT.nbytes((self.vectors, self.size))
        return self.tokens * self.vectors * self.size * (dtype or torch.bfloat16).itemsize

    @property
    def a_token(self) -> int:
        """Elements that one more token adds."""
        return self.vectors * self.size if self.kind in ("full", "latent") else 0


def layers_of(config: Mapping[str, Any], context: int, source: int | None = None) -> list[Layer] | None:
    """Each layer of a decoder at ``context`` tokens; None where config.json does not say what it keeps.

    ``source`` is the number of tokens that the encoder of an encoder and decoder has read; by default ``context``.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert text is not None

    def size(*keys: str) -> int | None:
        found = (text.get(key) for key in keys)
        return next((int(v) for v in found if type(v) is int and v > 0), None)

    if any("Encoder" in str(name) or "Masked" in str(name) for name in config.get("architectures") or ()):
        return None
    layers = size("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = size("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", "n_heads")
    hidden = size("hidden_size", "n_embd", "d_model")
    if layers is None or heads is None or hidden is None:
        return None
    if (rank := size("kv_lora_rank")) is not None:
        return [Layer("latent", 1, rank + (size("qk_rope_head_dim") or 0), context) for _ in range(layers)]
    width = size("head_dim", "d_kv", "kv_channels") or hidden // heads
    keys = size("num_key_value_heads", "num_kv_heads", "multi_query_group_num") or (
        1 if text.get("multi_query") else heads
    )
    kinds = kinds_of(text, layers)
    window = size("sliding_window", "attention_window", "window_size", "attention_chunk_size")
    found = []
    for kind in kinds:
        if kind.startswith(("linear", "mamba", "recurrent", "conv")):
            state = state_of(text, size, hidden)
            if state is None:
                return None
            found.append(Layer("state", 1, state, 1))
        elif kind.startswith(("sliding", "chunked", "local")) and window:
            found.append(Layer("sliding", 2 * keys, width, min(context, window)))
        else:
            found.append(Layer("full", 2 * keys, width, context))
    if config.get("is_encoder_decoder"):
        found += [Layer("cross", 2 * keys, width, context if source is None else source) for _ in range(layers)]
    return found


def kinds_of(text: Mapping[str, Any], layers: int) -> list[str]:
    """Return the kind of attention of each layer, in the words of ``layer_types``."""
    told = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(told, list) and told:
        return [str(told[i % len(told)]) for i in range(layers)]
    window, pattern = text.get("sliding_window"), text.get("sliding_window_pattern")
    if not window or text.get("use_sliding_window") is False:
        return ["full_attention"] * layers
    if type(pattern) is int and pattern > 0:  # every pattern-th layer attends to everything
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    first = text.get("max_window_layers") if "use_sliding_window" in text else 0
    return ["full_attention" if i < (first or 0) else "sliding_attention" for i in range(layers)]


def state_of(text: Mapping[str, Any], size: Callable[..., int | None], hidden: int) -> int | None:
    """Elements that a layer without attention keeps: the recurrent state and the last inputs of its convolution."""
    if (heads := size("linear_num_value_heads")) is not None:  # a gated delta net
        keys, of_key, of_value = (
            size(f"linear_{name}") or 0 for name in ("num_key_heads", "key_head_dim", "value_head_dim")
        )
        channels = 2 * keys * of_key + heads * of_value
        return heads * of_key * of_value + channels * (size("linear_conv_kernel_dim") or 0)
    states, kernel = size("mamba_d_state", "ssm_state_size", "state_size"), size("mamba_d_conv", "conv_kernel")
    if states is None or kernel is None:
        return None
    inner = int((text.get("mamba_expand") or text.get("expand") or 2) * hidden)
    groups = size("mamba_n_groups", "n_groups")
    channels = inner + 2 * groups * states if groups else inner
    return inner * states + channels * kernel


def section(layers: list[Layer], context: int, batch: int) -> Section:
    """A token, and the context, in 16 and in 8 bits."""
    kinds: dict[str, int] = {}
    for layer in layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    what = " + ".join(f"{n} {kind}" for kind, n in kinds.items())
    grows = sum(layer.a_token for layer in layers)
    lines = [
        Line(
            "a token, 16 bits",
            grows * 2,
            "bytes",
            f"sum over layers ({what}) of vectors x size x 2: keys and values of each head, or a latent; "
            "a state and a window do not grow",
        ),
    ]
    for name, dtype in (("16 bits", torch.bfloat16), ("8 bits", None)):
        total = {kind: sum(x.nbytes(dtype) for x in layers if x.kind == kind) * batch for kind in kinds}
        how = "2 bytes an element" if dtype else f"{EIGHT}: a code an element, a scale a vector"
        lines.append(
            Line(
                f"{batch} x {context:,} tokens, {name}",
                sum(total.values()),
                "bytes",
                f"batch x sum over layers of tokens kept x vectors x size at {how}",
                dict(total),
            )
        )
    return Section("cache", lines)
