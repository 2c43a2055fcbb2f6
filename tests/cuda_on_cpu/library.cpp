// csrc/cuda/register.cpp as it is, for CPU tensors: torch.ops.quantlib_on_cpu has the ops of quantlib/ops.def, and
// what serves them are the kernels that this library was linked with.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, DEVICE, m) _STABLE_TORCH_LIBRARY_IMPL(quantlib_on_cpu, CPU, m, C10_UID)

#include "absent.h"
#include "cuda/register.cpp"

// There is no device to make the current one, and one stream.
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

STABLE_TORCH_LIBRARY(quantlib_on_cpu, m) {
#define DEF(schema) m.def(schema);
#include "ops.def"
#undef DEF
}
