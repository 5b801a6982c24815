// The full Gram matrix for a range of chunks: the lower triangle in blocks that fill the registers.
// Included once for each instruction set.

template <class A>
using Reg = typename vec_of<A>::reg;

// sums[r * stride + c] += panel row (i + r) * panel row (j + c) over `width` elements.
template <class A>
inline void gram_block(const A* panel, int64_t width, int64_t i, int64_t j, int64_t rows,
                       double* sums) {
  using V = Reg<A>;
  V acc[kGramRows][kGramColumns];
  for (auto& line : acc) {
    for (auto& v : line) v = broadcast<V>(A(0));
  }
  const A* left = panel + i * width;
  const A* right = panel + j * width;
  for (int64_t k = 0; k < width; k += V::lanes) {
    V b[kGramColumns];
    for (int c = 0; c < kGramColumns; ++c) b[c] = load<V>(right + c * width + k);
    for (int r = 0; r < kGramRows; ++r) {
      const V a = load<V>(left + r * width + k);
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
  Buffer<A> buffer(padded * width);
  A* panel = buffer.data;
  for (int64_t i = total * width; i < padded * width; ++i) panel[i] = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sums = args.partials + chunk * total * total;
    for (int64_t k = 0; k < total * total; ++k) sums[k] = 0;
    const int64_t chunk_end = args.plan.chunk_end(chunk);
    for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += width) {
      const int64_t count = min_of(width, chunk_end - at);
      for (int64_t r = 0; r < total; ++r) {
        widen_row<T>(rows, r, at, count, panel + r * width);
        for (int64_t i = count; i < width; ++i) panel[r * width + i] = 0;
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
