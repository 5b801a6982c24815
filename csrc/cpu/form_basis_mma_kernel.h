// Basis rows in bfloat16 as combinations of bfloat16 snapshots, by matrix instructions. Included
// once for each unit that has them.

// Each coefficient becomes the sum of so many bfloat16 numbers, off by 2^-26 of it at most.
constexpr int64_t kFormTerms = 3;
// Snapshots whose products are added in float32; fewer are not worth their packing.
constexpr int64_t kFormLeast = 8, kFormMost = 512;
// Columns that are combined at a time, and those that are fetched meanwhile.
constexpr int64_t kFormColumns = 2 * kMmaRows, kFormAhead = 256;

// The coefficients on the left: panels of 16 basis rows, the smallest terms of all snapshots first.
struct FormTerms {
  int64_t blocks;  // of a term
  Buffer<Word> words;

  explicit FormTerms(const FormBasisArgs& args)
      : blocks(ceil_div(args.snapshots.rows, 2 * kMmaWords)), words(panel() * panels(args)) {
    for (int64_t k = 0; k < panel() * panels(args); ++k) words.data[k] = 0;
    constexpr int64_t kNumbers = 2 * kMmaWords;
    const int64_t snapshots = args.snapshots.rows;
    for (int64_t r = 0; r < args.dim; ++r) {
      Word* block = words.data + r / kMmaRows * panel() + r % kMmaRows * kMmaWords;
      for (int64_t t = 0; t < snapshots; t += kNumbers, block += kMmaBlock) {
        double rest[kNumbers] = {};
        __builtin_memcpy(rest, args.coefficients + r * snapshots + t,
                         static_cast<size_t>(min_of(kNumbers, snapshots - t)) * sizeof(double));
        for (int64_t term = kFormTerms - 1; term >= 0; --term) {
          bf16 numbers[kNumbers];
          for (int64_t k = 0; k < kNumbers; k += VecD::lanes) {
            const VecD x = load<VecD>(rest + k);
            store(numbers + k, x);
            store(rest + k, sub(x, load<VecD>(numbers + k)));
          }
          __builtin_memcpy(block + term * blocks * kMmaBlock, numbers, sizeof(numbers));
        }
      }
    }
  }
  int64_t panel() const { return kFormTerms * blocks * kMmaBlock; }
  static int64_t panels(const FormBasisArgs& args) { return ceil_div(args.dim, kMmaRows); }

  // Whether float32 sums of such terms are as good as the result can show.
  static bool serve(const FormBasisArgs& args) {
    const int64_t count = args.dim * args.snapshots.rows;
    double largest = 0;
    for (int64_t k = 0; k < count; ++k) {
      const double size = __builtin_fabs(args.coefficients[k]);
      if (!(size <= largest)) largest = size;
      if (size != size) return false;
    }
    return args.snapshots.dtype == DType::bf16 && args.out_dtype == DType::bf16 &&
           args.snapshots.rows >= kFormLeast && args.snapshots.rows <= kFormMost &&
           largest > 0x1p-60 && largest < 0x1p60;
  }
};

