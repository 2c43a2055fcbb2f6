"""Optimizers with 8-bit states: what they compute, keep, refuse, and how they go on after a checkpoint."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from defaults import default_dtype
from torch import Tensor, nn

import quantlib
from quantlib import reference
from quantlib.optim import Adam8bit, AdamW8bit, parameter_groups
from quantlib.reference.adamw_step import random_bits
from quantlib.testing import assert_same_bytes
from quantlib.testing.bytes import bits

Group = dict[str, Any]


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def run(optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """Steps with gradients that depend on the number of the step."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 + step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters and states."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found += [p.detach(), *(t for _, t in sorted(optimizer.state[p].items()))]
    return found


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for one, other in zip(everything(a), everything(b), strict=True):
        assert_same_bytes(one, other)


# ---- what a step computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("kind", [AdamW8bit, Adam8bit])
def test_32_bits_are_torchs(kind: type[Adam8bit], options: Group) -> None:
    """The formula is torch's; operations in another order differ in the last places."""
    shapes = ((64, 128), (33,), (), (5, 4, 3))
    ours, theirs = ([parameter(*shape) for shape in shapes] for _ in range(2))
    torchs: Any = {AdamW8bit: torch.optim.AdamW, Adam8bit: torch.optim.Adam}[kind]
    run(kind(ours, lr=1e-2, bits=32, **options), 20)
    run(torchs(theirs, lr=1e-2, **options), 20)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_8_bits_are_near() -> None:
    """Two of 20 steps apart at most, where torch's has gone 20; 16 bits of the states would be far nearer."""
    ours, theirs, start = parameter(64, 256), parameter(64, 256), parameter(64, 256)
    run(AdamW8bit([ours], lr=1e-2), 20)
    run(torch.optim.AdamW([theirs], lr=1e-2), 20)
    apart, gone = (ours - theirs).detach().square().mean().sqrt(), (theirs - start).detach().square().mean().sqrt()
    assert 0 < apart < 0.1 * gone


def test_a_step_is_the_ops() -> None:
    """Rows of a parameter of four axes are its first axis; the constants are those of the second step."""
    p = parameter(48, 16, 3, 3)
    optimizer = AdamW8bit([p], lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3, block=64)
    run(optimizer, 1)
    state = {name: t.clone().numpy() for name, t in optimizer.state[p].items()}
    before, gradient = p.detach().clone(), torch.randn(p.shape)
    p.grad = gradient
    optimizer.step()
    constants = np.array(
        [1 - 1e-2 * 0.3, 0, 0.8, 1 - 0.8, 0.99, 1 - 0.99, 1e-2 / (1 - 0.8**2), (1 - 0.99**2) ** -0.5, 1e-6], np.float32
    )
    flat = (48, 144)
    states = (state[n].reshape(flat) for n in ("exp_avg", "exp_avg_sq"))
    scales = (state[f"{n}_scale"] for n in ("exp_avg", "exp_avg_sq"))
    matrices = (t.view(flat).numpy() for t in (before, gradient))
    want = reference.adamw_step(*matrices, *states, *scales, constants, block=64)
    new = optimizer.state[p]
    assert new["step"] == 2
    assert_same_bytes(p.detach().view(flat), want.parameter)
    assert_same_bytes(new["exp_avg"].view(flat), want.m)
    assert_same_bytes(new["exp_avg_sq"].view(flat), want.v)
    assert_same_bytes(new["exp_avg_scale"], want.m_scale)
    assert_same_bytes(new["exp_avg_sq_scale"], want.v_scale)


def test_every_way_in_memory_is_the_same() -> None:
    """channels_last, a transposed matrix, and a gradient that lies otherwise than its parameter."""
    plain = [parameter(32, 16, 4, 4), parameter(64, 128)]
    turned = [
        nn.Parameter(plain[0].detach().clone(memory_format=torch.channels_last)),
        nn.Parameter(plain[1].detach().T.contiguous().T),
    ]
    a, b = AdamW8bit(plain), AdamW8bit(turned)
    run(a, 3)
    run(b, 3)
    assert turned[0].is_contiguous(memory_format=torch.channels_last)
    assert_same(a, b)


