// The library that torch.ops.quantlib_on_cpu is: the ops of quantlib/ops.def, served on CPU tensors by the CUDA kernels
// that this is linked with.
#include "on_cpu.h"

#include <torch/csrc/stable/accelerator.h>

#include "absent.h"

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
