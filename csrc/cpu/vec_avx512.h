// Vectors for AVX-512 (F, BW, VL, DQ).

struct VecF {
  static constexpr int lanes = 16;
  __m512 v;
};
struct VecD {
  static constexpr int lanes = 8;
  __m512d v;
};
using RegF = VecF;
using RegD = VecD;
// Rows that dot_kernel.h reads side by side with one vector, and with two.
constexpr int kRowBlock = 8;
constexpr int kPairRows = 4;
// The patch of gram_kernel.h, and the vectors of each row after which a line is fetched.
constexpr int kGramRows = 5, kGramColumns = 5, kGramUnroll = 1;

template <class V>
inline V broadcast(float x) {
  return {_mm512_set1_ps(x)};
}
template <class V>
inline V broadcast(double x) {
  return {_mm512_set1_pd(x)};
}
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline VecF add(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecD add(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
inline VecF sub(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecD sub(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }

inline __m256 low_half(__m512 x) { return _mm512_castps512_ps256(x); }
inline __m256 high_half(__m512 x) { return _mm512_extractf32x8_ps(x, 1); }
inline __m512 join(__m256 lo, __m256 hi) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1);
}

// Sixteen stored numbers, widened to float32.
inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const double* p) {
  return join(_mm512_cvtpd_ps(_mm512_loadu_pd(p)), _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8)));
}
inline __m512 load16(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline __m512 load16(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 load16(const int8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
}
inline __m512 decode16(__m128i raw) {
  // Placed one bit below the sign, e4m3 reads as a float16 that is 2^8 too small.
  const __m128i largest = _mm_set1_epi8(0x7f);
  const __mmask16 number = _mm_cmpneq_epi8_mask(_mm_and_si128(raw, largest), largest);
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(raw), 7),
                                        _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return _mm512_mask_mul_ps(_mm512_set1_ps(__builtin_nanf("")), number, _mm512_cvtph_ps(half),
                            _mm512_set1_ps(256.0f));
}
inline __m512 load16(const f8e4m3* p) {
  return decode16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Eight; no more than eight are read.
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
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
inline __m256 load8(const f8e4m3* p) {
  return low_half(decode16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

template <class V, class T>
inline V load(const T* p) {
  if constexpr (std::is_same_v<V, VecF>) {
    return {load16(p)};
  } else if constexpr (std::is_same_v<T, double>) {
    return {_mm512_loadu_pd(p)};
  } else {
    return {_mm512_cvtps_pd(load8(p))};
  }
}

// Sixteen numbers, rounded once.
inline void store(float* p, VecF x) { _mm512_storeu_ps(p, x.v); }
inline void store(double* p, VecF x) {
  _mm512_storeu_pd(p, _mm512_cvtps_pd(low_half(x.v)));
  _mm512_storeu_pd(p + 8, _mm512_cvtps_pd(high_half(x.v)));
}
inline __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
inline __m256i to_f16(__m512 x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(bf16* p, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x.v));
}
inline void store(f16* p, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(x.v));
}
template <class T>
inline void store(T* p, VecF x) {  // int8 and float8: written once a snapshot
  float values[16];
  _mm512_storeu_ps(values, x.v);
  for (int k = 0; k < 16; ++k) narrow(values[k], p[k]);
}

#include "round_to_odd_x86.h"
inline __m256 round_to_odd(__m512d x) {
  return _mm256_set_m128(round_to_odd(_mm512_extractf64x4_pd(x, 1)),
                         round_to_odd(_mm512_castpd512_pd256(x)));
}
inline void store(float* p, VecD x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x.v)); }
inline void store(double* p, VecD x) { _mm512_storeu_pd(p, x.v); }
inline void store(bf16* p, VecD x) {
  const __m256 odd = round_to_odd(x.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(to_bf16(join(odd, odd))));
}
inline void store(f16* p, VecD x) {
  const __m256 odd = round_to_odd(x.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(to_f16(join(odd, odd))));
}

inline double sum(VecD x) {
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(x.v), _mm512_extractf64x4_pd(x.v, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline double sum(VecF x) {
  return sum(VecD{_mm512_cvtps_pd(_mm256_add_ps(low_half(x.v), high_half(x.v)))});
}
