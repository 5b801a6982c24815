// What a kernel file needs of CUDA: the runtime under nvcc, or tests/kernels/emulated_cuda.h, which
// carries out the same kernels on the CPU (DLDR_EMULATED_CUDA).
#pragma once

#if defined(DLDR_EMULATED_CUDA)
#include "emulated_cuda.h"
#else
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>

#include "../plan.h"

#if defined(__CUDACC__)
#define DLDR_UNROLL _Pragma("unroll")
#define DLDR_NO_UNROLL _Pragma("unroll 1")
// Shared memory whose size the launch gives, aligned for 16-byte accesses.
#define DLDR_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char dldr_shared[]; \
  type* const name = reinterpret_cast<type*>(dldr_shared)
#else
#define DLDR_UNROLL
#define DLDR_NO_UNROLL
#endif

namespace dldr::cuda {

#if defined(DLDR_EMULATED_CUDA)
inline std::string remedy(cudaError_t) { return ""; }
#else
#define DLDR_TEXT(...) #__VA_ARGS__
#define DLDR_TEXT_OF(...) DLDR_TEXT(__VA_ARGS__)
// What to do about an error that comes from the machine, not from the call.
inline std::string remedy(cudaError_t error) {
  int device = 0, major = 0, minor = 0, driver = 0;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string found = std::to_string(major) + "." + std::to_string(minor);
    return "; this GPU has compute capability " + found +
           ", and the library has code for __CUDA_ARCH_LIST__ = " DLDR_TEXT_OF(
               __CUDA_ARCH_LIST__) ": use tensors on the CPU" +
           (major >= 8 ? ", or build with TORCH_CUDA_ARCH_LIST=" + found
                       : std::string("; GPUs before 8.0 are not supported"));
  }
  if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion) {
    cudaDriverGetVersion(&driver);
    return "; the driver is for CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ", and the library was built with " +
           std::to_string(CUDART_VERSION / 1000) + "." +
           std::to_string(CUDART_VERSION % 1000 / 10) +
           ": update the driver, or build with an older CUDA toolkit";
  }
  return "";
}
#endif

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("dldr_ext: ") + what + ": " + cudaGetErrorString(error) +
                             remedy(error));
  }
}

// More than this much shared memory has to be asked for.
constexpr int64_t kDefaultShared = 48 << 10;

// Bytes of arguments that every driver takes, and that CUDA 12.1 and later do.
constexpr size_t kParameters = 4096, kManyParameters = 32764;

// Queues kernel<<<grid, block, shared, stream>>>(arguments...) and checks that it was accepted. A
// kernel that needs more than the default shared memory always asks for the same: the request is
// the kernel's, and another thread of the host may be here at the same time.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, int block, int64_t shared,
            void* stream, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + (8 * sizeof...(Parameters))) <= kManyParameters,
                "too many bytes of arguments");
  if (shared > kDefaultShared) {
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        what);
  }
#if defined(__CUDACC__)
  kernel<<<grid, static_cast<unsigned>(block), static_cast<size_t>(shared),
           static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
#elif defined(DLDR_EMULATED_CUDA)
  (void)stream;
  emulated::run(reinterpret_cast<const void*>(kernel), grid, block, shared,
                [kernel, arguments...] { kernel(static_cast<Parameters>(arguments)...); });
#endif
  check(cudaGetLastError(), what);
}

// A number that marks one launch in memory whose earlier contents are unknown: random but for nine
// zeros at the end. That memory holds it by chance is as likely as one flipped bit in 2^55.
inline uint64_t launch_mark() {
  static std::atomic<uint64_t> launches{(static_cast<uint64_t>(std::random_device{}()) << 32) ^
                                        std::random_device{}()};
  // splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
  uint64_t z = launches.fetch_add(0x9e3779b97f4a7c15u) + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) & ~uint64_t{511};
}

inline dim3 make_grid(int64_t x, int64_t y = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

}  // namespace dldr::cuda
