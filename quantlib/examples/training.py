"""The experiment: train, then go on in FP32 and towards the codes of each spec, and compare what can be deployed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

from quantlib import convert_, prepare_qat_, qat_mode_, qat_parameters, quantize_
from quantlib.examples.tasks import Score, Task, evaluate, loss_of
from quantlib.nn import QUANTIZED
from quantlib.nn.module import QuantModule
from quantlib.nn.qat import QATModule

SPECS = ("int8:row", "int4:row", "int4:tensor")
FROZEN_AFTER = 0.8  # of the steps of fine-tuning: the last part trains the weights alone, over scales that stand still
NOTHING = 1e-3  # nats: less than this is not worth a share
TYPES = tuple(QUANTIZED)


class MismatchError(Exception):
    """The deployed model is not the trained one."""


@dataclass(frozen=True)
class Schedule:
    """The number of steps and of runs."""

    steps: int  # in FP32, before the ways part
    tuning: int  # steps more, in FP32 or with fake quantization: as many, on the same batches
    seeds: int


FULL, QUICK = Schedule(500, 120, 3), Schedule(30, 10, 1)


@dataclass(frozen=True)
class Run:
    """A task, a format and a seed: the tests after as many steps."""

    task: str
    spec: str
    seed: int
    fp32: Score
    post_training: Score  # the FP32 model, quantized
    qat: Score  # trained to be quantized, and converted
    scales: dict[str, list[float]]  # layer -> its mean scale after each step of tuning, in those it started from

    @property
    def lost(self) -> float:
        """The nats of loss that quantizing after training costs."""
        return self.post_training.loss - self.fp32.loss

    @property
    def regained(self) -> float:
        return self.post_training.loss - self.qat.loss


def experiment(task: Task, seed: int, schedule: Schedule, tick: Callable[[], object]) -> Iterator[Run]:
    """Train, then go on as often from the same point: in FP32, and towards the codes of every spec."""
    torch.manual_seed(seed)
    model = task.build()
    train(model, task, schedule.steps, task.rate, seed, tick)

    def tuned(prepare: Callable[[nn.Module], object]) -> tuple[nn.Module, dict[str, list[float]]]:
        copied = copy.deepcopy(model)
        prepare(copied)
        return copied, train(copied, task, schedule.tuning, task.rate / 4, seed + 1000, tick)

    float_model, _ = tuned(lambda model: None)
    fp32 = evaluate(float_model, task)
    for spec in SPECS:
        quantized = copy.deepcopy(float_model)
        quantize_(quantized, spec, types=TYPES)
        trained, scales = tuned(partial(prepare_qat_, spec=spec, types=TYPES))
        qat = deploy(trained, task)
        yield Run(task.name, spec, seed, fp32, evaluate(quantized, task), qat, scales)


def train(
    model: nn.Module, task: Task, steps: int, rate: float, seed: int, tick: Callable[[], object]
) -> dict[str, list[float]]:
    """Train by AdamW with a rate that rises, then falls to 0; return the history of the learned scales, if any."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(qat_parameters(model), lr=rate)
    rise = max(1, steps // 10)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise))
    )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QATModule)}
    scales: dict[str, list[float]] = {name: [] for name in layers}
    for step in range(steps):
        if step == int(FROZEN_AFTER * steps):
            qat_mode_(model, observers=False, learn_scales=False)
        x, target = task.draw(generator)
        loss = loss_of(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shape.step()
        for name, layer in layers.items():
            gain = layer.weight_quantizer.gain
            assert gain is not None
            scales[name].append(float(gain.detach().mean()))
        tick()
    return scales


def deploy(model: nn.Module, task: Task) -> Score:
    """Convert a trained model, and score it.

    Raises
    ------
    MismatchError
        Where a code stands for another weight than the one that was trained, or the scores are not the same.
    """
    trained = {n: m.fake_weight().detach() for n, m in model.named_modules() if isinstance(m, QATModule)}
    before = evaluate(model, task)
    convert_(model)
    for name, weight in trained.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantModule) or not same_bits(layer.values(), weight):
            raise MismatchError(f"{task.name}: {name} has codes of other weights than those trained")
    after = evaluate(model, task)
    if not abs(after.loss - before.loss) <= 1e-4:
        raise MismatchError(f"{task.name}: loss {after.loss} deployed, {before.loss} trained")
    return after


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def grouped(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """(task, spec) -> its runs, one a seed."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.spec), []).append(run)
    return groups


def share_of(group: Sequence[Run]) -> float:
    """Return the share of the lost nats that training regains, means over the seeds; NaN where nothing is lost."""
    lost = fmean(run.lost for run in group)
    return fmean(run.regained for run in group) / lost if lost >= NOTHING else math.nan
