// The driver's answers to the TMA descriptors that CUTLASS asks of it.
//
// CUTLASS asserts them at most, and a descriptor for im2col that was refused is what lay on the
// stack: nothing among the kernel's parameters tells it from a good one. So the calls go through
// `noted`. Include this before anything of CUTLASS that makes descriptors.
#pragma once

// A library must answer and not abort.
#ifndef NDEBUG
#define NDEBUG
#endif

#include <cuda.h>

#include "cutlass/cuda_host_adapter.hpp"

namespace fxquant {

inline thread_local CUresult refusal = CUDA_SUCCESS;  // the first since it was last cleared

inline CUresult noted(CUresult answer) {
  if (refusal == CUDA_SUCCESS) refusal = answer;
  return answer;
}

}  // namespace fxquant

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) \
  [](auto... arguments) { return ::fxquant::noted(::cutlass::call_##function(arguments...)); }
