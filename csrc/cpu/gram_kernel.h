// The full Gram matrix, a strip of rows of one chunk at a time: the lower triangle in patches that
// fill the registers. Included once for each instruction set.

template <class A>
using Reg = typename vec_of<A>::reg;

// Between the rows of a panel: a power of two would put them all into the same sets of a cache.
constexpr int64_t kPanelGap = 16;

// Rows of a tile in the working precision, `stride` numbers apart.
template <class A>
struct Panel {
  const A* data;
  int64_t rows;
  int64_t stride;

  Panel from(int64_t row) const { return {data + row * stride, rows - row, stride}; }
};

// sums[r * total + c] += row r of left * row c of right, all c < columns, for one patch at the
// start of both. On the diagonal each row has one column more than the one before it; kHalf is a
// square patch whose first row has one. Kept out of line: inlined, it gets too few registers.
template <bool kHalf, class A>
__attribute__((noinline)) void gram_patch(const Panel<A>& left, const Panel<A>& right,
                                          int64_t width, int64_t columns, bool diagonal,
                                          double* sums, int64_t total, Ahead& ahead) {
  using V = Reg<A>;
  constexpr int64_t kStep = kGramUnroll * V::lanes;
  // A patch may reach past the rows: it reads the first one there, and uses nothing of it.
  const A* rows[kGramRows];
  const A* others[kGramColumns];
  for (int r = 0; r < kGramRows; ++r) rows[r] = left.data + (r < left.rows ? r : 0) * left.stride;
  for (int c = 0; c < kGramColumns; ++c) {
    others[c] = right.data + (c < right.rows ? c : 0) * right.stride;
  }
  V acc[kGramRows][kGramColumns];
  for (auto& line : acc) {
    for (auto& v : line) v = broadcast<V>(A(0));
  }
  for (int64_t at = 0; at < width; at += kStep) {
    ahead.fetch();
    for (int64_t k = at; k < at + kStep; k += V::lanes) {
      V b[kGramColumns];
      for (int c = 0; c < kGramColumns; ++c) b[c] = load<V>(others[c] + k);
      for (int r = 0; r < kGramRows; ++r) {
        const V a = kHalf ? b[r] : load<V>(rows[r] + k);
        for (int c = 0; c < (kHalf ? r + 1 : kGramColumns); ++c) {
          acc[r][c] = fma(a, b[c], acc[r][c]);
        }
      }
    }
  }
  for (int64_t r = 0; r < min_of(kGramRows, left.rows); ++r) {
    const int64_t last = min_of(kGramColumns, diagonal ? columns + r : columns);
    for (int64_t c = 0; c < last; ++c) sums[r * total + c] += sum(acc[r][c]);
  }
}

// Whether rows this many bytes apart crowd into the same sets of a cache whose ways have 64 KiB.
inline bool crowded(int64_t stride, int64_t rows, int64_t bytes) {
  constexpr int64_t kWay = 64 << 10, kMost = 8;
  int64_t near = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = r * stride % kWay;
    near += offset < bytes || kWay - offset < bytes;
  }
  return near > kMost;
}

// The rows [first, first + rows) of a tile: where they lie if the arithmetic can use them there,
// else in `buffer`, widened, with zeros behind `count` columns up to `width`.
template <class T, class A>
inline Panel<A> make_panel(const Rows& all, int64_t first, int64_t rows, int64_t at, int64_t count,
                           int64_t width, A* buffer) {
  if constexpr (std::is_same_v<T, A>) {
    const int64_t size = sizeof(A);
    if (count == width && !crowded(all.stride * size, rows, width * size)) {
      return {static_cast<const A*>(all.data) + first * all.stride + at, rows, all.stride};
    }
  }
  const Panel<A> panel = {buffer, rows, width + kPanelGap};
  for (int64_t r = 0; r < rows; ++r) {
    A* row = buffer + r * panel.stride;
    widen_row<T>(all, first + r, at, count, row);
    for (int64_t i = count; i < width; ++i) row[i] = 0;
  }
  return panel;
}

// One strip of rows of one chunk.
template <class T>
void gram_strip(const GramArgs& args, int64_t chunk, int64_t strip) {
  using A = typename wide_of<T>::type;
  const Rows& all = args.snapshots;
  const int64_t total = all.rows, width = args.plan.tile;
  const int64_t first = strip * kGramStrip, rows = min_of(kGramStrip, total - first);
  const int64_t size = min_of(kGramStrip, total) * (width + kPanelGap);
  Buffer<A> buffer((strip > 0 ? 2 : 1) * size);
  double* const sums = args.partials + (chunk * total + first) * total;
  for (int64_t k = 0; k < rows * total; ++k) sums[k] = 0;
  const int64_t chunk_end = args.plan.chunk_end(chunk);
  for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += width) {
    const int64_t count = min_of(width, chunk_end - at);
    const Panel<A> left = make_panel<T>(all, first, rows, at, count, width, buffer.data);
    for (int64_t other = 0; other <= strip; ++other) {
      const bool diagonal = other == strip;
      const int64_t begin = other * kGramStrip, columns = diagonal ? rows : kGramStrip;
      const Panel<A> right =
          diagonal ? left
                   : make_panel<T>(all, begin, columns, at, count, width, buffer.data + size);
      const int64_t next = diagonal ? 0 : begin + kGramStrip;
      const int64_t next_at = diagonal ? at + width : at;
      const int64_t bytes = sizeof(T) * max_of(0, min_of(width, chunk_end - next_at));
      Ahead ahead(static_cast<const T*>(all.data) + next * all.stride + next_at, bytes,
                  min_of(kGramStrip, total - next), sizeof(T) * all.stride);
      for (int64_t i = 0; i < rows; i += kGramRows) {
        const int64_t end = diagonal ? min_of(i + kGramRows, rows) : columns;
        for (int64_t j = 0; j < end; j += kGramColumns) {
          auto* patch = &gram_patch<false, A>;
          if constexpr (kGramRows == kGramColumns) {
            if (diagonal && i == j) patch = &gram_patch<true, A>;
          }
          patch(left.from(i), right.from(j), width, diagonal ? i + 1 - j : columns - j, diagonal,
                sums + i * total + begin + j, total, ahead);
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
