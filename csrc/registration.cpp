// The ops of quantlib: quantlib/ops.def, which Python reads where there is no compiled library.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(quantlib, m) {
#define DEF(schema) m.def(schema);
#include "ops.def"
#undef DEF
}
