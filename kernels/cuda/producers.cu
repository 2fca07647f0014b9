// The ops that make quantised activations, each in one pass over memory (group norm: two reads).
//
// Reference: ../reference.py, op by op. Called by producers.py with raw pointers; images are
// [batch, spatial, channels] in memory, everything is contiguous. x_type, out_type and the type of
// a norm's parameters are Types of call.h. `row` is device memory that only kernels read.
// Each function answers a Status; what it refuses it refuses before a launch.

#include "elementwise.cuh"
#include "group_norm.cuh"
#include "layer_norm.cuh"

namespace fxquant {
namespace {

bool is_readable(const void* x, int type) {
  return x != nullptr && is_aligned(x, size_of(type));
}

// A norm ends in a quantiser or in floats.
bool is_valid_end(int out_type, Step step) {
  return is_float(out_type) || (out_type == kInt8 && step.is_valid());
}

bool is_wide(const void* pointer) { return is_aligned(pointer, 16); }

bool is_wide(Affine affine) { return is_wide(affine.weight) && is_wide(affine.bias); }

Status checked(Affine affine) {
  if (affine.weight == nullptr && affine.bias == nullptr) return kOk;
  if (!is_float(affine.type)) return kTypeMissing;
  const int64_t size = size_of(affine.type);
  return is_aligned(affine.weight, size) && is_aligned(affine.bias, size) ? kOk : kAlignment;
}

Status checked(const void* x, int x_type, const void* out, Step step) {
  if (!is_float(x_type)) return kTypeMissing;
  if (!step.is_valid() || out == nullptr) return kShape;
  return is_readable(x, x_type) ? kOk : kAlignment;
}

// The plan that x's alignment allows.
GroupPlan group_plan(int64_t length, int channels, int groups, bool is_wide) {
  GroupPlan plan;
  if (is_wide && channels % kVector == 0 && plan_groups(length, channels, groups, kVector, plan))
    return plan;
  plan_groups(length, channels, groups, 1, plan);
  return plan;
}

bool is_group_shape(int64_t batch, int64_t length, int64_t channels, int64_t groups) {
  return batch >= 0 && batch < 65536 && length >= 0 && length < (int64_t(1) << 30) &&
         channels > 0 && channels < (1 << 24) && groups > 0 && channels % groups == 0;
}

}  // namespace
}  // namespace fxquant

using namespace fxquant;

FXQUANT_API int fxquant_abi_version() { return FXQUANT_ABI; }

// The CUDA runtime's words for this thread's last kLaunch.
FXQUANT_API const char* fxquant_last_error() { return last_error(); }

// x [rows, columns] -> out int8 [rows, out_stride], the first `columns` of each row.
FXQUANT_API int fxquant_quantize(const void* x, int x_type, int64_t rows, int64_t columns,
                                 void* out, int64_t out_stride, const float* row, int index,
                                 int bits, int activation, void* stream) {
  if (rows < 0 || columns < 0 || (rows > 1 && out_stride < columns)) return kShape;
  if (rows * columns == 0) return kOk;
  const Step step = {row, index, bits};
  if (const Status status = checked(x, x_type, out, step)) return status;
  if (rows == 1 || out_stride == columns) {
    columns *= rows;
    rows = 1;
    out_stride = 0;
  }
  const bool wide = columns % kVector == 0 && out_stride % kVector == 0 && is_wide(x) &&
                    is_aligned(out, kVector);
  return with_float(x_type, [&](auto in) {
    using In = typename decltype(in)::type;
    return with_activation(activation, [&](auto kind) {
      return with_vector(wide, [&](auto vector) {
        constexpr int n = decltype(vector)::value;
        const Activated<n, In, decltype(kind)::value> source = {static_cast<const In*>(x)};
        if (columns / n >= int64_t(1) << 31) return int(kShape);
        const Rows<n> place = {static_cast<int8_t*>(out), uint32_t(columns / n), out_stride};
        return run_elementwise<n>(source, place, rows * (columns / n), step, stream);
      });
    });
  });
}

