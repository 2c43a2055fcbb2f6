// What the linker knows of this executable's memory.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_on_cpu {

struct Symbol {
  uintptr_t begin, end;
  std::string name;  // as C++ writes it
};

struct Image {
  std::vector<Symbol> shared;     // by address
  uintptr_t begin, written, end;  // of all, of what is zero at first
};

const Image& image();

}  // namespace cuda_on_cpu
