// The ops as IPluginV3, for TensorRT 10 and later.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "op.h"

namespace edgeprune::plugins {

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(Op const& op, Attributes const& attributes);
  Plugin(Plugin const& other) : Plugin(other.op_, other.attributes_) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return op_.name; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kOpVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(op_.outputs.size()); }
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* made, int32_t outputs, nvinfer1::DataType const* types,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const* shape_in,
                          int32_t shape_inputs, nvinfer1::DimsExprs* made, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* descs, int32_t inputs,
                                 int32_t outputs) noexcept override;
  // The attributes and our version: TensorRT adds shapes and formats, and times equal layers once.
  char const* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  Op const& op_;
  Attributes const attributes_;
  std::vector<nvinfer1::PluginField> const fields_;
  nvinfer1::PluginFieldCollection const collection_;
  std::string const timing_id_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(Op const& op);
  Creator(Creator const&) = delete;

  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return op_.name; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kOpVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;

 private:
  Op const& op_;
  std::vector<nvinfer1::PluginField> const fields_;
  nvinfer1::PluginFieldCollection const collection_;
};

}  // namespace edgeprune::plugins
