"""The processes start once for all cases of the files that are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gloo
import pytest
import torch.distributed as dist


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> gloo.Results:
    """What each process found, by case and number of ranks."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    modules = dict.fromkeys(item.module for item in request.session.items if hasattr(item.module, "CASES"))
    cases = [(module.__name__, case.__name__) for module in modules for case in module.CASES]
    return gloo.run(cases, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=gloo.WORLDS, ids=lambda world: f"{world} ranks")
def found(request: pytest.FixtureRequest, results: gloo.Results) -> Callable[[Any], list[Any]]:
    """What each process found in a case on so many ranks."""

    def of(case: Any) -> list[Any]:
        values = results[case.__name__, request.param]
        for value in values:
            if isinstance(value, AssertionError):
                raise value
        return values

    return of
