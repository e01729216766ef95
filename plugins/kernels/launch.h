// Launching kernels from the host.
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"
#include "rows.h"

namespace edgeprune {

constexpr int kBlocksPerMultiprocessor = 2;

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// The result of cudaLaunchKernel alone is judged: an error that was there before is not ours to report or to clear.
template <class Arguments>
int launch(const char* name, void (*kernel)(Arguments), dim3 blocks, int threads, Arguments arguments, void* stream) {
  void* pointers[] = {&arguments};
  const cudaError_t status = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(threads), pointers, 0,
                                              static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return EDGEPRUNE_OK;
  cudaGetLastError();
  return fail(EDGEPRUNE_LAUNCH_FAILED, "%s: %s", name, cudaGetErrorString(status));
}

// Calls function(Vector) with the vector of that many bytes.
template <class Function>
int with_vector(int bytes, const Function& function) {
  switch (bytes) {
    case 16: return function(Vector16{});
    case 8: return function(Vector8{});
    case 4: return function(uint32_t{});
    case 2: return function(uint16_t{});
    default: return function(uint8_t{});
  }
}

// Rows per block such that each thread copies kInFlight vectors.
inline int rows_of_a_block(int vectors) {
  const int rows = kCopyThreads * kInFlight / vectors;
  return rows > 1 ? rows : 1;
}

// Enqueues the copy of the rows at `arguments.indices`; see gather_tokens.cu.
int launch_gather(GatherArguments arguments, int batch, int vector_bytes, void* stream);

}  // namespace edgeprune
