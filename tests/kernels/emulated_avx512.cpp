// The AVX-512 kernels (csrc/cpu/vec_avx512.h and what is built on it) over AVX-512 intrinsics that
// are emulated, so that their logic is tested on processors without AVX-512. An intrinsic that
// vec_avx512.h uses and that is missing in emulated_avx512.h does not compile: add it.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <new>
#include <type_traits>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c")
#endif

namespace dldr {
namespace avx512_emulated {
namespace {

#include "emulated_avx512.h"

}  // namespace
}  // namespace avx512_emulated
}  // namespace dldr

#define DLDR_ISA avx512_emulated
#define DLDR_VECTORS "vec_avx512.h"
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
