#include "weights.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "error.h"
#include "json.h"
#include "launches.h"
#include "sha256.h"

namespace aliked::core {
namespace {

constexpr size_t LARGEST_FILE = 256 << 20, LARGEST_HEADER = 1 << 20;
constexpr const char *FORMAT = "aliked-fused";

struct Tensor {
  std::string name, type;
  std::vector<uint64_t> shape;
  size_t begin = 0, end = 0;  // in the data

  uint64_t count() const {
    uint64_t count = 1;
    for (uint64_t size : shape) count *= size;
    return count;
  }
};

// What the file is called in sentences, and the one way to refuse it.
struct File {
  std::string name;

  [[noreturn]] void refuse(const std::string &reason) const {
    throw Error(ALIKED_BAD_WEIGHTS,
                name + " " + reason +
                    "; write it with `python -m aliked.fused.pack_weights` of the same version");
  }

  std::string value(const Json &metadata, const char *key) const {
    const Json *found = metadata.find(key);
    if (!found || found->kind != Json::STRING) refuse(text("has no \"%s\"", key));
    return found->string;
  }

  int number(const std::string &digits) const {
    if (digits.empty() || digits.size() > 6 ||
        digits.find_first_not_of("0123456789") != std::string::npos)
      refuse("has a size that is no number: \"" + digits + "\"");
    return std::stoi(digits);
  }
};

Tensor parse_tensor(const File &file, const std::string &name, const Json &entry, size_t size) {
  const Json *type = entry.find("dtype"), *shape = entry.find("shape"),
             *offsets = entry.find("data_offsets");
  if (!type || !shape || !offsets || offsets->items.size() != 2)
    file.refuse("has an incomplete entry for " + name);
  Tensor tensor{name, type->string, {}, offsets->items[0].number, offsets->items[1].number};
  const uint64_t item = tensor.type == "F16" ? 2 : tensor.type == "F32" ? 4 : 0;
  if (!item) file.refuse(name + " is neither F16 nor F32");
  uint64_t bytes = item;
  for (const Json &side : shape->items) {
    const bool possible = side.kind == Json::NUMBER && side.number <= LARGEST_FILE / bytes;
    if (!possible) file.refuse(name + " has an absurd shape");
    tensor.shape.push_back(side.number);
    bytes *= side.number;
    if (bytes == 0) file.refuse(name + " is empty");
  }
  if (tensor.begin > tensor.end || tensor.end > size || tensor.end - tensor.begin != bytes)
    file.refuse("does not hold " + name + " where its header says");
  return tensor;
}

// The text that the hash covers before the data: every value and every tensor, a line each.
std::string listing(const Json &metadata, const std::vector<Tensor> &tensors) {
  std::string lines;
  for (const auto &[key, value] : metadata.members)
    if (key != "sha256") lines += key + "=" + value.string + "\n";
  for (const Tensor &tensor : tensors) {
    lines += tensor.name + " " + tensor.type;
    for (uint64_t side : tensor.shape) lines.append(" ").append(std::to_string(side));
    lines += "\n";
  }
  return lines;
}

Shape parse_shape(const File &file, const Json &metadata) {
  Shape shape;
  const std::string channels = file.value(metadata, "channels") + ",";
  size_t at = 0;
  for (int &count : shape.channels) {
    const size_t comma = channels.find(',', at);
    if (comma == std::string::npos) file.refuse("has fewer than four numbers of channels");
    count = file.number(channels.substr(at, comma - at));
    at = comma + 1;
  }
  shape.dim = file.number(file.value(metadata, "dim"));
  shape.positions = file.number(file.value(metadata, "positions"));
  return shape;
}

}  // namespace

std::vector<Expected> expected_tensors(const Shape &shape) {
  const auto [c1, c2, c3, c4] = shape.channels;
  const int64_t q = shape.quarter(), d = shape.dim, m = shape.positions;
  const auto sixteens = [](int64_t rows) { return (rows + 15) / 16; };
  const int64_t block1 = 3 * (c1 / 8) + sixteens(9 * c1) * (c1 / 8) + sixteens(c1) * (q / 8) +
                         sixteens(q);
  const int64_t block2 = (sixteens(9 * c1) + sixteens(9 * c2) + sixteens(c1)) * (c2 / 8) +
                         sixteens(c2) * (q / 8) + sixteens(q);
  std::vector<Expected> tensors = {
      {"block1.fragments", "F16", block1 * 128},
      {"block1.stem_bias", "F32", c1},
      {"block1.bias", "F32", c1},
      {"block2.fragments", "F16", block2 * 128},
      {"block2.first_bias", "F32", c2},
      {"block2.bias", "F32", c2},
      {"score_head.fragments", "F16", 15 * 128},
      {"score_head.first_bias", "F32", 4},
      {"score_head.second_bias", "F32", 4},
      {"descriptor.level_fragments", "F16", c1 * q},
      {"descriptor.patch_fragments", "F16", (9 * d / 32 + 2 * m / 32) * (2 * m / 8) * 256},
      {"descriptor.patch_bias", "F32", 2 * m},
      {"descriptor.offset_bias", "F32", 2 * m},
      {"descriptor.sample_fragments", "F16", (1 + m) * (d / 16) * (d / 8) * 128},
  };
  const int64_t inputs[4] = {c2, c3, c3, c4}, outputs[4] = {c3, c3, c4, c4};
  for (int i = 0; i < 4; ++i) {
    const std::string name = text("deform%d.", i + 1);
    const int64_t level = i % 2 ? outputs[i] / 32 * (q / 8) : 0;
    const int64_t fragments = inputs[i] / 16 * (20 + 10 * (outputs[i] / 16)) + level;
    tensors.push_back({name + "fragments", "F16", fragments * 256});
    tensors.push_back({name + "offset_bias", "F32", 18});
    tensors.push_back({name + "bias", "F32", outputs[i]});
    if (i % 2) tensors.push_back({name + "score_weight", "F16", q * 8});
  }
  return tensors;
}

Weights Weights::read(const std::string &file) {
  std::error_code ignored;
  if (std::filesystem::is_directory(file, ignored))
    throw Error(ALIKED_NO_FILE, text("cannot read the weights %s: it is a folder", file.c_str()));
  std::ifstream stream(file, std::ios::binary | std::ios::ate);
  const std::streamoff size = stream ? std::streamoff(stream.tellg()) : -1;
  if (size < 0)
    throw Error(ALIKED_NO_FILE,
                text("cannot read the weights %s: %s", file.c_str(), strerror(errno)));
  if (size_t(size) > LARGEST_FILE) File{file}.refuse("is too large for a weights file");
  std::vector<char> content(static_cast<size_t>(size));
  stream.seekg(0);
  if (!stream.read(content.data(), size))
    throw Error(ALIKED_NO_FILE,
                text("cannot read the weights %s: %s", file.c_str(), strerror(errno)));
  return parse(content.data(), content.size(), file);
}

Weights Weights::parse(const void *data, size_t size, const std::string &name) {
  const File file{name};
  const unsigned char *bytes = (const unsigned char *)data;
  if (size < 8) file.refuse("is truncated: it has no header");
  uint64_t header_size = 0;
  for (int i = 7; i >= 0; --i) header_size = header_size << 8 | bytes[i];
  if (header_size > LARGEST_HEADER) file.refuse("is no safetensors file");
  if (header_size > size - 8) file.refuse("is truncated: its header does not end");
  Json header;
  try {
    header = parse_json({(const char *)bytes + 8, size_t(header_size)});
  } catch (const std::invalid_argument &error) {
    file.refuse(std::string("has a damaged header: ") + error.what());
  }
  const unsigned char *const content = bytes + 8 + header_size;
  const size_t content_size = size - 8 - size_t(header_size);

  const Json *metadata = header.find("__metadata__");
  if (!metadata || metadata->kind != Json::OBJECT) file.refuse("has no __metadata__");
  if (file.value(*metadata, "format") != FORMAT)
    file.refuse("holds something else than packed weights");
  const std::string version = file.value(*metadata, "format_version");
  if (version != std::to_string(ALIKED_FORMAT_VERSION))
    file.refuse(text("has format version %.20s and this library reads version %d", version.c_str(),
                     ALIKED_FORMAT_VERSION));

  std::vector<Tensor> tensors;
  for (const auto &[key, entry] : header.members)
    if (key != "__metadata__") tensors.push_back(parse_tensor(file, key, entry, content_size));
  std::sort(tensors.begin(), tensors.end(),
            [](const Tensor &a, const Tensor &b) { return a.begin < b.begin; });
  size_t end = 0;
  for (const Tensor &tensor : tensors) {
    if (tensor.begin != end) file.refuse("has a gap or an overlap before " + tensor.name);
    end = tensor.end;
  }
  if (end != content_size) file.refuse("is longer than its header says");

  Sha256 hash;
  const std::string lines = listing(*metadata, tensors);
  hash.add(lines.data(), lines.size());
  hash.add(content, content_size);
  if (hash.hex() != file.value(*metadata, "sha256"))
    file.refuse("is damaged: its content does not have the SHA-256 that its header names");

  Weights weights;
  weights.model_ = file.value(*metadata, "model");
  weights.shape_ = parse_shape(file, *metadata);
  if (weights.model_.size() >= sizeof(aliked_info::model)) file.refuse("has an absurd model name");
  if (!has_kernels(weights.shape_))
    file.refuse("holds " + weights.model_ + ", whose sizes this library has no kernels for");
  for (const Expected &wanted : expected_tensors(weights.shape_)) {
    const auto found = std::find_if(tensors.begin(), tensors.end(),
                                    [&](const Tensor &t) { return t.name == wanted.name; });
    if (found == tensors.end()) file.refuse("has no " + wanted.name);
    if (found->type != wanted.type || found->count() != uint64_t(wanted.count))
      file.refuse(text("has %s with %llu %s numbers where the kernels read %lld of %s",
                       wanted.name.c_str(), (unsigned long long)found->count(),
                       found->type.c_str(), (long long)wanted.count, wanted.type.c_str()));
    const size_t offset = (weights.bytes_.size() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    weights.bytes_.resize(offset + found->end - found->begin);
    std::copy(content + found->begin, content + found->end, weights.bytes_.begin() + offset);
    weights.offsets_[wanted.name] = offset;
  }
  return weights;
}

}  // namespace aliked::core
