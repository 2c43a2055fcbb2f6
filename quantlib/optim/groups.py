"""The parameters of a model that keep their states in 32 bits: those of embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def parameter_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """The parameters of ``model`` that are trained as groups for an optimizer with 8-bit states.

    The weights of embeddings get ``bits=32``: a row of an embedding has gradients only where its token occurs, so the
    states of rare and frequent tokens differ by orders of magnitude. A head that shares the weight of an embedding is
    one of them.

    Parameters
    ----------
    **options
        Options of every group, such as ``lr``.

    Returns
    -------
    list of dict
        One group of the embeddings, one of the others; an empty one is left out.
    """
    embeddings = embeddings_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    others = {"params": [p for p in trained if id(p) not in embeddings], **options}
    wide = {"params": [p for p in trained if id(p) in embeddings], **options, "bits": 32}
    return [group for group in (others, wide) if group["params"]]


def embeddings_of(model: nn.Module) -> set[int]:
    """The `id` of every parameter that belongs to an embedding."""
    return {id(p) for m in model.modules() if isinstance(m, EMBEDDINGS) for p in m.parameters(recurse=False)}
