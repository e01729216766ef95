// Part of harness.cpp: an IPluginV3 and its creator, under the names that harness.cpp uses.

struct Plugin {
  IPluginV3* plugin;

  template <class Capability>
  Capability* as(PluginCapabilityType type) const {
    return static_cast<Capability*>(plugin->getCapabilityInterface(type));
  }
  IPluginV3OneCore* core() const { return as<IPluginV3OneCore>(PluginCapabilityType::kCORE); }
  IPluginV3OneBuild* build() const { return as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD); }
  IPluginV3OneRuntime* runtime() const { return as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME); }

  int outputs() const { return build()->getNbOutputs(); }
  Plugin clone() const { return {plugin->clone()}; }
  std::string stored() const { return described(*runtime()->getFieldsToSerialize()); }
  std::string name() const {
    return described_name(core()->getPluginNamespace(), core()->getPluginName(), core()->getPluginVersion());
  }
  std::string timing_id() const { return build()->getTimingCacheID(); }
  bool accepts(int position, Desc const* descs, int inputs) const {
    return build()->supportsFormatCombination(position, descs, inputs, outputs());
  }
  bool shapes(std::vector<DimsExprs> const& in, std::vector<DimsExprs>& out, Builder& builder) const {
    return build()->getOutputShapes(in.data(), in.size(), nullptr, 0, out.data(), out.size(), builder) == 0;
  }
  std::vector<DataType> types(std::vector<DataType> const& in) const {
    std::vector<DataType> made(outputs());
    build()->getOutputDataTypes(made.data(), made.size(), in.data(), in.size());
    return made;
  }
  int run(std::vector<PluginTensorDesc> const& in, std::vector<PluginTensorDesc> const& out, void** from, void** to,
          cudaStream_t stream) const {
    return runtime()->enqueue(in.data(), out.data(), from, to, nullptr, stream);
  }
  bool refuses(std::vector<PluginTensorDesc> const& in, std::vector<PluginTensorDesc> const& out) const {
    void* none[3]{};
    return runtime()->onShapeChange(in.data(), in.size(), out.data(), out.size()) != 0 &&
           run(in, out, none, none, nullptr) != 0;
  }
  void destroy() { delete plugin; }
};

using AnyCreator = IPluginCreatorInterface;
constexpr char const* kEntry = "getCreators";

struct Creator {
  IPluginCreatorV3One* creator;

  explicit Creator(AnyCreator* any) : creator(static_cast<IPluginCreatorV3One*>(any)) {}
  Plugin create(PluginFieldCollection const& fields) const {
    return {creator->createPlugin("layer", &fields, TensorRTPhase::kBUILD)};
  }
  Plugin restore(Plugin const& from) const {
    return {creator->createPlugin("layer", from.runtime()->getFieldsToSerialize(), TensorRTPhase::kRUNTIME)};
  }
  // A plan that lost a field; an op without fields has none to lose.
  bool refuses_damage(Plugin const& from) const {
    PluginFieldCollection fields = *from.runtime()->getFieldsToSerialize();
    return fields.nbFields-- == 0 || creator->createPlugin("layer", &fields, TensorRTPhase::kRUNTIME) == nullptr;
  }
};
