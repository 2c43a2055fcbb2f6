// Included before the glue of csrc/ops: its kernels are registered for CPU tensors, in a namespace of their own.
#pragma once
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, DEVICE, m) _STABLE_TORCH_LIBRARY_IMPL(quantlib_on_cpu, CPU, m, C10_UID)
