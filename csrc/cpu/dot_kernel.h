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

// acc[r] += rows[r][0, count) * x[0, count), where x is zero from count to the next multiple of a
// cache line of T. The line kPrefetchBytes ahead is fetched, past the end that of ahead[r].
template <int R, class T, class A>
inline void dot_rows(const T* const (&rows)[R], const T* const (&ahead)[R], const A* x,
                     int64_t count, Vec<A> (&acc)[R]) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  const int64_t whole = count / kStep * kStep;
  const int64_t near = max_of(0, whole - kAhead);
  const auto run = [&](int64_t begin, int64_t end, const T* const (&fetch)[R], int64_t shift) {
    for (int64_t i = begin; i < end; i += kStep) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(fetch[r] + i + shift);
      for (int64_t k = 0; k < kStep; k += V::lanes) {
        const V v = load<V>(x + i + k);
        for (int r = 0; r < R; ++r) acc[r] = fma(load<V>(rows[r] + i + k), v, acc[r]);
      }
    }
  };
  run(0, near, rows, kAhead);
  run(near, whole, ahead, -near);
  if (whole < count) {
    for (int r = 0; r < R; ++r) {
      T rest[kStep] = {};
      __builtin_memcpy(rest, rows[r] + whole, static_cast<size_t>(count - whole) * sizeof(T));
      for (int64_t k = 0; k < kStep; k += V::lanes) {
        acc[r] = fma(load<V>(rest + k), load<V>(x + whole + k), acc[r]);
      }
    }
  }
}

// sums[r] += rows[first + r][begin, begin + count) * x for r < R.
template <int R, class T, class A>
void dot_block(const Rows& rows, int64_t first, int64_t next, int64_t begin, int64_t count,
               const A* x, double* sums) {
  using V = Vec<A>;
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
      const T* from[R];
      const T* to[R];
      V part[R];
      for (int r = 0; r < R; ++r) {
        from[r] = at[r] + block;
        to[r] = from[r] + kPrefetchBytes;
        part[r] = broadcast<V>(A(0));
      }
      dot_rows<R>(from, to, x + block, min_of(kScaleBlock, count - block), part);
      for (int r = 0; r < R; ++r) {
        acc[r] = fma(part[r], broadcast<V>(A(scale[r * stride + block / kScaleBlock])), acc[r]);
      }
    }
  } else {
    dot_rows<R>(at, ahead, x, count, acc);
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
