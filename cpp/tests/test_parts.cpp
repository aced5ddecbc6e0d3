// Hash, JSON, weights files, arena and table of launches. Leaves a weights file of random numbers
// in the folder given, for the other tests.
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <stdexcept>

#include "arena.h"
#include "check.h"
#include "error.h"
#include "json.h"
#include "launches.h"
#include "sha256.h"
#include "weights.h"

using namespace aliked::core;

namespace {

std::string sha256(const std::string &text) {
  Sha256 hash;
  hash.add(text.data(), text.size());
  return hash.hex();
}

void test_sha256() {
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256(std::string(1000000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

bool is_json(const std::string &text) {
  try {
    parse_json(text);
    return true;
  } catch (const std::invalid_argument &) {
    return false;
  }
}

void test_json() {
  const Json json = parse_json(R"( {"a": [1, 23], "b": {"c": "d\"e"}} )");
  CHECK(json.find("a")->items[1].number == 23);
  CHECK(json.find("b")->find("c")->string == "d\"e");
  CHECK(!json.find("c"));
  for (const char *bad : {"", "{", "{\"a\"}", "{\"a\":1,}", "[1 2]", "1x", "\"a", "-1", "1e3",
                          "99999999999999999999", "{\"a\":1,\"a\":2}", "[[[[[[[[[[1]]]]]]]]]]"})
    CHECK(!is_json(bad));
}

struct Contents {
  std::string version = "1", model = "aliked-test", channels = "8,16,32,64", dim = "64";
  std::string left_out;   // a tensor
  bool good_hash = true;
};

// A weights file as `pack_weights.py` writes it, of random numbers.
std::string weights_file(const Contents &contents = {}) {
  Shape shape;
  shape.channels[0] = 8, shape.channels[1] = 16, shape.channels[2] = 32, shape.channels[3] = 64;
  shape.dim = 64, shape.positions = 16;
  std::string data, tensors;
  std::string metadata = "\"format\":\"aliked-fused\"", lines = "format=aliked-fused\n";
  const auto add = [&](const std::string &key, const std::string &value) {
    metadata += ",\"" + key + "\":\"" + value + "\"";
    lines += key + "=" + value + "\n";
  };
  add("format_version", contents.version);
  add("model", contents.model);
  add("channels", contents.channels);
  add("dim", contents.dim);
  add("positions", "16");
  std::mt19937 random(0);
  for (const Expected &tensor : expected_tensors(shape)) {
    if (tensor.name == contents.left_out) continue;
    const bool half = tensor.type == "F16";
    const size_t begin = data.size();
    for (int64_t i = 0; i < tensor.count; ++i) {  // numbers below 1 in magnitude
      if (half) {
        const uint16_t value = uint16_t(random() & 0xA3FF);
        data.append((const char *)&value, 2);
      } else {
        const float value = float(random() % 1000) / 2000;
        data.append((const char *)&value, 4);
      }
    }
    tensors += ",\"" + tensor.name + "\":{\"dtype\":\"" + tensor.type + "\",\"shape\":[" +
               std::to_string(tensor.count) + "],\"data_offsets\":[" + std::to_string(begin) + "," +
               std::to_string(data.size()) + "]}";
    lines += tensor.name + " " + tensor.type + " " + std::to_string(tensor.count) + "\n";
  }
  const std::string hash = contents.good_hash ? sha256(lines + data) : sha256("");
  const std::string header =
      "{\"__metadata__\":{" + metadata + ",\"sha256\":\"" + hash + "\"}" + tensors + "}";
  std::string size(8, '\0');
  for (size_t i = 0; i < 8; ++i) size[i] = char(header.size() >> (8 * i));
  return size + header + data;
}

// Why a content is refused; "" where it is not.
std::string refusal(const std::string &content) {
  try {
    Weights::parse(content.data(), content.size(), "FILE");
    return "";
  } catch (const Error &error) {
    CHECK(error.status == ALIKED_BAD_WEIGHTS);
    return error.what();
  }
}

bool refused_for(const std::string &content, const char *word) {
  const std::string reason = refusal(content);
  if (reason.find(word) == std::string::npos)
    std::fprintf(stderr, "refused for another reason than \"%s\": %s\n", word, reason.c_str());
  return reason.find(word) != std::string::npos;
}

void test_weights() {
  const std::string good = weights_file();
  CHECK(refusal(good).empty());
  const Weights weights = Weights::parse(good.data(), good.size(), "FILE");
  CHECK(weights.model() == "aliked-test" && weights.shape().dim == 64);
  CHECK(weights.offset("deform2.score_weight") % Weights::ALIGNMENT == 0);
  for (size_t size = 0; size < good.size(); size += size < 4096 ? 1 : 9973)
    CHECK(!refusal(good.substr(0, size)).empty());
  CHECK(refused_for(good + "x", "longer"));
  std::mt19937 random(1);
  for (int i = 0; i < 400; ++i) {  // half of them in the header
    std::string damaged = good;
    const size_t at = random() % (i % 2 ? good.size() : 3000);
    damaged[at] = char(damaged[at] ^ (1 << random() % 8));
    CHECK(!refusal(damaged).empty());
  }
  Contents other;
  other.version = "2";
  CHECK(refused_for(weights_file(other), "format version 2"));
  other = {}, other.good_hash = false;
  CHECK(refused_for(weights_file(other), "damaged"));
  other = {}, other.channels = "8,16,32,48";
  CHECK(refused_for(weights_file(other), "no kernels"));
  other = {}, other.channels = "16,32,64,128", other.dim = "128";
  CHECK(refused_for(weights_file(other), "block1.fragments"));
  other = {}, other.dim = "six";
  CHECK(refused_for(weights_file(other), "no number"));
  other = {}, other.left_out = "deform4.score_weight";
  CHECK(refused_for(weights_file(other), "has no deform4.score_weight"));
}

void test_arena() {
  std::mt19937 random(2);
  struct Buffer { size_t size; int first, last, number; };
  for (int round = 0; round < 50; ++round) {
    Arena arena;
    std::vector<Buffer> buffers;
    for (int i = 0; i < 20; ++i) {
      const int first = int(random() % 10), last = first + int(random() % 4);
      const size_t size = 1 + random() % 5000;
      buffers.push_back({size, first, last, arena.add(size, first, last)});
    }
    const size_t whole = arena.place();
    for (const Buffer &a : buffers) {
      CHECK(arena.offset(a.number) + a.size <= whole);
      for (const Buffer &b : buffers) {
        if (a.number >= b.number || a.last < b.first || b.last < a.first) continue;
        CHECK(arena.offset(a.number) + a.size <= arena.offset(b.number) ||
              arena.offset(b.number) + b.size <= arena.offset(a.number));
      }
    }
  }
}

bool is(const Geometry &g, std::vector<long> grid, std::vector<long> block) {
  return std::equal(grid.begin(), grid.end(), g.grid) &&
         std::equal(block.begin(), block.end(), g.block);
}

void test_launches() {
  CHECK(builds().size() > 30);
  const Sizes vga{1, 480, 640, 1000, 0, 1000, 2024, 476 * 636};
  const Build &block = *find_build("blocks", {{"IN", 3}, {"OUT", 8}});
  CHECK(is(geometry("block1", block, vga), {20, 30, 1}, {128, 1, 1}));
  const Build &cluster = *find_build("deform", {{"KIND", 2}, {"CI", 128}});
  CHECK(is(geometry("deform", cluster, {1, 15, 20}), {40, 4, 1}, {288, 1, 1}));
  const Build &maxima = *find_build("maxima", {});
  CHECK(is(geometry("find_maxima", maxima, vga), {1, 20, 6}, {32, 11, 1}));
  CHECK(is(geometry("find_maxima", maxima, {2, 5, 5}), {2, 1, 1}, {32, 11, 1}));
  CHECK(is(geometry("score_head", *find_build("score_head", {}), vga), {1, 24, 11}, {32, 8, 1}));
  CHECK(value_of_capacity(vga) == 476 * 636 && value_of_room(vga) == 2024);
  CHECK(value_of_each({0, 0, 0, 0, 0, 0, 4097}) == 4 && value_of_each(vga) == 1);
  CHECK(!find_build("blocks", {{"IN", 5}}));
}

}  // namespace

int main(int, char **words) {
  test_sha256();
  test_json();
  test_weights();
  test_arena();
  test_launches();
  const std::string content = weights_file();
  std::ofstream(std::string(words[1]) + "/random.safetensors", std::ios::binary) << content;
  std::string damaged = content;
  damaged[content.size() - 9] ^= 1;
  std::ofstream(std::string(words[1]) + "/damaged.safetensors", std::ios::binary) << damaged;
  return result();
}
