// What gemm_sm90a.cu and conv_sm90a.cu share on the host: the checks and the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#include "cutlass/device_kernel.h"
#include "cutlass/kernel_hardware_info.h"

#include "checks.h"
#include "visitor_sm90.h"

namespace fxquant {

inline Status checked_sm90(const Call& call) {
  if (const Status status = checked(call, 8, 8)) return status;
  const Epilogue& end = call.epilogue;
  if (end.out_type != FXQUANT_OUT) return kTypeMissing;
  if (call.n % kOutAlignment) return kShape;
  // Pairs of columns are read at once.
  return aligned(end.out, 16) && finish_of(call).run >= 2 ? kOk : kAlignment;
}

inline cutlass::KernelHardwareInfo hardware(const Call& call) {
  cutlass::KernelHardwareInfo info;  // a count above 0 keeps CUTLASS from asking the device
  info.sm_count = call.multiprocessors > 0 ? call.multiprocessors : 132;
  return info;
}

inline thread_local char last_error[96] = "";

inline Status failed(cudaError_t error) {
  cudaGetLastError();  // what is not sticky is ours to clear
  std::snprintf(last_error, sizeof(last_error), "%s", cudaGetErrorString(error));
  return kLaunch;
}

// The kernel's parameters, for which the driver makes a TMA descriptor of each operand and of the
// output.
template <class Kernel>
Status describe(const typename Kernel::Arguments& arguments, typename Kernel::Params& params) {
  refusal = CUDA_SUCCESS;
  params = Kernel::to_underlying_arguments(arguments, nullptr);
  if (refusal == CUDA_SUCCESS) return kOk;
  std::snprintf(last_error, sizeof(last_error), "the driver made no TMA descriptor: CUresult %d",
                int(refusal));
  return kLaunch;
}

// Launches on the caller's stream. A capture may record it once the kernel has run before: the
// driver loads a kernel's code at its first use.
template <class Kernel>
Status launch(const typename Kernel::Arguments& arguments, void* stream) {
  const void* function = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
  // First, since it fails cleanly without a device or on one of another kind.
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Kernel::SharedStorageSize);
  if (error != cudaSuccess) return failed(error);
  typename Kernel::Params params;
  if (const Status status = describe<Kernel>(arguments, params)) return status;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = FXQUANT_CLUSTER_M;
  cluster.val.clusterDim.y = FXQUANT_CLUSTER_N;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* pointers[] = {&params};
  error = cudaLaunchKernelExC(&config, function, pointers);
  return error == cudaSuccess ? kOk : failed(error);
}

}  // namespace fxquant

FXQUANT_API int fxquant_abi_version() { return FXQUANT_ABI; }
FXQUANT_API int64_t fxquant_workspace(const fxquant::Call*) { return 0; }
FXQUANT_API const char* fxquant_last_error() { return fxquant::last_error; }
