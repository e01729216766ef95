// The three ops as data, without TensorRT: what both generations of plugins share.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace edgeprune::plugins {

constexpr char const* kNamespace = "edgeprune";
constexpr char const* kOpVersion = "1";

enum class Type { kF32, kF16, kBF16, kI8, kFP8, kI32, kOther };

// What a tensor is to an op; decides its rank and the types it may have.
enum class Role { kScores, kTokens, kIndices, kCount };

struct Port {
  char const* name;
  Role role;
};

struct Attributes {
  int32_t k = 0;
  int32_t num_prefix_tokens = 0;
  int32_t order = 0;
  int32_t mode = 0;
  float threshold = 0;
};

// Every field must be given. Exactly one of the two members is set.
struct Field {
  char const* name;
  int32_t Attributes::*integer;
  float Attributes::*real;
};

constexpr int kMaxRank = 3;
constexpr int64_t kUnknown = -1;

struct Shape {
  int rank = 0;
  std::array<int64_t, kMaxRank> size{};
};

// One size of an output: a size of an input (none where `input` is -1) plus a constant.
struct Extent {
  int input;
  int axis;
  int64_t add;
};

struct Tensor {
  Shape shape;
  Type type = Type::kOther;
  void* data = nullptr;  // never written through where the tensor is an input
};

constexpr int kMaxPorts = 3;
using Tensors = std::array<Tensor, kMaxPorts>;
using Shapes = std::array<Shape, kMaxPorts>;

// A reason why something is refused; empty where it is not.
using Reason = std::string;

struct Op {
  char const* name;
  std::vector<Field> fields;
  std::vector<Port> inputs;
  std::vector<Port> outputs;
  Reason (*refuse_attributes)(Attributes const&);
  Reason (*refuse_sizes)(Attributes const&, Shapes const& inputs);
  std::vector<std::vector<Extent>> (*output_extents)(Attributes const&);
  int (*launch)(Attributes const&, Tensors const& inputs, Tensors const& outputs, void* stream);
};

std::vector<Op> const& ops();

int rank_of(Role role);
int64_t bytes_of(Type type);

// Whether the type at `position` (inputs, then outputs) fits the op and the types before it.
bool accepts_type(Op const& op, int position, Type const* types);

// Ranks and sizes; sizes of kUnknown are not judged.
Reason refuse_shapes(Op const& op, Attributes const& attributes, Shapes const& inputs);

// What tells two plugins of an op apart, as text.
std::string fingerprint(Op const& op, Attributes const& attributes);

}  // namespace edgeprune::plugins
