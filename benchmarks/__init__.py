"""Time every op on this machine, beside a plain copy and beside its peers: ``python -m benchmarks``.

Bytes first, time second: an op is timed only after its results equalled ``quantlib.reference`` bit for bit.
"""
