"""How fast every op is on this machine, how far from a plain copy, and who is faster: ``python -m benchmarks``.

Bytes first, time second: an op is timed only after its results equalled ``quantlib.reference`` bit for bit.
"""
