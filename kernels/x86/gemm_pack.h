// Weights of the integer kernels in panels, eight or four bits each. See gemm.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace {

constexpr int kWidth = 2;                // registers of a panel
constexpr int kPanel = kWidth * kLanes;  // output channels of a panel
constexpr int kGroup = 4 * kPanel;       // bytes of a group of weights

// The shape of a packed weight.
struct Panels {
  int64_t outputs, channels, taps;
  bool gated, four_bit;

  int64_t tap_groups() const { return ceil_div(channels, 4); }
  int64_t groups() const { return taps * tap_groups(); }
  int64_t count() const {
    return gated ? ceil_div(outputs / 2, kLanes) : ceil_div(outputs, kPanel);
  }
  int64_t bytes() const { return (four_bit ? ceil_div(groups(), 2) : groups()) * kGroup; }

  // The output channel at a place in a panel; -1 is padding. Gated panels hold kLanes channels of
  // the first half, then those of the second half that go with them.
  int64_t channel(int64_t panel, int64_t place) const {
    if (!gated) {
      const int64_t channel = panel * kPanel + place;
      return channel < outputs ? channel : -1;
    }
    const int64_t channel = panel * kLanes + place % kLanes;
    return channel < outputs / 2 ? channel + place / kLanes * (outputs / 2) : -1;
  }
};

// The weights of one output channel, in bytes or in nibbles.
struct ByteRow {
  const int8_t* weights;
  ByteRow(const void* all, int64_t k, int64_t channel)
      : weights(static_cast<const int8_t*>(all) + channel * k) {}
  int operator()(int64_t i) const { return weights[i]; }
};

struct NibbleRow {
  const uint8_t* weights;
  NibbleRow(const void* all, int64_t k, int64_t channel)
      : weights(static_cast<const uint8_t*>(all) + channel * ceil_div(k, 2)) {}
  int operator()(int64_t i) const {
    const int nibble = weights[i / 2] >> (i % 2 * 4) & 15;
    return (nibble ^ 8) - 8;
  }
};

// Four weights at a time: `packed` and `sums` of one panel.
template <class Row>
void pack_panel(const Panels& shape, const void* weight, int64_t panel, uint8_t* packed,
                int32_t* sums) {
  std::memset(packed, shape.four_bit ? 0x88 : 0, shape.bytes());  // nibbles hold w + 8
  std::memset(sums, 0, kPanel * sizeof *sums);
  std::vector<std::pair<Row, int64_t>> rows;  // and their places in the panel
  for (int64_t place = 0; place < kPanel; ++place)
    if (const int64_t channel = shape.channel(panel, place); channel >= 0)
      rows.emplace_back(Row(weight, shape.channels * shape.taps, channel), place);
  const int mask = shape.four_bit ? 15 : 255;
  for (int64_t group = 0; group < shape.groups(); ++group) {
    const int64_t tap = group % shape.taps, c = group / shape.taps * 4;  // in order of the source
    const int64_t size = std::min<int64_t>(4, shape.channels - c);
    const int64_t to = tap * shape.tap_groups() + c / 4;
    uint8_t* words = packed + (shape.four_bit ? to / 2 : to) * kGroup;
    const int shift = shape.four_bit ? to % 2 * 4 : 0;
    for (const auto& [row, place] : rows) {
      uint32_t word;
      std::memcpy(&word, words + 4 * place, 4);
      for (int64_t i = 0; i < size; ++i) {
        const int w = row((c + i) * shape.taps + tap);
        sums[place] += w;
        word ^= uint32_t(w & mask) << (8 * i + shift);
      }
      std::memcpy(words + 4 * place, &word, 4);
    }
  }
}

// Two groups per step: low nibbles are the first group. `count` is the number of pairs.
void unpack_nibbles(const uint8_t* __restrict from, int64_t count, int8_t* __restrict to) {
  typedef int8_t Signed __attribute__((vector_size(4 * kLanes)));
  const Ints mask = splat(0x0f0f0f0f);
  const Signed eight = reinterpret_cast<Signed>(splat(0x08080808));
  for (int64_t pair = 0; pair < count; ++pair, from += kGroup, to += 2 * kGroup) {
    for (int i = 0; i < kGroup; i += 4 * kLanes) {
      const Ints both = load_vector<Ints>(from + i);
      store_vector(to + i, reinterpret_cast<Signed>(both & mask) - eight);
      store_vector(to + kGroup + i, reinterpret_cast<Signed>((both >> 4) & mask) - eight);
    }
  }
}

}  // namespace
