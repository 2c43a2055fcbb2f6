#include "image.h"

#include <cxxabi.h>
#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

extern "C" char __executable_start[] __attribute__((weak)), __bss_start[], _end[];  // a library has no such start

namespace cuda_on_cpu {

static std::string demangled(const char* name) {
  int status;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = text ? text : name;
  std::free(text);
  return result;
}

// run(symbol, its name) for every symbol of the executable, whose addresses are those of its memory: -no-pie.
template <class Run>
static void each_symbol(Run run) {
  std::ifstream file("/proc/self/exe", std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[s].sh_offset);
    const char* names = bytes.data() + sections[sections[s].sh_link].sh_offset;
    for (size_t k = 0; k < sections[s].sh_size / sizeof *symbols; ++k) run(symbols[k], names + symbols[k].st_name);
  }
}

const Image& image() {
  static const Image image = [] {
    Image made{{}, uintptr_t(__executable_start), uintptr_t(__bss_start), uintptr_t(_end)};
    each_symbol([&](const Elf64_Sym& s, const char* name) {
      if (ELF64_ST_TYPE(s.st_info) == STT_OBJECT && s.st_value >= made.written && s.st_value % 65536 == 0)
        made.shared.push_back({s.st_value, s.st_value + s.st_size, demangled(name)});
    });
    std::sort(made.shared.begin(), made.shared.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
    return made;
  }();
  return image;
}

}  // namespace cuda_on_cpu
