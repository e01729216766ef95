// What TensorRT 8 and a loader find in the library.
#include <NvInferRuntime.h>

#include <list>
#include <vector>

#include "log.h"
#include "plugin.h"
#ifdef EDGEPRUNE_SELF_REGISTER
#include "registration.h"
#endif

#define EDGEPRUNE_EXPORT extern "C" __attribute__((visibility("default")))

namespace edgeprune::plugins {
namespace {

std::vector<nvinfer1::IPluginCreator*> const& creators() {
  static std::list<Creator> held(ops().begin(), ops().end());
  static std::vector<nvinfer1::IPluginCreator*> const all = [] {
    std::vector<nvinfer1::IPluginCreator*> made;
    for (Creator& creator : held) made.push_back(&creator);
    return made;
  }();
  return all;
}

#ifdef EDGEPRUNE_SELF_REGISTER
bool const registered = register_creators(creators());
#endif

}  // namespace
}  // namespace edgeprune::plugins

EDGEPRUNE_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) noexcept {
  using edgeprune::plugins::creators;
  count = 0;
  return edgeprune::plugins::guarded<nvinfer1::IPluginCreator* const*>(nullptr, [&] {
    count = static_cast<int32_t>(creators().size());
    return creators().data();
  });
}

#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_MINOR >= 6
EDGEPRUNE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  edgeprune::plugins::set_logger_finder(finder);
}
#endif

EDGEPRUNE_EXPORT int edgeprune_plugin_abi() noexcept { return 8; }
EDGEPRUNE_EXPORT char const* edgeprune_plugin_version() noexcept { return EDGEPRUNE_PLUGIN_VERSION; }
