"""AdamW and Adam with states in 8 bits, by the op `adamw_step` (contract C13, C9)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quantlib.ops.adamw_step import BLOCKS, adamw_step, states_of
from quantlib.ops.check import INPUTS, Result, described, dtype_name, is_sharded
from quantlib.optim.matrix import Matrix, columns_of, like, local, matrix_of

LEAST_COLUMNS = 32  # of a matrix with 8-bit states: a scale for fewer would take as much as it saves
NAMES = {"m": "exp_avg", "v": "exp_avg_sq", "m_scale": "exp_avg_scale", "v_scale": "exp_avg_sq_scale"}
State = dict[str, Tensor]


class Adam8bit(Optimizer):
    """Adam (Kingma and Ba 2015) whose two states take 8 bits each.

    The update is that of `torch.optim.Adam`; the states of a parameter are rounded to 8 bits after each step, in blocks
    of ``block`` neighbours in a row of the parameter, viewed as [first size, the rest]. States stay in 32 bits for
    parameters of one axis, of fewer than ``min_elements`` elements, of fewer than 32 columns, and of groups with
    ``bits=32``. All of this depends on the whole parameter alone, so every sharding gives the same bytes.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) or of dict
        float32, float16 or bfloat16. A group may have its own value of each option below.
    lr : float or Tensor
        A tensor only where ``capturable``.
    betas : (float, float)
    eps : float
    weight_decay : float
        Added to the gradient as an L2 penalty; of `AdamW8bit`, taken from the parameter.
    bits : {8, 32}
        Of the states.
    block : {32, 64, 128, 256, 512, 1024}
        Columns of a row that share a scale. A state takes 1 + 4 / block bytes a parameter.
    min_elements : int
        Fewer keep their states in 32 bits.
    stochastic_rounding : bool
        Round bfloat16 parameters up or down at random, so that updates smaller than half their last place count too.
        The random bits depend on ``seed``, the position of the parameter, the step, and the element's row and column.
    seed : int
    maximize : bool
        Follow the gradient upwards.
    capturable : bool
        Keep the counters of steps on the parameter's device, so that a CUDA graph may capture `step`.

    Raises
    ------
    ValueError
        For an option or a parameter that is not as above.
    """

    decoupled_weight_decay = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bits: int = 8,
        block: int = 128,
        min_elements: int = 4096,
        stochastic_rounding: bool = False,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, after a check of its options and parameters."""
        _check_options(self.defaults | param_group)
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                _check_parameter(p, self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; the value of ``closure``, which computes them, if there is one.

        Raises
        ------
        RuntimeError
            For a sparse gradient, or one that is sharded unlike its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        position = 0
        for group in self.param_groups:
            trained = []
            for p in group["params"]:
                if p.grad is not None:
                    _check_gradient(p)
                    if not self.state[p]:
                        self.state[p] = _first_state(p, group, position)
                    trained.append((p, self.state[p]))
                position += 1
            if trained:
                self._step_group(group, trained)
        return loss

    def _step_group(self, group: dict[str, Any], trained: list[tuple[Tensor, State]]) -> None:
        steps = [state["step"] for _, state in trained]
        torch._foreach_add_(steps, 1)
        constants = _constants(group, steps, [p.device for p, _ in trained], self.decoupled_weight_decay)
        for (p, state), of_step in zip(trained, constants, strict=True):
            key = None
            if "key" in state:
                key = torch.stack([state["key"], state["step"].to(torch.int32)]).to(p.device, non_blocking=True)
            _step(p, state, of_step, group["block"], key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states as torch does, but keep their dtypes.

        Raises
        ------
        ValueError
            For states of other blocks, or in other dtypes or shapes, than this optimizer has for a parameter. Nothing
            has been loaded then.
        """
        pairs = list(self._pairs(state_dict))
        for p, group, saved_group, saved in pairs:
            _check_state(p, group, saved_group, saved)
        super().load_state_dict(state_dict)
        for p, group, _, saved in pairs:
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    counter = name in ("step", "key") and not group["capturable"]
                    self.state[p][name] = value if counter else value.to(p.device)

    def _pairs(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any], State]]:
        """Each parameter with its group, the saved group, and its saved state, where all of them match."""
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for p, number in zip(group["params"], saved_group["params"], strict=False):
                if saved := state_dict["state"].get(number):
                    yield p, group, saved_group, saved


class AdamW8bit(Adam8bit):
    """AdamW (Loshchilov and Hutter 2019) whose two states take 8 bits each: `Adam8bit` with decoupled weight decay.

    Parameters
    ----------
    params, lr, betas, eps
        As those of `Adam8bit`.
    weight_decay : float
        A step multiplies the parameter by 1 - lr * weight_decay.
    **options
        Those of `Adam8bit`.
    """

    decoupled_weight_decay = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)


def has_8_bits(shape: torch.Size, bits: int, min_elements: int) -> bool:
    """True if the states of a parameter of ``shape`` take 8 bits."""
    return bits == 8 and len(shape) > 1 and shape.numel() >= min_elements and columns_of(shape)[1] >= LEAST_COLUMNS


def states_nbytes(shape: torch.Size, bits: int = 8, block: int = 128, min_elements: int = 4096) -> int:
    """Bytes of the two states of a parameter of ``shape``, without the counter of steps."""
    states = states_of(*columns_of(shape), block if has_8_bits(shape, bits, min_elements) else 0)
    return sum(math.prod(size) * dtype.itemsize for size, dtype in states.values())


# ---- one parameter --------------------------------------------------------------------------------------------------


def _block(p: Tensor, group: dict[str, Any]) -> int:
    """Columns that share a scale; 0 where the states are in 32 bits."""
    block: int = group["block"]
    return block if has_8_bits(p.shape, group["bits"], group["min_elements"]) else 0


def _first_state(p: Tensor, group: dict[str, Any], position: int) -> State:
    counters = p.device if group["capturable"] else torch.device("cpu")
    state = {"step": torch.zeros((), dtype=torch.float32, device=counters)}
    if group["stochastic_rounding"] and p.dtype == torch.bfloat16:
        word = hashlib.sha256(f"{group['seed']} {position}".encode()).digest()[:4]
        state["key"] = torch.tensor(int.from_bytes(word, "little", signed=True), dtype=torch.int32, device=counters)
    block = _block(p, group)
    whole, part = (states_of(*size, block) for size in (matrix_of(p).whole, matrix_of(p).part))
    for name, (shape, dtype) in part.items():
        if not name.endswith("scale"):
            zeros = torch.zeros(local(p).shape, dtype=dtype, device=p.device)
            state[NAMES[name]] = like(p, zeros, p.shape)
        elif block:
            zeros = torch.zeros(tuple(shape), dtype=dtype, device=p.device)
            state[NAMES[name]] = like(p, zeros, whole[name][0])
    return state


def _step(p: Tensor, state: State, constants: Tensor, block: int, key: Tensor | None) -> None:
    """Update ``p`` and its states in place."""
    at: Matrix = matrix_of(p)
    whole = [local(p), *(local(state[NAMES[name]]) for name in ("m", "v"))]
    own = [_rows(t, at) for t in whole]
    if "exp_avg_scale" in state:
        scales = [local(state[NAMES[name]]) for name in ("m_scale", "v_scale")]
    else:
        block, scales = 0, [own[0].new_empty((at.part[0], 0), dtype=torch.float32) for _ in range(2)]
    assert p.grad is not None
    gradient = _rows(local(p.grad), at)
    parameter, m, v = own
    m_scale, v_scale = scales
    out = (parameter, m, v, m_scale, v_scale)
    adamw_step(parameter, gradient, m, v, m_scale, v_scale, constants, block=block, key=key, origin=at.origin, out=out)
    for t, rows in zip(whole, own, strict=True):
        if rows.data_ptr() != t.data_ptr():  # it does not lie in memory as a matrix
            t.copy_(rows.view(t.shape))
    torch.autograd.graph.increment_version(p)


def _rows(t: Tensor, at: Matrix) -> Tensor:
    return t.contiguous().view(at.part)


def _constants(
    group: dict[str, Any], steps: list[Tensor], devices: list[torch.device], decoupled: bool
) -> Iterator[Tensor]:
    """The constants of `adamw_step` for each parameter of a group, on its device."""
    if not group["capturable"]:
        known: dict[tuple[float, torch.device], Tensor] = {}
        for step, device in zip(steps, devices, strict=True):
            at = step.item(), device
            if at not in known:
                values = _values(group, step.item(), float(group["lr"]), decoupled)
                known[at] = torch.tensor(values, dtype=torch.float32, device=device)
            yield known[at]
        return
    lr = group["lr"]
    for step in steps:  # in float64 and on the device, which nothing waits for
        values = _values(group, step.double(), lr.double() if isinstance(lr, Tensor) else lr, decoupled)
        yield torch.stack([torch.as_tensor(v, dtype=torch.float64, device=step.device) for v in values]).float()


def _values(group: dict[str, Any], step: Any, lr: Any, decoupled: bool) -> list[Any]:
    beta1, beta2 = group["betas"]
    decay, sign = group["weight_decay"], -1.0 if group["maximize"] else 1.0
    return [
        1 - lr * decay if decoupled else 1.0,
        0.0 if decoupled else sign * decay,
        beta1,
        sign * (1 - beta1),
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        1 / (1 - beta2**step) ** 0.5,
        group["eps"],
    ]


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_options(group: dict[str, Any]) -> None:
    def must(name: str, right: bool, expected: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {expected}, got {group[name]!r}")

    lr = group["lr"]
    must("lr", not isinstance(lr, Tensor) or (group["capturable"] and lr.numel() == 1),
         "a number, or of a capturable optimizer a tensor of one element")  # fmt: skip
    must("lr", isinstance(lr, Tensor) or (_is_number(lr) and lr >= 0), ">= 0")
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    must("betas", pair and all(_is_number(b) and 0 <= b < 1 for b in betas), "two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        must(name, _is_number(group[name]) and group[name] >= 0, ">= 0")
    must("bits", group["bits"] in (8, 32), "8 or 32")
    must("block", group["block"] in BLOCKS[1:], f"one of {', '.join(map(str, BLOCKS[1:]))}")
    must("min_elements", isinstance(group["min_elements"], int) and group["min_elements"] >= 0, "an integer >= 0")
    must("seed", isinstance(group["seed"], int), "an integer")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_parameter(p: Tensor, group: dict[str, Any]) -> None:
    if dtype_name(p.dtype) not in INPUTS:
        raise ValueError(f"a parameter must be {' or '.join(INPUTS)}, got {described(p.shape, p.dtype, p.device)}")
    at, block = matrix_of(p), _block(p, group)
    cut = at.part[1] != at.whole[1] and (at.origin[1] % block or at.part[1] % block) if block else False
    if cut:
        raise ValueError(
            f"block must divide the columns that a process holds of a parameter, got {block} of "
            f"{list(p.shape)} in parts of {at.part[1]} columns: give its group another block, or bits=32"
        )


def _check_gradient(p: Tensor) -> None:
    g = p.grad
    assert g is not None
    if g.layout is not torch.strided:
        raise RuntimeError(f"a gradient must be dense, got {g.layout}: use nn.Embedding(sparse=False)")
    if is_sharded(g) != is_sharded(p) or (is_sharded(p) and g.placements != p.placements):  # type: ignore[attr-defined]
        raise RuntimeError("a gradient must be sharded as its parameter is, got another placement")


def _check_state(p: Tensor, group: dict[str, Any], saved_group: dict[str, Any], saved: State) -> None:
    """A saved state is that of ``p`` in this optimizer."""
    block = _block(p, group)
    if block and saved_group.get("block", block) != block and "exp_avg_scale" in saved:
        raise ValueError(f"state_dict must have states in blocks of {block}, got blocks of {saved_group['block']}")
    whole = states_of(*columns_of(p.shape), block)
    expected: dict[str, Result] = {NAMES[name]: (p.shape, whole[name][1]) for name in ("m", "v")}
    if block:
        expected |= {NAMES[name]: whole[name] for name in ("m_scale", "v_scale")}
    for name in (*NAMES.values(), "step"):
        got = saved.get(name)
        if name == "step" or name not in expected:
            fits = isinstance(got, Tensor) == (name == "step")
            wanted = "a tensor" if name == "step" else "left out for a parameter with states in 32 bits"
        else:
            shape, dtype = expected[name]
            fits = isinstance(got, Tensor) and list(got.shape) == list(shape) and got.dtype == dtype
            wanted = described(shape, dtype, p.device)
        if not fits:
            is_tensor = isinstance(got, Tensor)
            found = described(got.shape, got.dtype, got.device) if is_tensor else type(got).__name__  # type: ignore[union-attr]
            raise ValueError(f"state_dict: {name} must be {wanted}, got {found}")