@pytest.mark.parametrize("backend", ["composite", "cpp"])
def test_backends_agree(backend: str) -> None:
    if why := quantlib.backends.refuses(backend, "cpu"):
        pytest.skip(why)
    optimizers = []
    for name in ("auto", backend):
        ps = [parameter(16, 300), parameter(16, 300, dtype=torch.bfloat16), parameter(40)]
        optimizers.append(AdamW8bit(ps, min_elements=0, stochastic_rounding=True))
        with quantlib.use_backend(name):
            run(optimizers[-1], 4)
    assert_same(*optimizers)


def test_a_closure_and_missing_gradients() -> None:
    p, frozen = parameter(64, 64), parameter(64, 64)
    optimizer = AdamW8bit([p, frozen])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.detach()

    before, kept = float(closure()), frozen.detach().clone()
    assert float(optimizer.step(closure)) == before
    assert float(closure()) < before
    assert torch.equal(frozen, kept)
    assert not optimizer.state.get(frozen)


def test_autograd_sees_that_a_parameter_changed() -> None:
    p = parameter(64, 64)
    optimizer = AdamW8bit([p])
    run(optimizer, 1)
    y = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_scheduler_and_groups() -> None:
    a, b = parameter(64, 64), parameter(64, 64)
    optimizer = AdamW8bit([{"params": [a], "lr": 0.0, "weight_decay": 0.0}, {"params": [b]}], lr=1e-2)
    before = a.detach().clone(), b.detach().clone()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run(optimizer, 1)
    assert torch.equal(a, before[0])
    first = (b - before[1]).detach().abs().mean()
    schedule.step()
    here = b.detach().clone()
    run(optimizer, 1, 1)
    assert (b - here).detach().abs().mean() < 0.7 * first


# ---- which states have 8 bits, and how many bytes that is -----------------------------------------------------------


def test_bytes_of_a_parameter() -> None:
    p = parameter(256, 1024)
    optimizer = AdamW8bit([p])
    run(optimizer, 1)
    held = sum(t.nbytes for t in optimizer.state[p].values())
    assert held == 2 * (p.numel() + p.numel() // 128 * 4) + 4
    assert held / p.numel() < 2.1


@pytest.mark.parametrize(
    ("shape", "options", "eight"),
    [
        ((64, 64), {}, True),
        ((63, 64), {}, False),
        ((63, 64), {"min_elements": 100}, True),
        ((1 << 16,), {}, False),
        ((1 << 12, 31), {}, False),
        ((1 << 12, 32), {}, True),
        ((64, 8, 3, 3), {}, True),
        ((64, 64), {"bits": 32}, False),
    ],
    ids=str,
)
def test_which_states_have_8_bits(shape: tuple[int, ...], options: Group, eight: bool) -> None:
    p = parameter(*shape)
    optimizer = AdamW8bit([{"params": [p], **options}])
    run(optimizer, 1)
    state = optimizer.state[p]
    assert state["exp_avg"].dtype == (torch.int8 if eight else torch.float32)
    assert state["exp_avg_sq"].dtype == (torch.uint8 if eight else torch.float32)
    assert ("exp_avg_scale" in state) == eight
    assert state["exp_avg"].shape == p.shape


def test_embeddings_keep_32_bits() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, 64)
            self.body = nn.Linear(64, 64)
            self.head = nn.Linear(64, 100, bias=False)
            self.head.weight = self.embedding.weight
            self.frozen = nn.Parameter(torch.zeros(64, 64), requires_grad=False)

    model = Model()
    groups = parameter_groups(model, lr=1e-4)
    assert [[tuple(p.shape) for p in g["params"]] for g in groups] == [[(64, 64), (64,)], [(100, 64)]]
    optimizer = AdamW8bit(groups, weight_decay=0.5)
    assert [(g["bits"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (8, 1e-4, 0.5),
        (32, 1e-4, 0.5),
    ]
    run(optimizer, 1)
    assert optimizer.state[model.embedding.weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model.body.weight]["exp_avg"].dtype == torch.int8
    assert len(parameter_groups(nn.Linear(3, 3))) == 1


def test_a_row_of_small_gradients_still_moves() -> None:
    """Elements whose gradients are 10^3 times smaller than those of their block go as far as the others."""
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = AdamW8bit([p], lr=1e-3, weight_decay=0.0)
    scale = torch.ones(128)
    scale[::2] = 1e-3
    for _ in range(50):
        p.grad = scale.expand(64, 128).clone()
        optimizer.step()
    small, large = p.detach()[:, ::2].mean(), p.detach()[:, 1::2].mean()
    assert 0.9 < small / large < 1.1


# ---- stochastic rounding --------------------------------------------------------------------------------------------


def test_rounding_at_random_has_no_bias() -> None:
    """Steps of an eighth of the last place add up; to nearest they vanish."""
    moved = {}
    for random in (False, True):
        p = nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))
        optimizer = AdamW8bit([p], lr=2.0**-10, weight_decay=0.0, stochastic_rounding=random, betas=(0.0, 0.0))
        for _ in range(16):  # below 1 a place is 2^-8: a quarter of it
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[random] = float((1 - p.detach().float()).mean()) * 2**10
    assert moved[False] == 0
    assert abs(moved[True] - 16) < 0.1


