/* Token selection on CUDA, as plain C. Semantics: edgeprune/pruning/ops.py.
 *
 * All pointers are device memory, dense, row-major, and must not overlap. `stream` is a cudaStream_t. Every function
 * returns one of the codes below, only enqueues work, allocates nothing and may be captured into a CUDA graph. */
#ifndef EDGEPRUNE_KERNELS_H
#define EDGEPRUNE_KERNELS_H

#include <stdint.h>

#ifdef EDGEPRUNE_KERNELS_EXPORT
#define EDGEPRUNE_KERNELS_API __attribute__((visibility("default")))
#else
#define EDGEPRUNE_KERNELS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGEPRUNE_OK = 0, EDGEPRUNE_BAD_ARGUMENT = 1, EDGEPRUNE_LAUNCH_FAILED = 2 };
enum { EDGEPRUNE_F32 = 0, EDGEPRUNE_F16 = 1, EDGEPRUNE_BF16 = 2 }; /* score types */
enum { EDGEPRUNE_RANK = 0, EDGEPRUNE_POSITION = 1 };
enum { EDGEPRUNE_TOP_K = 0, EDGEPRUNE_THRESHOLD = 1, EDGEPRUNE_MASS = 2 };

#define EDGEPRUNE_MAX_TOKENS 4096
#define EDGEPRUNE_MAX_BATCH 1024
#define EDGEPRUNE_MAX_PREFIX 4096
#define EDGEPRUNE_MAX_ROW_BYTES 65536

typedef struct {
  int64_t batch, tokens /* N */, kept /* k */, prefix /* P */, row_bytes /* D * element size */;
  int score_type, order, mode;
  float threshold;
} edgeprune_topk_gather_params;

/* Keep the prefix and the k best tokens. scores [B,N], tokens [B,P+N,D], kept [B,P+k,D], indices [B,k] into N,
 * count [B]: how many the mode keeps, more than k when k was too small. */
EDGEPRUNE_KERNELS_API int edgeprune_topk_gather(const edgeprune_topk_gather_params* params, const void* scores,
                                                const void* tokens, void* kept, int32_t* indices, int32_t* count,
                                                void* stream);

typedef struct {
  int64_t batch, tokens, kept, prefix, row_bytes;
} edgeprune_gather_tokens_params;

/* tokens [B,P+N,D], indices [B,k] into N, kept [B,P+k,D]. An index outside 0..N-1 gives a row of zero bytes. */
EDGEPRUNE_KERNELS_API int edgeprune_gather_tokens(const edgeprune_gather_tokens_params* params, const void* tokens,
                                                  const int32_t* indices, void* kept, void* stream);

typedef struct {
  int64_t batch, tokens, kept, row_bytes;
} edgeprune_scatter_tokens_params;

/* base [B,N,D], tokens [B,k,D], indices [B,k] into N, out [B,N,D]: base with those rows replaced. Of equal indices the
 * last one counts, an index outside 0..N-1 is ignored. */
EDGEPRUNE_KERNELS_API int edgeprune_scatter_tokens(const edgeprune_scatter_tokens_params* params, const void* base,
                                                   const void* tokens, const int32_t* indices, void* out,
                                                   void* stream);

/* Why the last call of this thread that failed did so; "" before the first failure. */
EDGEPRUNE_KERNELS_API const char* edgeprune_kernels_error(void);

EDGEPRUNE_KERNELS_API int edgeprune_kernels_version(void);

#ifdef __cplusplus
}
#endif

#endif
