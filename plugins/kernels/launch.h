// Launching kernels from the host.
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"
#include "rows.h"

namespace edgeprune {

constexpr int kBlocksPerMultiprocessor = 2;

// The result of the launch alone is judged: cudaGetLastError would report an earlier error of someone else as ours.
template <class Arguments>
int launch(const char* name, void (*kernel)(Arguments), dim3 blocks, int threads, Arguments arguments, void* stream) {
  void* pointers[] = {&arguments};
  const cudaError_t status =
      cudaLaunchKernel(kernel, blocks, dim3(threads), pointers, 0, static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return EDGEPRUNE_OK;
  cudaGetLastError();
  return fail(EDGEPRUNE_LAUNCH_FAILED, "%s: %s", name, cudaGetErrorString(status));
}

// Enqueues the copy of the rows at `arguments.indices`; see gather_tokens.cu.
int launch_gather(GatherArguments arguments, int batch, int vector_bytes, void* stream);

}  // namespace edgeprune
