"""The properties of a device: bytes of memory, bytes a second, operations a second."""

from __future__ import annotations

import re
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """A device, of its maker's data sheet.

    Attributes
    ----------
    name : str
    memory : int
        Bytes that the driver reports in all.
    bandwidth : float
        Bytes a second; 0 where it is not known.
    flops : float
        Dense BF16 (of T4 and V100 FP16) tensor operations a second with sums in FP32; 0 where it is not known.
    context : int
        Bytes that the driver and the libraries of each process take before the first tensor: measured on CUDA 12 with
        PyTorch, and between 0.3 and 0.8 GB; 0 of a plain number of bytes.
    """

    name: str
    memory: int
    bandwidth: float = 0.0
    flops: float = 0.0
    context: int = 512 * MIB


TABLE = (
    #      name        MiB             bytes/s  FLOP/s
    Device("B200",      183359 * MIB,  8.00e12, 2250e12),
    Device("H200",      143771 * MIB,  4.80e12, 989.4e12),
    Device("H100",      81559 * MIB,   3.35e12, 989.4e12),
    Device("A100",      81920 * MIB,   2.039e12, 312e12),
    Device("A100-40GB", 40960 * MIB,   1.555e12, 312e12),
    Device("L40S",      46068 * MIB,   8.64e11, 362e12),
    Device("L4",        23034 * MIB,   3.00e11, 121e12),
    Device("A10",       23028 * MIB,   6.00e11, 125e12),
    Device("T4",        15360 * MIB,   3.20e11, 65e12),
    Device("V100",      32768 * MIB,   9.00e11, 125e12),
    Device("RTX5090",   32607 * MIB,   1.792e12, 209.5e12),
    Device("RTX4090",   24564 * MIB,   1.008e12, 165.2e12),
    Device("RTX3090",   24576 * MIB,   9.36e11, 71e12),
)  # fmt: skip
DEVICES = {device.name.upper(): device for device in TABLE}
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def device_of(text: str) -> Device:
    """A device of the table, or one of so many bytes: ``H100``, ``24GB``, ``80GiB``, ``16000000000``.

    Raises
    ------
    ValueError
        For a name that is not in the table and no number of bytes above 0.
    """
    if (known := DEVICES.get(str(text).strip().upper().replace(" ", ""))) is not None:
        return known
    match = re.fullmatch(
        r"(\d+(?:\.\d*)?(?:e\d+)?)\s*([KMGT]I?|)B?", str(text).strip().upper().replace("E+", "E"), re.I
    )
    memory = int(float(match[1].lower()) * UNITS[match[2]]) if match else 0
    if memory < 1:
        names = ", ".join(device.name for device in TABLE)
        raise ValueError(f"device must be {names} or a number of bytes such as 24GB or 80GiB, got {text!r}")
    return Device(str(text).strip(), memory, context=0)
