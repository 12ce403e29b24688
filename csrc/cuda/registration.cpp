// Every CUDA op of javis, on one screen: its schema and what implements it.
//
// A namespace of its own, javis_cuda: the ops take modulation in any dtype and other layouts than their CPU twins in
// javis_native, and this library also works where that one was not built. PyTorch's stable ABI only, as there.
// Python registers the shape functions (fakes) in javis/kernels/ops/<op>/contract.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(javis_cuda, m) {
  (void)m;
}

STABLE_TORCH_LIBRARY_IMPL(javis_cuda, CUDA, m) {
  (void)m;
}

// Plain C, read through ctypes by javis/kernels/native.py: the architectures this library has code for, such as 80;90a.
extern "C" __attribute__((visibility("default"))) const char* javis_cuda_architectures() { return JAVIS_CUDA_ARCHS; }
