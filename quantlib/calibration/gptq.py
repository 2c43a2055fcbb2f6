"""Codes q that make sum over x of |(w - decode(q)) x|^2 small: a column is rounded, and its error moved into the rest

Frantar et al., GPTQ, 2023: columns in an order of falling energy, groups with scales of their own, the Cholesky factor
of the inverse of H = sum of x x^T in FP32, errors moved at once within a block of columns and later beyond it. Where a
layer has a bias, which can take the mean of the error, H is the covariance of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib import ops
from quantlib.nn.functional import Weight, kept_scale, kept_weight, quantized
from quantlib.spec import SIGNED, QuantSpec

COLUMNS = 128  # of a block whose errors stay inside it until it is done
GROWTH, MOST = 10.0, 1e4  # of the damping where H is not positive definite, as a share of the mean of its diagonal


@dataclass(frozen=True)
class Rounded:
    """The codes and scales of a weight, and their error."""

    weight: Weight
    loss: float  # of |w x|^2, the share that the error of the codes has
    rounding: float  # the same of `quantize_`
    damping: float  # a share of the mean of H's diagonal
    energy: float  # of w x, |w x|^2: what the two losses are shares of
    shift: Tensor | None  # [N], (w - decode(q)) mean: what a bias takes


def gptq(
    w: Tensor, H: Tensor, spec: QuantSpec, damping: float = 0.01, search: bool = True, mean: Tensor | None = None
) -> Rounded:
    """Codes of w [N, K] for inputs x of which H [K, K] is the mean of x x^T; both float32.

    Parameters
    ----------
    spec : QuantSpec
        With a scale.
    damping : float
        The amount added to H's diagonal, as a share of its mean. It grows until H is positive definite.
    search : bool
        Look for the part of each block's scale that leaves the least error, weighted by H's diagonal.
    mean : Tensor [K] float32, optional
        The mean of x, where a bias takes the mean of the error: only the rest of it counts as a loss.

    Raises
    ------
    ValueError
        For an H that no damping makes positive definite: one that is not finite.
    """
    (_, K), block = w.shape, spec.block(w.shape)
    if not bool(H.isfinite().all()):
        raise ValueError("inputs must leave sums of squares that are finite, got some that are not")
    plain = quantized(w, spec)
    whole, rounding = energy_of(w, H), energy_of(decoded(plain, spec, w) - w, H)
    if mean is not None:
        H = H - torch.outer(mean, mean)
        H.diagonal().clamp_(min=0)  # which only an error of rounding leaves below
    energy = H.diagonal().clone()
    scale, zero_point = searched(w, spec, energy) if search else plain[1:]
    assert scale is not None
    s, z = (None if t is None else spread(t, w.shape, block) for t in (scale, zero_point))
    order = torch.argsort(energy, descending=True, stable=True)
    U, used = inverse_factor(H[order][:, order], damping)
    left, done = w[:, order].clone(), torch.empty_like(w)
    s, z = s[:, order], None if z is None else z[:, order]  # type: ignore[index]
    for k0 in range(0, K, COLUMNS):
        k1 = min(k0 + COLUMNS, K)
        part, errors = left[:, k0:k1], torch.empty_like(left[:, k0:k1])
        for k in range(k0, k1):
            column = part[:, k - k0]
            y = projected(column, s[:, k], None if z is None else z[:, k], spec)
            done[:, k] = y
            error = (column - y) / U[k, k]
            part[:, k - k0 :].addr_(error, U[k, k:k1], alpha=-1)
            errors[:, k - k0] = error
        left[:, k1:].addmm_(errors, U[k0:k1, k1:], alpha=-1)
    values = torch.empty_like(w)
    values[:, order] = done
    codes = ops.quantize(values, scale, spec.format, block=block, zero_point=zero_point)
    weight = kept_weight(Weight(codes, scale, zero_point), spec)
    error = w - decoded(weight, spec, w)
    loss, rounding = (part / whole if whole else 0.0 for part in (energy_of(error, H), rounding))
    return Rounded(weight, loss, rounding, used, whole, None if mean is None else error @ mean)


def searched(w: Tensor, spec: QuantSpec, energy: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scales that leave the least sum of energy[k] (w[n, k] - decode(codes[n, k]))^2 in each block, as kept."""
    found = ops.compute_scale(
        w,
        spec.format,
        spec.block(w.shape),
        symmetric=spec.symmetric is True,
        method="signed_mse" if spec.search.startswith(SIGNED) else "mse",
        energy=energy / energy.max().clamp(min=torch.finfo(energy.dtype).tiny),  # whose sums no float32 may exceed
        kept=spec.scale,
    )
    scale, zero_point = (found, None) if isinstance(found, Tensor) else found
    return kept_scale(scale, spec), zero_point


def inverse_factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping mean(diagonal) 1)^-1, and the damping that it took.

    A column that no input has reached is left out of the rest: its part of H becomes that of the unit matrix.
    """
    diagonal = H.diagonal()
    mean = float(diagonal.mean()) or 1.0
    H = H / mean
    H.diagonal()[H.diagonal() == 0] = 1
    while True:
        # With the order of rows and columns reversed, the factor of H is the inverse of the one that is wanted.
        damped = H.flip(0, 1)
        damped.diagonal().add_(damping)
        L, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            unit = torch.eye(len(H), dtype=H.dtype, device=H.device)
            return torch.linalg.solve_triangular(L, unit, upper=False).flip(0, 1), damping
        damping = max(damping * GROWTH, 1e-6)
        if damping > MOST:
            raise ValueError("inputs must leave a positive definite sum of squares, got one that no damping makes so")


def projected(column: Tensor, s: Tensor, z: Tensor | None, spec: QuantSpec) -> Tensor:
    """The values [N] of the codes of a column [N]."""
    x, s, z = column[:, None].contiguous(), s[:, None].contiguous(), None if z is None else z[:, None].contiguous()
    codes = ops.quantize(x, s, spec.format, block=(1, 1), zero_point=z)
    return ops.dequantize(codes, s, spec.format, block=(1, 1), zero_point=z, size=1)[:, 0]


def decoded(weight: Weight, spec: QuantSpec, like: Tensor) -> Tensor:
    codes, scale, zero_point = weight
    assert scale is not None
    return ops.dequantize(
        codes, scale, spec.format, block=spec.block(like.shape), zero_point=zero_point, size=like.shape[1]
    )


def energy_of(w: Tensor, H: Tensor) -> float:
    """Sum over n of w[n] H w[n]^T."""
    return float(((w @ H) * w).sum(dtype=torch.float64))


def spread(values: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """[I, J] -> [N, K]: values[n // br, k // bk]."""
    (N, K), (br, bk) = shape, block
    return values.repeat_interleave(br, 0)[:N].repeat_interleave(bk, 1)[:, :K]
