"""Every cast against two implementations that share no code with this library: CUDA's own headers and ml_dtypes."""

from __future__ import annotations

from fractions import Fraction

import pytest

from quantlib import backends
from quantlib.testing.implementations import Backend, CudaHeaders, MlDtypes, Reference
from quantlib.testing.sweep import Case, Implementation, suites, sweep

SHARE = Fraction(1, 2048)
CASES = [case for suite in suites() for case in suite.cases]


@pytest.fixture(params=[CudaHeaders, MlDtypes], ids=lambda oracle: oracle.name)
def oracle(request: pytest.FixtureRequest) -> Implementation:
    found: Implementation = request.param()
    if found.missing is not None:
        pytest.skip(found.missing)
    return found


@pytest.mark.parametrize("candidate", [Reference(), Backend("cpp")], ids=lambda candidate: candidate.name)
def test_same_bytes(oracle: Implementation, candidate: Implementation) -> None:
    why = backends.refuses("cpp", "cpu") if isinstance(candidate, Backend) else None
    if why is not None:
        pytest.skip(why)
    known = [case for case in CASES if oracle.refuses(case) is None]
    assert {case.format for case in known} >= {"float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
    for case in known:
        result = sweep(case, candidate, oracle, SHARE)
        assert result.inputs >= 1 << 8
        assert result.mismatches == 0, str(result.first)


def test_the_headers_know_more_than_casts() -> None:
    oracle = CudaHeaders()
    if oracle.missing is not None:
        pytest.skip(oracle.missing)
    projection = Case("quantize", "float32", "float4_e2m1fn", scale=1.0)
    if oracle.refuses(projection):
        pytest.skip(oracle.refuses(projection) or "")
    assert sweep(projection, Reference(), oracle, SHARE).mismatches == 0
    assert oracle.refuses(Case("quantize", "float32", "int8", scale=1.0)) is not None
    assert oracle.refuses(Case("cast", "float32", "float16", saturate=True)) is not None
