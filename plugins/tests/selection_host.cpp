// The kernels' block functions on the host: what the device runs, but for the launches.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../kernels/block.cuh"
#include "../kernels/rows.h"

namespace edgeprune {
namespace {

// Quick: every step is a loop over its indices, forwards or backwards; a result that depends on their order shows.
struct HostBlock {
  int size;
  bool backwards;

  int threads() const { return size; }

  template <class Function>
  void each(int n, const Function& function) const {
    for (int i = 0; i < n; ++i) function(backwards ? n - 1 - i : i);
  }

  template <class Function>
  void each_apart(int n, const Function& function) const {
    each(n, function);
  }

  // Adds in the order of the device: within warps of 32, then over warps.
  template <class Value, class Use>
  void scan(const Value& value, const Use& use) const {
    using T = decltype(value(0));
    std::vector<T> sums(size);
    each(size, [&](int i) { sums[i] = value(i); });
    std::vector<T> warps;
    for (int first = 0; first < size; first += 32) {
      inclusive(&sums[first], std::min(32, size - first));
      warps.push_back(sums[std::min(size, first + 32) - 1]);
    }
    inclusive(warps.data(), static_cast<int>(warps.size()));
    each(size, [&](int i) {
      const T before = i % 32 ? sums[i - 1] : T{0};
      use(i, (i >= 32 ? warps[i / 32 - 1] : T{0}) + before);
    });
  }

  void increment(int& counter) const { ++counter; }

  void raise(int& value, int candidate) const { value = std::max(value, candidate); }

 private:
  template <class T>
  static void inclusive(T* sums, int n) {
    for (int distance = 1; distance < n; distance *= 2) {
      for (int i = n - 1; i >= distance; --i) sums[i] += sums[i - distance];
    }
  }
};

// How a block runs: bit 0, backwards; bit 1, the device's own ThreadBlock with a fiber per thread.
template <class Function>
void run_block(int threads, int how, const Function& function) {
  const bool backwards = (how & 1) != 0;
  if (how & 2) {
    cuda_on_host::run_block(threads, backwards, [&] { function(ThreadBlock{}); });
  } else {
    function(HostBlock{threads, backwards});
  }
}

// Shared memory holds anything when a block starts.
template <class Storage>
void poison(Storage& storage) {
  memset(static_cast<void*>(&storage), 0xa5, sizeof storage);
}

template <class Function>
void each_share(int batch, int rows, int rows_per_block, const Function& function) {
  for (int image = 0; image < batch; ++image) {
    for (int share = 0; share < divide_up(rows, rows_per_block); ++share) function(image, share);
  }
}

}  // namespace
}  // namespace edgeprune

using namespace edgeprune;

extern "C" {

void host_keys(const void* scores, int type, int n, uint32_t* keys, float* values, float* restored) {
  const Scores read = scores_of(scores, type, n, 0);
  for (int i = 0; i < n; ++i) {
    values[i] = read(i);
    keys[i] = key_of(values[i]);
    restored[i] = score_of(keys[i]);
  }
}

// `small` chooses the algorithm, `threads` the size of the selecting block, `vector` the bytes copied at once.
void host_topk_gather(const edgeprune_topk_gather_params* params, const void* scores, const void* tokens, void* kept,
                      int32_t* indices, int32_t* count, int small, int threads, int how, int rows_per_block,
                      int vector) {
  const int batch = static_cast<int>(params->batch), n = static_cast<int>(params->tokens);
  const int k = static_cast<int>(params->kept), prefix = static_cast<int>(params->prefix);
  const GatherArguments gather{tokens, indices, kept, n, k, prefix, static_cast<int>(params->row_bytes) / vector,
                               rows_per_block};
  const Selection selection{n, k, params->order, params->mode, params->threshold};
  const TopkGatherArguments arguments{selection, gather, scores, params->score_type, indices, count};
  if (!small) {
    LargeStorage storage;
    for (int image = 0; image < batch; ++image) {
      poison(storage);
      run_block(threads, how, [&](const auto& block) { topk_select_block(block, storage, arguments, image); });
    }
  }
  with_vector(vector, [&](auto as) {
    SmallStorage storage;
    each_share(batch, prefix + k, rows_per_block, [&](int image, int share) {
      poison(storage);
      run_block(kCopyThreads, how, [&](const auto& block) {
        if (small) {
          topk_gather_block<decltype(as)>(block, storage, arguments, image, share);
        } else {
          gather_block<decltype(as)>(block, gather, image, share);
        }
      });
    });
    return 0;
  });
}

void host_gather_tokens(const edgeprune_gather_tokens_params* params, const void* tokens, const int32_t* indices,
                        void* kept, int how, int rows_per_block, int vector) {
  const int n = static_cast<int>(params->tokens), k = static_cast<int>(params->kept);
  const int prefix = static_cast<int>(params->prefix);
  const GatherArguments arguments{tokens, indices, kept, n, k, prefix, static_cast<int>(params->row_bytes) / vector,
                                  rows_per_block};
  with_vector(vector, [&](auto as) {
    each_share(static_cast<int>(params->batch), prefix + k, rows_per_block, [&](int image, int share) {
      run_block(kCopyThreads, how,
                [&](const auto& block) { gather_block<decltype(as)>(block, arguments, image, share); });
    });
    return 0;
  });
}

void host_scatter_tokens(const edgeprune_scatter_tokens_params* params, const void* base, const void* tokens,
                         const int32_t* indices, void* out, int how, int vector) {
  const int n = static_cast<int>(params->tokens), k = static_cast<int>(params->kept);
  const ScatterArguments arguments{base, tokens, indices, out, n, k, static_cast<int>(params->row_bytes) / vector};
  with_vector(vector, [&](auto as) {
    int owners[kScatterRows];
    each_share(static_cast<int>(params->batch), n, kScatterRows, [&](int image, int share) {
      run_block(kCopyThreads, how,
                [&](const auto& block) { scatter_block<decltype(as)>(block, owners, arguments, image, share); });
    });
    return 0;
  });
}

}  // extern "C"
