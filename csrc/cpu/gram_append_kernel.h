// Stores a snapshot and multiplies it with the earlier ones, for a range of chunks. Included once
// for each instruction set.

// Rounds x to the storage format at `row` and back: the Gram matrix is that of the stored rows.
template <class T, class A>
inline void store_row(A* x, int64_t count, T* row, float* scale) {
  if constexpr (scaled_format<T>::value) {
    for (int64_t block = 0; block < count; block += kScaleBlock) {
      const int64_t size = min_of(kScaleBlock, count - block);
      float largest = 0;
      for (int64_t i = 0; i < size; ++i) {
        const float magnitude = __builtin_fabsf(x[block + i]);
        if (!(magnitude <= largest)) largest = magnitude;  // a NaN stays
        if (largest != largest) break;
      }
      const float step = largest / scaled_format<T>::largest;
      const float factor = step < 0x1p-126f ? 0 : step;  // a subnormal's inverse would overflow
      const float inverse = factor > 0 ? scaled_format<T>::largest / largest : 0;
      scale[block / kScaleBlock] = factor;
      for (int64_t i = 0; i < size; ++i) x[block + i] *= inverse;
      narrow_array(x + block, size, row + block);
      widen_array(row + block, size, x + block);
      for (int64_t i = 0; i < size; ++i) x[block + i] *= factor;
    }
  } else {
    narrow_array(x, count, row);
    widen_array(row, count, x);
  }
}

template <class T>
void gram_append_chunks(const GramAppendArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const A* anchor = static_cast<const A*>(args.anchor);
  T* row = static_cast<T*>(args.row);
  Buffer<A> buffer(kTile);
  A* x = buffer.data;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sums = args.partials + chunk * (args.index + 1);
    for (int64_t t = 0; t <= args.index; ++t) sums[t] = 0;
    const int64_t chunk_end = args.plan.chunk_end(chunk);
    for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += kTile) {
      const int64_t count = min_of(kTile, chunk_end - at);
      stage_list(args.list, at, at + count, x);
      for (int64_t i = 0; i < count; ++i) x[i] -= anchor[at + i];
      store_row(x, count, row + at,
                scaled_format<T>::value ? args.row_scale + at / kScaleBlock : nullptr);
      for (int64_t i = count; i < kTile && i % kCacheLine != 0; ++i) x[i] = 0;
      // The new row too is read back from memory (from cache): one arithmetic for all products.
      dot_all<T>(args.snapshots, args.index + 1, at, count, x, sums);
    }
  }
}

void gram_append(const GramAppendArgs& args, int64_t begin, int64_t end) {
  dispatch(args.snapshots.dtype, [&](auto* type) {
    gram_append_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
