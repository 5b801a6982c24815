// AVX-512 intrinsics, emulated with pairs of AVX2 registers. The types and functions below shadow
// those of <immintrin.h>. Included once for each unit, inside its own namespace.

// Macros in some compilers: with immediate operands.
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_extractf64x4_pd
#undef _mm512_insertf32x8
#undef _mm512_extracti64x4_epi64
#undef _mm512_inserti64x4
#undef _mm512_shuffle_i32x4

struct __m512 {
  __m256 lo, hi;
};
struct __m512d {
  __m256d lo, hi;
};
struct __m512i {
  __m256i lo, hi;
};

// name(arguments) = f applied to the low and to the high halves
#define DLDR_BINARY(type, name, f) \
  inline type name(type a, type b) { return {f(a.lo, b.lo), f(a.hi, b.hi)}; }
#define DLDR_TERNARY(type, name, f) \
  inline type name(type a, type b, type c) { return {f(a.lo, b.lo, c.lo), f(a.hi, b.hi, c.hi)}; }
#define DLDR_SET1(type, name, number, f) \
  inline type name(number x) { return {f(x), f(x)}; }
#define DLDR_CAST(to, name, from, f) \
  inline to name(from x) { return {f(x.lo), f(x.hi)}; }

DLDR_SET1(__m512, _mm512_set1_ps, float, _mm256_set1_ps)
DLDR_SET1(__m512d, _mm512_set1_pd, double, _mm256_set1_pd)
DLDR_SET1(__m512i, _mm512_set1_epi32, int, _mm256_set1_epi32)

DLDR_BINARY(__m512, _mm512_add_ps, _mm256_add_ps)
DLDR_BINARY(__m512d, _mm512_add_pd, _mm256_add_pd)
DLDR_BINARY(__m512, _mm512_sub_ps, _mm256_sub_ps)
DLDR_BINARY(__m512d, _mm512_sub_pd, _mm256_sub_pd)
DLDR_BINARY(__m512, _mm512_mul_ps, _mm256_mul_ps)
DLDR_TERNARY(__m512, _mm512_fmadd_ps, _mm256_fmadd_ps)
DLDR_TERNARY(__m512d, _mm512_fmadd_pd, _mm256_fmadd_pd)
DLDR_BINARY(__m512i, _mm512_add_epi32, _mm256_add_epi32)
DLDR_BINARY(__m512i, _mm512_and_si512, _mm256_and_si256)
DLDR_BINARY(__m512i, _mm512_or_si512, _mm256_or_si256)
inline __m512i _mm512_slli_epi32(__m512i x, unsigned count) {
  const __m128i by = _mm_cvtsi32_si128(static_cast<int>(count));
  return {_mm256_sll_epi32(x.lo, by), _mm256_sll_epi32(x.hi, by)};
}
inline __m512i _mm512_srli_epi32(__m512i x, unsigned count) {
  const __m128i by = _mm_cvtsi32_si128(static_cast<int>(count));
  return {_mm256_srl_epi32(x.lo, by), _mm256_srl_epi32(x.hi, by)};
}

DLDR_CAST(__m512i, _mm512_castps_si512, __m512, _mm256_castps_si256)
DLDR_CAST(__m512, _mm512_castsi512_ps, __m512i, _mm256_castsi256_ps)
inline __m256 _mm512_castps512_ps256(__m512 x) { return x.lo; }
inline __m256d _mm512_castpd512_pd256(__m512d x) { return x.lo; }
inline __m512 _mm512_castps256_ps512(__m256 x) {  // the high half is undefined: make it visible
  return {x, _mm256_castsi256_ps(_mm256_set1_epi32(-1))};
}
inline __m256 _mm512_extractf32x8_ps(__m512 x, int half) { return half ? x.hi : x.lo; }
inline __m256d _mm512_extractf64x4_pd(__m512d x, int half) { return half ? x.hi : x.lo; }
inline __m512 _mm512_insertf32x8(__m512 x, __m256 y, int half) {
  return half ? __m512{x.lo, y} : __m512{y, x.hi};
}

