#include "json.h"

#include <limits>
#include <stdexcept>

namespace aliked::core {
namespace {

constexpr int DEEPEST = 8;  // safetensors has 3: a damaged file must not exhaust the stack

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json whole() {
    Json value = parse(0);
    skip_spaces();
    if (at_ != text_.size()) fail("text after the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const char *what) const {
    throw std::invalid_argument(std::string(what) + " at byte " + std::to_string(at_));
  }

  void skip_spaces() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' ||
                                  text_[at_] == '\r'))
      ++at_;
  }

  char next() {
    skip_spaces();
    if (at_ == text_.size()) fail("the text ends");
    return text_[at_];
  }

  bool take(char wanted) {
    if (next() != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char wanted) {
    if (!take(wanted)) fail("something unexpected");
  }

  Json parse(int depth) {
    if (depth > DEEPEST) fail("too deep");
    Json value;
    switch (next()) {
      case '{': parse_object(value, depth); break;
      case '[': parse_array(value, depth); break;
      case '"':
        value.kind = Json::STRING;
        value.string = parse_string();
        break;
      default: value.number = parse_number();
    }
    return value;
  }

  void parse_object(Json &value, int depth) {
    value.kind = Json::OBJECT;
    expect('{');
    if (take('}')) return;
    do {
      if (next() != '"') fail("a member without a name");
      std::string name = parse_string();
      if (value.find(name)) fail("a name that is there twice");
      expect(':');
      value.members.emplace_back(std::move(name), parse(depth + 1));
    } while (take(','));
    expect('}');
  }

  void parse_array(Json &value, int depth) {
    value.kind = Json::ARRAY;
    expect('[');
    if (take(']')) return;
    do value.items.push_back(parse(depth + 1));
    while (take(','));
    expect(']');
  }

  std::string parse_string() {
    std::string string;
    for (++at_;; ++at_) {
      if (at_ >= text_.size()) fail("the text ends");
      char c = text_[at_];
      if (c == '"') break;
      if ((unsigned char)c < ' ') fail("a control character");
      if (c == '\\') {
        if (++at_ >= text_.size()) fail("the text ends");
        c = text_[at_];
        if (c != '"' && c != '\\' && c != '/') fail("an escape that is not supported");
      }
      string += c;
    }
    ++at_;
    return string;
  }

  uint64_t parse_number() {
    constexpr uint64_t MOST = std::numeric_limits<uint64_t>::max();
    const size_t start = at_;
    uint64_t number = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const uint64_t digit = uint64_t(text_[at_] - '0');
      if (number > (MOST - digit) / 10) fail("a number that is too large");
      number = number * 10 + digit;
    }
    if (at_ == start) fail("something unexpected");
    return number;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Json *Json::find(std::string_view name) const {
  for (const auto &[key, value] : members)
    if (key == name) return &value;
  return nullptr;
}

Json parse_json(std::string_view text) { return Parser(text).whole(); }

}  // namespace aliked::core
