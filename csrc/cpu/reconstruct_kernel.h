// w0 + P theta for a range of chunks. Included once for each instruction set.

// out[begin, end) += sum over r < R of theta[r] * rows[r][begin, end) over whole cache lines of T.
template <int R, class T, class A>
inline void combine_lines(const T* const (&rows)[R], const T* const (&fetch)[R], int64_t shift,
                          const Vec<A> (&theta)[R], int64_t begin, int64_t end, A* out) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t i = begin; i < end; i += kStep) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(fetch[r] + i + shift);
    for (int64_t k = 0; k < kStep; k += V::lanes) {
      V sum = load<V>(out + i + k);
      for (int r = 0; r < R; ++r) sum = fma(load<V>(rows[r] + i + k), theta[r], sum);
      store(out + i + k, sum);
    }
  }
}

// What is left behind the last whole cache line; out is padded to a vector.
template <int R, class T, class A>
inline void combine_rest(const T* const (&rows)[R], const Vec<A> (&theta)[R], int64_t begin,
                         int64_t end, A* out) {
  using V = Vec<A>;
  for (int64_t i = begin; i < end; i += V::lanes) {
    V sum = load<V>(out + i);
    for (int r = 0; r < R; ++r) {
      T rest[V::lanes] = {};
      __builtin_memcpy(rest, rows[r] + i,
                       static_cast<size_t>(min_of(V::lanes, end - i)) * sizeof(T));
      sum = fma(load<V>(rest), theta[r], sum);
    }
    store(out + i, sum);
  }
}

// out[0, count) += sum over r < R of theta[first + r] * rows[first + r][begin, begin + count); rows
// from `next` on are read after these.
template <int R, class T, class A>
void combine_block(const Rows& rows, int64_t first, int64_t next, int64_t begin, int64_t count,
                   const A* theta, A* out) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  const int64_t whole = count / kStep * kStep;
  const int64_t near = max_of(0, whole - kAhead);
  const T* data = static_cast<const T*>(rows.data) + begin;
  const T* at[R];
  const T* ahead[R];
  V factor[R];
  for (int r = 0; r < R; ++r) {
    at[r] = data + (first + r) * rows.stride;
    ahead[r] = data + (next + r) * rows.stride;
    factor[r] = broadcast<V>(theta[first + r]);
  }
  if constexpr (scaled_format<T>::value) {
    const int64_t stride = ceil_div(rows.numel, kScaleBlock);
    const float* scale = rows.scale + first * stride + begin / kScaleBlock;
    for (int64_t block = 0; block < count; block += kScaleBlock) {
      for (int r = 0; r < R; ++r) {
        factor[r] = broadcast<V>(A(theta[first + r] * scale[r * stride + block / kScaleBlock]));
      }
      const int64_t end = min_of(block + kScaleBlock, whole);
      if (block < near) {
        combine_lines<R>(at, at, kAhead, factor, block, end, out);
      } else {
        combine_lines<R>(at, ahead, -near, factor, block, end, out);
      }
      if (whole < block + kScaleBlock) combine_rest<R>(at, factor, whole, count, out);
    }
  } else {
    combine_lines<R>(at, at, kAhead, factor, 0, near, out);
    combine_lines<R>(at, ahead, -near, factor, near, whole, out);
    combine_rest<R>(at, factor, whole, count, out);
  }
}

template <class T, class A>
void combine_all(const Rows& rows, int64_t begin, int64_t count, const A* theta, A* out) {
  int64_t r = 0;
  for (; r + kRowBlock <= rows.rows; r += kRowBlock) {
    const int64_t next = r + 2 * kRowBlock <= rows.rows ? r + kRowBlock : r;
    combine_block<kRowBlock, T>(rows, r, next, begin, count, theta, out);
  }
  switch (rows.rows - r) {
    case 3:
      combine_block<3, T>(rows, r, r, begin, count, theta, out);
      break;
    case 2:
      combine_block<2, T>(rows, r, r, begin, count, theta, out);
      break;
    case 1:
      combine_block<1, T>(rows, r, r, begin, count, theta, out);
      break;
    default:
      break;
  }
}

template <class T>
void reconstruct_chunks(const ReconstructArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const A* theta = static_cast<const A*>(args.theta);
  const A* origin = static_cast<const A*>(args.origin);
  Buffer<A> buffer(kTile);
  A* out = buffer.data;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t chunk_end = args.plan.chunk_end(chunk);
    for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += kTile) {
      const int64_t count = min_of(kTile, chunk_end - at);
      for (int64_t i = 0; i < kTile; ++i) out[i] = 0;
      // P theta is summed alone and the origin added last: the small sum keeps its own precision.
      combine_all<T>(args.basis, at, count, theta, out);
      if (origin != nullptr) {
        for (int64_t i = 0; i < count; ++i) out[i] += origin[at + i];
      }
      unstage_list(args.list, at, at + count, out);
    }
  }
}

void reconstruct(const ReconstructArgs& args, int64_t begin, int64_t end) {
  dispatch(args.basis.dtype, [&](auto* type) {
    reconstruct_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
