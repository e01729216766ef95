#include "block.cuh"
#include "launch.h"

namespace edgeprune {

template <class Vector>
__global__ void __launch_bounds__(kCopyThreads) gather_rows(GatherArguments arguments) {
  gather_block<Vector>(ThreadBlock{}, arguments, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x));
}

int launch_gather(GatherArguments arguments, int batch, int vector_bytes, void* stream) {
  arguments.rows_per_block = rows_of_a_block(arguments.vectors);
  const int shares = divide_up(arguments.prefix + arguments.kept, arguments.rows_per_block);
  return with_vector(vector_bytes, [&](auto vector) {
    return launch("gather_rows", gather_rows<decltype(vector)>, dim3(shares, batch), kCopyThreads, arguments, stream);
  });
}

}  // namespace edgeprune

extern "C" int edgeprune_gather_tokens(const edgeprune_gather_tokens_params* params, const void* tokens,
                                       const int32_t* indices, void* kept, void* stream) {
  using namespace edgeprune;
  int code = check_pointer("params", params, alignof(edgeprune_gather_tokens_params));
  if (!code) code = check_range("batch", params->batch, 1, EDGEPRUNE_MAX_BATCH);
  if (!code) code = check_range("tokens", params->tokens, 1, EDGEPRUNE_MAX_TOKENS);
  if (!code) code = check_range("kept", params->kept, 1, EDGEPRUNE_MAX_TOKENS);
  if (!code) code = check_range("prefix", params->prefix, 0, EDGEPRUNE_MAX_PREFIX);
  if (!code) code = check_range("row_bytes", params->row_bytes, 1, EDGEPRUNE_MAX_ROW_BYTES);
  if (!code) code = check_pointer("tokens", tokens, 1);
  if (!code) code = check_pointer("indices", indices, 4);
  if (!code) code = check_pointer("kept", kept, 1);
  if (code) return code;
  const int bytes = vector_bytes(params->row_bytes, tokens, kept);
  GatherArguments arguments{};
  arguments.tokens = tokens;
  arguments.indices = indices;
  arguments.kept_tokens = kept;
  arguments.tokens_per_image = static_cast<int>(params->tokens);
  arguments.kept = static_cast<int>(params->kept);
  arguments.prefix = static_cast<int>(params->prefix);
  arguments.vectors = static_cast<int>(params->row_bytes) / bytes;
  return launch_gather(arguments, static_cast<int>(params->batch), bytes, stream);
}
