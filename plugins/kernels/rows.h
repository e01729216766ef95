// Copying rows of tokens: what a block of each kernel writes. Block as in selection.h, and
//   raise(v, x)  sets a shared value to the larger of itself and x
#pragma once

#include "selection.h"

namespace edgeprune {

constexpr int kCopyThreads = 256;
constexpr int kInFlight = 4;  // vectors a thread loads before it stores
constexpr int kScatterRows = 32;

struct alignas(16) Vector16 {
  uint32_t words[4];
};
struct alignas(8) Vector8 {
  uint32_t words[2];
};

// `vectors` is the length of a row in vectors; a block writes `rows_per_block` rows of one image.
struct GatherArguments {
  const void* tokens;
  const int32_t* indices;
  void* kept_tokens;
  int tokens_per_image, kept, prefix, vectors, rows_per_block;
};

struct TopkGatherArguments {
  Selection selection;
  GatherArguments gather;
  const void* scores;
  int score_type;
  int32_t* indices;
  int32_t* count;
};

struct ScatterArguments {
  const void* base;
  const void* tokens;
  const int32_t* indices;
  void* out;
  int tokens_per_image, kept, vectors;
};

// Fills `rows` rows at `to` with the rows that `source(row)` points at, and with zeros where that is null.
template <class Vector, class Block, class Source>
EDGEPRUNE_DEVICE void copy_rows(const Block& block, int rows, int vectors, Vector* to, const Source& source) {
  const int threads = block.threads();
  block.each(threads, [&](int thread) {
    const int total = rows * vectors;
    const int row_step = threads / vectors, column_step = threads % vectors;
    int row = thread / vectors, column = thread % vectors;  // kept in step with the flat position: no more divisions
    for (int flat = thread; flat < total; flat += kInFlight * threads) {
      Vector held[kInFlight] = {};
      for (int i = 0; i < kInFlight; ++i) {
        if (row < rows) {
          const Vector* from = source(row);
          if (from != nullptr) held[i] = from[column];
        }
        row += row_step;
        column += column_step;
        if (column >= vectors) {
          column -= vectors;
          ++row;
        }
      }
      for (int i = 0; i < kInFlight; ++i) {
        if (flat + i * threads < total) to[flat + i * threads] = held[i];
      }
    }
  });
}

// Writes one share of the rows of an image: its prefix, then the tokens `token_at(slot)`.
template <class Vector, class Block, class TokenAt>
EDGEPRUNE_DEVICE void gather_share(const Block& block, const GatherArguments& arguments, int image, int share,
                                   const TokenAt& token_at) {
  const int prefix = arguments.prefix, vectors = arguments.vectors, n = arguments.tokens_per_image;
  const int total = prefix + arguments.kept;
  const int first = share * arguments.rows_per_block;
  const int rows = smaller(arguments.rows_per_block, total - first);
  const Vector* from = static_cast<const Vector*>(arguments.tokens) + int64_t{image} * (prefix + n) * vectors;
  Vector* to = static_cast<Vector*>(arguments.kept_tokens) + (int64_t{image} * total + first) * vectors;
  copy_rows(block, rows, vectors, to, [&](int row) -> const Vector* {
    const int slot = first + row - prefix;
    if (slot < 0) return from + int64_t{first + row} * vectors;
    const int token = token_at(slot);
    return token >= 0 && token < n ? from + int64_t{prefix + token} * vectors : nullptr;
  });
}

template <class Vector, class Block>
EDGEPRUNE_DEVICE void gather_block(const Block& block, const GatherArguments& arguments, int image, int share) {
  const int32_t* indices = arguments.indices + int64_t{image} * arguments.kept;
  gather_share<Vector>(block, arguments, image, share, [&](int slot) { return indices[slot]; });
}

// Selects and writes one share of the rows; the first share also writes indices and count.
template <class Vector, class Block>
EDGEPRUNE_DEVICE void topk_gather_block(const Block& block, SmallStorage& storage,
                                        const TopkGatherArguments& arguments, int image, int share) {
  const Selection& selection = arguments.selection;
  const Scores scores = scores_of(arguments.scores, arguments.score_type, selection.tokens, image);
  const uint16_t* tokens = select_small(block, storage, selection, scores);
  if (share == 0) {
    int32_t* indices = arguments.indices + int64_t{image} * selection.kept;
    block.each(selection.kept, [&](int slot) { indices[slot] = tokens[slot]; });
    const int count = count_small(block, storage, selection);
    block.each(1, [&](int) { arguments.count[image] = count; });
  }
  gather_share<Vector>(block, arguments.gather, image, share, [&](int slot) -> int { return tokens[slot]; });
}

template <class Block>
EDGEPRUNE_DEVICE void topk_select_block(const Block& block, LargeStorage& storage,
                                        const TopkGatherArguments& arguments, int image) {
  const Selection& selection = arguments.selection;
  const Scores scores = scores_of(arguments.scores, arguments.score_type, selection.tokens, image);
  select_large(block, storage, selection, scores, arguments.indices + int64_t{image} * selection.kept,
               arguments.count + image);
}

// Writes kScatterRows rows of an image. `owners` is shared memory: which row of `tokens` each of them takes.
template <class Vector, class Block>
EDGEPRUNE_DEVICE void scatter_block(const Block& block, int* owners, const ScatterArguments& arguments, int image,
                                    int share) {
  const int vectors = arguments.vectors, n = arguments.tokens_per_image, kept = arguments.kept;
  const int first = share * kScatterRows;
  const int rows = smaller(kScatterRows, n - first);
  const int32_t* indices = arguments.indices + int64_t{image} * kept;
  block.each(rows, [&](int row) { owners[row] = -1; });
  block.each(kept, [&](int slot) {
    const int token = indices[slot];
    if (token >= first && token < first + rows) block.raise(owners[token - first], slot);
  });
  const int64_t written = (int64_t{image} * n + first) * vectors;
  const Vector* base = static_cast<const Vector*>(arguments.base) + written;
  const Vector* tokens = static_cast<const Vector*>(arguments.tokens) + int64_t{image} * kept * vectors;
  copy_rows(block, rows, vectors, static_cast<Vector*>(arguments.out) + written, [&](int row) -> const Vector* {
    return owners[row] < 0 ? base + int64_t{row} * vectors : tokens + int64_t{owners[row]} * vectors;
  });
}

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

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

}  // namespace edgeprune
