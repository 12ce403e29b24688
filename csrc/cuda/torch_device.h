// The device and the stream of a call, for the torch bindings (*_op.cpp) of CUDA kernels.
//
// PyTorch's stable ABI gives the current stream as CUDA knows it through a function that only CUDA builds of torch have.
// It is looked up when it is first needed, so that this library also loads beside a CPU build (where no call of it can
// ever come, because there are no CUDA tensors).

#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace javis::cuda {

#ifdef JAVIS_EMULATE

class OnDevice {  // the kernels run on the CPU, at once
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
};

#else

inline void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    // Python loads libtorch_cuda.so where the global search does not look, so the copy in memory is asked for by name.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(
        dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA streams: it is not a CUDA build");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "cannot get the current CUDA stream of device ", device);
  return stream;
}

// Makes the device of `tensor` the current one while it lives, and knows its current stream.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

#endif

// For what a JAVIS_ENTRY returns.
inline void check_launch(const char* problem, const char* op) {
  STD_TORCH_CHECK(problem == nullptr, op, ": the CUDA kernel did not start: ", problem);
}

}  // namespace javis::cuda
