#include "op.h"

#include <cmath>
#include <cstdio>

#include "edgeprune_kernels.h"

namespace edgeprune::plugins {
namespace {

Port const& port_at(Op const& op, int position) {
  int const inputs = static_cast<int>(op.inputs.size());
  return position < inputs ? op.inputs[position] : op.outputs[position - inputs];
}

std::string text(int64_t value) { return std::to_string(value); }

// Two sizes that must agree, where both are known.
bool differ(int64_t a, int64_t b) { return a != kUnknown && b != kUnknown && a != b; }

Reason refuse_batch(int64_t batch) {
  if (batch > EDGEPRUNE_MAX_BATCH) {
    return "the batch is " + text(batch) + ", at most " + text(EDGEPRUNE_MAX_BATCH) + " is possible";
  }
  return {};
}

// How many tokens an image has besides the prefix.
Reason refuse_tokens(int64_t tokens) {
  if (tokens > EDGEPRUNE_MAX_TOKENS) {
    return "an image has " + text(tokens) + " tokens, at most " + text(EDGEPRUNE_MAX_TOKENS) + " are possible";
  }
  return {};
}

Reason first_of(Reason a, Reason b) { return a.empty() ? b : a; }

Reason refuse_prefix(Attributes const& a) {
  if (a.num_prefix_tokens >= 0 && a.num_prefix_tokens <= EDGEPRUNE_MAX_PREFIX) return {};
  return "num_prefix_tokens is " + text(a.num_prefix_tokens) + ", possible are 0 to " + text(EDGEPRUNE_MAX_PREFIX);
}

Reason refuse_topk_attributes(Attributes const& a) {
  if (a.k < 1 || a.k > EDGEPRUNE_MAX_TOKENS) {
    return "k is " + text(a.k) + ", possible are 1 to " + text(EDGEPRUNE_MAX_TOKENS);
  }
  if (a.order != EDGEPRUNE_RANK && a.order != EDGEPRUNE_POSITION) {
    return "order is " + text(a.order) + ", known are 0 (by rank) and 1 (by position)";
  }
  if (a.mode < EDGEPRUNE_TOP_K || a.mode > EDGEPRUNE_MASS) {
    return "mode is " + text(a.mode) + ", known are 0 (top-k), 1 (threshold) and 2 (mass)";
  }
  if (std::isnan(a.threshold)) return "threshold is not a number";
  return refuse_prefix(a);
}

Reason refuse_topk_sizes(Attributes const& a, Shapes const& inputs) {
  auto const [B, N, unused] = inputs[0].size;
  auto const [tokens_B, rows, D] = inputs[1].size;
  if (differ(B, tokens_B)) return "scores are of " + text(B) + " images and tokens of " + text(tokens_B);
  if (N != kUnknown && differ(rows, a.num_prefix_tokens + N)) {
    return "tokens have " + text(rows) + " rows, needed are num_prefix_tokens + scores of an image = " +
           text(a.num_prefix_tokens + N);
  }
  if (N != kUnknown && a.k > N) return "k is " + text(a.k) + ", but an image has " + text(N) + " scores";
  return first_of(refuse_tokens(N), refuse_batch(B));
}

std::vector<std::vector<Extent>> topk_extents(Attributes const& a) {
  int64_t const rows = int64_t{a.num_prefix_tokens} + a.k;
  return {{{1, 0, 0}, {-1, 0, rows}, {1, 2, 0}}, {{0, 0, 0}, {-1, 0, a.k}}, {{0, 0, 0}}};
}

int score_type(Type type) {
  if (type == Type::kF32) return EDGEPRUNE_F32;
  return type == Type::kF16 ? EDGEPRUNE_F16 : EDGEPRUNE_BF16;
}

int launch_topk(Attributes const& a, Tensors const& in, Tensors const& out, void* stream) {
  edgeprune_topk_gather_params params{};
  params.batch = in[0].shape.size[0];
  params.tokens = in[0].shape.size[1];
  params.kept = a.k;
  params.prefix = a.num_prefix_tokens;
  params.row_bytes = in[1].shape.size[2] * bytes_of(in[1].type);
  params.score_type = score_type(in[0].type);
  params.order = a.order;
  params.mode = a.mode;
  params.threshold = a.threshold;
  return edgeprune_topk_gather(&params, in[0].data, in[1].data, out[0].data, static_cast<int32_t*>(out[1].data),
                               static_cast<int32_t*>(out[2].data), stream);
}

Reason refuse_gather_sizes(Attributes const& a, Shapes const& inputs) {
  auto const [B, rows, D] = inputs[0].size;
  auto const [indices_B, K, unused] = inputs[1].size;
  if (differ(B, indices_B)) return "tokens are of " + text(B) + " images and indices of " + text(indices_B);
  if (rows != kUnknown && rows <= a.num_prefix_tokens) {
    return "tokens have " + text(rows) + " rows, needed are more than num_prefix_tokens = " + text(a.num_prefix_tokens);
  }
  return first_of(refuse_tokens(rows - a.num_prefix_tokens), refuse_batch(B));
}

std::vector<std::vector<Extent>> gather_extents(Attributes const& a) {
  return {{{0, 0, 0}, {1, 1, a.num_prefix_tokens}, {0, 2, 0}}};
}

int launch_gather(Attributes const& a, Tensors const& in, Tensors const& out, void* stream) {
  edgeprune_gather_tokens_params params{};
  params.batch = in[0].shape.size[0];
  params.tokens = in[0].shape.size[1] - a.num_prefix_tokens;
  params.kept = in[1].shape.size[1];
  params.prefix = a.num_prefix_tokens;
  params.row_bytes = in[0].shape.size[2] * bytes_of(in[0].type);
  return edgeprune_gather_tokens(&params, in[0].data, static_cast<int32_t const*>(in[1].data), out[0].data, stream);
}

Reason refuse_nothing(Attributes const&) { return {}; }

Reason refuse_scatter_sizes(Attributes const&, Shapes const& inputs) {
  auto const [B, N, D] = inputs[0].size;
  auto const [tokens_B, K, tokens_D] = inputs[1].size;
  auto const [indices_B, indices_K, unused] = inputs[2].size;
  if (differ(B, tokens_B) || differ(B, indices_B)) {
    return "base is of " + text(B) + " images, tokens of " + text(tokens_B) + " and indices of " + text(indices_B);
  }
  if (differ(K, indices_K)) return text(K) + " tokens of an image have " + text(indices_K) + " indices";
  if (differ(D, tokens_D)) return "rows of base have " + text(D) + " values and rows of tokens " + text(tokens_D);
  return first_of(refuse_tokens(N), refuse_batch(B));
}

std::vector<std::vector<Extent>> scatter_extents(Attributes const&) { return {{{0, 0, 0}, {0, 1, 0}, {0, 2, 0}}}; }

int launch_scatter(Attributes const&, Tensors const& in, Tensors const& out, void* stream) {
  edgeprune_scatter_tokens_params params{};
  params.batch = in[0].shape.size[0];
  params.tokens = in[0].shape.size[1];
  params.kept = in[1].shape.size[1];
  params.row_bytes = in[0].shape.size[2] * bytes_of(in[0].type);
  return edgeprune_scatter_tokens(&params, in[0].data, in[1].data, static_cast<int32_t const*>(in[2].data), out[0].data,
                                  stream);
}

}  // namespace

std::vector<Op> const& ops() {
  using A = Attributes;
  static std::vector<Op> const all{
      {"TopKGather",
       {{"k", &A::k, nullptr},
        {"num_prefix_tokens", &A::num_prefix_tokens, nullptr},
        {"order", &A::order, nullptr},
        {"mode", &A::mode, nullptr},
        {"threshold", nullptr, &A::threshold}},
       {{"scores", Role::kScores}, {"tokens", Role::kTokens}},
       {{"kept", Role::kTokens}, {"indices", Role::kIndices}, {"count", Role::kCount}},
       refuse_topk_attributes,
       refuse_topk_sizes,
       topk_extents,
       launch_topk},
      {"GatherTokens",
       {{"num_prefix_tokens", &A::num_prefix_tokens, nullptr}},
       {{"tokens", Role::kTokens}, {"indices", Role::kIndices}},
       {{"kept", Role::kTokens}},
       refuse_prefix,
       refuse_gather_sizes,
       gather_extents,
       launch_gather},
      {"ScatterTokens",
       {},
       {{"base", Role::kTokens}, {"tokens", Role::kTokens}, {"indices", Role::kIndices}},
       {{"out", Role::kTokens}},
       refuse_nothing,
       refuse_scatter_sizes,
       scatter_extents,
       launch_scatter},
  };
  return all;
}

int rank_of(Role role) {
  switch (role) {
    case Role::kTokens: return 3;
    case Role::kScores:
    case Role::kIndices: return 2;
    case Role::kCount: return 1;
  }
  return 0;
}

int64_t bytes_of(Type type) {
  switch (type) {
    case Type::kF32:
    case Type::kI32: return 4;
    case Type::kF16:
    case Type::kBF16: return 2;
    case Type::kI8:
    case Type::kFP8: return 1;
    case Type::kOther: return 0;
  }
  return 0;
}

bool accepts_type(Op const& op, int position, Type const* types) {
  Type const type = types[position];
  switch (port_at(op, position).role) {
    case Role::kScores: return type == Type::kF32 || type == Type::kF16 || type == Type::kBF16;
    case Role::kIndices:
    case Role::kCount: return type == Type::kI32;
    case Role::kTokens: break;
  }
  // Tokens are copied as bytes, so the scale of 8-bit ones stays that of the input, and no type is turned into another.
  for (int before = 0; before < position; ++before) {
    if (port_at(op, before).role == Role::kTokens && types[before] != type) return false;
  }
  return type != Type::kI32 && type != Type::kOther;
}

Reason refuse_shapes(Op const& op, Attributes const& attributes, Shapes const& inputs) {
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    Port const& port = op.inputs[i];
    if (inputs[i].rank != rank_of(port.role)) {
      return std::string(port.name) + " has " + text(inputs[i].rank) + " axes, needed are " + text(rank_of(port.role));
    }
    for (int axis = 0; axis < inputs[i].rank; ++axis) {
      if (inputs[i].size[axis] == 0) return std::string(port.name) + " is empty";
    }
  }
  return op.refuse_sizes(attributes, inputs);
}

std::string fingerprint(Op const& op, Attributes const& attributes) {
  std::string made = std::string(op.name) + " " EDGEPRUNE_PLUGIN_VERSION;
  for (Field const& field : op.fields) {
    char real[32];
    if (field.real != nullptr) std::snprintf(real, sizeof real, "%.9g", static_cast<double>(attributes.*field.real));
    made += std::string(" ") + field.name + "=" + (field.real != nullptr ? real : text(attributes.*field.integer));
  }
  return made;
}

}  // namespace edgeprune::plugins
