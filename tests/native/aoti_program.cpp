// y = package(x) without Python: aoti_program LIBRARY PACKAGE ROWS COLUMNS < x > y, both float32, y of one output.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>
#include <vector>

int main(int, char** arguments) {
  if (!dlopen(arguments[1], RTLD_NOW)) {
    std::cerr << dlerror() << std::endl;
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader package(arguments[2]);
  const at::Tensor x = torch::empty({std::stol(arguments[3]), std::stol(arguments[4])});
  std::cin.read(static_cast<char*>(x.data_ptr()), std::streamsize(x.nbytes()));
  std::vector<at::Tensor> inputs{x};
  const at::Tensor y = package.run(inputs).at(0).contiguous();
  std::cout.write(static_cast<const char*>(y.data_ptr()), std::streamsize(y.nbytes()));
  return std::cin && std::cout.flush() ? 0 : 1;
}
