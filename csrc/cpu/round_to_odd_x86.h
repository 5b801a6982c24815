// round_to_odd of formats.h for four numbers, shared by the AVX2 and the AVX-512 vectors.

// The lower halves of four 64-bit lanes.
inline __m128i low_words(__m256d x) {
  const __m256 pairs = _mm256_castpd_ps(x);
  const __m128 lo = _mm256_castps256_ps128(pairs), hi = _mm256_extractf128_ps(pairs, 1);
  return _mm_castps_si128(_mm_shuffle_ps(lo, hi, _MM_SHUFFLE(2, 0, 2, 0)));
}

inline __m128 round_to_odd(__m256d x) {
  const __m128 near = _mm256_cvtpd_ps(x);
  const __m256d sign = _mm256_set1_pd(-0.0);
  const __m256d size = _mm256_andnot_pd(sign, x);
  const __m256d found = _mm256_andnot_pd(sign, _mm256_cvtps_pd(near));
  // masks are -1 where true
  const __m128i above = low_words(_mm256_cmp_pd(size, found, _CMP_GT_OQ));
  const __m128i below = low_words(_mm256_cmp_pd(size, found, _CMP_LT_OQ));
  const __m128i bits = _mm_castps_si128(near), one = _mm_set1_epi32(1);
  const __m128i even = _mm_sub_epi32(_mm_and_si128(bits, one), one);
  const __m128i step = _mm_and_si128(even, _mm_sub_epi32(below, above));
  return _mm_castsi128_ps(_mm_add_epi32(bits, step));
}
