// Products of several stored rows with one or two staged vectors at a time: the heart of project,
// gram_append and gram_block. Included once for each instruction set.

// Rows that are read side by side are kRowBlock, where so many are left, then kFewRows, then one:
// enough streams and FMA chains to hide latency, few enough for the registers.
constexpr int kFewRows = 4;
// How far ahead of the read position rows are prefetched, into L2: its misses wait in longer queues
// than those of L1.
constexpr int64_t kPrefetchBytes = 2048;
constexpr int kPrefetchLevel = 2;
// Elements of one vector that are staged at once, in L2: the longer the pieces of rows that are
// read on end, the better hardware prefetches them.
constexpr int64_t kStage = 4 * kTile;

template <class A>
inline double sum_lanes(Vec<A> v) {
  A lanes[Vec<A>::lanes];
  store(lanes, v);
  double sums[Vec<A>::lanes];
  for (int k = 0; k < Vec<A>::lanes; ++k) sums[k] = lanes[k];
  for (int width = Vec<A>::lanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
  }
  return sums[0];
}

// acc[v][r] += rows[r][begin, end) * x[v][begin, end) with begin and end multiples of a cache line
// of T. The line `shift` elements ahead of the position is fetched from `fetch`.
template <int R, int K, class T, class A>
inline void dot_lines(const T* const (&rows)[R], const T* const (&fetch)[R], int64_t shift,
                      const A* const (&x)[K], int64_t begin, int64_t end, Vec<A> (&acc)[K][R]) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t i = begin; i < end; i += kStep) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(fetch[r] + i + shift, 0, kPrefetchLevel);
    for (int64_t k = 0; k < kStep; k += V::lanes) {
      V vectors[K];
      for (int v = 0; v < K; ++v) vectors[v] = load<V>(x[v] + i + k);
      for (int r = 0; r < R; ++r) {
        const V row = load<V>(rows[r] + i + k);
        for (int v = 0; v < K; ++v) acc[v][r] = fma(row, vectors[v], acc[v][r]);
      }
    }
  }
}

// What is left of a row behind the last whole cache line, padded with zeros; so is x.
template <int R, int K, class T, class A>
inline void dot_rest(const T* const (&rows)[R], const A* const (&x)[K], int64_t begin, int64_t end,
                     Vec<A> (&acc)[K][R]) {
  using V = Vec<A>;
  for (int r = 0; r < R; ++r) {
    for (int64_t i = begin; i < end; i += V::lanes) {
      T rest[V::lanes] = {};
      __builtin_memcpy(rest, rows[r] + i,
                       static_cast<size_t>(min_of(V::lanes, end - i)) * sizeof(T));
      const V row = load<V>(rest);
      for (int v = 0; v < K; ++v) acc[v][r] = fma(row, load<V>(x[v] + i), acc[v][r]);
    }
  }
}

// Vectors, `stage` numbers apart, and the sums of their products with all rows: `width` apart for
// the vectors, `chunk_width` apart for the chunks of the plan from `first` on.
template <class A>
struct Products {
  const A* x;
  int64_t stage;
  double* sums;
  int64_t width;
  const Plan& plan;
  int64_t first;
  int64_t chunk_width;

  double* sums_at(int64_t element) const {
    return sums + (element / (plan.tile * plan.tiles_per_chunk) - first) * chunk_width;
  }
};

