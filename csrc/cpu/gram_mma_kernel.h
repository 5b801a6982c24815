// The full Gram matrix of bfloat16, float8 and int8 rows by matrix instructions. Included once for
// each unit that has them.

// Columns whose products are added in float32, or exactly for int8.
template <class T>
constexpr int64_t kMmaSpan = scaled_format<T>::value ? kScaleBlock : 256;

// Fewer rows are not worth their packing, in panels of 16.
template <class T>
constexpr int64_t kMmaLeast = 28;
template <>
constexpr int64_t kMmaLeast<int8_t> = 12;
template <>
constexpr int64_t kMmaLeast<f8e4m3> = 48;

// Rows of a span, packed.
template <class T>
struct MmaPanels {
  using N = typename mma_of<T>::type;
  static constexpr int64_t kPanel = kMmaSpan<T> / kMmaColumns<T> * kMmaBlock;
  static constexpr bool kOffset = kMmaOffset && std::is_same_v<N, int8_t>;

  Buffer<Word> words{kGramStrip / kMmaRows * kPanel};
  double scale[kGramStrip] = {};
  int32_t offset[kGramStrip] = {};  // what `multiply` gives too much to each row of the left

  // Packs rows [first, first + rows), columns [at, at + count), as they stand on the left, or on
  // the right, or on both sides. Meanwhile `lines` cache lines a block are fetched.
  static void pack(const Rows& all, int64_t first, int64_t rows, int64_t at, int64_t count,
                   MmaPanels* left, MmaPanels* right, Ahead& ahead, int64_t lines) {
    for (int64_t row = 0; row < rows; row += kMmaRows) {
      pack_panel(all, first + row, min_of(kMmaRows, rows - row), at, count, row, left, right, ahead,
                 lines);
    }
    if constexpr (scaled_format<T>::value) {
      const float* factors = all.scale + at / kScaleBlock;
      const int64_t stride = ceil_div(all.numel, kScaleBlock);
      for (int64_t row = 0; row < rows; ++row) {
        const double factor = factors[(first + row) * stride];
        if (left != nullptr) left->scale[row] = factor;
        if (right != nullptr) right->scale[row] = factor;
      }
    }
  }

 private:
  static void pack_panel(const Rows& all, int64_t first, int64_t rows, int64_t at, int64_t count,
                         int64_t place, MmaPanels* left, MmaPanels* right, Ahead& ahead,
                         int64_t lines) {
    const T* data = static_cast<const T*>(all.data) + first * all.stride + at;
    __m512i sums = _mm512_setzero_si512();
    Word* to = left == nullptr ? nullptr : left->words.data + place / kMmaRows * kPanel;
    Word* across = right == nullptr ? nullptr : right->words.data + place / kMmaRows * kPanel;
    for (int64_t begin = 0; begin < count; begin += kMmaColumns<T>) {
      ahead.fetch(lines);
      __m512i x[kMmaRows];
      for (int64_t r = 0; r < kMmaRows; ++r) {
        x[r] = r < rows ? load_words(data + r * all.stride + begin, count - begin)
                        : _mm512_setzero_si512();
      }
      if (to != nullptr) {
        for (int64_t r = 0; r < kMmaRows; ++r) _mm512_storeu_si512(to + r * kMmaWords, x[r]);
        to += kMmaBlock;
      }
      if (across == nullptr && !kOffset) continue;
      transpose(x);
      if constexpr (kOffset) add_offset(x, sums);
      if (across != nullptr) {
        for (int64_t w = 0; w < kMmaWords; ++w) _mm512_storeu_si512(across + w * kMmaRows, x[w]);
        across += kMmaBlock;
      }
    }
    if (kOffset && left != nullptr) _mm512_storeu_si512(left->offset + place, sums);
  }
};

// sums[r * stride + c] += the product of row r of the left and row c of the right, each 16.
template <class T>
inline void add_products(const MmaPanels<T>& left, int64_t row, const MmaPanels<T>& right,
                         int64_t column,
                         const typename sum_of<typename mma_of<T>::type>::type* from, double* sums,
                         int64_t stride) {
  for (int64_t r = 0; r < kMmaRows; ++r) {
    __m512d lo, hi;
    if constexpr (std::is_same_v<T, int8_t>) {
      __m512i x = _mm512_loadu_si512(from + r * kMmaRows);
      if constexpr (kMmaOffset) x = _mm512_sub_epi32(x, _mm512_set1_epi32(left.offset[row + r]));
      lo = _mm512_cvtepi32_pd(_mm512_castsi512_si256(x));
      hi = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x, 1));
    } else {
      const __m512 x = _mm512_loadu_ps(from + r * kMmaRows);
      lo = _mm512_cvtps_pd(low_half(x));
      hi = _mm512_cvtps_pd(high_half(x));
    }
    double* const to = sums + r * stride;
    __m512d one = _mm512_loadu_pd(to), two = _mm512_loadu_pd(to + 8);
    if constexpr (scaled_format<T>::value) {
      const __m512d factor = _mm512_set1_pd(left.scale[row + r]);
      const double* scale = right.scale + column;
      one = _mm512_fmadd_pd(lo, _mm512_mul_pd(factor, _mm512_loadu_pd(scale)), one);
      two = _mm512_fmadd_pd(hi, _mm512_mul_pd(factor, _mm512_loadu_pd(scale + 8)), two);
    } else {
      one = _mm512_add_pd(one, lo);
      two = _mm512_add_pd(two, hi);
    }
    _mm512_storeu_pd(to, one);
    _mm512_storeu_pd(to + 8, two);
  }
}

