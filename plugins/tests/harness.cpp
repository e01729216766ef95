// Asks a plugin library what TensorRT asks while it builds, with the headers alone: no TensorRT library, no GPU.
//   harness LIBRARY OP FIELDS SHAPES [WRONG_SHAPES | run=TYPES]
// FIELDS: name:type=value separated by commas, type i (int32), f (float32) or l (int32 of length 2).
// SHAPES: one per input, sizes separated by commas, shapes by semicolons; -1 is not known while building.
// WRONG_SHAPES: what the plugin must refuse at run time, before it launches anything.
// TYPES: of the inputs, as numbers of DataType; runs the plugin on addresses 1, 2, ... for inputs and 11, 12, ... for
// outputs and stream 99, for a library whose kernels only tell how they were called. Prints one JSON object.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;
using Strings = std::vector<std::string>;

#if NV_TENSORRT_MAJOR >= 10
using Size = int64_t;
using Desc = DynamicPluginTensorDesc;
constexpr int kVersion = NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100;
PluginTensorDesc& plain(Desc& desc) { return desc.desc; }
#else
using Size = int32_t;
using Desc = PluginTensorDesc;
constexpr int kVersion = NV_TENSORRT_MAJOR * 1000 + NV_TENSORRT_MINOR * 100;
PluginTensorDesc& plain(Desc& desc) { return desc; }
#endif

// The library asks whoever owns the logger finder for the version, as it asks libnvinfer.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() noexcept { return kVersion; }

namespace {

struct Log final : ILogger {
  Strings lines;
  void log(Severity, AsciiChar const* line) noexcept override { lines.emplace_back(line); }
};

struct Finder final : ILoggerFinder {
  Log log;
  ILogger* findLogger() override { return &log; }
};

struct Expression final : IDimensionExpr, apiv::VDimensionExpr {
  Size value;
  explicit Expression(Size v) : value(v) { mImpl = this; }
  bool isConstant() const override { return value >= 0; }
  Size getConstantValue() const override { return value; }
#if NV_TENSORRT_MAJOR >= 10
  bool isSizeTensor() const override { return false; }
#endif
};

struct Builder final : IExprBuilder, apiv::VExprBuilder {
  std::list<Expression> made;
  Builder() { mImpl = this; }
  IDimensionExpr const* constant(Size value) override { return &made.emplace_back(value); }
  IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& a, IDimensionExpr const& b) override {
    if (op != DimensionOperation::kSUM) std::abort();
    return constant(a.isConstant() && b.isConstant() ? a.getConstantValue() + b.getConstantValue() : -1);
  }
#if NV_TENSORRT_MAJOR >= 10
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    std::abort();
  }
#endif
};

Strings split(std::string const& text, char at) {
  Strings parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}

std::string quoted(std::string const& text) { return '"' + text + '"'; }

std::string list(Strings const& items) {
  std::string made;
  for (auto const& item : items) made += (made.empty() ? "" : ", ") + item;
  return "[" + made + "]";
}

std::string described_name(std::string const& space, std::string const& name, std::string const& version) {
  return space + "::" + name + " " + version;
}

struct Fields {
  std::list<std::string> names;
  std::list<std::array<int32_t, 2>> integers;
  std::list<float> reals;
  std::vector<PluginField> fields;
  PluginFieldCollection collection{};

  explicit Fields(std::string const& text) {
    for (auto const& part : split(text, ',')) {
      size_t const colon = part.find(':'), equal = part.find('=');
      char const* name = names.emplace_back(part.substr(0, colon)).c_str();
      char const type = part[colon + 1];
      double const value = std::atof(part.c_str() + equal + 1);
      if (type == 'f') {
        fields.emplace_back(name, &reals.emplace_back(static_cast<float>(value)), PluginFieldType::kFLOAT32, 1);
      } else {
        auto& held = integers.emplace_back();
        held[0] = static_cast<int32_t>(value);
        fields.emplace_back(name, held.data(), PluginFieldType::kINT32, type == 'l' ? 2 : 1);
      }
    }
    collection = {static_cast<int32_t>(fields.size()), fields.data()};
  }
};

std::string described(PluginFieldCollection const& collection) {
  Strings made;
  for (int i = 0; i < collection.nbFields; ++i) {
    PluginField const& field = collection.fields[i];
    bool const real = field.type == PluginFieldType::kFLOAT32;
    std::string line = std::string(field.name) + ":" + (real ? "f" : field.type == PluginFieldType::kINT32 ? "i" : "?");
    char value[32] = "";
    if (field.data && real) std::snprintf(value, sizeof value, "=%g", *static_cast<float const*>(field.data));
    if (field.data && !real) std::snprintf(value, sizeof value, "=%d", *static_cast<int32_t const*>(field.data));
    made.push_back(quoted(line + value));
  }
  return list(made);
}

#if NV_TENSORRT_MAJOR >= 10
#include "harness_v3.h"
#else
#include "harness_v2.h"
#endif

using Sizes = std::vector<std::vector<Size>>;

Sizes sizes_of(std::string const& text) {
  Sizes made;
  for (auto const& shape : split(text, ';')) {
    made.emplace_back();
    for (auto const& size : split(shape, ',')) made.back().push_back(std::atoi(size.c_str()));
  }
  return made;
}

// All type combinations the plugin takes, position by position as TensorRT asks; counts what contradicts itself.
struct Formats {
  Plugin const& plugin;
  int inputs;
  Strings accepted;
  int wrong_types = 0, other_layouts = 0;
  std::vector<Desc> descs;

