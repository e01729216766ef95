// Scores as unsigned 32-bit keys: a larger key is a better score, equal scores have equal keys, NaN is 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "edgeprune_kernels.h"

// Plain C++ under the compiler of the host tests. What takes a Block (selection.h) is device code only under nvcc.
#ifdef __CUDACC__
#define EDGEPRUNE_DEVICE __device__ __forceinline__
#define EDGEPRUNE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EDGEPRUNE_DEVICE inline
#define EDGEPRUNE_HOST_DEVICE inline
#endif

namespace edgeprune {

EDGEPRUNE_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

EDGEPRUNE_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

EDGEPRUNE_HOST_DEVICE float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The value of a half is its fields read as an integer of 2^-24 when subnormal; else the exponent is rebased.
  if (magnitude < 0x400) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

EDGEPRUNE_HOST_DEVICE float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

EDGEPRUNE_HOST_DEVICE uint32_t key_of(float score) {
  if (score != score) return 0;
  const uint32_t bits = score == 0 ? 0 : bits_of(score);  // zeros of both signs tie
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// The score a key stands for; NaN for 0.
EDGEPRUNE_HOST_DEVICE float score_of(uint32_t key) { return float_of(key >> 31 ? key ^ 0x80000000 : ~key); }

// Keys of distinct tokens are distinct, and of equal scores the lower index has the larger key. Never 0.
EDGEPRUNE_HOST_DEVICE uint64_t sort_key(uint32_t key, int token) {
  return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(token);
}

EDGEPRUNE_HOST_DEVICE int token_of(uint64_t sort_key) { return static_cast<int>(~static_cast<uint32_t>(sort_key)); }

EDGEPRUNE_HOST_DEVICE int score_bytes(int type) { return type == EDGEPRUNE_F32 ? 4 : 2; }

// The scores of one image.
struct Scores {
  const void* row;
  int type;

  EDGEPRUNE_HOST_DEVICE float operator()(int token) const {
    if (type == EDGEPRUNE_F32) return static_cast<const float*>(row)[token];
    const uint16_t bits = static_cast<const uint16_t*>(row)[token];
    return type == EDGEPRUNE_F16 ? from_half(bits) : from_bfloat16(bits);
  }
};

EDGEPRUNE_HOST_DEVICE Scores scores_of(const void* scores, int type, int tokens, int image) {
  const int64_t offset = static_cast<int64_t>(image) * tokens * score_bytes(type);
  return {static_cast<const unsigned char*>(scores) + offset, type};
}

}  // namespace edgeprune
