// w0 + P theta, and P theta together with the residual of a gradient, for a range of chunks.
// Included once for each instruction set.

// out[v][begin, end) += sum over r < R of theta[v][r] * rows[r][begin, end) over whole cache lines
// of T.
template <int R, int K, class T, class A>
inline void combine_lines(const T* const (&rows)[R], const T* const (&fetch)[R], int64_t shift,
                          const Vec<A> (&theta)[K][R], int64_t begin, int64_t end,
                          A* const (&out)[K]) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t i = begin; i < end; i += kStep) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(fetch[r] + i + shift, 0, kPrefetchLevel);
    for (int64_t k = 0; k < kStep; k += V::lanes) {
      V sums[K];
      for (int v = 0; v < K; ++v) sums[v] = load<V>(out[v] + i + k);
      for (int r = 0; r < R; ++r) {
        const V row = load<V>(rows[r] + i + k);
        for (int v = 0; v < K; ++v) sums[v] = fma(row, theta[v][r], sums[v]);
      }
      for (int v = 0; v < K; ++v) store(out[v] + i + k, sums[v]);
    }
  }
}

// What is left behind the last whole cache line; out is padded to a vector.
template <int R, int K, class T, class A>
inline void combine_rest(const T* const (&rows)[R], const Vec<A> (&theta)[K][R], int64_t begin,
                         int64_t end, A* const (&out)[K]) {
  using V = Vec<A>;
  for (int64_t i = begin; i < end; i += V::lanes) {
    for (int r = 0; r < R; ++r) {
      T rest[V::lanes] = {};
      __builtin_memcpy(rest, rows[r] + i,
                       static_cast<size_t>(min_of(V::lanes, end - i)) * sizeof(T));
      const V row = load<V>(rest);
      for (int v = 0; v < K; ++v) {
        store(out[v] + i, fma(row, theta[v][r], load<V>(out[v] + i)));
      }
    }
  }
}

// out[v][0, count) += sum over r < R of theta[v][first + r] * rows[first + r][begin, begin +
// count); rows from `next` on are read after these.
template <int R, int K, class T, class A>
void combine_block(const Rows& rows, int64_t first, int64_t next, int64_t begin, int64_t count,
                   const A* const (&theta)[K], A* const (&out)[K]) {
  using V = Vec<A>;
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  const int64_t whole = count / kStep * kStep;
  const int64_t near = max_of(0, whole - kAhead);
  const T* data = static_cast<const T*>(rows.data) + begin;
  const T* at[R];
  const T* ahead[R];
  V factor[K][R];
  for (int r = 0; r < R; ++r) {
    at[r] = data + (first + r) * rows.stride;
    ahead[r] = data + (next + r) * rows.stride;
    for (int v = 0; v < K; ++v) factor[v][r] = broadcast<V>(theta[v][first + r]);
  }
  if constexpr (scaled_format<T>::value) {
    const int64_t stride = ceil_div(rows.numel, kScaleBlock);
    const float* scale = rows.scale + first * stride + begin / kScaleBlock;
    for (int64_t block = 0; block < count; block += kScaleBlock) {
      for (int r = 0; r < R; ++r) {
        const float step = scale[r * stride + block / kScaleBlock];
        for (int v = 0; v < K; ++v) factor[v][r] = broadcast<V>(A(theta[v][first + r] * step));
      }
      const int64_t end = min_of(block + kScaleBlock, whole);
      if (block < near) {
        combine_lines<R, K>(at, at, kAhead, factor, block, end, out);
      } else {
        combine_lines<R, K>(at, ahead, -near, factor, block, end, out);
      }
      if (whole < block + kScaleBlock) combine_rest<R, K>(at, factor, whole, count, out);
    }
  } else {
    combine_lines<R, K>(at, at, kAhead, factor, 0, near, out);
    combine_lines<R, K>(at, ahead, -near, factor, near, whole, out);
    combine_rest<R, K>(at, factor, whole, count, out);
  }
}

// The same for rows from `first` on, R of them side by side, and then fewer.
template <int R, int K, class T, class A>
inline void combine_rows(const Rows& rows, int64_t first, int64_t begin, int64_t count,
                         const A* const (&theta)[K], A* const (&out)[K]) {
  int64_t r = first;
  for (; r + R <= rows.rows; r += R) {
    combine_block<R, K, T>(rows, r, min_of(r + R, rows.rows - R), begin, count, theta, out);
  }
  if constexpr (R > 1) {
    constexpr int fewer = R > kFewRows ? kFewRows : 1;
    combine_rows<fewer, K, T>(rows, r, begin, count, theta, out);
  }
}

// The same for all rows. Each number is summed row by row: how rows are grouped changes no bit.
template <int K, class T, class A>
void combine_all(const Rows& rows, int64_t begin, int64_t count, const A* const (&theta)[K],
                 A* const (&out)[K]) {
  for (A* const sums : out) {
    for (int64_t i = 0; i < ceil_div(count, kCacheLine) * kCacheLine; ++i) sums[i] = 0;
  }
  combine_rows<kRowBlock, K, T>(rows, 0, begin, count, theta, out);
}

template <class T>
void reconstruct_chunks(const ReconstructArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const A* const theta = static_cast<const A*>(args.theta);
  const A* const origin = static_cast<const A*>(args.origin);
  Buffer<A> buffer(kStage);
  A* const out = buffer.data;
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += kStage) {
    const int64_t count = min_of(kStage, chunks_end - at);
    // P theta is summed alone and the origin added last: the small sum keeps its own precision.
    combine_all<1, T, A>(args.basis, at, count, {theta}, {out});
    if (origin != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] += origin[at + i];
    }
    unstage_list(args.list, at, at + count, out);
  }
}

void reconstruct(const ReconstructArgs& args, int64_t begin, int64_t end) {
  dispatch(args.basis.dtype, [&](auto* type) {
    reconstruct_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

template <class T>
void residual_chunks(const ResidualArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const A* const theta = static_cast<const A*>(args.theta);
  const A* const coordinates = static_cast<const A*>(args.coordinates);
  A* direction = static_cast<A*>(args.direction);
  A* residual = static_cast<A*>(args.residual);
  Buffer<A> buffer(3 * kTile);
  A* const moved = buffer.data;
  A* const inside = moved + kTile;
  A* const flat = inside + kTile;
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += kTile) {
    const int64_t count = min_of(kTile, chunks_end - at);
    combine_all<2, T, A>(args.basis, at, count, {theta, coordinates}, {moved, inside});
    stage_list(args.list, at, at + count, flat);
    for (int64_t i = 0; i < count; ++i) direction[at + i] = moved[i];
    for (int64_t i = 0; i < count; ++i) residual[at + i] = flat[i] - inside[i];
  }
}

void reconstruct_residual(const ResidualArgs& args, int64_t begin, int64_t end) {
  dispatch(args.basis.dtype, [&](auto* type) {
    residual_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