def test_random_bits_are_uniform_and_depend_on_everything() -> None:
    rows, columns = np.arange(512)[:, None], np.arange(512)[None, :]
    drawn = [random_bits(np.array(key, np.int32), rows, columns) for key in ((1, 1), (1, 2), (2, 1))]
    for one in drawn:
        counts = np.bincount(one.ravel() >> 8, minlength=256)
        chi2 = float(((counts - 1024.0) ** 2 / 1024).sum())
        assert 170 < chi2 < 360, chi2  # 255 degrees of freedom
        for other in (np.roll(one, 1, 0), np.roll(one, 1, 1), one.T):
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.01
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(drawn[a].ravel(), drawn[b].ravel())[0, 1]) < 0.01
    part = random_bits(np.array((1, 1), np.int32), rows[100:], columns[:, 200:])
    assert np.array_equal(part, drawn[0][100:, 200:])


def test_the_seed_and_the_position_choose_the_bits() -> None:
    def trained(seed: int, before: int = 0) -> Tensor:
        p = parameter(64, 64, dtype=torch.bfloat16)
        others = [parameter(2, dtype=torch.bfloat16) for _ in range(before)]
        optimizer = AdamW8bit([*others, p], stochastic_rounding=True, seed=seed)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
    assert not torch.equal(trained(1), trained(1, 1))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def made(**options: Any) -> AdamW8bit:
    first, second = parameter(64, 300, dtype=torch.bfloat16), parameter(64, 64, seed=1)
    groups: list[Group] = [{"params": [first, parameter(7)]}, {"params": [second], "lr": 1e-2, "block": 32}]
    return AdamW8bit(groups, **{"stochastic_rounding": True, **options})


