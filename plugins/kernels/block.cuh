// The thread block of a kernel, as selection.h and rows.h use it; its size is a multiple of 32.
#pragma once

#include <cuda_runtime.h>

namespace edgeprune {

struct ThreadBlock {
  __device__ int threads() const { return static_cast<int>(blockDim.x); }

  template <class Function>
  __device__ __forceinline__ void each(int n, const Function& function) const {
    for (int i = thread(); i < n; i += threads()) function(i);
    __syncthreads();
  }

  template <class Function>
  __device__ __forceinline__ void each_apart(int n, const Function& function) const {
    for (int i = thread(); i < n; i += threads()) function(i);
    __syncwarp();
  }

  template <class Value, class Use>
  __device__ __forceinline__ void scan(const Value& value, const Use& use) const {
    use(thread(), before(value(thread())));
    __syncthreads();
  }

  __device__ void increment(int& counter) const { atomicAdd(&counter, 1); }

  __device__ void raise(int& value, int candidate) const { atomicMax(&value, candidate); }

 private:
  static constexpr unsigned kAll = 0xffffffff;

  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  template <class T>
  __device__ static T inclusive(T sum, int lane) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const T below = __shfl_up_sync(kAll, sum, distance);
      if (lane >= distance) sum += below;
    }
    return sum;
  }

  // The sum of `own` over all threads before this one. The caller synchronizes before the next scan.
  template <class T>
  __device__ T before(T own) const {
    __shared__ T totals[32];
    const int lane = thread() % 32, warp = thread() / 32;
    const T sum = inclusive(own, lane);
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    const T warps = inclusive(lane < threads() / 32 ? totals[lane] : T{0}, lane);
    const T warps_before = __shfl_sync(kAll, warps, warp > 0 ? warp - 1 : 0);
    const T lanes_before = __shfl_up_sync(kAll, sum, 1);
    return (warp > 0 ? warps_before : T{0}) + (lane > 0 ? lanes_before : T{0});
  }
};

}  // namespace edgeprune
