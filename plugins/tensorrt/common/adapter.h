// The ops in TensorRT's types. Compiled once per generation; names that both generations share are used alone.
#pragma once

#include <NvInferRuntime.h>

#include <optional>
#include <vector>

#include "op.h"

namespace edgeprune::plugins {

// Reads the fields of a plugin; nothing and a logged reason when one is missing, wrong or out of range.
std::optional<Attributes> read_fields(Op const& op, nvinfer1::PluginFieldCollection const* fields);

// The fields of an op without values, for creators; with values, for serialization: they point into `attributes`.
std::vector<nvinfer1::PluginField> describe_fields(Op const& op);
std::vector<nvinfer1::PluginField> write_fields(Op const& op, Attributes const& attributes);

inline nvinfer1::PluginTensorDesc const& plain(nvinfer1::PluginTensorDesc const& desc) { return desc; }
inline nvinfer1::PluginTensorDesc const& plain(nvinfer1::DynamicPluginTensorDesc const& desc) { return desc.desc; }

Type type_of(nvinfer1::DataType type);
Shape shape_of(nvinfer1::Dims const& dims);
bool log_refusal(Op const& op, Reason const& reason);

bool check_inputs(Op const& op, int32_t inputs);

// Sizes of -1 are not judged; the logged reason is the only trace of a refusal.
bool check_shapes(Op const& op, Attributes const& attributes, nvinfer1::DimsExprs const* inputs);

template <class Desc>
bool check_shapes(Op const& op, Attributes const& attributes, Desc const* inputs) {
  Shapes shapes{};
  for (size_t i = 0; i < op.inputs.size(); ++i) shapes[i] = shape_of(plain(inputs[i]).dims);
  return !log_refusal(op, refuse_shapes(op, attributes, shapes));
}

// Rows lie one behind the other in the linear format alone.
template <class Desc>
bool accepts_format(Op const& op, int position, Desc const* descs) {
  std::array<Type, 2 * kMaxPorts> types{};
  for (int i = 0; i <= position; ++i) types[i] = type_of(plain(descs[i]).type);
  return plain(descs[position]).format == nvinfer1::TensorFormat::kLINEAR && accepts_type(op, position, types.data());
}

nvinfer1::DimsExprs output_dims(Op const& op, Attributes const& attributes, int output,
                                nvinfer1::DimsExprs const* inputs, nvinfer1::IExprBuilder& builder);
nvinfer1::DataType output_data_type(Op const& op, int output, nvinfer1::DataType const* inputs);

// Checks the shapes and launches; 0 on success, as TensorRT wants it.
int32_t enqueue(Op const& op, Attributes const& attributes, nvinfer1::PluginTensorDesc const* input_desc,
                nvinfer1::PluginTensorDesc const* output_desc, void const* const* inputs, void* const* outputs,
                void* stream);

}  // namespace edgeprune::plugins
