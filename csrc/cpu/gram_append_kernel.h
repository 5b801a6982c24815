// Stores snapshots and multiplies them with the earlier ones, for a range of chunks. Included once
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

// x = the list minus the anchor, columns [at, at + count), rounded as it is stored in the row.
template <class T, class A>
inline void store_stage(const GramAppendArgs& args, int64_t at, int64_t count, A* x) {
  const A* anchor = static_cast<const A*>(args.anchor);
  stage_list(args.list, at, at + count, x);
  for (int64_t i = 0; i < count; ++i) x[i] -= anchor[at + i];
  store_row(x, count, static_cast<T*>(args.row) + at,
            scaled_format<T>::value ? args.row_scale + at / kScaleBlock : nullptr);
}

template <class T>
void store_snapshot_chunks(const GramAppendArgs& args, int64_t begin, int64_t end) {
  Buffer<typename wide_of<T>::type> buffer(kTile);
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += kTile) {
    store_stage<T>(args, at, min_of(kTile, chunks_end - at), buffer.data);
  }
}

void store_snapshot(const GramAppendArgs& args, int64_t begin, int64_t end) {
  dispatch(args.snapshots.dtype, [&](auto* type) {
    store_snapshot_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

template <class T>
void gram_append_chunks(const GramAppendArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const int64_t width = args.index + 1;
  Buffer<A> buffer(kStage);
  double* const sums = args.partials + begin * width;
  for (int64_t k = 0; k < (end - begin) * width; ++k) sums[k] = 0;
  const Products<A> products = {buffer.data, kStage, sums, width, args.plan, begin, width};
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += kStage) {
    const int64_t count = min_of(kStage, chunks_end - at);
    store_stage<T>(args, at, count, buffer.data);
    pad_stage(buffer.data, count);
    // The new row too is read back from memory (from cache): one arithmetic for all products.
    dot_all<T>(args.snapshots, 0, width, at, count, products, 1);
  }
}

void gram_append(const GramAppendArgs& args, int64_t begin, int64_t end) {
  dispatch(args.snapshots.dtype, [&](auto* type) {
    gram_append_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

// The products of `count` stored rows, those before them read once for all.
template <class T>
void gram_block_chunks(const GramBlockArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const int64_t width = args.index + args.count, chunk_width = args.count * width;
  Buffer<A> buffer(args.count * kTile);
  double* const sums = args.partials + (begin - args.first) * chunk_width;
  for (int64_t k = 0; k < (end - begin) * chunk_width; ++k) sums[k] = 0;
  const Products<A> all = {buffer.data, kTile, sums, width, args.plan, begin, chunk_width};
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += kTile) {
    const int64_t count = min_of(kTile, chunks_end - at);
    for (int64_t k = 0; k < args.count; ++k) {
      A* x = buffer.data + k * kTile;
      widen_row<T>(args.snapshots, args.index + k, at, count, x);
      pad_stage(x, count);
    }
    dot_all<T>(args.snapshots, 0, args.index, at, count, all, args.count);
    for (int64_t k = 0; k < args.count; ++k) {
      Products<A> tile = all;
      tile.x += k * kTile;
      tile.sums += k * width;
      dot_all<T>(args.snapshots, args.index, args.index + k + 1, at, count, tile, 1);
    }
  }
}

void gram_block(const GramBlockArgs& args, int64_t begin, int64_t end) {
  dispatch(args.snapshots.dtype, [&](auto* type) {
    gram_block_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
