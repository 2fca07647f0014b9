// The C interface of the integer GEMM and convolution libraries: plain structs, no torch.
// kernels/cutlass/gemm.py mirrors them field by field; a change of either raises FXQUANT_ABI.
#pragma once
#include <cstdint>

#define FXQUANT_ABI 1
#define FXQUANT_API extern "C" __attribute__((visibility("default")))

namespace fxquant {

enum Type : int32_t { kNothing = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3, kInt8 = 4 };
enum Activation : int32_t { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3 };

// What a library answers. Everything but kOk comes before a kernel is launched, and leaves the CUDA
// context as it was; kLaunch carries the runtime's error, which fxquant_last_error names.
enum Status : int32_t {
  kOk = 0,
  kVersion = 1,    // the caller's structs are of another version
  kShape = 2,      // a size this tile cannot do (CUTLASS's can_implement said no)
  kAlignment = 3,  // a pointer or a stride off its alignment, or nothing where something must be
  kTypeMissing = 4,  // an output or residual type this library was not compiled for
  kWorkspace = 5,  // the workspace is smaller than fxquant_workspace says
  kLaunch = 6,
};

// What happens to the sums. Pointers are device memory; a null one is absent.
struct Epilogue {
  const float* row;             // [quantisers][2]: scale, zero point
  const float* weight_scale;    // [n]
  const int32_t* weight_sums;   // [n] integers of an output channel, summed
  const int32_t* tap_sums;      // [kernel_h * kernel_w][n] the same by tap; convolutions with padding
  const float* bias;            // [n]
  const float* channel_add;     // [batch][n]; convolutions
  const void* residual;         // [m][n], contiguous, of residual_type
  void* out;                    // [m][n], contiguous, of out_type
  int32_t x_index;
  int32_t out_index;            // below 0: a float output
  int32_t out_bits;
  int32_t activation;
  int32_t residual_type;
  int32_t out_type;
};

// One call. A linear is m = rows, n, k and leaves the image at zero; a convolution sets the image
// and m = batch * out_height * out_width, k = kernel_h * kernel_w * channels.
// Layouts: x [m][k] or [batch][height][width][channels], weight [n][k] or [n][kernel_h][kernel_w][channels].
struct Call {
  int32_t version;              // FXQUANT_ABI
  int32_t multiprocessors;      // of the device; 0 asks the library to assume 132
  const void* x;
  const void* weight;
  void* workspace;
  int64_t workspace_bytes;
  int64_t m, n, k;
  int32_t batch, height, width, channels;
  int32_t kernel_h, kernel_w, stride_h, stride_w;
  int32_t pad_top, pad_left, dilation_h, dilation_w;
  int32_t out_height, out_width;
  Epilogue epilogue;
};

}  // namespace fxquant

// Each library defines:
//   int fxquant_abi_version()                      FXQUANT_ABI
//   int fxquant_can_run(const Call*)               a Status, on the host alone: no GPU needed
//   int64_t fxquant_workspace(const Call*)         bytes
//   int fxquant_shared_memory()                    bytes of shared memory a block takes
//   int fxquant_run(const Call*, void* stream)     a Status
//   const char* fxquant_last_error()               the CUDA runtime's words for the last kLaunch
