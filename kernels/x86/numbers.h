// The numbers that tensors hold, and the activations that follow a layer, by their codes.

#pragma once

#include <cstdint>

namespace {

enum Type { kFloat32 = 0, kBfloat16 = 1, kUint8 = 2, kInt8 = 3 };
enum Activation { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3 };

struct Bfloat16 {
  uint16_t bits;
};

}  // namespace
