// As much of CUDA as the kernels need, on the host: blocks run one after another, a block's threads are fibers of one
// thread. A fiber runs until it waits for others, so work that lacks a barrier sees values that are too old or too new,
// and a barrier that not every thread reaches aborts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim;

namespace cuda_on_host {

struct Barrier {
  int expected, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier{32};
  unsigned char values[32][8];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = false;
};

constexpr int kStackBytes = 1 << 16;

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block{0};
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int running;
inline bool progress;

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
  }
  while (barrier.generation == generation) swapcontext(&fibers[running].context, &scheduler);
}

inline void run_fiber() {
  body();
  fibers[running].finished = progress = true;
}

// Runs `function` in every thread of a block; backwards turns their order round.
inline void run_block(int threads, bool backwards, const std::function<void()>& function) {
  body = function;
  blockDim.x = static_cast<unsigned>(threads);
  block = Barrier{threads};
  warps.assign(threads / 32, Warp{});
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  const auto finished = [] {
    return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.finished; });
  };
  while (!finished()) {
    progress = false;
    for (int i = 0; i < threads; ++i) {
      running = backwards ? threads - 1 - i : i;
      threadIdx.x = static_cast<unsigned>(running);
      if (!fibers[running].finished) swapcontext(&scheduler, &fibers[running].context);
    }
    if (!progress) {
      fputs("some threads wait at a barrier that others never reach\n", stderr);
      abort();
    }
  }
}

// The value that lane `from` of the own warp brings.
template <class T>
T exchange(T value, int from) {
  Warp& warp = warps[threadIdx.x / 32];
  memcpy(warp.values[threadIdx.x % 32], &value, sizeof value);
  wait(warp.barrier);
  memcpy(&value, warp.values[from], sizeof value);
  wait(warp.barrier);
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block); }

inline void __syncwarp() { cuda_on_host::wait(cuda_on_host::warps[threadIdx.x / 32].barrier); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_host::exchange(value, lane);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return cuda_on_host::exchange(value, lane < distance ? lane : lane - distance);
}

inline int atomicAdd(int* value, int summand) {
  const int before = *value;
  *value += summand;
  return before;
}

inline int atomicMax(int* value, int candidate) {
  const int before = *value;
  *value = std::max(before, candidate);
  return before;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* text = getenv("CUDA_ON_HOST_MULTIPROCESSORS");
  *value = text != nullptr ? atoi(text) : 1;
  return cudaSuccess;
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 blocks, dim3 threads, void** arguments, size_t,
                             cudaStream_t) {
  const Arguments& only = *static_cast<Arguments*>(arguments[0]);
  for (unsigned y = 0; y < blocks.y; ++y) {
    for (unsigned x = 0; x < blocks.x; ++x) {
      blockIdx = dim3(x, y);
      cuda_on_host::run_block(static_cast<int>(threads.x), (x + y) % 2 != 0, [&] { kernel(only); });
    }
  }
  return cudaSuccess;
}
