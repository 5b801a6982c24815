// Vectors for AVX2 + FMA + F16C: a VecF is two registers, so that its 16 lanes are summed in the
// same order as one AVX-512 register's.

struct VecF {
  static constexpr int lanes = 16;
  __m256 lo, hi;
};
struct VecD {
  static constexpr int lanes = 8;
  __m256d lo, hi;
};
struct RegF {
  static constexpr int lanes = 8;
  __m256 v;
};
struct RegD {
  static constexpr int lanes = 4;
  __m256d v;
};
// Rows that dot_kernel.h reads side by side with one vector, and with two.
constexpr int kRowBlock = 4;
constexpr int kPairRows = 2;
// The patch of gram_kernel.h, and the vectors of each row after which a line is fetched.
constexpr int kGramRows = 4, kGramColumns = 3, kGramUnroll = 2;

template <class V>
inline V broadcast(float x) {
  const __m256 v = _mm256_set1_ps(x);
  if constexpr (std::is_same_v<V, VecF>) {
    return {v, v};
  } else {
    return {v};
  }
}
template <class V>
inline V broadcast(double x) {
  const __m256d v = _mm256_set1_pd(x);
  if constexpr (std::is_same_v<V, VecD>) {
    return {v, v};
  } else {
    return {v};
  }
}

inline VecF fma(VecF a, VecF b, VecF c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline VecD fma(VecD a, VecD b, VecD c) {
  return {_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)};
}
inline RegF fma(RegF a, RegF b, RegF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline RegD fma(RegD a, RegD b, RegD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline VecF add(VecF a, VecF b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline VecD add(VecD a, VecD b) { return {_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)}; }
inline VecF sub(VecF a, VecF b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline VecD sub(VecD a, VecD b) { return {_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)}; }

// Eight stored numbers, widened to float32.
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const double* p) {
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)),
                         _mm256_cvtpd_ps(_mm256_loadu_pd(p)));
}
inline __m256 load8(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline __m256 load8(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 load8(const int8_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
}
// Placed one bit below the sign, e4m3 reads as a float16 that is 2^8 too small.
inline __m256 decode8(__m128i half) {
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}
inline __m256i halves16(const f8e4m3* p) {
  const __m256i raw = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i largest = _mm256_set1_epi16(0x3f80);
  const __m256i half =
      _mm256_and_si256(_mm256_slli_epi16(raw, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
  const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest);
  return _mm256_or_si256(half, _mm256_srli_epi16(nan, 1));
}
inline __m256 load8(const f8e4m3* p) {
  f8e4m3 block[16] = {};
  __builtin_memcpy(block, p, 8);
  return decode8(_mm256_castsi256_si128(halves16(block)));
}

template <class V, class T>
inline V load(const T* p) {
  if constexpr (std::is_same_v<V, VecF> && std::is_same_v<T, f8e4m3>) {
    const __m256i halves = halves16(p);
    return {decode8(_mm256_castsi256_si128(halves)), decode8(_mm256_extracti128_si256(halves, 1))};
  } else if constexpr (std::is_same_v<V, VecF>) {
    return {load8(p), load8(p + 8)};
  } else if constexpr (std::is_same_v<V, RegF>) {
    return {load8(p)};
  } else if constexpr (std::is_same_v<V, RegD>) {
    static_assert(std::is_same_v<T, double>);
    return {_mm256_loadu_pd(p)};
  } else if constexpr (std::is_same_v<T, double>) {
    return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
  } else {
    const __m256 x = load8(p);
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
            _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
  }
}

// Eight numbers, rounded once.
inline void store8(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
inline void store8(double* p, __m256 x) {
  _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
  _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
inline void store8(bf16* p, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store8(f16* p, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <class T>
inline void store8(T* p, __m256 x) {  // int8 and float8: written once a snapshot
  float values[8];
  _mm256_storeu_ps(values, x);
  for (int k = 0; k < 8; ++k) narrow(values[k], p[k]);
}

template <class T>
inline void store(T* p, VecF x) {
  store8(p, x.lo);
  store8(p + 8, x.hi);
}
#include "round_to_odd_x86.h"
template <class T>
inline void store(T* p, VecD x) {
  store8(p, _mm256_set_m128(round_to_odd(x.hi), round_to_odd(x.lo)));
}
inline void store(float* p, VecD x) {
  _mm256_storeu_ps(p, _mm256_set_m128(_mm256_cvtpd_ps(x.hi), _mm256_cvtpd_ps(x.lo)));
}
inline void store(double* p, VecD x) {
  _mm256_storeu_pd(p, x.lo);
  _mm256_storeu_pd(p + 4, x.hi);
}

inline double sum(RegD x) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x.v), _mm256_extractf128_pd(x.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline double sum(RegF x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  return sum(RegD{_mm256_cvtps_pd(four)});
}
