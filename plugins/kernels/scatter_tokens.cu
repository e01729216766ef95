#include "block.cuh"
#include "launch.h"

namespace edgeprune {

template <class Vector>
__global__ void __launch_bounds__(kCopyThreads) scatter_rows(ScatterArguments arguments) {
  __shared__ int owners[kScatterRows];
  scatter_block<Vector>(ThreadBlock{}, owners, arguments, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x));
}

}  // namespace edgeprune

extern "C" int edgeprune_scatter_tokens(const edgeprune_scatter_tokens_params* params, const void* base,
                                        const void* tokens, const int32_t* indices, void* out, void* stream) {
  using namespace edgeprune;
  int code = check_pointer("params", params, alignof(edgeprune_scatter_tokens_params));
  if (!code) code = check_range("batch", params->batch, 1, EDGEPRUNE_MAX_BATCH);
  if (!code) code = check_range("tokens", params->tokens, 1, EDGEPRUNE_MAX_TOKENS);
  if (!code) code = check_range("kept", params->kept, 1, EDGEPRUNE_MAX_TOKENS);
  if (!code) code = check_range("row_bytes", params->row_bytes, 1, EDGEPRUNE_MAX_ROW_BYTES);
  if (!code) code = check_pointer("base", base, 1);
  if (!code) code = check_pointer("tokens", tokens, 1);
  if (!code) code = check_pointer("indices", indices, 4);
  if (!code) code = check_pointer("out", out, 1);
  if (code) return code;
  const int bytes = vector_bytes(params->row_bytes, base, tokens, out);
  ScatterArguments arguments{};
  arguments.base = base;
  arguments.tokens = tokens;
  arguments.indices = indices;
  arguments.out = out;
  arguments.tokens_per_image = static_cast<int>(params->tokens);
  arguments.kept = static_cast<int>(params->kept);
  arguments.vectors = static_cast<int>(params->row_bytes) / bytes;
  const dim3 blocks(divide_up(arguments.tokens_per_image, kScatterRows), static_cast<unsigned>(params->batch));
  return with_vector(bytes, [&](auto vector) {
    return launch("scatter_rows", scatter_rows<decltype(vector)>, blocks, kCopyThreads, arguments, stream);
  });
}
