// Stored rows in the layout of matrix instructions, which multiply 16 rows with 16 others in words
// of 32 bits: two bfloat16 or four int8. Included once for each unit that has such instructions.

using Word = uint32_t;
constexpr int64_t kMmaRows = 16;   // of a panel; those that are missing are zeros
constexpr int64_t kMmaWords = 16;  // of each row in a block: a cache line
constexpr int64_t kMmaBlock = kMmaRows * kMmaWords;

// What the numbers of a storage format become: float8_e4m3fn is exact in bfloat16.
template <class T>
struct mma_of {
  static constexpr bool value = false;
};
template <>
struct mma_of<bf16> {
  static constexpr bool value = true;
  using type = bf16;
};
template <>
struct mma_of<f8e4m3> : mma_of<bf16> {};
template <>
struct mma_of<int8_t> {
  static constexpr bool value = true;
  using type = int8_t;
};
// Numbers of a row in a block.
template <class T>
constexpr int64_t kMmaColumns = kCacheLine / static_cast<int64_t>(sizeof(typename mma_of<T>::type));

// One row of a block; `count` of its numbers are stored, zeros follow.
template <class T>
inline __m512i load_words(const T* p) {
  return _mm512_loadu_si512(p);
}
inline __m512i load_words(const f8e4m3* p) {
  const __m256i lo = to_bf16(load16(p)), hi = to_bf16(load16(p + 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}
template <class T>
inline __m512i load_words(const T* p, int64_t count) {
  if (count >= kMmaColumns<T>) return load_words(p);
  T rest[kMmaColumns<T>] = {};
  __builtin_memcpy(rest, p, static_cast<size_t>(count) * sizeof(T));
  return load_words(rest);
}

// Word w of row r becomes word r of row w.
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
  }
}

// The products of a left and a right panel: word w of row r of block b lies at
// left[(b * 16 + r) * 16 + w] and at right[(b * 16 + w) * 16 + r]; further panels follow after
// `left_panel` and `right_panel` words. A row has `words`, and zeros behind them up to a whole
// block. The left has `repeats` times the blocks of the right, which is multiplied with all of
// them. Meanwhile `lines` cache lines a block are fetched.
struct MmaArgs {
  const Word* left;
  int64_t left_panel;
  const Word* right;
  int64_t right_panel;
  int64_t words;
  int64_t repeats;
  int64_t lines;
};