  Formats(Plugin const& p, int in) : plugin(p), inputs(in), descs(in + p.outputs()) { visit(0); }

  void visit(size_t position) {
    if (position == descs.size()) return take();
    for (int type = 0; type < EnumMax<DataType>(); ++type) {
      plain(descs[position]).type = static_cast<DataType>(type);
      for (int format = EnumMax<TensorFormat>() - 1; format >= 0; --format) {
        plain(descs[position]).format = static_cast<TensorFormat>(format);
        bool const fits = plugin.accepts(position, descs.data(), inputs);
        if (format != 0) other_layouts += fits;
        if (format == 0 && fits) visit(position + 1);
      }
    }
  }

  void take() {
    std::vector<DataType> in, out;
    std::string names;
    for (size_t i = 0; i < descs.size(); ++i) {
      (i < static_cast<size_t>(inputs) ? in : out).push_back(plain(descs[i]).type);
      names += (i ? " " : "") + std::to_string(static_cast<int>(plain(descs[i]).type));
    }
    wrong_types += plugin.types(in) != out;
    accepted.push_back(quoted(names));
  }
};

std::string output_shapes(Plugin const& plugin, Sizes const& inputs) {
  Builder builder;
  std::vector<DimsExprs> in, out(plugin.outputs());
  for (auto const& sizes : inputs) {
    in.emplace_back().nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) in.back().d[i] = builder.constant(sizes[i]);
  }
  if (!plugin.shapes(in, out, builder)) return "null";
  Strings shapes;
  for (auto const& dims : out) {
    Strings sizes;
    for (int i = 0; i < dims.nbDims; ++i) {
      sizes.push_back(std::to_string(dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : -1));
    }
    shapes.push_back(list(sizes));
  }
  return list(shapes);
}

std::vector<PluginTensorDesc> descs_of(Sizes const& inputs) {
  std::vector<PluginTensorDesc> made;
  for (auto const& sizes : inputs) {
    made.emplace_back().dims.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) made.back().dims.d[i] = sizes[i];
  }
  return made;
}

std::string extra(Plugin const& plugin, Sizes const& inputs, std::string const& request) {
  std::vector<PluginTensorDesc> out(plugin.outputs());
  if (request.rfind("run=", 0) != 0) {
    return std::string("\"refuses\": ") + (plugin.refuses(descs_of(sizes_of(request)), out) ? "true" : "false");
  }
  auto in = descs_of(inputs);
  auto const types = split(request.substr(4), ',');
  for (size_t i = 0; i < in.size(); ++i) in[i].type = static_cast<DataType>(std::atoi(types[i].c_str()));
  std::array<void*, 3> from{}, to{};
  for (intptr_t i = 0; i < 3; ++i) {
    from[i] = reinterpret_cast<void*>(1 + i);
    to[i] = reinterpret_cast<void*>(11 + i);
  }
  return "\"code\": " + std::to_string(plugin.run(in, out, from.data(), to.data(), reinterpret_cast<cudaStream_t>(99)));
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) return std::puts("usage: harness LIBRARY OP FIELDS SHAPES [WRONG_SHAPES | run=TYPES]"), 2;
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::puts(dlerror()), 1;
  Finder finder;
  using SetFinder = void (*)(ILoggerFinder*);
  using Entry = AnyCreator* const* (*)(int32_t&);
  reinterpret_cast<SetFinder>(dlsym(library, "setLoggerFinder"))(&finder);
  int32_t creators = 0;
  AnyCreator* const* all = reinterpret_cast<Entry>(dlsym(library, kEntry))(creators);
  for (int32_t i = 0; i < creators; ++i) {
    Creator const creator(all[i]);
    if (std::strcmp(creator.creator->getPluginName(), arguments[2]) != 0) continue;
    Fields const fields(arguments[3]);
    Plugin plugin = creator.create(fields.collection);
    Strings facts{"\"declared\": " + described(*creator.creator->getFieldNames())};
    if (plugin.plugin != nullptr) {
      Sizes const inputs = sizes_of(arguments[4]);
      Plugin clone = plugin.clone(), restored = creator.restore(plugin);
      Formats const formats(plugin, static_cast<int>(inputs.size()));
      facts.push_back("\"name\": " + quoted(plugin.name()));
      facts.push_back("\"shapes\": " + output_shapes(plugin, inputs));
      facts.push_back("\"accepted\": " + list(formats.accepted));
      facts.push_back("\"wrong_types\": " + std::to_string(formats.wrong_types));
      facts.push_back("\"other_layouts\": " + std::to_string(formats.other_layouts));
      facts.push_back("\"stored\": " + list({plugin.stored(), clone.stored(), restored.stored()}));
      facts.push_back("\"timing_id\": " + quoted(plugin.timing_id()));
      facts.push_back(std::string("\"refuses_damage\": ") + (creator.refuses_damage(plugin) ? "true" : "false"));
      if (count > 5) facts.push_back(extra(plugin, inputs, arguments[5]));
      for (Plugin* made : {&plugin, &clone, &restored}) made->destroy();
    }
    Strings lines;
    for (auto const& line : finder.log.lines) lines.push_back(quoted(line));
    facts.push_back("\"log\": " + list(lines));
    std::string object = list(facts);
    object.front() = '{', object.back() = '}';
    return std::puts(object.c_str()), 0;
  }
  return std::printf("no creator named %s\n", arguments[2]), 1;
}
