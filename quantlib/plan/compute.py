"""Estimates of time: operations of training, compute-optimal tokens, and the bound of bandwidth on decoding."""

from __future__ import annotations

from collections.abc import Callable

from quantlib.plan.devices import Device
from quantlib.plan.lines import Line, Section
from quantlib.plan.parameters import Parameters

PETAFLOP_DAY = 1e15 * 86400  # operations of a petaflop/s for a day: 8.64e19
PER_PARAMETER = 20  # tokens: the rule of thumb of Hoffmann et al. 2022


def kaplan(parameters: float) -> float:
    """Tokens of Kaplan et al. 2020: N = 1.3e9 C^0.73 and D = 2e10 C^0.27, C in petaflop/s-days."""
    return float(2e10 * (parameters / 1.3e9) ** (0.27 / 0.73))


def parametric(parameters: float, A: float, B: float, alpha: float, beta: float) -> float:
    """Tokens at which A / N^alpha + B / D^beta is least for C = 6 N D: alpha A / N^alpha = beta B / D^beta."""
    return float((beta * B / (alpha * A) * parameters**alpha) ** (1 / beta))


def hoffmann(parameters: float) -> float:
    """Hoffmann et al. 2022, their third approach, as published."""
    return parametric(parameters, 406.4, 410.7, 0.34, 0.28)


def besiroglu(parameters: float) -> float:
    """Besiroglu et al. 2024, who fitted the same data once more."""
    return parametric(parameters, 482.01, 2085.43, 0.3478, 0.3658)


ESTIMATES: tuple[tuple[str, Callable[[float], float], str], ...] = (
    ("20 tokens a parameter", lambda n: PER_PARAMETER * n, "20 N: Hoffmann et al. 2022, approaches 1 and 2"),
    ("Kaplan et al. 2020", kaplan, "2e10 (N / 1.3e9)^(0.27 / 0.73)"),
    ("Hoffmann et al. 2022, 3", hoffmann, "alpha A / N^alpha = beta B / D^beta; 406.4, 410.7, 0.34, 0.28"),
    ("Besiroglu et al. 2024", besiroglu, "the same; 482.01, 2085.43, 0.3478, 0.3658"),
)


def training_flops(parameters: Parameters, tokens: float) -> float:
    """6 N D: two operations a parameter and token forward, four backward; attention to other tokens aside."""
    return 6.0 * parameters.multiplied * tokens


def section(
    parameters: Parameters, tokens: float | None, device: Device | None, gpus: int, utilization: float
) -> Section:
    """Tokens, operations and days."""
    N = parameters.multiplied
    lines = [Line(name, of(N), "tokens", f"{how}; N = {N:,} multiplied parameters") for name, of, how in ESTIMATES]
    D = tokens or PER_PARAMETER * N
    flops = training_flops(parameters, D)
    told = f"D = {D:.4g} tokens" if tokens else f"D = 20 N = {D:.4g} tokens"
    lines.append(Line("training", flops, "FLOP", f"6 N D, {told}; products of attention over the context aside"))
    lines.append(Line("training in time", flops / PETAFLOP_DAY, "petaflop/s-days", "FLOP / 8.64e19"))
    if device is not None and device.flops:
        rate = gpus * device.flops * utilization
        lines.append(
            Line(
                "days",
                flops / rate / 86400,
                "days",
                f"FLOP / ({gpus} x {device.flops:.4g} FLOP/s of {device.name} x {utilization:g} utilization x 86400 s)",
            )
        )
        lines.append(
            Line(
                "devices of a petaflop/s",
                1e15 / device.flops,
                "",
                f"1e15 / {device.flops:.4g} FLOP/s of {device.name} at its peak; more at a lower utilization",
            )
        )
    return Section("compute", lines)


def decode_bound(name: str, weights: int, cache: int, batch: int, device: Device) -> Line:
    """Tokens a second at most: every step reads the weights that it meets, and the cache, once."""
    return Line(
        f"decoding, {name}",
        batch * device.bandwidth / (weights + cache),
        "tokens/s",
        f"at most batch {batch} x {device.bandwidth:.4g} bytes/s of {device.name} / "
        f"(weights that a step reads {weights:,} + cache {cache:,} bytes)",
    )
