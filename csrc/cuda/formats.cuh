// Storage formats on the device: single conversions, and 16-byte packs of a row. Under nvcc they
// are the hardware's; the emulation has plain twins.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "launch.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#endif

namespace dldr::cuda {

#if defined(__CUDACC__)

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8e4m3 {
  uint8_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(int8_t x) { return static_cast<float>(x); }
__device__ inline float widen(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(f8e4m3 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
}

// Round to nearest even, once.
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, double& out) { out = x; }
__device__ inline void narrow(float x, bf16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void narrow(float x, f16& out) {
  out.bits = __half_as_ushort(__float2half_rn(x));
}
__device__ inline void narrow(float x, f8e4m3& out) {
  out.bits = __nv_cvt_float_to_fp8(x, __NV_NOSAT, __NV_E4M3);
}
__device__ inline void narrow(float x, int8_t& out) {
  // A NaN becomes 0; the scale of its block is NaN.
  out = static_cast<int8_t>(x == x ? rintf(fminf(fmaxf(x, -127.0f), 127.0f)) : 0.0f);
}
__device__ inline void narrow(double x, float& out) { out = static_cast<float>(x); }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(double x, bf16& out) {
  out.bits = __bfloat16_as_ushort(__double2bfloat16(x));
}
__device__ inline void narrow(double x, f16& out) { out.bits = __half_as_ushort(__double2half(x)); }

// The scaled formats, their largest stored magnitude, and the precision of arithmetic.
template <class T>
struct scaled_format {
  static constexpr bool value = false;
  static constexpr float largest = 0;
};
template <>
struct scaled_format<int8_t> {
  static constexpr bool value = true;
  static constexpr float largest = 127;
};
template <>
struct scaled_format<f8e4m3> {
  static constexpr bool value = true;
  static constexpr float largest = 448;
};
template <class T>
struct wide_of {
  using type = float;
};
template <>
struct wide_of<double> {
  using type = double;
};

// Calls f with a null pointer of the storage type: in host code, and in kernels for the dtypes that
// parameters may have.
template <class F>
inline void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    case DType::i8:
      return f(static_cast<int8_t*>(nullptr));
    case DType::f8e4m3:
      return f(static_cast<f8e4m3*>(nullptr));
  }
}
template <class F>
__device__ inline void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    default:
      return;
  }
}

#else

#include "../cpu/formats.h"

inline double widen(double x) { return x; }
inline void narrow(float x, double& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(double x, float& out) { out = static_cast<float>(x); }
inline void narrow(double x, bf16& out) { narrow(round_to_odd(x), out); }
inline void narrow(double x, f16& out) { narrow(round_to_odd(x), out); }

#endif

__device__ inline uint32_t bits_of(float x) {
#if defined(__CUDACC__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}
__device__ inline float float_of(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

// 16 bytes of a row, and how many elements that is.
struct alignas(16) Pack {
  uint32_t words[4];
};
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));
// Elements that are widened at a time.
template <class T>
constexpr int kPart = kPack<T> < 4 ? kPack<T> : 4;

inline bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Pack) == 0;
}

// Whether every row can be read in 16-byte packs.
inline bool rows_aligned(const Rows& rows) {
  return is_aligned(rows.data) &&
         (rows.rows == 1 || rows.stride * dtype_size(rows.dtype) % sizeof(Pack) == 0);
}

// An address as that of several numbers at once. The emulation minds whether they may lie there.
template <class Wide, class T>
__device__ inline Wide* as_wide(T* at) {
#if !defined(__CUDACC__)
  if (reinterpret_cast<uintptr_t>(at) % alignof(Wide) != 0) throw std::logic_error("misaligned");
#endif
  return reinterpret_cast<Wide*>(at);
}

// Any memory, that of the block too.
template <class T>
__device__ inline Pack load_wide(const T* from) {
#if defined(__CUDACC__)
  return *as_wide<const Pack>(from);
#else
  Pack pack;
  __builtin_memcpy(&pack, as_wide<const Pack>(from), sizeof(pack));
  return pack;
#endif
}
template <class Wide, class T>
__device__ inline void store_wide(T* to, const Wide& wide) {
#if defined(__CUDACC__)
  *as_wide<Wide>(to) = wide;
#else
  __builtin_memcpy(as_wide<Wide>(to), &wide, sizeof(wide));
#endif
}

// Reads what no thread of the same launch writes.
template <class T>
__device__ inline Pack load_pack(const T* from) {
#if defined(__CUDACC__)
  const uint4 words = __ldg(as_wide<const uint4>(from));
  return {{words.x, words.y, words.z, words.w}};
#else
  return load_wide(from);
#endif
}

