// Part of harness.cpp: an IPluginV2DynamicExt and its creator, under the names that harness.cpp uses.

using Bytes = std::vector<unsigned char>;

struct Plugin {
  IPluginV2DynamicExt* plugin;

  int outputs() const { return plugin->getNbOutputs(); }
  Plugin clone() const { return {plugin->clone()}; }
  Bytes bytes() const {
    Bytes made(plugin->getSerializationSize());
    plugin->serialize(made.data());
    return made;
  }
  std::string stored() const {
    std::string made;
    for (unsigned char byte : bytes()) {
      made += "0123456789abcdef"[byte >> 4];
      made += "0123456789abcdef"[byte & 15];
    }
    return quoted(made);
  }
  std::string name() const {
    return described_name(plugin->getPluginNamespace(), plugin->getPluginType(), plugin->getPluginVersion());
  }
  std::string timing_id() const { return ""; }
  bool accepts(int position, Desc const* descs, int inputs) const {
    return plugin->supportsFormatCombination(position, descs, inputs, outputs());
  }
  bool shapes(std::vector<DimsExprs> const& in, std::vector<DimsExprs>& out, Builder& builder) const {
    for (size_t i = 0; i < out.size(); ++i) out[i] = plugin->getOutputDimensions(i, in.data(), in.size(), builder);
    return out[0].nbDims >= 0;
  }
  std::vector<DataType> types(std::vector<DataType> const& in) const {
    std::vector<DataType> made;
    for (int i = 0; i < outputs(); ++i) made.push_back(plugin->getOutputDataType(i, in.data(), in.size()));
    return made;
  }
  int run(std::vector<PluginTensorDesc> const& in, std::vector<PluginTensorDesc> const& out, void** from, void** to,
          cudaStream_t stream) const {
    return plugin->enqueue(in.data(), out.data(), from, to, nullptr, stream);
  }
  bool refuses(std::vector<PluginTensorDesc> const& in, std::vector<PluginTensorDesc> const& out) const {
    void* none[3]{};
    return run(in, out, none, none, nullptr) != 0;
  }
  void destroy() { plugin->destroy(); }
};

using AnyCreator = IPluginCreator;
constexpr char const* kEntry = "getPluginCreators";

struct Creator {
  IPluginCreator* creator;

  explicit Creator(AnyCreator* any) : creator(any) {}
  Plugin create(PluginFieldCollection const& fields) const {
    return {static_cast<IPluginV2DynamicExt*>(creator->createPlugin("layer", &fields))};
  }
  Plugin read(Bytes const& bytes) const {
    return {static_cast<IPluginV2DynamicExt*>(creator->deserializePlugin("layer", bytes.data(), bytes.size()))};
  }
  Plugin restore(Plugin const& from) const { return read(from.bytes()); }
  bool refuses_damage(Plugin const& from) const {
    Bytes shorter = from.bytes(), other_layout = from.bytes();
    shorter.pop_back();
    other_layout[0] ^= 0xff;
    return read(shorter).plugin == nullptr && read(other_layout).plugin == nullptr;
  }
};
