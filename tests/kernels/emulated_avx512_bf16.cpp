// The kernels with AVX-512 BF16 and VNNI (csrc/cpu/mma_avx512_bf16.h) over emulated intrinsics.
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
namespace avx512_bf16_emulated {
namespace {

#include "emulated_avx512.h"

using __m512bh = __m512i;
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  float to[16];
  uint16_t left[32], right[32];
  std::memcpy(to, &sum, sizeof(to));
  std::memcpy(left, &a, sizeof(left));
  std::memcpy(right, &b, sizeof(right));
  for (int k = 0; k < 16; ++k) {
    to[k] = add_product(to[k], left + 2 * k + 1, right + 2 * k + 1);
    to[k] = add_product(to[k], left + 2 * k, right + 2 * k);
  }
  return _mm512_loadu_ps(to);
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  int32_t to[16];
  uint8_t left[64];
  int8_t right[64];
  std::memcpy(to, &sum, sizeof(to));
  std::memcpy(left, &a, sizeof(left));
  std::memcpy(right, &b, sizeof(right));
  for (int k = 0; k < 64; ++k) to[k / 4] += left[k] * right[k];
  return _mm512_loadu_si512(to);
}

}  // namespace
}  // namespace avx512_bf16_emulated
}  // namespace dldr

#define DLDR_ISA avx512_bf16_emulated
#define DLDR_BASE avx512_emulated
#define DLDR_MMA "mma_avx512_bf16.h"
#include "mma.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
