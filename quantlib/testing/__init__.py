"""Tests of a backend: values where rounding is decided, a table of cases, and a comparison of bytes.

>>> from quantlib import testing
>>> for case in testing.cases("cast", "float8_e4m3fn"):
...     testing.check(case)

``python -m quantlib.testing BACKEND`` runs the whole table on one backend.
"""

from quantlib.testing.bytes import assert_same_bytes, bits, poisoned, tensor
from quantlib.testing.compare import call, check, expected, tensors
from quantlib.testing.generate import inputs
from quantlib.testing.table import Case, cases

__all__ = [
    "Case",
    "assert_same_bytes",
    "bits",
    "call",
    "cases",
    "check",
    "expected",
    "inputs",
    "poisoned",
    "tensor",
    "tensors",
]