// The products of rows first, ..., first + R - 1, columns [begin, begin + count) of one tile, with
// vectors vector, ..., vector + K - 1, which begin at x + at_x, are added to their sums; rows are
// read from `next` on (an offset in the data) after these.
template <int R, int K, class T, class A>
void dot_block(const Rows& rows, int64_t first, int64_t next, int64_t begin, int64_t count,
               const Products<A>& products, int64_t vector, int64_t at_x) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  const int64_t whole = count / kStep * kStep;
  // From here on the lines to fetch are the next ones.
  const int64_t near = max_of(0, whole - kAhead);
  const T* data = static_cast<const T*>(rows.data);
  const T* at[R];
  const T* ahead[R];
  const A* x[K];
  V acc[K][R];
  for (int r = 0; r < R; ++r) {
    at[r] = data + (first + r) * rows.stride + begin;
    ahead[r] = data + r * rows.stride + next;
  }
  for (int v = 0; v < K; ++v) {
    x[v] = products.x + (vector + v) * products.stage + at_x;
    for (auto& sum : acc[v]) sum = broadcast<V>(A(0));
  }
  if constexpr (scaled_format<T>::value) {
    const int64_t stride = ceil_div(rows.numel, kScaleBlock);
    const float* scale = rows.scale + first * stride + begin / kScaleBlock;
    for (int64_t block = 0; block < count; block += kScaleBlock) {
      V part[K][R];
      for (auto& line : part) {
        for (auto& sum : line) sum = broadcast<V>(A(0));
      }
      const int64_t end = min_of(block + kScaleBlock, whole);
      if (block < near) {
        dot_lines<R, K>(at, at, kAhead, x, block, end, part);
      } else {
        dot_lines<R, K>(at, ahead, -near, x, block, end, part);
      }
      if (whole < block + kScaleBlock) dot_rest<R, K>(at, x, whole, count, part);
      for (int r = 0; r < R; ++r) {
        const V factor = broadcast<V>(A(scale[r * stride + block / kScaleBlock]));
        for (int v = 0; v < K; ++v) acc[v][r] = fma(part[v][r], factor, acc[v][r]);
      }
    }
  } else {
    dot_lines<R, K>(at, at, kAhead, x, 0, near, acc);
    dot_lines<R, K>(at, ahead, -near, x, near, whole, acc);
    dot_rest<R, K>(at, x, whole, count, acc);
  }
  for (int v = 0; v < K; ++v) {
    double* sums = products.sums_at(begin) + (vector + v) * products.width + first;
    for (int r = 0; r < R; ++r) sums[r] += sum_lanes<A>(acc[v][r]);
  }
}

// The same for whole rows of the stage, tile by tile: columns [begin, begin + count).
template <int R, int K, class T, class A>
inline void dot_tiles(const Rows& rows, int64_t first, int64_t next, int64_t begin, int64_t count,
                      const Products<A>& products, int64_t vector) {
  for (int64_t at = 0; at < count; at += kTile) {
    const bool more = at + kTile < count;
    const int64_t then =
        more ? first * rows.stride + begin + at + kTile : next * rows.stride + begin;
    dot_block<R, K, T>(rows, first, then, begin + at, min_of(kTile, count - at), products, vector,
                       at);
  }
}

// The same for rows [first, last), R of them side by side, and then fewer.
template <int R, int K, class T, class A>
inline void dot_rows(const Rows& rows, int64_t first, int64_t last, int64_t begin, int64_t count,
                     const Products<A>& products, int64_t vector) {
  int64_t r = first;
  for (; r + R <= last; r += R) {
    dot_tiles<R, K, T>(rows, r, min_of(r + R, last - R), begin, count, products, vector);
  }
  if constexpr (R > 1) {
    constexpr int fewer = R > kFewRows ? kFewRows : 1;
    dot_rows<fewer, K, T>(rows, r, last, begin, count, products, vector);
  }
}

// The same for rows [first, last) and vectors [0, vectors). Every sum is made alone, in one order:
// how rows and vectors are grouped changes no bit.
template <class T, class A>
void dot_all(const Rows& rows, int64_t first, int64_t last, int64_t begin, int64_t count,
             const Products<A>& products, int64_t vectors) {
  // Blocks of 256 numbers are summed alone where each has a scale: too short for many rows.
  constexpr int R = scaled_format<T>::value ? kFewRows : kRowBlock;
  if (vectors == 1) {
    dot_rows<R, 1, T>(rows, first, last, begin, count, products, 0);
    return;
  }
  // Rows that one pair of vectors has read are in cache for the next.
  for (int64_t r = first; r < last; r += R) {
    const int64_t end = min_of(r + R, last);
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) {
      dot_rows<kPairRows, 2, T>(rows, r, end, begin, count, products, v);
    }
    if (v < vectors) dot_rows<R, 1, T>(rows, r, end, begin, count, products, v);
  }
}

// Zeros behind the `count` numbers of a stage, up to a whole cache line of any format.
template <class A>
inline void pad_stage(A* x, int64_t count) {
  for (int64_t i = count; i % kCacheLine != 0; ++i) x[i] = 0;
}
