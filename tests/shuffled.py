"""A plugin of pytest, ``-p shuffled``: files in another order, and the tests of each file too.

The order follows from QUANTLIB_SHUFFLE, a number, which is printed.
"""

from __future__ import annotations

import os
import random

import pytest


def seed() -> str:
    return os.environ.get("QUANTLIB_SHUFFLE", "1")


def pytest_report_header() -> str:
    return f"QUANTLIB_SHUFFLE={seed()}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chance = random.Random(seed())
    keys = {path: chance.random() for path in dict.fromkeys(item.path for item in items)}
    items.sort(key=lambda item: (keys[item.path], chance.random()))
