"""Checks of every GPU kernel's machine code, without a GPU: ``python -m gpu_static`` from ``tests/``.

calls.py lists what is called and triton_kernels.py what the launchers make of it; cuda_kernels.py compiles csrc/cuda.
sass.py turns listings into numbers, contract.py says what they must be, budgets.py what they were.
"""
