#include "adapter.h"

#include <cstring>
#include <string>

#include "edgeprune_kernels.h"
#include "log.h"

namespace edgeprune::plugins {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

PluginFieldType field_type(Field const& field) {
  return field.real != nullptr ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
}

PluginField const* find(PluginFieldCollection const& given, char const* name) {
  for (int32_t i = 0; i < given.nbFields; ++i) {
    if (given.fields[i].name != nullptr && std::strcmp(given.fields[i].name, name) == 0) return &given.fields[i];
  }
  return nullptr;
}

bool has_field(Op const& op, char const* name) {
  for (Field const& field : op.fields) {
    if (name != nullptr && std::strcmp(field.name, name) == 0) return true;
  }
  return false;
}

Reason read_field(Field const& field, PluginFieldCollection const& given, Attributes& attributes) {
  std::string const name = field.name;
  PluginField const* found = find(given, field.name);
  if (found == nullptr) return "field " + name + " is missing";
  if (found->type != field_type(field)) {
    return "field " + name + " must be " + (field.real != nullptr ? "float32" : "int32");
  }
  if (found->length != 1 || found->data == nullptr) return "field " + name + " must hold one value";
  if (field.real != nullptr) {
    std::memcpy(&(attributes.*field.real), found->data, sizeof(float));
  } else {
    std::memcpy(&(attributes.*field.integer), found->data, sizeof(int32_t));
  }
  return {};
}

Shape known_shape_of(DimsExprs const& dims) {
  Shape shape{dims.nbDims, {}};
  for (int axis = 0; axis < dims.nbDims && axis < kMaxRank; ++axis) {
    shape.size[axis] = dims.d[axis]->isConstant() ? int64_t{dims.d[axis]->getConstantValue()} : kUnknown;
  }
  return shape;
}

Tensor tensor_of(PluginTensorDesc const& desc, void* data) { return {shape_of(desc.dims), type_of(desc.type), data}; }

}  // namespace

bool log_refusal(Op const& op, Reason const& reason) {
  if (reason.empty()) return false;
  log_error((std::string(op.name) + ": " + reason).c_str());
  return true;
}

std::optional<Attributes> read_fields(Op const& op, PluginFieldCollection const* fields) {
  PluginFieldCollection const given = fields != nullptr ? *fields : PluginFieldCollection{0, nullptr};
  Attributes attributes;
  for (Field const& field : op.fields) {
    if (log_refusal(op, read_field(field, given, attributes))) return std::nullopt;
  }
  for (int32_t i = 0; i < given.nbFields; ++i) {
    char const* name = given.fields[i].name;
    if (name != nullptr && !has_field(op, name)) {
      log_warning((std::string(op.name) + ": field " + name + " is unknown and without effect").c_str());
    }
  }
  if (log_refusal(op, op.refuse_attributes(attributes))) return std::nullopt;
  return attributes;
}

bool check_inputs(Op const& op, int32_t inputs) {
  if (inputs == static_cast<int32_t>(op.inputs.size())) return true;
  return !log_refusal(op, std::to_string(inputs) + " inputs, needed are " + std::to_string(op.inputs.size()));
}

std::vector<PluginField> describe_fields(Op const& op) {
  std::vector<PluginField> made;
  for (Field const& field : op.fields) made.emplace_back(field.name, nullptr, field_type(field), 1);
  return made;
}

std::vector<PluginField> write_fields(Op const& op, Attributes const& attributes) {
  std::vector<PluginField> made = describe_fields(op);
  for (size_t i = 0; i < made.size(); ++i) {
    Field const& field = op.fields[i];
    made[i].data = field.real != nullptr ? static_cast<void const*>(&(attributes.*field.real))
                                         : static_cast<void const*>(&(attributes.*field.integer));
  }
  return made;
}

Type type_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return Type::kF32;
    case DataType::kHALF: return Type::kF16;
    case DataType::kINT8: return Type::kI8;
    case DataType::kINT32: return Type::kI32;
#if NV_TENSORRT_MAJOR >= 10
    case DataType::kBF16: return Type::kBF16;
    case DataType::kFP8: return Type::kFP8;
#endif
    default: return Type::kOther;
  }
}

Shape shape_of(nvinfer1::Dims const& dims) {
  Shape shape{dims.nbDims, {}};
  for (int axis = 0; axis < dims.nbDims && axis < kMaxRank; ++axis) shape.size[axis] = dims.d[axis];
  return shape;
}

bool check_shapes(Op const& op, Attributes const& attributes, DimsExprs const* inputs) {
  Shapes shapes{};
  for (size_t i = 0; i < op.inputs.size(); ++i) shapes[i] = known_shape_of(inputs[i]);
  return !log_refusal(op, refuse_shapes(op, attributes, shapes));
}

DimsExprs output_dims(Op const& op, Attributes const& attributes, int output, DimsExprs const* inputs,
                      nvinfer1::IExprBuilder& builder) {
  auto const extents = op.output_extents(attributes)[output];
  DimsExprs dims{};
  dims.nbDims = static_cast<int32_t>(extents.size());
  for (size_t axis = 0; axis < extents.size(); ++axis) {
    Extent const& extent = extents[axis];
    if (extent.input < 0) {
      dims.d[axis] = builder.constant(extent.add);
    } else if (extent.add == 0) {
      dims.d[axis] = inputs[extent.input].d[extent.axis];
    } else {
      dims.d[axis] = builder.operation(nvinfer1::DimensionOperation::kSUM, *inputs[extent.input].d[extent.axis],
                                       *builder.constant(extent.add));
    }
  }
  return dims;
}

DataType output_data_type(Op const& op, int output, DataType const* inputs) {
  if (op.outputs[output].role != Role::kTokens) return DataType::kINT32;
  size_t input = 0;
  while (op.inputs[input].role != Role::kTokens) ++input;
  return inputs[input];
}

int32_t enqueue(Op const& op, Attributes const& attributes, PluginTensorDesc const* input_desc,
                PluginTensorDesc const* output_desc, void const* const* inputs, void* const* outputs, void* stream) {
  if (!check_shapes(op, attributes, input_desc)) return -1;
  Tensors in{}, out{};
  for (size_t i = 0; i < op.inputs.size(); ++i) in[i] = tensor_of(input_desc[i], const_cast<void*>(inputs[i]));
  for (size_t i = 0; i < op.outputs.size(); ++i) out[i] = tensor_of(output_desc[i], outputs[i]);
  if (op.launch(attributes, in, out, stream) == EDGEPRUNE_OK) return 0;
  log_refusal(op, edgeprune_kernels_error());
  return -1;
}

}  // namespace edgeprune::plugins
