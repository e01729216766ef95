// Kernels that tell on standard error how they were called, so that the way from a plugin to its kernel is tested on a
// host. A batch of 13 fails as a launch would.
#include <cinttypes>
#include <cstdio>

#include "edgeprune_kernels.h"

namespace {

int told(int64_t batch) { return batch == 13 ? EDGEPRUNE_LAUNCH_FAILED : EDGEPRUNE_OK; }

}  // namespace

extern "C" int edgeprune_topk_gather(const edgeprune_topk_gather_params* p, const void* scores, const void* tokens,
                                     void* kept, int32_t* indices, int32_t* count, void* stream) {
  std::fprintf(stderr, "topk_gather %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 " %d %d %d %g", p->batch,
               p->tokens, p->kept, p->prefix, p->row_bytes, p->score_type, p->order, p->mode, double{p->threshold});
  std::fprintf(stderr, " %p %p %p %p %p %p\n", scores, tokens, kept, static_cast<void*>(indices),
               static_cast<void*>(count), stream);
  return told(p->batch);
}

extern "C" int edgeprune_gather_tokens(const edgeprune_gather_tokens_params* p, const void* tokens,
                                       const int32_t* indices, void* kept, void* stream) {
  std::fprintf(stderr, "gather_tokens %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64, p->batch, p->tokens,
               p->kept, p->prefix, p->row_bytes);
  std::fprintf(stderr, " %p %p %p %p\n", tokens, static_cast<const void*>(indices), kept, stream);
  return told(p->batch);
}

extern "C" int edgeprune_scatter_tokens(const edgeprune_scatter_tokens_params* p, const void* base, const void* tokens,
                                        const int32_t* indices, void* out, void* stream) {
  std::fprintf(stderr, "scatter_tokens %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64, p->batch, p->tokens, p->kept,
               p->row_bytes);
  std::fprintf(stderr, " %p %p %p %p %p\n", base, tokens, static_cast<const void*>(indices), out, stream);
  return told(p->batch);
}

extern "C" const char* edgeprune_kernels_error(void) { return "the launch failed"; }
