"""GPTQ on one weight: plain rounding where inputs do not depend on one another, and less error where they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantlib import ops
from quantlib.calibration import gptq as module
from quantlib.calibration.gptq import decoded, gptq, inverse_factor, searched, spread
from quantlib.nn.functional import quantize_weight
from quantlib.reference.numerics import effective_scale
from quantlib.reference.search_scale import loss_of
from quantlib.spec import QuantSpec

SPECS = ["int4:group:32", "float4_e2m1fn:group:32", "int4:group:32:affine", "int8:row", "int4:tile:16", "int4:tensor"]
SPECS += ["nf4:group:32", "nf4:group:32:signed_mse", "W4A16", "int4:group:32:affine:float16"]


def weight(N: int = 24, K: int = 80) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1))


def gram(K: int = 80, rank: int = 12, tokens: int = 256) -> Tensor:
    """Make the Hessian of inputs that lie near a space of few dimensions."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, K, generator=generator)
    x += 0.1 * torch.randn(tokens, K, generator=generator)
    return x.T @ x


def error(values: Tensor, w: Tensor, H: Tensor) -> float:
    d = (values - w).double()
    return float(((d @ H.double()) * d).sum())


@pytest.mark.parametrize("text", SPECS)
def test_inputs_that_do_not_depend_on_one_another_give_plain_rounding(text: str) -> None:
    spec, w = QuantSpec.parse(text), weight()
    H = torch.diag(torch.rand(80, generator=torch.Generator().manual_seed(0)) + 0.5)
    found, plain = gptq(w, H, spec, search=False).weight, quantize_weight(w, spec)
    assert torch.equal(found.codes, plain.codes)
    assert found.scale is not None
    assert plain.scale is not None
    assert torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("search", [True, False])
def test_less_error_than_rounding(text: str, search: bool) -> None:
    spec, w, H = QuantSpec.parse(text), weight(), gram()
    found = gptq(w, H, spec, search=search)
    assert found.loss < 0.8 * found.rounding
    whole = error(torch.zeros_like(w), w, H)
    assert found.loss == pytest.approx(error(decoded(found.weight, spec, w), w, H) / whole, rel=1e-3)
    assert found.rounding == pytest.approx(error(decoded(quantize_weight(w, spec), spec, w), w, H) / whole, rel=1e-3)


def test_errors_reach_the_columns_of_later_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, w, H, losses = QuantSpec.parse("int4:group:32"), weight(24, 300), gram(300), []
    for columns in (32, 512):
        monkeypatch.setattr(module, "COLUMNS", columns)
        losses.append(gptq(w, H, spec).loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_two_columns_by_hand() -> None:
    """w = (0.4, 0.4) with inputs that are equal: the first rounds to 0, and the second takes its error, 0.8, to 1."""
    H = torch.tensor([[1.0001, 1.0], [1.0, 1.0]])
    w = torch.tensor([[0.4, 0.4, 7.0]])  # the scale is 1
    H = torch.block_diag(H, torch.ones(1, 1))
    found = gptq(w, H, QuantSpec.parse("int4:row"), damping=1e-6, search=False)
    assert decoded(found.weight, QuantSpec.parse("int4:row"), w).tolist() == [[0.0, 1.0, 7.0]]


@pytest.mark.parametrize("text", SPECS)
def test_a_search_never_adds_error_weighted_by_energy(text: str) -> None:
    spec, w, energy = QuantSpec.parse(text), weight(), gram().diagonal()
    plain = quantize_weight(w, spec)
    scale, zero_point = searched(w, spec, energy)
    block = spec.block(w.shape)
    assert plain.scale is not None
    whole = ops.compute_scale(w, spec.format, block=block, symmetric=spec.symmetric is True)
    first = np.float32(1) / effective_scale((whole if isinstance(whole, Tensor) else whole[0]).numpy(), spec.row)
    z = None if zero_point is None else zero_point.numpy()
    share = (energy / energy.max()).numpy()
    losses = [  # as the search counts them
        loss_of(w.numpy(), s.float().numpy(), first, spec.row, block, "mse", z, share) for s in (scale, plain.scale)
    ]
    assert bool((losses[0] <= losses[1]).all())
    assert bool((losses[0] < losses[1]).any()) or text == "int8:row"


def test_the_factor_is_that_of_the_inverse() -> None:
    H = gram()
    U, used = inverse_factor(H, 0.01)
    damped = H / H.diagonal().mean() + 0.01 * torch.eye(80)
    assert used == 0.01
    assert torch.equal(U, U.triu())
    assert float((U.T @ U @ damped - torch.eye(80)).abs().max()) < 1e-3


def test_a_sum_that_is_not_positive_definite_is_damped_until_it_is() -> None:
    H = gram()
    H[3, 5] = H[5, 3] = 2 * float(H.diagonal().max())
    _, used = inverse_factor(H, 0.01)
    assert used > 0.01
    with pytest.raises(ValueError, match="got some that are not"):
        gptq(torch.ones(4, 4), torch.full((4, 4), float("nan")), QuantSpec.parse("int4:row"))


def test_columns_that_no_input_reached_are_rounded() -> None:
    spec, w, H = QuantSpec.parse("int4:group:32"), weight(), gram()
    H[7], H[:, 7] = 0, 0
    found = decoded(gptq(w, H, spec, search=False).weight, spec, w)
    assert torch.equal(found[:, 7], decoded(quantize_weight(w, spec), spec, w)[:, 7])


def test_the_same_bytes_twice() -> None:
    first, second = (gptq(weight(), gram(), QuantSpec.parse("int4:group:32")).weight for _ in range(2))
    assert torch.equal(first.codes, second.codes)


def test_blocks_of_any_shape() -> None:
    sums = torch.tensor([[12.0, 20, 13], [21, 25, 14]])
    assert spread(sums, torch.Size((3, 5)), (2, 2))[2].tolist() == [21, 21, 25, 25, 14]


def test_a_bias_leaves_only_the_covariance_to_be_small() -> None:
    generator = torch.Generator().manual_seed(4)
    x = 20 * torch.randn(80, generator=generator)  # the mean, and a space of few dimensions around it
    x = x + torch.randn(512, 12, generator=generator) @ torch.randn(12, 80, generator=generator)
    w, spec, H, mean = weight(), QuantSpec.parse("int4:row"), x.T @ x / len(x), x.mean(0)
    found, without = gptq(w, H, spec, mean=mean), gptq(w, H, spec)
    left, other = ((w - decoded(f.weight, spec, w)) @ (x - mean).T for f in (found, without))
    assert left.square().mean() < 0.8 * other.square().mean()
    torch.testing.assert_close(found.loss * found.energy, float(left.square().sum()) / len(x), rtol=1e-2, atol=0)
    assert found.shift is not None
    torch.testing.assert_close(found.shift, (w - decoded(found.weight, spec, w)) @ mean)
    assert found.rounding == without.rounding
    assert without.shift is None
