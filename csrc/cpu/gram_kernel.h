// The full Gram matrix, a strip of rows of one chunk at a time: the lower triangle in patches that
// fill the registers. Included once for each instruction set.

template <class A>
using Reg = typename vec_of<A>::reg;

// Between the rows of a panel: a power of two would put them all into the same sets of a cache.
constexpr int64_t kPanelGap = 16;

// The panel that is read next: fetched, line by line, while the arithmetic on this one runs.
struct Ahead {
  const char* data = nullptr;  // the next cache line
  int64_t left = 0;            // lines left of this row
  int64_t lines = 0;           // of each row
  int64_t rows = 0;            // rows left behind this one
  int64_t step = 0;            // bytes from the end of a row's lines to the next row's first

  Ahead(const void* first, int64_t bytes, int64_t rows, int64_t stride)
      : data(static_cast<const char*>(first)),
        left(ceil_div(bytes, kCacheLine)),
        lines(left),
        rows(rows - 1),
        step(stride - left * kCacheLine) {}

  void fetch() {
    if (left == 0) return;
    __builtin_prefetch(data, 0, 2);  // no nearer than L2: the panel has the L1
    data += kCacheLine;
    if (--left == 0 && rows > 0) {
      --rows;
      data += step;
      left = lines;
    }
  }
};

// sums[r * total + c] += left row r * right row c for the rows r < `rows` and columns c < `columns`
// of a patch; on the diagonal each row has one column more than the one before it.
template <class A>
inline void gram_patch(const A* left, const A* right, int64_t width, int64_t rows, int64_t columns,
                       bool diagonal, double* sums, int64_t total, Ahead& ahead) {
  using V = Reg<A>;
  // A panel's width is a multiple of kScaleBlock.
  constexpr int64_t kStep = kGramUnroll * V::lanes;
  V acc[kGramRows][kGramColumns];
  for (auto& line : acc) {
    for (auto& v : line) v = broadcast<V>(A(0));
  }
  const int64_t stride = width + kPanelGap;
  for (int64_t at = 0; at < width; at += kStep) {
    ahead.fetch();
    for (int64_t k = at; k < at + kStep; k += V::lanes) {
      V b[kGramColumns];
      for (int c = 0; c < kGramColumns; ++c) b[c] = load<V>(right + c * stride + k);
      for (int r = 0; r < kGramRows; ++r) {
        const V a = load<V>(left + r * stride + k);
        for (int c = 0; c < kGramColumns; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
      }
    }
  }
  for (int64_t r = 0; r < min_of(kGramRows, rows); ++r) {
    const int64_t last = min_of(kGramColumns, diagonal ? columns + r : columns);
    for (int64_t c = 0; c < last; ++c) sums[r * total + c] += sum(acc[r][c]);
  }
}

// The rows [first, first + rows) of a tile, widened; zeros behind `count` columns.
template <class T, class A>
inline void fill_panel(const Rows& snapshots, int64_t first, int64_t rows, int64_t at,
                       int64_t count, int64_t width, A* panel) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = panel + r * (width + kPanelGap);
    widen_row<T>(snapshots, first + r, at, count, row);
    for (int64_t i = count; i < width; ++i) row[i] = 0;
  }
}

// One strip of rows of one chunk.
template <class T>
void gram_strip(const GramArgs& args, int64_t chunk, int64_t strip) {
  using A = typename wide_of<T>::type;
  const Rows& all = args.snapshots;
  const int64_t total = all.rows, width = args.plan.tile, stride = width + kPanelGap;
  const int64_t first = strip * kGramStrip, rows = min_of(kGramStrip, total - first);
  // Patches may reach past the rows; what they find there is a number, and is not used.
  const int64_t padded = min_of(kGramStrip, total) + kGramRows + kGramColumns;
  Buffer<A> buffer((strip > 0 ? 2 : 1) * padded * stride);
  A* const left = buffer.data;
  A* const other_rows = left + padded * stride;
  for (int64_t i = rows * stride; i < padded * stride; ++i) left[i] = 0;
  for (int64_t i = kGramStrip * stride; strip > 0 && i < padded * stride; ++i) other_rows[i] = 0;
  double* const sums = args.partials + (chunk * total + first) * total;
  for (int64_t k = 0; k < rows * total; ++k) sums[k] = 0;
  const int64_t chunk_end = args.plan.chunk_end(chunk);
  for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += width) {
    const int64_t count = min_of(width, chunk_end - at);
    fill_panel<T>(all, first, rows, at, count, width, left);
    for (int64_t other = 0; other <= strip; ++other) {
      const bool diagonal = other == strip;
      A* const right = diagonal ? left : other_rows;
      const int64_t begin = other * kGramStrip, columns = diagonal ? rows : kGramStrip;
      if (!diagonal) fill_panel<T>(all, begin, columns, at, count, width, right);
      const int64_t next = diagonal ? 0 : begin + kGramStrip;
      const int64_t next_at = diagonal ? at + width : at;
      const int64_t bytes = sizeof(T) * max_of(0, min_of(width, chunk_end - next_at));
      Ahead ahead(static_cast<const T*>(all.data) + next * all.stride + next_at, bytes,
                  min_of(kGramStrip, total - next), sizeof(T) * all.stride);
      for (int64_t i = 0; i < rows; i += kGramRows) {
        const int64_t end = diagonal ? min_of(i + kGramRows, rows) : columns;
        for (int64_t j = 0; j < end; j += kGramColumns) {
          gram_patch(left + i * stride, right + j * stride, width, rows - i,
                     diagonal ? i + 1 - j : columns - j, diagonal, sums + i * total + begin + j,
                     total, ahead);
        }
      }
    }
  }
}

void gram(const GramArgs& args, int64_t begin, int64_t end) {
  const int64_t strips = gram_strips(args.snapshots.rows);
  dispatch(args.snapshots.dtype, [&](auto* type) {
    for (int64_t task = begin; task < end; ++task) {
      gram_strip<std::remove_pointer_t<decltype(type)>>(args, task / strips, task % strips);
    }
  });
}
