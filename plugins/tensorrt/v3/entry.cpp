// What TensorRT 10 and later and a loader find in the library.
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

using nvinfer1::IPluginCreatorInterface;

std::vector<IPluginCreatorInterface*> const& creators() {
  static std::list<Creator> held(ops().begin(), ops().end());
  static std::vector<IPluginCreatorInterface*> const all = [] {
    std::vector<IPluginCreatorInterface*> made;
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

EDGEPRUNE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
  using edgeprune::plugins::creators;
  count = 0;
  return edgeprune::plugins::guarded<nvinfer1::IPluginCreatorInterface* const*>(nullptr, [&] {
    count = static_cast<int32_t>(creators().size());
    return creators().data();
  });
}

EDGEPRUNE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  edgeprune::plugins::set_logger_finder(finder);
}

EDGEPRUNE_EXPORT int edgeprune_plugin_abi() noexcept { return 10; }
EDGEPRUNE_EXPORT char const* edgeprune_plugin_version() noexcept { return EDGEPRUNE_PLUGIN_VERSION; }