// Panels i, ..., i + R - 1 of the left with panels j, ..., j + C - 1 of the right.
template <int R, int C, class T>
inline void multiply_panels(const MmaPanels<T>& left, int64_t i, int64_t rows,
                            const MmaPanels<T>& right, int64_t j, MmaArgs args, double* sums,
                            int64_t stride, Ahead& ahead) {
  using N = typename mma_of<T>::type;
  alignas(64) typename sum_of<N>::type products[R * C * kMmaBlock];
  args.left = left.words.data + i * args.left_panel;
  args.right = right.words.data + j * args.right_panel;
  multiply<N, R, C>(args, rows - i * kMmaRows, products, ahead);
  for (int p = 0; p < R; ++p) {
    for (int q = 0; q < C; ++q) {
      const int64_t row = (i + p) * kMmaRows, column = (j + q) * kMmaRows;
      add_products(left, row, right, column, products + (p * C + q) * kMmaBlock,
                   sums + row * stride + column, stride);
    }
  }
}

// One strip of rows of one chunk.
template <class T>
void gram_mma_strip(const GramArgs& args, int64_t chunk, int64_t strip) {
  using Panels = MmaPanels<T>;
  const Rows& all = args.snapshots;
  const int64_t total = all.rows, first = strip * kGramStrip;
  const int64_t rows = min_of(kGramStrip, total - first), panels = ceil_div(rows, kMmaRows);
  // Sums of whole panels; those of rows that are missing are not used.
  const int64_t stride = (strip * kGramStrip / kMmaRows + panels) * kMmaRows;
  Buffer<double> sums(panels * kMmaRows * stride);
  for (int64_t k = 0; k < panels * kMmaRows * stride; ++k) sums.data[k] = 0;
  Panels left, right;
  const int64_t chunk_end = args.plan.chunk_end(chunk);
  for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += kMmaSpan<T>) {
    const int64_t count = min_of(kMmaSpan<T>, chunk_end - at);
    for (int64_t other = 0; other <= strip; ++other) {
      const bool diagonal = other == strip;
      const int64_t begin = other * kGramStrip;
      // The rows that come next are fetched while these are packed and multiplied.
      const int64_t next = diagonal ? 0 : begin + kGramStrip;
      const int64_t next_at = diagonal ? at + kMmaSpan<T> : at;
      const int64_t next_rows = min_of(kGramStrip, total - next);
      const int64_t bytes = sizeof(T) * max_of(0, min_of(kMmaSpan<T>, chunk_end - next_at));
      Ahead ahead(static_cast<const T*>(all.data) + next * all.stride + next_at, bytes, next_rows,
                  sizeof(T) * all.stride);
      const int64_t groups = ceil_div(panels, kMmaGroup);
      const int64_t others = diagonal ? panels : kGramStrip / kMmaRows;
      const int64_t pairs = diagonal ? groups * (groups + 1) / 2 : groups * others / kMmaGroup;
      const int64_t blocks = ceil_div(count, kMmaColumns<T>);
      const int64_t lines =
          ceil_div(ceil_div(bytes, kCacheLine) * next_rows, (others + pairs) * blocks);
      if (other == 0) {
        Panels::pack(all, first, rows, at, count, &left, strip == 0 ? &right : nullptr, ahead,
                     lines);
      }
      if (strip > 0) {
        Panels::pack(all, begin, diagonal ? rows : kGramStrip, at, count, nullptr, &right, ahead,
                     lines);
      }
      const MmaArgs mma = {nullptr, Panels::kPanel, nullptr, Panels::kPanel, blocks * kMmaWords,
                           1,       lines};
      for (int64_t i = 0; i < panels; i += kMmaGroup) {
        const int64_t columns = diagonal ? min_of(i + kMmaGroup, panels) : others;
        for (int64_t j = 0; j < columns; j += kMmaGroup) {
          auto* f = &multiply_panels<1, 1, T>;
          if constexpr (kMmaGroup == 2) {
            const bool two = i + 1 < panels;
            if (j + 1 < columns) {
              f = two ? &multiply_panels<2, 2, T> : &multiply_panels<1, 2, T>;
            } else if (two) {
              f = &multiply_panels<2, 1, T>;
            }
          }
          f(left, i, rows, right, j, mma, sums.data + begin, stride, ahead);
        }
      }
    }
  }
  double* const to = args.partials + (chunk * total + first) * total;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c <= first + r; ++c) to[r * total + c] = sums.data[r * stride + c];
    for (int64_t c = first + r + 1; c < total; ++c) to[r * total + c] = 0;
  }
}

void gram(const GramArgs& args, int64_t begin, int64_t end) {
  const int64_t strips = gram_strips(args.snapshots.rows);
  dispatch(args.snapshots.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (mma_of<T>::value) {
      if (args.snapshots.rows >= kMmaLeast<T>) {
        const MmaUnit unit{};
        for (int64_t task = begin; task < end; ++task) {
          gram_mma_strip<T>(args, task / strips, task % strips);
        }
        return;
      }
    }
    DLDR_BASE::kernels.gram(args, begin, end);
  });
}
