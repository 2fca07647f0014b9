// The call of an attention, and its operands in the order that dot products take them: keys by
// words of channels, values by words of keys, queries a lane each. See attention.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention_dot.h"
#include "numbers.h"
#include "parallel.h"
#include "vector.h"

namespace {

constexpr int kRegisters = kLanes == 16 ? 4 : 2;  // of queries
constexpr int kRows = 6;                          // keys, or output channels, of a register tile
constexpr int kQueries = kRegisters * kLanes;
constexpr int64_t kKeys = 192;  // of a block
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -std::numeric_limits<float>::max();

// ---- the call ----------------------------------------------------------------------------------

// [batch, heads, tokens, channels] with the last dimension contiguous; strides in elements.
struct Tensor {
  const void* data;
  int64_t batch, head, token;
};

struct Call {
  Tensor q, k, v;
  Tensor mask;  // float32 [batch, heads, queries, keys], added to the scores; data may be null
  Tensor out;
  int64_t batch, heads, queries, keys, channels, value_channels;
  float scale;                     // of the scores
  const float *q_step, *k_step, *v_step, *out_step;  // scale and zero point of integer tensors
  int32_t in_type, out_type, out_bits, threads;
};

template <class T>
inline const T* row(const Tensor& t, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head + token * t.token;
}

// Rows that are read soon come into cache: they lie apart, and the CPU does not see them coming.
template <class T>
FXQUANT_INLINE void fetch_later(const T* from, const Tensor& t) {
  __builtin_prefetch(from + 8 * t.token);
}

// ---- packing -----------------------------------------------------------------------------------

// What a thread works on; sized once.
template <class Dot>
struct Scratch {
  int64_t words, groups;        // of a key's channels, of a head's keys
  int64_t stride;               // words, up to whole registers
  std::vector<int32_t> keys;    // [keys, stride]
  std::vector<int32_t> start;   // [keys]: where the sums of a key begin
  std::vector<int32_t> values;  // [groups, value_channels]
  std::vector<Ints> queries;    // [words, kRegisters]
  std::vector<Floats> scores;   // [kKeys, kRegisters]
  std::vector<Ints> weights;    // [kKeys / kStep, kRegisters]
  std::vector<Floats> out;      // [value_channels, kRegisters]
  std::vector<Ints> rows;       // [value_channels, kRegisters]: out, as it is stored

  explicit Scratch(const Call& c)
      : words(ceil_div(c.channels, Dot::kStep)),
        groups(ceil_div(c.keys, Dot::kStep)),
        stride(ceil_div(words, kLanes) * kLanes),
        keys(c.keys * stride),
        start(c.keys),
        values(groups * c.value_channels),
        queries(words * kRegisters),
        scores(kKeys * kRegisters),
        weights(kKeys / Dot::kStep * kRegisters),
        out(c.value_channels * kRegisters),
        rows(c.value_channels * kRegisters) {}
};

template <class Dot>
void pack_keys(const Call& c, int64_t b, int64_t h, Scratch<Dot>& s) {
  using In = typename Dot::In;
  for (int64_t key = 0; key < c.keys; ++key) {
    const In* from = row<In>(c.k, b, h, key);
    int32_t* to = s.keys.data() + key * s.stride;
    fetch_later(from, c.k);
    if constexpr (Dot::kStep == 1) {
      for (int64_t i = 0; i < c.channels; ++i) to[i] = int32_t(Dot::bits(from[i]));
    } else {
      std::memcpy(to, from, c.channels * sizeof(In));
    }
    if constexpr (std::is_same_v<In, uint8_t>) {
      std::memset(reinterpret_cast<uint8_t*>(to) + c.channels, 128, 4 * s.stride - c.channels);
      Ints sums = {};
      for (int64_t w = 0; w < s.stride; w += kLanes) {
        const Ints x = load_vector<Ints>(to + w) ^ splat(int32_t(0x80808080));
        store_vector(to + w, x);
        sums = dot_bytes(sums, splat(0x01010101), x);
      }
      int32_t sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += sums[i];
      // The query's zero point; the key's adds the same to all scores of a query.
      s.start[key] = -(int32_t(c.q_step[1]) + 128) * sum;
    }
  }
}

template <class Dot>
void pack_values(const Call& c, int64_t b, int64_t h, Scratch<Dot>& s) {
  using In = typename Dot::In;
  constexpr int kStep = Dot::kStep;
  for (int64_t g = 0; g < s.groups; ++g) {
    int32_t* to = s.values.data() + g * c.value_channels;
    const In* from[kStep];
    for (int j = 0; j < kStep; ++j) {
      from[j] = row<In>(c.v, b, h, std::min(g * kStep + j, c.keys - 1));  // weight 0 past the end
      fetch_later(from[j], c.v);
    }
    for (int64_t i = 0; i < c.value_channels; ++i) {
      uint32_t word = 0;
      if constexpr (std::is_same_v<In, uint8_t>) {
        for (int j = 0; j < kStep; ++j) word |= uint32_t(from[j][i] ^ 0x80) << (8 * j);
      } else {
        for (int j = 0; j < kStep; ++j) word |= Dot::bits(from[j][i]) << (j * 16);
      }
      to[i] = int32_t(word);
    }
  }
}

template <class Dot>
void pack_queries(const Call& c, int64_t b, int64_t h, int64_t first, Scratch<Dot>& s) {
  using In = typename Dot::In;
  int32_t* to = reinterpret_cast<int32_t*>(s.queries.data());
  const int64_t count = std::min<int64_t>(kQueries, c.queries - first);
  const int64_t whole = c.channels / Dot::kStep;
  for (int64_t i = 0; i < count; ++i) {
    const In* from = row<In>(c.q, b, h, first + i);
    fetch_later(from, c.q);
    for (int64_t w = 0; w < whole; ++w) {
      if constexpr (Dot::kStep == 1) {
        to[w * kQueries + i] = int32_t(Dot::bits(from[w]));
      } else {
        std::memcpy(to + w * kQueries + i, from + w * Dot::kStep, 4);
      }
    }
    if (whole < s.words) {
      int32_t last = 0;
      std::memcpy(&last, from + whole * Dot::kStep, (c.channels % Dot::kStep) * sizeof(In));
      to[whole * kQueries + i] = last;
    }
  }
}

}  // namespace
