// Registration when the library is opened, in builds that are linked against libnvinfer.
#pragma once

#include <NvInferRuntime.h>

#include "log.h"
#include "op.h"

namespace edgeprune::plugins {

// The methods of the registry moved between majors, so only the one that the headers are of is spoken to.
template <class Creators>
bool register_creators(Creators const& creators) {
  int32_t const version = getInferLibVersion();
  int32_t const major = version >= 100000 ? version / 10000 : version / 1000;
  if (major != NV_TENSORRT_MAJOR) {
    log_error("not registered: the library was built with headers of another major version of TensorRT");
    return false;
  }
  bool every = true;
  for (auto* creator : creators) every &= getPluginRegistry()->registerCreator(*creator, kNamespace);
  return every;
}

}  // namespace edgeprune::plugins
