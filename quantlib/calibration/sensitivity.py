"""loss(D) ~ 1/2 tr(G D H D^T): the loss of the output by an error D [N, K] of a weight, by the Fisher matrix

H = E[x x^T] of what the layer is given and G = E[g g^T] of the gradients that reach its result, both means over tokens.
g is of -log p of labels drawn from the model's own distribution, so that the loss is, to second order, the KL of the
next token, in nats (Martens and Grosse, Kronecker-factored curvature, 2015). A model without logits counts as one whose
outputs have unit variance: half the squared error of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.stages import Call, evaluating, first_of


@dataclass
class Curvature:
    """Means over tokens: H [K, K] and G [N, N], float32."""

    H: Tensor
    G: Tensor
    tokens: int = 0

    def loss(self, error: Tensor) -> float:
        """Nats a token that an error [N, K] of the weight costs."""
        return 0.5 * float(((self.G @ error @ self.H) * error).sum(dtype=torch.float64)) / self.tokens**2


def curvatures(
    model: nn.Module, calls: Sequence[Call], layers: Mapping[str, nn.Linear], tick: Callable[[], object], seed: int = 0
) -> dict[str, Curvature]:
    """name -> the curvature of the loss in the weight of each of ``layers``; layers without a token are left out."""
    found: dict[str, Curvature] = {}
    seen: list[tuple[str, Tensor, Tensor]] = []  # of one batch: (name, x, result)

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
            seen.append((name, (args[0] if args else kwargs["input"]).detach(), result))

        return hook

    asked = {p: p.requires_grad for p in model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for p in asked:
            p.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)  # so that there is a graph; the gradients are those of the results
        with evaluating(model), torch.enable_grad():
            for call in calls:
                loss = drawn_loss(call(model), generator)
                results = [y for _, _, y in seen]
                gradients = torch.autograd.grad(loss, results, allow_unused=True)
                for (name, given, _), gradient in zip(seen, gradients, strict=True):
                    if gradient is None:  # the output does not depend on it
                        continue
                    x, g = (t.reshape(-1, t.shape[-1]).float() for t in (given, gradient))
                    if name not in found:
                        K, N = x.shape[1], g.shape[1]
                        found[name] = Curvature(x.new_zeros(K, K), g.new_zeros(N, N))
                    found[name].H.addmm_(x.T, x)
                    found[name].G.addmm_(g.T, g)
                    found[name].tokens += len(x)
                seen.clear()
                tick()
    finally:
        for handle in handles:
            handle.remove()
        for p, value in asked.items():
            p.requires_grad_(value)
    return {name: c for name, c in found.items() if c.tokens}


def drawn_loss(output: Any, generator: torch.Generator) -> Tensor:
    """The sum over tokens of -log p of labels drawn from p; without logits, of outputs times random signs."""
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        y: Tensor = first_of(getattr(output, "last_hidden_state", output))
        signs = torch.randint(0, 2, y.shape, generator=generator, device="cpu").to(y.device) * 2 - 1
        return (y.float() * signs).sum()
    p = logits.detach().float().softmax(-1).flatten(0, -2)
    labels = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
    log_p: Tensor = logits.float().log_softmax(-1).flatten(0, -2)
    return -log_p.gather(-1, labels).sum()
