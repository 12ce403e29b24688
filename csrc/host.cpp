// The only Python-specific binary of javis: what the extensions were built with. No op lives here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

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
}
