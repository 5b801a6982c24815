// Products of several stored rows with one staged vector: the heart of project and gram_append.
// Included once for each instruction set.

// Rows that are read side by side: enough streams and FMA chains to hide latency, few enough for
// 16 registers.
constexpr int kRowBlock = 4;
constexpr int64_t kCacheLine = 64;
// How far ahead of the read position rows are prefetched.
constexpr int64_t kPrefetchBytes = 1024;

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

// acc[r] += rows[r][begin, end) * x[begin, end) with begin and end multiples of a cache line of T.
// The line `shift` elements ahead of the position is fetched from `fetch`.
template <int R, class T, class A>
inline void dot_lines(const T* const (&rows)[R], const T* const (&fetch)[R], int64_t shift,
                      const A* x, int64_t begin, int64_t end, Vec<A> (&acc)[R]) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t i = begin; i < end; i += kStep) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(fetch[r] + i + shift);
    for (int64_t k = 0; k < kStep; k += V::lanes) {
      const V v = load<V>(x + i + k);
      for (int r = 0; r < R; ++r) acc[r] = fma(load<V>(rows[r] + i + k), v, acc[r]);
    }
  }
}

// What is left of a row behind the last whole cache line, padded with zeros; so is x.
template <int R, class T, class A>
inline void dot_rest(const T* const (&rows)[R], const A* x, int64_t begin, int64_t end,
                     Vec<A> (&acc)[R]) {
  using V = Vec<A>;
  for (int r = 0; r < R; ++r) {
    for (int64_t i = begin; i < end; i += V::lanes) {
      T rest[V::lanes] = {};
      __builtin_memcpy(rest, rows[r] + i,
                       static_cast<size_t>(min_of(V::lanes, end - i)) * sizeof(T));
      acc[r] = fma(load<V>(rest), load<V>(x + i), acc[r]);
    }
  }
}

// sums[r] += rows[first + r][begin, begin + count) * x for r < R; rows from `next` on are read
// after these.
template <int R, class T, class A>
void dot_block(const Rows& rows, int64_t first, int64_t next, int64_t begin, int64_t count,
               const A* x, double* sums) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  const int64_t whole = count / kStep * kStep;
  // From here on the lines to fetch are the first ones of the next rows.
  const int64_t near = max_of(0, whole - kAhead);
  const T* data = static_cast<const T*>(rows.data) + begin;
  const T* at[R];
  const T* ahead[R];
  V acc[R];
  for (int r = 0; r < R; ++r) {
    at[r] = data + (first + r) * rows.stride;
    ahead[r] = data + (next + r) * rows.stride;
    acc[r] = broadcast<V>(A(0));
  }
  if constexpr (scaled_format<T>::value) {
    const int64_t stride = ceil_div(rows.numel, kScaleBlock);
    const float* scale = rows.scale + first * stride + begin / kScaleBlock;
    for (int64_t block = 0; block < count; block += kScaleBlock) {
      V part[R];
      for (auto& v : part) v = broadcast<V>(A(0));
      const int64_t end = min_of(block + kScaleBlock, whole);
      if (block < near) {
        dot_lines<R>(at, at, kAhead, x, block, end, part);
      } else {
        dot_lines<R>(at, ahead, -near, x, block, end, part);
      }
      if (whole < block + kScaleBlock) dot_rest<R>(at, x, whole, count, part);
      for (int r = 0; r < R; ++r) {
        acc[r] = fma(part[r], broadcast<V>(A(scale[r * stride + block / kScaleBlock])), acc[r]);
      }
    }
  } else {
    dot_lines<R>(at, at, kAhead, x, 0, near, acc);
    dot_lines<R>(at, ahead, -near, x, near, whole, acc);
    dot_rest<R>(at, x, whole, count, acc);
  }
  for (int r = 0; r < R; ++r) sums[r] += sum_lanes<A>(acc[r]);
}

// sums[r] += rows[r][begin, begin + count) * x for all r < number of rows.
template <class T, class A>
void dot_all(const Rows& rows, int64_t number, int64_t begin, int64_t count, const A* x,
             double* sums) {
  int64_t r = 0;
  for (; r + kRowBlock <= number; r += kRowBlock) {
    const int64_t next = r + 2 * kRowBlock <= number ? r + kRowBlock : r;
    dot_block<kRowBlock, T>(rows, r, next, begin, count, x, sums + r);
  }
  switch (number - r) {
    case 3:
      dot_block<3, T>(rows, r, r, begin, count, x, sums + r);
      break;
    case 2:
      dot_block<2, T>(rows, r, r, begin, count, x, sums + r);
      break;
    case 1:
      dot_block<1, T>(rows, r, r, begin, count, x, sums + r);
      break;
    default:
      break;
  }
}
