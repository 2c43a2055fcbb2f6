"""The Triton kernels executed on the CPU as the compiler made them: an executor of their PTX in NumPy.

Triton's interpreter runs the source of a kernel, with no lanes, no shared memory and no layouts; a fault of the
compiler cannot be seen there. Here the launchers are called with CPU tensors, each kernel is compiled for sm_90 without
a GPU, and its PTX runs on the memory of the tensors. The case tables then compare every byte with the NumPy reference,
as they do on a GPU.

    python -m ptx                           # the cases of ``every.launches()``, from tests/
    python -m ptx --op fake_quantize        # of one op
    python -m ptx --arch 100 --few          # compiled for sm_100; a case of each kind
    python -m ptx --part 0/2 --every 10     # every tenth case of the first half

All threads of many programs step together, and a register is an array of one value a thread (machine.py). Threads that
have branched apart run by the order of their basic blocks (order.py) until they meet again. An error names the line of
PTX and the line of source: an access that is not aligned, or outside of each tensor; two threads that write different
values to one address at once; shared memory that is written and used by two threads with no barrier between; a barrier
or a shuffle that not all of its threads reach; a division of integers by zero; and any instruction that is not in the
tables of instructions.py and machine.py. Unspecified bits are made up so that they are noticed: a register that was not
written, the payload of a NaN where PTX promises none.

The executor knows no time, no caches, no memory order between programs, and nothing of what ptxas does to the PTX.
"""
