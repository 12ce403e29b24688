// The only Python-specific binary of javis: what the extensions were built with. No op lives here.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cuda/attributes.h"

namespace {

// One dict for each kernel of libjavis_cuda.so, which is only looked into, never linked: this module is built without CUDA.
pybind11::list kernel_attributes(const std::string& library, int threads) {
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  const auto function = reinterpret_cast<JavisKernelAttributesFunction>(dlsym(handle, "javis_cuda_kernel_attributes"));
  if (function == nullptr) throw std::runtime_error(library + " is of an earlier version: build it again");
  pybind11::list found;
  for (int number = 0;; ++number) {
    JavisKernelAttributes facts;
    if (const char* problem = function(number, threads, &facts)) throw std::runtime_error(problem);
    if (facts.name == nullptr) return found;
    pybind11::dict entry;
    entry["name"] = facts.name;
    entry["registers"] = facts.registers;
    entry["local_bytes"] = facts.local_bytes;
    entry["shared_bytes"] = facts.shared_bytes;
    entry["max_threads"] = facts.max_threads;
    entry["binary_version"] = facts.binary_version;
    entry["ptx_version"] = facts.ptx_version;
    entry["threads"] = facts.threads;
    entry["blocks_per_multiprocessor"] = facts.blocks_per_multiprocessor;
    found.append(entry);
  }
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the compiled parts of javis.";
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"compiler", __VERSION__},
            {"cxx_standard", std::to_string(__cplusplus)},
            {"pybind11", std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR)},
            {"torch_headers", JAVIS_TORCH_HEADERS},
            {"torch_target", JAVIS_TORCH_TARGET},
            {"instruction_sets", JAVIS_INSTRUCTION_SETS},
        };
      },
      "Compiler, torch headers, oldest torch served, and instruction sets, as a dict of strings.");
  m.def("kernel_attributes", &kernel_attributes, "Facts about the CUDA kernels of a library on the current device.");
}
