// The full Gram matrix for a range of chunks: the lower triangle in blocks that fill the registers.
// Included once for each instruction set.

template <class A>
using Reg = typename vec_of<A>::reg;

// Between the rows of a panel: a power of two would put them all into the same sets of a cache.
constexpr int64_t kPanelGap = 16;

// sums[r, c] += panel row r * panel row c for the block at (i, j), its part below the diagonal.
template <class A>
inline void gram_block(const A* panel, int64_t width, int64_t i, int64_t j, int64_t rows,
                       double* sums) {
  using V = Reg<A>;
  V acc[kGramRows][kGramColumns];
  for (auto& line : acc) {
    for (auto& v : line) v = broadcast<V>(A(0));
  }
  const int64_t stride = width + kPanelGap;
  const A* left = panel + i * stride;
  const A* right = panel + j * stride;
  for (int64_t k = 0; k < width; k += V::lanes) {
    V b[kGramColumns];
    for (int c = 0; c < kGramColumns; ++c) b[c] = load<V>(right + c * stride + k);
    for (int r = 0; r < kGramRows; ++r) {
      const V a = load<V>(left + r * stride + k);
      for (int c = 0; c < kGramColumns; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
    }
  }
  for (int r = 0; r < kGramRows; ++r) {
    for (int c = 0; c < kGramColumns; ++c) {
      if (i + r < rows && j + c <= i + r) sums[(i + r) * rows + j + c] += sum(acc[r][c]);
    }
  }
}

template <class T>
void gram_chunks(const GramArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const Rows& rows = args.snapshots;
  const int64_t total = rows.rows, width = args.plan.tile;
  const int64_t padded = ceil_div(total, kGramRows) * kGramRows + kGramColumns;
  const int64_t stride = width + kPanelGap;
  Buffer<A> buffer(padded * stride);
  A* panel = buffer.data;
  for (int64_t i = total * stride; i < padded * stride; ++i) panel[i] = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sums = args.partials + chunk * total * total;
    for (int64_t k = 0; k < total * total; ++k) sums[k] = 0;
    const int64_t chunk_end = args.plan.chunk_end(chunk);
    for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += width) {
      const int64_t count = min_of(width, chunk_end - at);
      for (int64_t r = 0; r < total; ++r) {
        widen_row<T>(rows, r, at, count, panel + r * stride);
        for (int64_t i = count; i < width; ++i) panel[r * stride + i] = 0;
      }
      for (int64_t i = 0; i < total; i += kGramRows) {
        for (int64_t j = 0; j < min_of(i + kGramRows, total); j += kGramColumns) {
          gram_block(panel, width, i, j, total, sums);
        }
      }
    }
  }
}

void gram(const GramArgs& args, int64_t begin, int64_t end) {
  dispatch(args.snapshots.dtype, [&](auto* type) {
    gram_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
