// Products of panels with vdpbf16ps and vpdpbusd, one row of 16 sums in a register.

// Panels that are multiplied at a time.
constexpr int kMmaGroup = 1;
// vpdpbusd takes numbers without a sign on the right: 128 is added there, and its products with the
// left are taken off the sums.
constexpr bool kMmaOffset = true;

// Adds 128 to int8, and to sums[r] the products of row r with it.
inline void add_offset(__m512i (&x)[16], __m512i& sums) {
  const __m512i offset = _mm512_set1_epi32(static_cast<int>(0x80808080));
  for (auto& words : x) {
    sums = _mm512_dpbusd_epi32(sums, offset, words);
    words = _mm512_xor_si512(words, offset);
  }
}

struct MmaUnit {
  ~MmaUnit() {}  // nothing to set up
};

template <class N>
struct sum_of {
  using type = float;
  static constexpr int rows = 8;  // two registers each
  static __m512i dot(__m512i sum, __m512i left, __m512i right) {
    return _mm512_castps_si512(
        _mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)right, (__m512bh)left));
  }
  // The sums of a block begin at zero, as those of AMX do: small ones lose less.
  static constexpr bool apart = true;
  static __m512i add(__m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
};
template <>
struct sum_of<int8_t> {
  using type = int32_t;
  static constexpr int rows = 16;
  static __m512i dot(__m512i sum, __m512i left, __m512i right) {
    return _mm512_dpbusd_epi32(sum, right, left);
  }
  static constexpr bool apart = false;
  static __m512i add(__m512i, __m512i b) { return b; }
};

// sums[r * 16 + c], r < kRows.
template <class N, int kRows>
inline void multiply_rows(const MmaArgs& args, const Word* left, typename sum_of<N>::type* sums,
                          Ahead& ahead) {
  using S = sum_of<N>;
  __m512i acc[kRows], block[kRows];
  for (auto& sum : acc) sum = _mm512_setzero_si512();
  for (auto& sum : block) sum = _mm512_setzero_si512();
  for (int64_t repeat = 0; repeat < args.repeats; ++repeat) {
    const Word* right = args.right;
    for (int64_t first = 0; first < args.words; first += kMmaWords, left += kMmaBlock) {
      const int64_t words = min_of(kMmaWords, args.words - first);
      ahead.fetch(args.lines);
      if constexpr (S::apart) {
        for (auto& sum : block) sum = _mm512_setzero_si512();
      }
      for (int64_t w = 0; w < words; ++w, right += kMmaRows) {
        const __m512i column = _mm512_loadu_si512(right);
        for (int r = 0; r < kRows; ++r) {
          const int word = static_cast<int>(left[r * kMmaWords + w]);
          block[r] = S::dot(block[r], _mm512_set1_epi32(word), column);
        }
      }
      for (int r = 0; r < kRows; ++r) acc[r] = S::add(acc[r], block[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_si512(sums + r * kMmaRows, acc[r]);
}

// sums[r * 16 + c] of a left and a right panel, at least for r < rows.
template <class N, int R, int C>
void multiply(const MmaArgs& args, int64_t rows, typename sum_of<N>::type* sums, Ahead& ahead) {
  static_assert(R == 1 && C == 1, "kMmaGroup");
  constexpr int kHalf = kMmaRows / 2;
  if (2 * rows <= kMmaRows || sum_of<N>::rows == kHalf) {
    multiply_rows<N, kHalf>(args, args.left, sums, ahead);
    if (2 * rows <= kMmaRows) return;
    multiply_rows<N, kHalf>(args, args.left + kHalf * kMmaWords, sums + kHalf * kMmaRows, ahead);
  } else {
    multiply_rows<N, kMmaRows>(args, args.left, sums, ahead);
  }
}
