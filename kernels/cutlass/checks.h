// What every GEMM and convolution library asks of a call before its own tile's conditions. On the
// host alone; null pointers pass, so that a plan can be checked before there are tensors.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "epilogue.h"

namespace fxquant {

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline bool is_float(int32_t type) {
  return type == kFloat32 || type == kFloat16 || type == kBFloat16;
}

inline bool types_known(const Epilogue& e) {
  const bool out = e.out_index < 0 ? is_float(e.out_type)
                                   : e.out_type == kInt8 && e.out_bits >= 2 && e.out_bits <= 8;
  const bool residual = !e.residual || is_float(e.residual_type);
  return out && residual && e.x_index >= 0 && e.activation >= kNone && e.activation <= kGeluTanh;
}

// Each pointer at least as its element; what is aligned further is moved faster, see finish_of.
inline bool is_aligned(const Call& c) {
  const Epilogue& e = c.epilogue;
  for (const void* words : std::initializer_list<const void*>{
           e.row, e.bias, e.weight_scale, e.weight_sums, e.tap_sums, e.channel_add})
    if (!aligned(words, 4)) return false;
  return aligned(c.x, 16) && aligned(c.weight, 16) && aligned(e.out, size_of(e.out_type)) &&
         (!e.residual || aligned(e.residual, size_of(e.residual_type)));
}

// No centred sum leaves int32: |q - zero point| is below 2^x_bits, a weight at most 2^(bits-1).
inline bool sums_fit(int64_t k, int x_bits, int weight_bits) {
  const int64_t largest = ((int64_t(1) << x_bits) - 1) << (weight_bits - 1);
  return k <= INT32_MAX / largest;
}

inline bool is_image(const Call& c) { return c.batch != 0; }

// No image, or one whose every pixel is a row by itself.
inline bool is_linear(const Call& c) {
  return !is_image(c) ||
         (c.kernel_h == 1 && c.kernel_w == 1 && c.stride_h == 1 && c.stride_w == 1 &&
          c.pad_top == 0 && c.pad_left == 0 && c.out_height == c.height && c.out_width == c.width);
}

inline bool image_agrees(const Call& c) {
  const bool positive = c.batch > 0 && c.height > 0 && c.width > 0 && c.channels > 0 &&
                        c.kernel_h > 0 && c.kernel_w > 0 && c.stride_h > 0 && c.stride_w > 0 &&
                        c.dilation_h > 0 && c.dilation_w > 0 && c.out_height > 0 &&
                        c.out_width > 0 && c.pad_top >= 0 && c.pad_left >= 0;
  return positive && c.m == int64_t(c.batch) * c.out_height * c.out_width &&
         c.k == int64_t(c.kernel_h) * c.kernel_w * c.channels;
}

constexpr int64_t kMost = INT32_MAX - 4096;  // rows or columns: of whole tiles int32 counts as well

inline Status checked(const Call& c, int x_bits, int weight_bits) {
  if (c.version != FXQUANT_ABI) return kVersion;
  if (c.m < 1 || c.n < 1 || c.k < 1 || c.m > kMost || c.n > kMost) return kShape;
  if (!sums_fit(c.k, x_bits, weight_bits)) return kShape;
  if (is_image(c) ? !image_agrees(c) : c.epilogue.channel_add != nullptr) return kShape;
  if (!types_known(c.epilogue)) return kTypeMissing;
  return is_aligned(c) ? kOk : kAlignment;
}

// Whether a window leaves the image, so that tap_sums are read.
inline bool windows_leave(const Call& c) {
  const auto leaves = [](int64_t size, int64_t pad, int64_t windows, int64_t stride, int64_t taps,
                         int64_t dilation) {
    return pad > 0 || (windows - 1) * stride + (taps - 1) * dilation >= size;
  };
  return is_image(c) && (leaves(c.height, c.pad_top, c.out_height, c.stride_h, c.kernel_h,
                                c.dilation_h) ||
                         leaves(c.width, c.pad_left, c.out_width, c.stride_w, c.kernel_w,
                                c.dilation_w));
}

// Before a launch: nothing is missing that the kernel reads or writes.
inline bool is_complete(const Call& c) {
  const Epilogue& e = c.epilogue;
  return c.x && c.weight && e.row && e.weight_scale && e.weight_sums && e.out &&
         (e.tap_sums || !windows_leave(c));
}

}  // namespace fxquant