// The same from any address, with zeros behind the first `left` elements.
template <class T>
__device__ inline Pack load_pack_guarded(const T* from, int left) {
  union {
    Pack pack;
    T elements[kPack<T>];
  } data = {};
  DLDR_UNROLL
  for (int e = 0; e < kPack<T>; ++e) {
    if (e < left) data.elements[e] = from[e];
  }
  return data.pack;
}

// Elements [part * kPart, ...) of a pack in the precision of arithmetic.
template <class T, class A>
__device__ inline void widen_part(const Pack& pack, int part, A (&out)[kPart<T>]) {
#if defined(__CUDACC__)
  const uint32_t* words = pack.words;
  if constexpr (sizeof(T) == 8) {
    DLDR_UNROLL
    for (int e = 0; e < kPart<T>; ++e) {
      out[e] = __hiloint2double(static_cast<int>(words[2 * e + 1]), static_cast<int>(words[2 * e]));
    }
  } else if constexpr (sizeof(T) == 4) {
    DLDR_UNROLL
    for (int e = 0; e < 4; ++e) out[e] = __uint_as_float(words[e]);
  } else if constexpr (sizeof(T) == 2) {
    DLDR_UNROLL
    for (int e = 0; e < 4; ++e) {
      const uint32_t word = words[2 * part + e / 2];
      out[e] = widen(T{static_cast<uint16_t>(e % 2 ? word >> 16 : word & 0xffff)});
    }
  } else if constexpr (scaled_format<T>::largest == 127) {
    // Conversions from int8 run at a quarter of the rate: the biased byte becomes the low mantissa
    // of 2^23 instead.
    const uint32_t word = words[part] ^ 0x80808080u;
    DLDR_UNROLL
    for (int e = 0; e < 4; ++e) {
      out[e] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | e)) - 8388736.0f;
    }
  } else {
    DLDR_UNROLL
    for (int e = 0; e < 2; ++e) {
      const auto pair = static_cast<__nv_fp8x2_storage_t>(words[part] >> (16 * e) & 0xffff);
      const float2 two = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
      out[2 * e] = two.x;
      out[2 * e + 1] = two.y;
    }
  }
#else
  T elements[kPack<T>];
  __builtin_memcpy(elements, &pack, sizeof(pack));
  for (int e = 0; e < kPart<T>; ++e) out[e] = widen(elements[part * kPart<T> + e]);
#endif
}

// x = the N numbers at `from`, in 16-byte loads where the vector allows it; zeros behind the first
// `left`. Also for a vector that the same launch writes, behind a barrier.
template <class A, int N>
__device__ inline void load_numbers(const A* from, int64_t left, bool aligned, A (&x)[N]) {
  static_assert(N % kPack<A> == 0, "whole packs");
  if (aligned && left >= N) {
    Pack packs[N / kPack<A>];
    DLDR_UNROLL
    for (int p = 0; p < N / kPack<A>; ++p) packs[p] = load_wide(from + p * kPack<A>);
    DLDR_UNROLL
    for (int p = 0; p < N / kPack<A>; ++p) {
      A part[kPack<A>];
      widen_part<A>(packs[p], 0, part);
      DLDR_UNROLL
      for (int e = 0; e < kPack<A>; ++e) x[p * kPack<A> + e] = part[e];
    }
  } else {
    DLDR_UNROLL
    for (int e = 0; e < N; ++e) x[e] = e < left ? from[e] : A(0);
  }
}

// The first `left` of N numbers, rounded once, in wide stores where the vector allows it.
template <class A, class T, int N>
__device__ inline void store_numbers(const A (&x)[N], T* to, int64_t left, bool aligned) {
  constexpr size_t kBytes = N * sizeof(T) < sizeof(Pack) ? N * sizeof(T) : sizeof(Pack);
  struct alignas(kBytes) Chunk {
    T elements[kBytes / sizeof(T)];
  };
  if (aligned && left >= N) {
    constexpr int kEach = static_cast<int>(kBytes / sizeof(T));
    DLDR_UNROLL
    for (int c = 0; c < N / kEach; ++c) {
      Chunk chunk;
      DLDR_UNROLL
      for (int e = 0; e < kEach; ++e) narrow(x[c * kEach + e], chunk.elements[e]);
      store_wide(to + c * kEach, chunk);
    }
  } else {
    DLDR_UNROLL
    for (int e = 0; e < N; ++e) {
      if (e < left) narrow(x[e], to[e]);
    }
  }
}

}  // namespace dldr::cuda
