// javis_cuda_kernel_attributes: the facts that `make native-cuda` reads from ptxas, as a device sees them.

#ifndef JAVIS_EMULATE  // there are no compiled kernels in the emulator

#include "attributes.h"

#include "device.cuh"

extern "C" __attribute__((visibility("default"))) const char* javis_cuda_kernel_attributes(
    int number, int threads, JavisKernelAttributes* out) {
  *out = {};
  const javis::cuda::KernelEntry* entry = javis::cuda::kernel_list();
  for (; entry != nullptr && number > 0; --number) entry = entry->next;
  if (entry == nullptr) return nullptr;
  cudaFuncAttributes facts;
  cudaError_t status = cudaFuncGetAttributes(&facts, entry->kernel);
  int blocks = 0;
  if (status == cudaSuccess) {
    if (threads <= 0 || threads > facts.maxThreadsPerBlock) threads = facts.maxThreadsPerBlock;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry->kernel, threads, 0);
  }
  if (status != cudaSuccess) {
    cudaGetLastError();  // else the next launch would report this one
    return cudaGetErrorString(status);
  }
  *out = {entry->name, facts.numRegs, static_cast<int>(facts.localSizeBytes), static_cast<int>(facts.sharedSizeBytes),
          facts.maxThreadsPerBlock, facts.binaryVersion, facts.ptxVersion, threads, blocks};
  return nullptr;
}

#endif
