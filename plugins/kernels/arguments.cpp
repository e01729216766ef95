#include "arguments.h"

#include <cstdarg>
#include <cstdio>

namespace edgeprune {
namespace {

thread_local char last_error[256] = "";

}  // namespace

int fail(int code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
  return code;
}

int check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return EDGEPRUNE_OK;
  return fail(EDGEPRUNE_BAD_ARGUMENT, "%s is %lld, not within %lld..%lld", name, static_cast<long long>(value),
              static_cast<long long>(least), static_cast<long long>(most));
}

int check_pointer(const char* name, const void* pointer, int alignment) {
  if (pointer == nullptr) return fail(EDGEPRUNE_BAD_ARGUMENT, "%s is null", name);
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0) return EDGEPRUNE_OK;
  return fail(EDGEPRUNE_BAD_ARGUMENT, "%s is not aligned to %d bytes", name, alignment);
}

int vector_bytes(int64_t row_bytes, const void* a, const void* b, const void* c) {
  const uint64_t bits = static_cast<uint64_t>(row_bytes) | reinterpret_cast<uintptr_t>(a) |
                        reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c);
  int bytes = 16;
  while (bits % static_cast<uint64_t>(bytes) != 0) bytes /= 2;
  return bytes;
}

}  // namespace edgeprune

extern "C" const char* edgeprune_kernels_error(void) { return edgeprune::last_error; }

extern "C" int edgeprune_kernels_version(void) { return 1; }
