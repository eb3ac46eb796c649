#include <algorithm>
#include <cstring>

#include "data/tokenizer_parts.h"

namespace pith {

AddedTokens::AddedTokens(vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::sort(tokens_.begin(), tokens_.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.content < b.content; });
  if (tokens_.empty()) return;
  nodes_.emplace_back();
  add_node(0, 0, tokens_.size(), 0);
  for (uint32_t i = 0; i < nodes_[0].num_edges; i++) starts_[edges_[i].byte] = true;
  if (nodes_[0].num_edges == 1) only_start_ = edges_[0].byte;
}

// Fills the trie below `node`: tokens [first, last) share their first `depth` bytes.
void AddedTokens::add_node(size_t node, size_t first, size_t last, size_t depth) {
  // Of equal contents the last one counts.
  for (; first < last && tokens_[first].content.size() == depth; first++)
    nodes_[node].token = int32_t(first);
  const size_t first_edge = edges_.size();
  const auto byte_at = [&](size_t token) { return uint8_t(tokens_[token].content[depth]); };
  for (size_t i = first; i < last; i++)
    if (i == first || byte_at(i) != byte_at(i - 1)) {
      edges_.push_back({byte_at(i), uint32_t(nodes_.size())});
      nodes_.emplace_back();
    }
  nodes_[node].first_edge = uint32_t(first_edge);
  nodes_[node].num_edges = uint32_t(edges_.size() - first_edge);
  for (size_t edge = first_edge, i = first; i < last; edge++) {
    const size_t begin = i;
    while (i < last && byte_at(i) == byte_at(begin)) i++;
    add_node(edges_[edge].node, begin, i, depth + 1);
  }
}

const AddedToken* AddedTokens::find(string_view text, size_t from, size_t& begin) const {
  if (tokens_.empty()) return nullptr;
  for (size_t at = from; at < text.size(); at++) {
    if (only_start_ >= 0) {
      const void* next = memchr(text.data() + at, only_start_, text.size() - at);
      if (!next) return nullptr;
      at = size_t(static_cast<const char*>(next) - text.data());
    } else {
      while (at < text.size() && !starts_[uint8_t(text[at])]) at++;
    }
    int32_t longest = -1;
    const Node* node = &nodes_[0];
    for (size_t i = at; node; i++) {
      if (node->token >= 0) longest = node->token;
      if (i >= text.size()) break;
      const Edge *edge = &edges_[node->first_edge], *last = edge + node->num_edges;
      const auto byte = uint8_t(text[i]);
      edge =
          std::lower_bound(edge, last, byte, [](const Edge& e, uint8_t b) { return e.byte < b; });
      node = edge != last && edge->byte == byte ? &nodes_[edge->node] : nullptr;
    }
    if (longest < 0) continue;
    begin = at;
    return &tokens_[size_t(longest)];
  }
  return nullptr;
}

static size_t char_before(string_view text, size_t end) {
  do end--;
  while ((text[end] & 0xc0) == 0x80);
  return end;
}

bool is_separate_word(const CharTable& chars, string_view text, size_t begin, size_t end) {
  const auto is_word = [&](size_t at) {
    return (chars[decode_char(text.data() + at).code] & kWordChar) != 0;
  };
  return (begin == 0 || !is_word(char_before(text, begin))) &&
         (end == text.size() || !is_word(end));
}

size_t spaces_before(const CharTable& chars, string_view text, size_t end) {
  while (end > 0) {
    const size_t last = char_before(text, end);
    if (!(chars[decode_char(text.data() + last).code] & kSpace)) break;
    end = last;
  }
  return end;
}

size_t spaces_after(const CharTable& chars, string_view text, size_t begin) {
  while (begin < text.size()) {
    const Char c = decode_char(text.data() + begin);
    if (!(chars[c.code] & kSpace)) break;
    begin += c.size;
  }
  return begin;
}

}  // namespace pith
