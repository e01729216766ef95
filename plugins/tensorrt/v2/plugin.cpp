#include "plugin.h"

#include <cstring>

#include "adapter.h"
#include "log.h"

namespace edgeprune::plugins {
namespace {

// What a plan holds of a plugin. It is read years later, so it only changes together with the number in front.
constexpr int32_t kLayout = 1;
struct Stored {
  int32_t layout;
  int32_t k, num_prefix_tokens, order, mode;
  float threshold;
};
static_assert(sizeof(Stored) == 24, "no padding");

}  // namespace

size_t Plugin::getSerializationSize() const noexcept { return sizeof(Stored); }

void Plugin::serialize(void* buffer) const noexcept {
  Attributes const& a = attributes_;
  Stored const stored{kLayout, a.k, a.num_prefix_tokens, a.order, a.mode, a.threshold};
  std::memcpy(buffer, &stored, sizeof stored);
}

void Plugin::setPluginNamespace(nvinfer1::AsciiChar const* space) noexcept {
  guarded(false, [&] { return space_ = space != nullptr ? space : "", true; });
}

nvinfer1::DataType Plugin::getOutputDataType(int32_t index, nvinfer1::DataType const* types, int32_t) const noexcept {
  return output_data_type(op_, index, types);
}

nvinfer1::IPluginV2DynamicExt* Plugin::clone() const noexcept {
  return guarded<Plugin*>(nullptr, [&] { return new Plugin(*this); });
}

nvinfer1::DimsExprs Plugin::getOutputDimensions(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t count,
                                                nvinfer1::IExprBuilder& builder) noexcept {
  nvinfer1::DimsExprs refused{};
  refused.nbDims = -1;
  return guarded(refused, [&] {
    bool const fits = check_inputs(op_, count) && check_shapes(op_, attributes_, inputs);
    return fits ? output_dims(op_, attributes_, output, inputs, builder) : refused;
  });
}

bool Plugin::supportsFormatCombination(int32_t position, nvinfer1::PluginTensorDesc const* descs, int32_t,
                                       int32_t) noexcept {
  return accepts_format(op_, position, descs);
}

void Plugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                             nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
  // Cannot refuse; logs what enqueue will refuse.
  guarded(false, [&] { return check_inputs(op_, inputs) && check_shapes(op_, attributes_, in); });
}

int32_t Plugin::enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                        void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept {
  return guarded(-1, [&] {
    return plugins::enqueue(op_, attributes_, input_desc, output_desc, inputs, outputs, stream);
  });
}

Creator::Creator(Op const& op)
    : op_(op), fields_(describe_fields(op)), collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV2DynamicExt* Creator::make(Attributes const& attributes) const {
  auto* plugin = new Plugin(op_, attributes);
  plugin->setPluginNamespace(space_.c_str());
  return plugin;
}

nvinfer1::IPluginV2DynamicExt* Creator::createPlugin(nvinfer1::AsciiChar const*,
                                                     nvinfer1::PluginFieldCollection const* fields) noexcept {
  return guarded<nvinfer1::IPluginV2DynamicExt*>(nullptr, [&]() -> nvinfer1::IPluginV2DynamicExt* {
    auto const attributes = read_fields(op_, fields);
    return attributes ? make(*attributes) : nullptr;
  });
}

nvinfer1::IPluginV2DynamicExt* Creator::deserializePlugin(nvinfer1::AsciiChar const*, void const* data,
                                                          size_t length) noexcept {
  return guarded<nvinfer1::IPluginV2DynamicExt*>(nullptr, [&]() -> nvinfer1::IPluginV2DynamicExt* {
    Stored stored{};
    if (data == nullptr || length != sizeof stored) {
      log_refusal(op_, "the plan holds " + std::to_string(length) + " bytes, needed are 24");
      return nullptr;
    }
    std::memcpy(&stored, data, sizeof stored);
    if (stored.layout != kLayout) {
      log_refusal(op_, "the plan was written with layout " + std::to_string(stored.layout) + ", this library reads 1");
      return nullptr;
    }
    Attributes const attributes{stored.k, stored.num_prefix_tokens, stored.order, stored.mode, stored.threshold};
    return log_refusal(op_, op_.refuse_attributes(attributes)) ? nullptr : make(attributes);
  });
}

void Creator::setPluginNamespace(nvinfer1::AsciiChar const* space) noexcept {
  guarded(false, [&] { return space_ = space != nullptr ? space : "", true; });
}

}  // namespace edgeprune::plugins
