#include "plugin.h"

#include "adapter.h"
#include "log.h"

namespace edgeprune::plugins {
namespace {

constexpr int32_t kFailure = -1;

int32_t size_of(std::vector<nvinfer1::PluginField> const& fields) { return static_cast<int32_t>(fields.size()); }

}  // namespace

Plugin::Plugin(Op const& op, Attributes const& attributes)
    : op_(op),
      attributes_(attributes),
      fields_(write_fields(op, attributes_)),
      collection_{size_of(fields_), fields_.data()},
      timing_id_(fingerprint(op, attributes)) {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&] { return new Plugin(*this); });
}

int32_t Plugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                                nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
  return guarded(kFailure,
                 [&] { return check_inputs(op_, inputs) && check_shapes(op_, attributes_, in) ? 0 : kFailure; });
}

int32_t Plugin::getOutputDataTypes(nvinfer1::DataType* made, int32_t outputs, nvinfer1::DataType const* types,
                                   int32_t inputs) const noexcept {
  return guarded(kFailure, [&] {
    if (!check_inputs(op_, inputs)) return kFailure;
    for (int32_t output = 0; output < outputs; ++output) made[output] = output_data_type(op_, output, types);
    return 0;
  });
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*, int32_t,
                                nvinfer1::DimsExprs* made, int32_t outputs, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(kFailure, [&] {
    if (!check_inputs(op_, inputs) || !check_shapes(op_, attributes_, in)) return kFailure;
    for (int32_t output = 0; output < outputs; ++output) {
      made[output] = output_dims(op_, attributes_, output, in, builder);
    }
    return 0;
  });
}

bool Plugin::supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* descs,
                                       int32_t, int32_t) noexcept {
  return accepts_format(op_, position, descs);
}

int32_t Plugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const*,
                              int32_t) noexcept {
  return guarded(kFailure,
                 [&] { return check_inputs(op_, inputs) && check_shapes(op_, attributes_, in) ? 0 : kFailure; });
}

int32_t Plugin::enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                        void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept {
  return guarded(kFailure, [&] {
    return plugins::enqueue(op_, attributes_, input_desc, output_desc, inputs, outputs, stream);
  });
}

Creator::Creator(Op const& op) : op_(op), fields_(describe_fields(op)), collection_{size_of(fields_), fields_.data()} {}

nvinfer1::IPluginV3* Creator::createPlugin(nvinfer1::AsciiChar const*, nvinfer1::PluginFieldCollection const* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&]() -> nvinfer1::IPluginV3* {
    auto const attributes = read_fields(op_, fields);
    return attributes ? new Plugin(op_, *attributes) : nullptr;
  });
}

}  // namespace edgeprune::plugins
