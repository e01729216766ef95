// Argument checks and error texts of the C interface.
#pragma once

#include "edgeprune_kernels.h"

namespace edgeprune {

// Keep the reason for edgeprune_kernels_error and return the code.
int fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Each returns EDGEPRUNE_OK or has failed.
int check_range(const char* name, int64_t value, int64_t least, int64_t most);
int check_pointer(const char* name, const void* pointer, int alignment);

// The largest power of two up to 16 that divides a row and the addresses of both buffers.
int vector_bytes(int64_t row_bytes, const void* a, const void* b, const void* c = nullptr);

}  // namespace edgeprune
