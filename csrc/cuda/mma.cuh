// Products of small matrices on tensor cores: one warp multiplies 16 rows of A with 8 rows of B
// over 32 bytes of each row. Under nvcc the instruction mma.sync of sm_80 and later; the emulation
// has a plain twin that finds every number where the instruction's layout has it.
//
// Lane 4 r + t holds words of rows r of A (a[0], a[2]), r + 8 of A (a[1], a[3]) and r of B (b[0],
// b[1]); the products are those of (a[0], a[1]) with b[0] and of (a[2], a[3]) with b[1]. Which
// words of a row these are is free, as long as A and B agree: a sum has no order here. acc holds
// the sums of A's rows r (acc[0], acc[1]) and r + 8 (acc[2], acc[3]) with B's rows 2 t and 2 t + 1.
#pragma once

#include "formats.cuh"
#include "lanes.cuh"

namespace dldr::cuda {

constexpr int kMmaGroup = 8;  // rows
// The formats whose rows are multiplied so.
template <class T>
constexpr bool kOnTensorCores = sizeof(T) <= 2;

// What is multiplied, and what sums it up: int8 exactly in 32 bits, all others in float32, where
// the products of 16-bit formats are exact. float8 is widened to float16 first, without loss.
template <class T>
struct mma_format {
  using sum = float;
  using element = T;
  static constexpr int kSteps = 2;  // of a pack
};
template <>
struct mma_format<int8_t> {
  using sum = int32_t;
  using element = int8_t;
  static constexpr int kSteps = 2;
};
// A float32 whose lowest 13 bits are zero.
struct tf32 {
  uint32_t bits;
};
template <>
struct mma_format<tf32> {
  using sum = float;
  using element = tf32;
};
template <>
struct mma_format<f8e4m3> {
  using sum = float;
  using element = f16;
  static constexpr int kSteps = 4;
};
// Cut into terms.
template <>
struct mma_format<float> {
  using sum = float;
  using element = bf16;
  static constexpr int kSteps = 1;
};
// Terms of a number.
template <class T>
constexpr int kMmaTerms = std::is_same_v<T, float> ? 3 : 1;

// The two words of a pack that step `step` multiplies, in each term. A float32 is the sum of its
// terms but for what lies below 2^-133: each is the upper half of what those before it leave, cut
// toward zero so that no finite number gets an infinite one. Infinities have terms that are NaN.
template <class T>
__device__ inline void mma_words(const Pack& pack, int step, uint32_t (&terms)[kMmaTerms<T>][2]) {
  uint32_t (&words)[2] = terms[0];
  if constexpr (kMmaTerms<T> == 3) {
    constexpr uint32_t kUpper = 0xffff0000u;
    DLDR_UNROLL
    for (int e = 0; e < 2; ++e) {
      uint32_t low = pack.words[2 * e], high = pack.words[2 * e + 1];
      DLDR_UNROLL
      for (auto& term : terms) {
        term[e] = (high & kUpper) | low >> 16;
        low = bits_of(float_of(low) - float_of(low & kUpper));
        high = bits_of(float_of(high) - float_of(high & kUpper));
      }
    }
  } else if constexpr (mma_format<T>::kSteps == 2) {
    words[0] = pack.words[2 * step];
    words[1] = pack.words[2 * step + 1];
  } else {
    DLDR_UNROLL
    for (int e = 0; e < 2; ++e) {
      const uint32_t pair = pack.words[step] >> (16 * e) & 0xffff;
#if defined(__CUDACC__)
      const __half2_raw two =
          __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
      words[e] = static_cast<uint32_t>(two.y) << 16 | two.x;
#else
      f16 low, high;
      narrow(widen(f8e4m3{static_cast<uint8_t>(pair & 0xff)}), low);
      narrow(widen(f8e4m3{static_cast<uint8_t>(pair >> 8)}), high);
      words[e] = static_cast<uint32_t>(high.bits) << 16 | low.bits;
#endif
    }
  }
}

// The same word for A where B has it too. Terms are made by an instruction of their own, which the
// compiler does not see through: it would gather the four registers of A anew for every product.
template <class T>
__device__ inline uint32_t mma_apart(uint32_t word) {
#if defined(__CUDACC__)
  if constexpr (kMmaTerms<T> > 1) {
    asm("prmt.b32 %0, %0, %0, 0x7610;" : "+r"(word));
  }
#endif
  return word;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "dldr_ext needs compute capability 8.0 or newer: name no older one in TORCH_CUDA_ARCH_LIST"
#endif

#if defined(__CUDACC__)

// acc += A B'.
template <class T, class S>
__device__ inline void mma(S (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using E = typename mma_format<T>::element;
  if constexpr (std::is_same_v<E, int8_t>) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<E, tf32>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<E, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#else

// The instruction drops the other bits: an operand that has some was not meant.
inline float widen(tf32 x) {
  const float value = float_of(x.bits);
  if (value == value && (x.bits & 0x1fffu) != 0) throw std::logic_error("an operand is no tf32");
  return value;
}

template <class T, class S>
inline void mma(S (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using E = typename mma_format<T>::element;
  constexpr int kWord = 4 / static_cast<int>(sizeof(E)), kHalf = 4 * kWord;  // elements
  struct Lane {
    uint32_t a[4], b[2];
  } lanes[kWarp];
  emulated::gather(Lane{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, lanes);
  const auto element = [](uint32_t word, int e) {
    E elements[kWord];
    __builtin_memcpy(elements, &word, sizeof(word));
    return static_cast<double>(widen(elements[e]));
  };
  for (int c = 0; c < 4; ++c) {
    const int row = lane() / 4 + 8 * (c / 2), column = 2 * (lane() % 4) + c % 2;
    double sum = 0;
    for (int k = 0; k < 2 * kHalf; ++k) {
      const int half = k / kHalf, quad = k % kHalf / kWord, e = k % kWord;
      sum += element(lanes[row % 8 * 4 + quad].a[row / 8 + 2 * half], e) *
             element(lanes[column * 4 + quad].b[half], e);
    }
    acc[c] = static_cast<S>(static_cast<double>(acc[c]) + sum);
  }
}

#endif

// acc += A B', of numbers in terms: without the products of terms that are at most 2^-21 of the
// whole, on average 2^-24. The others are summed up, small ones first, before they are added: the
// instruction cuts off what does not fit beside acc, and would do so six times.
template <class T, class S>
__device__ inline void mma_terms(S (&acc)[4], const uint32_t (&a)[kMmaTerms<T>][4],
                                 const uint32_t (&b)[kMmaTerms<T>][2]) {
  if constexpr (kMmaTerms<T> == 1) {
    mma<T>(acc, a[0], b[0]);
  } else {
    S sum[4] = {};
    DLDR_UNROLL
    for (int order = kMmaTerms<T> - 1; order >= 0; --order) {
      DLDR_UNROLL
      for (int term = 0; term <= order; ++term) mma<T>(sum, a[term], b[order - term]);
    }
    DLDR_UNROLL
    for (int c = 0; c < 4; ++c) acc[c] += sum[c];
  }
}

}  // namespace dldr::cuda