// Snapshots [0, T) in columns [at, at + count) on the right: two panels, whose columns are
// [0, 4) of every eight, and [4, 8).
inline void pack_columns(const Rows& all, int64_t at, int64_t count, int64_t panel, Word* right) {
  const bf16* data = static_cast<const bf16*>(all.data) + at;
  for (int64_t t = 0; t < all.rows; t += 2, right += kMmaRows) {
    const __m512i even = load_words(data + t * all.stride, count);
    const __m512i odd =
        t + 1 < all.rows ? load_words(data + (t + 1) * all.stride, count) : _mm512_setzero_si512();
    _mm512_storeu_si512(right, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(right + panel, _mm512_unpackhi_epi16(even, odd));
  }
}

// One number of the result as the other units make it, where float32 sums were not finite.
inline void form_exactly(const FormBasisArgs& args, int64_t row, int64_t column, bf16* to) {
  const Rows& all = args.snapshots;
  const bf16* data = static_cast<const bf16*>(all.data) + column;
  double sum = 0;
  for (int64_t t = 0; t < all.rows; ++t) {
    sum = __builtin_fma(args.coefficients[row * all.rows + t], widen(data[t * all.stride]), sum);
  }
  narrow(round_to_odd(sum), *to);
}

// Row `row` of the result, columns [at, at + count), from 16 sums of each of the two panels.
inline void store_formed(const FormBasisArgs& args, int64_t row, int64_t at, int64_t count,
                         const float* one, const float* two) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 a = _mm512_loadu_ps(one), b = _mm512_loadu_ps(two);
  const VecF sums[] = {{_mm512_permutex2var_ps(a, first, b)}, {_mm512_permutex2var_ps(a, last, b)}};
  bf16* to = static_cast<bf16*>(args.out) + row * args.plan.numel + at;
  bf16 rest[kFormColumns];
  bf16* const all = count == kFormColumns ? to : rest;
  store(all, sums[0]);
  store(all + kMmaRows, sums[1]);
  if (all == rest) __builtin_memcpy(to, rest, static_cast<size_t>(count) * sizeof(bf16));
  const __m512 odd = add(sub(sums[0], sums[0]), sub(sums[1], sums[1])).v;  // NaN unless finite
  if (_mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q) == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(widen(to[i]));
    if (!(magnitude < __builtin_inff())) form_exactly(args, row, at + i, to + i);
  }
}

// Panels p, ..., p + R - 1 of basis rows.
template <int R>
inline void form_panels(const FormBasisArgs& args, int64_t p, MmaArgs mma, int64_t at,
                        int64_t count, Ahead& ahead) {
  alignas(64) float sums[R * 2 * kMmaBlock];
  const int64_t rows = min_of(R * kMmaRows, args.dim - p * kMmaRows);
  mma.left += p * mma.left_panel;
  if constexpr (kMmaGroup == 2) {
    multiply<bf16, R, 2>(mma, rows, sums, ahead);
  } else {
    multiply<bf16, 1, 1>(mma, rows, sums, ahead);
    mma.right += mma.right_panel;
    multiply<bf16, 1, 1>(mma, rows, sums + kMmaBlock, ahead);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* one = sums + (r / kMmaRows * 2 * kMmaRows + r % kMmaRows) * kMmaRows;
    store_formed(args, p * kMmaRows + r, at, count, one, one + kMmaBlock);
  }
}

void form_basis(const FormBasisArgs& args, int64_t begin, int64_t end) {
  if (!FormTerms::serve(args)) return DLDR_BASE::kernels.form_basis(args, begin, end);
  const Rows& all = args.snapshots;
  const FormTerms terms(args);
  const int64_t panels = FormTerms::panels(args), right_panel = terms.blocks * kMmaBlock;
  Buffer<Word> right(2 * right_panel);
  for (int64_t k = 0; k < 2 * right_panel; ++k) right.data[k] = 0;
  const MmaUnit unit{};
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t tile = args.plan.chunk_begin(begin); tile < chunks_end; tile += kFormAhead) {
    const int64_t tile_end = min_of(tile + kFormAhead, chunks_end);
    const int64_t bytes = sizeof(bf16) * (min_of(tile_end + kFormAhead, chunks_end) - tile_end);
    Ahead ahead(static_cast<const bf16*>(all.data) + tile_end, bytes, all.rows,
                sizeof(bf16) * all.stride);
    const int64_t products = kFormAhead / kFormColumns * kFormTerms * terms.blocks *
                             ceil_div(panels, kMmaGroup) * (2 / kMmaGroup);
    const MmaArgs mma = {terms.words.data,
                         terms.panel(),
                         right.data,
                         right_panel,
                         ceil_div(all.rows, 2),
                         kFormTerms,
                         ceil_div(ceil_div(bytes, kCacheLine) * all.rows, products)};
    for (int64_t at = tile; at < tile_end; at += kFormColumns) {
      const int64_t count = min_of(kFormColumns, tile_end - at);
      pack_columns(all, at, count, right_panel, right.data);
      int64_t p = 0;
      for (; p + kMmaGroup <= panels; p += kMmaGroup) {
        form_panels<kMmaGroup>(args, p, mma, at, count, ahead);
      }
      if (p < panels) form_panels<1>(args, p, mma, at, count, ahead);
    }
  }
}