inline __m512 _mm512_loadu_ps(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline __m512d _mm512_loadu_pd(const double* p) {
  return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
}
inline void _mm512_storeu_ps(float* p, __m512 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline void _mm512_storeu_pd(double* p, __m512d x) {
  _mm256_storeu_pd(p, x.lo);
  _mm256_storeu_pd(p + 4, x.hi);
}

// Masks: bit k speaks of lane k.
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  static_assert(_CMP_UNORD_Q == 3, "the one predicate that is emulated");
  if (predicate != _CMP_UNORD_Q) __builtin_trap();
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_UNORD_Q));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_UNORD_Q));
  return static_cast<__mmask16>(lo | hi << 8);
}
#undef _mm_cmpneq_epi8_mask
inline __mmask16 _mm_cmpneq_epi8_mask(__m128i a, __m128i b) {
  return static_cast<__mmask16>(~_mm_movemask_epi8(_mm_cmpeq_epi8(a, b)));
}
inline __m512 _mm512_mask_mul_ps(__m512 source, __mmask16 mask, __m512 a, __m512 b) {
  float product[16], to[16];
  const __m512 all = _mm512_mul_ps(a, b);
  std::memcpy(product, &all, sizeof(product));
  std::memcpy(to, &source, sizeof(to));
  for (int k = 0; k < 16; ++k) to[k] = (mask >> k & 1) ? product[k] : to[k];
  std::memcpy(&source, to, sizeof(to));
  return source;
}
inline __m512i _mm512_mask_mov_epi32(__m512i source, __mmask16 mask, __m512i x) {
  int from[16], to[16];
  std::memcpy(from, &x, sizeof(from));
  std::memcpy(to, &source, sizeof(to));
  for (int k = 0; k < 16; ++k) to[k] = (mask >> k & 1) ? from[k] : to[k];
  std::memcpy(&source, to, sizeof(to));
  return source;
}
// Conversions, rounded to nearest even where they round.
inline __m128i high_bytes(__m128i x) { return _mm_unpackhi_epi64(x, x); }
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)};
}
inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(high_bytes(x))};
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
inline __m256i _mm512_cvtepi32_epi16(__m512i x) {  // keeps the low 16 bits of each lane
  int from[16];
  short to[16];
  std::memcpy(from, &x, sizeof(from));
  for (int k = 0; k < 16; ++k) to[k] = static_cast<short>(from[k] & 0xffff);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
}
inline __m512d _mm512_cvtps_pd(__m256 x) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
inline __m256 _mm512_cvtpd_ps(__m512d x) {
  return _mm256_set_m128(_mm256_cvtpd_ps(x.hi), _mm256_cvtpd_ps(x.lo));
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
inline __m256i _mm512_cvtps_ph(__m512 x, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  return _mm256_set_m128i(_mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
}

// What the matrix instructions' kernels need: csrc/cpu/mma_words.h and what is built on it.

DLDR_BINARY(__m512i, _mm512_sub_epi32, _mm256_sub_epi32)
DLDR_BINARY(__m512i, _mm512_xor_si512, _mm256_xor_si256)
DLDR_BINARY(__m512i, _mm512_unpacklo_epi16, _mm256_unpacklo_epi16)
DLDR_BINARY(__m512i, _mm512_unpackhi_epi16, _mm256_unpackhi_epi16)
DLDR_BINARY(__m512i, _mm512_unpacklo_epi32, _mm256_unpacklo_epi32)
DLDR_BINARY(__m512i, _mm512_unpackhi_epi32, _mm256_unpackhi_epi32)
DLDR_BINARY(__m512i, _mm512_unpacklo_epi64, _mm256_unpacklo_epi64)
DLDR_BINARY(__m512i, _mm512_unpackhi_epi64, _mm256_unpackhi_epi64)
DLDR_BINARY(__m512d, _mm512_mul_pd, _mm256_mul_pd)
inline __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof(x)); }
inline __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i,
                                 int j, int k, int l, int m, int n, int o, int p) {
  return {_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)};
}
inline __m256i _mm512_castsi512_si256(__m512i x) { return x.lo; }
inline __m512i _mm512_castsi256_si512(__m256i x) { return {x, _mm256_set1_epi32(-1)}; }
inline __m256i _mm512_extracti64x4_epi64(__m512i x, int half) { return half ? x.hi : x.lo; }
inline __m512i _mm512_inserti64x4(__m512i x, __m256i y, int half) {
  return half ? __m512i{x.lo, y} : __m512i{y, x.hi};
}
inline __m512d _mm512_cvtepi32_pd(__m256i x) {
  return {_mm256_cvtepi32_pd(_mm256_castsi256_si128(x)),
          _mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1))};
}
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int control) {
  __m128i from[8], to[4];
  std::memcpy(from, &a, sizeof(a));
  std::memcpy(from + 4, &b, sizeof(b));
  for (int k = 0; k < 4; ++k) to[k] = from[4 * (k / 2) + (control >> 2 * k & 3)];
  return _mm512_loadu_si512(to);
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i control, __m512 b) {
  float from[32], to[16];
  int index[16];
  std::memcpy(from, &a, sizeof(a));
  std::memcpy(from + 16, &b, sizeof(b));
  std::memcpy(index, &control, sizeof(index));
  for (int k = 0; k < 16; ++k) to[k] = from[index[k] & 31];
  return _mm512_loadu_ps(to);
}

// Products of bfloat16 as the hardware adds them: to nearest, subnormal numbers are zeros.
inline float flush(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x;
}
inline float add_product(float sum, const uint16_t* a, const uint16_t* b) {
  float x, y;
  const uint32_t left = static_cast<uint32_t>(*a) << 16, right = static_cast<uint32_t>(*b) << 16;
  std::memcpy(&x, &left, 4);
  std::memcpy(&y, &right, 4);
  return flush(__builtin_fmaf(flush(x), flush(y), flush(sum)));
}