// a + b, both [size], of any two types.
FXQUANT_API int fxquant_add(const void* a, int a_type, const void* b, int b_type, int64_t size,
                            void* out, const float* row, int index, int bits, void* stream) {
  if (size < 0 || size >= int64_t(1) << 34) return kShape;
  if (size == 0) return kOk;
  const Step step = {row, index, bits};
  if (const Status status = checked(a, a_type, out, step)) return status;
  if (const Status status = checked(b, b_type, out, step)) return status;
  const bool wide = size % kVector == 0 && is_wide(a) && is_wide(b) && is_aligned(out, kVector);
  return with_float(a_type, [&](auto first) {
    using A = typename decltype(first)::type;
    return with_float(b_type, [&](auto second) {
      using B = typename decltype(second)::type;
      return with_vector(wide, [&](auto vector) {
        constexpr int n = decltype(vector)::value;
        const Sum<n, A, B> source = {static_cast<const A*>(a), static_cast<const B*>(b)};
        const Rows<n> place = {static_cast<int8_t*>(out), uint32_t(size / n), 0};
        return run_elementwise<n>(source, place, size / n, step, stream);
      });
    });
  });
}

// x [rows, 2 * width] -> out int8 [rows, width]: value * activation(gate), kGelu or kGeluTanh.
FXQUANT_API int fxquant_geglu(const void* x, int x_type, int64_t rows, int64_t width, void* out,
                              const float* row, int index, int bits, int activation,
                              void* stream) {
  if (rows < 0 || width < 0 || width >= int64_t(1) << 31) return kShape;
  if (activation != kGelu && activation != kGeluTanh) return kShape;
  if (rows * width == 0) return kOk;
  const Step step = {row, index, bits};
  if (const Status status = checked(x, x_type, out, step)) return status;
  const bool wide = width % kVector == 0 && is_wide(x) && is_aligned(out, kVector);
  return with_float(x_type, [&](auto in) {
    using In = typename decltype(in)::type;
    return with_vector(wide, [&](auto vector) {
      constexpr int n = decltype(vector)::value;
      const In* from = static_cast<const In*>(x);
      const uint32_t columns = uint32_t(width / n);
      const Rows<n> place = {static_cast<int8_t*>(out), columns, width};
      if (activation == kGelu) {
        const Gated<n, In, kGelu> source = {from, columns};
        return run_elementwise<n>(source, place, rows * columns, step, stream);
      }
      const Gated<n, In, kGeluTanh> source = {from, columns};
      return run_elementwise<n>(source, place, rows * columns, step, stream);
    });
  });
}

// x [rows, width, channels] -> out int8 [rows * factor, width * factor, channels], nearest.
FXQUANT_API int fxquant_upsample(const void* x, int x_type, int64_t rows, int64_t width,
                                 int64_t channels, int64_t factor, void* out, const float* row,
                                 int index, int bits, void* stream) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (rows < 0 || width < 0 || channels < 0 || factor < 1) return kShape;
  if (width >= kMost || channels >= kMost || factor >= kMost) return kShape;
  if (rows * width * channels == 0) return kOk;
  const Step step = {row, index, bits};
  if (const Status status = checked(x, x_type, out, step)) return status;
  const bool wide = channels % kVector == 0 && is_wide(x) && is_aligned(out, kVector);
  return with_float(x_type, [&](auto in) {
    using In = typename decltype(in)::type;
    return with_vector(wide, [&](auto vector) {
      constexpr int n = decltype(vector)::value;
      const Activated<n, In, kNone> source = {static_cast<const In*>(x)};
      const Enlarged<n> place = {static_cast<int8_t*>(out), uint32_t(channels / n),
                                 uint32_t(width), uint32_t(factor)};
      return run_elementwise<n>(source, place, rows * width * (channels / n), step, stream);
    });
  });
}

