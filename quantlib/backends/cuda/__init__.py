"""CUDA C++: the library of csrc/cuda."""

from quantlib.backends import compiled
from quantlib.backends.backend import Backend

BACKEND = Backend("cuda", ("cuda",), compiled.refuses("cuda"), preference={"cuda": 10}, compiled=True)
