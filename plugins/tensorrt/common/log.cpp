#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

namespace edgeprune::plugins {
namespace {

constexpr int32_t kError = 1;
constexpr int32_t kWarning = 2;

std::atomic<void*> logger_finder{nullptr};
std::atomic<int> first_slot{-1};

// TensorRT 11 put IVersionedInterface under ILoggerFinder and ILogger: their one method moved from the first entry of
// the virtual table behind its four. One library serves 10 and 11, so it asks the library that the finder comes from.
int slot_of(void* finder) noexcept {
  using GetVersion = int32_t (*)();
  void* symbol = nullptr;
  Dl_info info{};
  if (dladdr(*static_cast<void**>(finder), &info) != 0 && info.dli_fname != nullptr) {
    if (void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)) {
      symbol = dlsym(library, "getInferLibVersion");
      dlclose(library);
    }
  }
  if (symbol == nullptr) symbol = dlsym(RTLD_DEFAULT, "getInferLibVersion");
  if (symbol == nullptr) return -1;
  int32_t const version = reinterpret_cast<GetVersion>(symbol)();  // 8.6.1 is 8601, 10.0.1 is 100001
  return version >= 110000 ? 4 : 0;
}

template <class Result, class... Arguments>
Result call(void* object, int slot, Arguments... arguments) {
  using Method = Result (*)(void*, Arguments...);
  void** const table = *static_cast<void***>(object);
  return reinterpret_cast<Method>(table[slot])(object, arguments...);
}

void log(int32_t severity, char const* message) noexcept {
  void* const finder = logger_finder.load();
  int const slot = first_slot.load();
  if (finder != nullptr && slot >= 0) {
    try {
      if (void* logger = call<void*>(finder, slot)) {
        char line[1024];
        std::snprintf(line, sizeof line, "edgeprune: %s", message);
        call<void>(logger, slot, severity, static_cast<char const*>(line));
        return;
      }
    } catch (...) {
      // findLogger may throw; the message then goes where it always can.
    }
  }
  std::fprintf(stderr, "edgeprune: %s\n", message);
}

}  // namespace

void set_logger_finder(void* finder) noexcept {
  first_slot = finder == nullptr ? -1 : slot_of(finder);
  logger_finder = finder;
}

void log_error(char const* message) noexcept { log(kError, message); }
void log_warning(char const* message) noexcept { log(kWarning, message); }

}  // namespace edgeprune::plugins