// Bytes of workspace, aligned to 16, that fxquant_group_norm takes; -1 for sizes it does not.
FXQUANT_API int64_t fxquant_group_norm_workspace(int64_t batch, int64_t length, int64_t channels,
                                                 int64_t groups) {
  if (!is_group_shape(batch, length, channels, groups)) return -1;
  const int64_t wide = group_plan(length, int(channels), int(groups), true).bytes(batch);
  const int64_t narrow = group_plan(length, int(channels), int(groups), false).bytes(batch);
  return wide > narrow ? wide : narrow;
}

// x [batch, length, channels] -> out the same, of out_type; activation none or silu. weight and
// bias [channels] or null. `row`, `index` and `bits` are read for an integer output alone.
FXQUANT_API int fxquant_group_norm(const void* x, int x_type, int64_t batch, int64_t length,
                                   int64_t channels, int64_t groups, const void* weight,
                                   const void* bias, int parameter_type, double eps,
                                   int activation, void* out, int out_type, const float* row,
                                   int index, int bits, void* workspace, int64_t workspace_bytes,
                                   void* stream) {
  if (!is_group_shape(batch, length, channels, groups)) return kShape;
  if (activation != kNone && activation != kSilu) return kShape;
  if (batch * length == 0) return kOk;
  const Step step = {row, index, bits};
  const Affine affine = {weight, bias, parameter_type};
  if (!is_float(x_type) || size_of(out_type) == 0) return kTypeMissing;
  if (!is_valid_end(out_type, step)) return kShape;
  if (!is_readable(x, x_type) || !is_readable(out, out_type)) return kAlignment;
  if (const Status status = checked(affine)) return status;
  const bool wide = is_wide(x) && is_wide(out);
  const GroupPlan plan = group_plan(length, int(channels), int(groups), wide);
  if (plan.slabs > 65535) return kShape;
  if (workspace == nullptr || workspace_bytes < plan.bytes(batch)) return kWorkspace;
  if (!is_wide(workspace)) return kAlignment;
  return with_float(x_type, [&](auto in) {
    using In = typename decltype(in)::type;
    return with_output(out_type, [&](auto to) {
      using Out = typename decltype(to)::type;
      return with_vector(plan.vector == kVector, [&](auto vector) {
        return run_group_norm<In, Out, decltype(vector)::value>(
            static_cast<const In*>(x), plan, batch, affine, eps, activation == kSilu,
            static_cast<Out*>(out), row, index, bits, workspace, stream);
      });
    });
  });
}

// x [rows, width] -> out the same, of out_type. weight and bias [width] or null.
FXQUANT_API int fxquant_layer_norm(const void* x, int x_type, int64_t rows, int64_t width,
                                   const void* weight, const void* bias, int parameter_type,
                                   double eps, void* out, int out_type, const float* row,
                                   int index, int bits, void* stream) {
  if (rows < 0 || rows >= int64_t(1) << 31 || width < 0) return kShape;
  if (rows * width == 0) return kOk;
  const Step step = {row, index, bits};
  const Affine affine = {weight, bias, parameter_type};
  if (!is_float(x_type) || size_of(out_type) == 0) return kTypeMissing;
  if (!is_valid_end(out_type, step)) return kShape;
  if (!is_readable(x, x_type) || !is_readable(out, out_type)) return kAlignment;
  if (const Status status = checked(affine)) return status;
  const bool wide = width % kVector == 0 && is_wide(x) && is_wide(out) && is_wide(affine);
  return with_float(x_type, [&](auto in) {
    using In = typename decltype(in)::type;
    return with_output(out_type, [&](auto to) {
      using Out = typename decltype(to)::type;
      return run_layer_norm<In, Out>(static_cast<const In*>(x), rows, width, affine, float(eps),
                                     static_cast<Out*>(out), row, index, bits, wide, stream);
    });
  });
}
