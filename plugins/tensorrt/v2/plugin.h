// The ops as IPluginV2DynamicExt, for TensorRT 8.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <string>
#include <vector>

#include "op.h"

namespace edgeprune::plugins {

class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  Plugin(Op const& op, Attributes const& attributes) : op_(op), attributes_(attributes) {}

  nvinfer1::AsciiChar const* getPluginType() const noexcept override { return op_.name; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kOpVersion; }
  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(op_.outputs.size()); }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  size_t getSerializationSize() const noexcept override;
  void serialize(void* buffer) const noexcept override;
  void destroy() noexcept override { delete this; }
  void setPluginNamespace(nvinfer1::AsciiChar const* space) noexcept override;
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return space_.c_str(); }

  nvinfer1::DataType getOutputDataType(int32_t index, nvinfer1::DataType const* types,
                                       int32_t count) const noexcept override;

  IPluginV2DynamicExt* clone() const noexcept override;
  nvinfer1::DimsExprs getOutputDimensions(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t count,
                                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::PluginTensorDesc const* descs, int32_t inputs,
                                 int32_t outputs) noexcept override;
  void configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                       nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override;
  size_t getWorkspaceSize(nvinfer1::PluginTensorDesc const*, int32_t, nvinfer1::PluginTensorDesc const*,
                          int32_t) const noexcept override {
    return 0;
  }
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 private:
  Op const& op_;
  Attributes attributes_;
  std::string space_ = kNamespace;
};

class Creator final : public nvinfer1::IPluginCreator {
 public:
  explicit Creator(Op const& op);
  Creator(Creator const&) = delete;

  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return op_.name; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kOpVersion; }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  nvinfer1::IPluginV2DynamicExt* createPlugin(nvinfer1::AsciiChar const* name,
                                              nvinfer1::PluginFieldCollection const* fields) noexcept override;
  nvinfer1::IPluginV2DynamicExt* deserializePlugin(nvinfer1::AsciiChar const* name, void const* data,
                                                   size_t length) noexcept override;
  void setPluginNamespace(nvinfer1::AsciiChar const* space) noexcept override;
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return space_.c_str(); }

 private:
  nvinfer1::IPluginV2DynamicExt* make(Attributes const& attributes) const;

  Op const& op_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
  std::string space_ = kNamespace;
};

}  // namespace edgeprune::plugins
