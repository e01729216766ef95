#include "block.cuh"
#include "launch.h"

namespace edgeprune {

constexpr int kSelectThreads = 1024;
constexpr int kFewTokens = 1024;  // up to here half the threads select
static_assert(kCopyThreads >= kSmallTokens, "select_small needs a thread per token");

template <class Vector>
__global__ void __launch_bounds__(kCopyThreads) topk_gather_small(TopkGatherArguments arguments) {
  __shared__ SmallStorage storage;
  topk_gather_block<Vector>(ThreadBlock{}, storage, arguments, static_cast<int>(blockIdx.y),
                            static_cast<int>(blockIdx.x));
}

__global__ void __launch_bounds__(kSelectThreads) topk_select(TopkGatherArguments arguments) {
  __shared__ LargeStorage storage;
  topk_select_block(ThreadBlock{}, storage, arguments, static_cast<int>(blockIdx.x));
}

namespace {

// Every block repeats the selection of its image, so there are no more of them than keep the device busy.
int launch_small(TopkGatherArguments arguments, int batch, int bytes, void* stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return fail(EDGEPRUNE_LAUNCH_FAILED, "no device: %s", cudaGetErrorString(status));
  const int rows = arguments.gather.prefix + arguments.gather.kept;
  const int useful = divide_up(rows, rows_of_a_block(arguments.gather.vectors));
  const int shares = smaller(useful, divide_up(kBlocksPerMultiprocessor * multiprocessors, batch));
  arguments.gather.rows_per_block = divide_up(rows, shares);
  const dim3 blocks(divide_up(rows, arguments.gather.rows_per_block), batch);
  return with_vector(bytes, [&](auto vector) {
    return launch("topk_gather_small", topk_gather_small<decltype(vector)>, blocks, kCopyThreads, arguments, stream);
  });
}

int launch_large(const TopkGatherArguments& arguments, int batch, int bytes, void* stream) {
  const int threads = arguments.selection.tokens > kFewTokens ? kSelectThreads : kSelectThreads / 2;
  const int code = launch("topk_select", topk_select, dim3(batch), threads, arguments, stream);
  return code ? code : launch_gather(arguments.gather, batch, bytes, stream);
}

}  // namespace
}  // namespace edgeprune

extern "C" int edgeprune_topk_gather(const edgeprune_topk_gather_params* params, const void* scores, const void* tokens,
                                     void* kept, int32_t* indices, int32_t* count, void* stream) {
  using namespace edgeprune;
  int code = check_pointer("params", params, alignof(edgeprune_topk_gather_params));
  if (!code) code = check_range("batch", params->batch, 1, EDGEPRUNE_MAX_BATCH);
  if (!code) code = check_range("tokens", params->tokens, 1, EDGEPRUNE_MAX_TOKENS);
  if (!code) code = check_range("kept", params->kept, 1, params->tokens);
  if (!code) code = check_range("prefix", params->prefix, 0, EDGEPRUNE_MAX_PREFIX);
  if (!code) code = check_range("row_bytes", params->row_bytes, 1, EDGEPRUNE_MAX_ROW_BYTES);
  if (!code) code = check_range("score_type", params->score_type, EDGEPRUNE_F32, EDGEPRUNE_BF16);
  if (!code) code = check_range("order", params->order, EDGEPRUNE_RANK, EDGEPRUNE_POSITION);
  if (!code) code = check_range("mode", params->mode, EDGEPRUNE_TOP_K, EDGEPRUNE_MASS);
  if (!code) code = check_pointer("scores", scores, score_bytes(params->score_type));
  if (!code) code = check_pointer("tokens", tokens, 1);
  if (!code) code = check_pointer("kept", kept, 1);
  if (!code) code = check_pointer("indices", indices, 4);
  if (!code) code = check_pointer("count", count, 4);
  if (code) return code;
  const int batch = static_cast<int>(params->batch);
  const int bytes = vector_bytes(params->row_bytes, tokens, kept);
  TopkGatherArguments arguments{};
  Selection& selection = arguments.selection;
  selection.tokens = static_cast<int>(params->tokens);
  selection.kept = static_cast<int>(params->kept);
  selection.order = params->order;
  selection.mode = params->mode;
  selection.threshold = params->threshold;
  arguments.gather.tokens = tokens;
  arguments.gather.indices = indices;
  arguments.gather.kept_tokens = kept;
  arguments.gather.tokens_per_image = selection.tokens;
  arguments.gather.kept = selection.kept;
  arguments.gather.prefix = static_cast<int>(params->prefix);
  arguments.gather.vectors = static_cast<int>(params->row_bytes) / bytes;
  arguments.scores = scores;
  arguments.score_type = params->score_type;
  arguments.indices = indices;
  arguments.count = count;
  return selection.tokens <= kSmallTokens ? launch_small(arguments, batch, bytes, stream)
                                          : launch_large(arguments, batch, bytes, stream);
}
