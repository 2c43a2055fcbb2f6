"""C++ on the CPU: the library of csrc/cpu."""

from quantlib.backends import compiled
from quantlib.backends.backend import Backend

BACKEND = Backend("cpp", ("cpu",), compiled.refuses("cpu"), preference={"cpu": 10}, compiled=True)