def saved(optimizer: AdamW8bit) -> Group:
    """The state through a file that holds tensors and nothing of this library."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: Group = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("capturable", [False, True])
def test_resume_to_the_same_bytes(capturable: bool) -> None:
    straight, interrupted = made(capturable=capturable), made(capturable=capturable)
    run(straight, 6)
    run(interrupted, 3)
    state = saved(interrupted)
    resumed = made(capturable=capturable)
    for group, of in zip(resumed.param_groups, interrupted.param_groups, strict=True):
        for p, q in zip(group["params"], of["params"], strict=True):
            p.data.copy_(q.data)
    resumed.load_state_dict(state)
    run(resumed, 3, 3)
    assert_same(resumed, straight)


def test_a_copy_goes_on_alike() -> None:
    optimizer = made()
    run(optimizer, 2)
    copied = copy.deepcopy(optimizer)
    run(optimizer, 2, 2)
    run(copied, 2, 2)
    assert_same(copied, optimizer)


def with_state(name: str, change: Callable[[Tensor], object]) -> Callable[[Group], None]:
    def apply(state: Group) -> None:
        changed = change(state["state"][0][name])
        if changed is None:
            del state["state"][0][name]
        else:
            state["state"][0][name] = changed

    return apply


def other_block(state: Group) -> None:
    state["param_groups"][0]["block"] = 256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_block, "state_dict must have states in blocks of 128, got blocks of 256"),
        (with_state("exp_avg_scale", lambda t: t[:, :2]), "must be float32 [64, 3] on cpu, got float32 [64, 2]"),
        (with_state("exp_avg", lambda t: t.float()), "exp_avg must be int8 [64, 300] on cpu, got float32 [64, 300]"),
        (with_state("exp_avg_sq", lambda t: None), "exp_avg_sq must be uint8 [64, 300] on cpu, got NoneType"),
        (with_state("step", lambda t: None), "step must be a tensor, got NoneType"),
    ],
)  # fmt: skip
def test_states_of_something_else_are_refused(change: Callable[[Group], None], said: str) -> None:
    optimizer = made()
    run(optimizer, 1)
    state = saved(optimizer)
    change(state)
    other = made()
    run(other, 2)
    before = [t.clone() for t in everything(other)]
    with pytest.raises(ValueError, match="state_dict") as caught:
        other.load_state_dict(state)
    assert said in str(caught.value)
    for now, then in zip(everything(other), before, strict=True):
        assert_same_bytes(now, then, "nothing is loaded")


def test_8_bits_are_not_loaded_into_32() -> None:
    optimizer, wide = AdamW8bit([parameter(64, 64)]), AdamW8bit([parameter(64, 64)], bits=32)
    run(optimizer, 1)
    with pytest.raises(ValueError, match=r"exp_avg must be float32 \[64, 64\] on cpu, got int8"):
        wide.load_state_dict(saved(optimizer))
    run(wide, 1)
    with pytest.raises(ValueError, match=r"exp_avg must be int8 \[64, 64\] on cpu, got float32"):
        optimizer.load_state_dict(saved(wide))


# ---- capturable -----------------------------------------------------------------------------------------------------


def test_capturable_is_the_same() -> None:
    """The constants are made on the device, in float64: the same numbers in float32."""
    options: Group = {"weight_decay": 0.1, "lr": 3e-3}
    a, b = made(**options), made(**{**options, "lr": torch.tensor(3e-3)}, capturable=True)
    b.param_groups[1]["lr"] = torch.tensor(1e-2)
    run(a, 5)
    run(b, 5)
    for p, q in zip(everything(a), everything(b), strict=True):
        torch.testing.assert_close(p.float(), q.float(), rtol=1e-2, atol=1.0 if p.dtype.itemsize == 1 else 1e-4)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be >= 0, got nan"),
        ({"lr": torch.tensor(1e-3)}, "lr must be a number, or of a capturable optimizer a tensor of one element"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"eps": -1e-8}, "eps must be >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"bits": 4}, "bits must be 8 or 32, got 4"),
        ({"block": 100}, "block must be one of 32, 64, 128, 256, 512, 1024, got 100"),
        ({"min_elements": -1}, "min_elements must be an integer >= 0, got -1"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
    ],
    ids=str,
)
def test_bad_options(options: Group, said: str) -> None:
    for params in ([parameter(4, 4)], [{"params": [parameter(4, 4)], **options}]):
        with pytest.raises(ValueError, match=said):
            AdamW8bit(params, **options if not isinstance(params[0], dict) else {})


def test_bad_parameters_and_gradients() -> None:
    with pytest.raises(
        ValueError, match=r"a parameter must be float32 or float16 or bfloat16, got float64 \[3\] on cpu"
    ):
        AdamW8bit([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    optimizer = AdamW8bit([parameter(4, 4)])
    with pytest.raises(ValueError, match="a parameter must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"a gradient must be dense, got torch\.sparse_coo"):
        AdamW8bit(embedding.parameters()).step()


def test_a_gradient_that_is_not_finite_ruins_its_block_and_no_other() -> None:
    p = parameter(64, 256)
    optimizer = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    p.grad[0, 0] = torch.nan
    optimizer.step()
    assert bits(optimizer.state[p]["exp_avg_scale"])[0, 0] == 0x7FFFFFFF
    assert int(p.detach().isnan().sum()) == 1
    run(optimizer, 1)
    assert int(p.detach().isnan().sum()) == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["composite", "cpp"])
def test_the_default_dtype_changes_no_byte(backend: str, dtype: torch.dtype) -> None:
    """Programs set it to bfloat16 before they build a model, and leave it so."""
    a, b = AdamW8bit([parameter(40, 64)]), AdamW8bit([parameter(40, 64)])
    with quantlib.use_backend(backend):
        run(a, 3)
        grads = [torch.randn(40, 64, generator=torch.Generator().manual_seed(1000 + step)) for step in range(3)]
        with default_dtype(dtype):
            for grad in grads:
                b.param_groups[0]["params"][0].grad = grad
                b.step()
    assert_same(a, b)
