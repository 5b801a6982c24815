// Moving a tile between a tensor list and a buffer of the working precision. Included once for
// each instruction set.

template <class A>
struct vec_of {
  using type = VecF;
  using reg = RegF;
};
template <>
struct vec_of<double> {
  using type = VecD;
  using reg = RegD;
};
template <class A>
using Vec = typename vec_of<A>::type;

template <class T, class A>
inline void widen_array(const T* from, int64_t count, A* to) {
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + V::lanes <= count; i += V::lanes) store(to + i, load<V>(from + i));
  if (i < count) {
    T rest[V::lanes] = {};
    A wide[V::lanes];
    __builtin_memcpy(rest, from + i, static_cast<size_t>(count - i) * sizeof(T));
    store(wide, load<V>(rest));
    __builtin_memcpy(to + i, wide, static_cast<size_t>(count - i) * sizeof(A));
  }
}

template <class T, class A>
inline void narrow_array(const A* from, int64_t count, T* to) {
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + V::lanes <= count; i += V::lanes) store(to + i, load<V>(from + i));
  if (i < count) {
    A wide[V::lanes] = {};
    T rest[V::lanes];
    __builtin_memcpy(wide, from + i, static_cast<size_t>(count - i) * sizeof(A));
    store(rest, load<V>(wide));
    __builtin_memcpy(to + i, rest, static_cast<size_t>(count - i) * sizeof(T));
  }
}

// x[0, end - begin) = the list's elements [begin, end).
template <class A>
void stage_list(const EntryList& list, int64_t begin, int64_t end, A* x) {
  for_each_piece(list, begin, end,
                 [&](const Entry& entry, int64_t offset, int64_t position, int64_t count) {
                   dispatch_float(entry.dtype, [&](auto* type) {
                     using T = std::remove_pointer_t<decltype(type)>;
                     const T* data = static_cast<const T*>(entry.data);
                     if (!entry.constant) {
                       widen_array(data + offset, count, x + position);
                       return;
                     }
                     A value;
                     widen_array(data, 1, &value);
                     for (int64_t i = 0; i < count; ++i) x[position + i] = value;
                   });
                 });
}

// The list's elements [begin, end) = x[0, end - begin), rounded once.
template <class A>
void unstage_list(const EntryList& list, int64_t begin, int64_t end, const A* x) {
  for_each_piece(list, begin, end,
                 [&](const Entry& entry, int64_t offset, int64_t position, int64_t count) {
                   dispatch_float(entry.dtype, [&](auto* type) {
                     using T = std::remove_pointer_t<decltype(type)>;
                     narrow_array(x + position, count, static_cast<T*>(entry.data) + offset);
                   });
                 });
}

// A row's elements [begin, begin + count) widened and scaled; begin is a multiple of kScaleBlock.
template <class T, class A>
inline void widen_row(const Rows& rows, int64_t row, int64_t begin, int64_t count, A* to) {
  widen_array(static_cast<const T*>(rows.data) + row * rows.stride + begin, count, to);
  if constexpr (scaled_format<T>::value) {
    using V = Vec<A>;
    const float* scale = rows.scale + row * ceil_div(rows.numel, kScaleBlock) + begin / kScaleBlock;
    for (int64_t block = 0; block < count; block += kScaleBlock) {
      const int64_t end = min_of(block + kScaleBlock, count);
      const A factor = scale[block / kScaleBlock];
      int64_t i = block;
      for (; i + V::lanes <= end; i += V::lanes) {
        store(to + i, fma(load<V>(to + i), broadcast<V>(factor), broadcast<V>(A(0))));
      }
      for (; i < end; ++i) to[i] *= factor;
    }
  }
}

// Working memory of a call; kernels run on any thread, whose stack may be small.
template <class A>
struct Buffer {
  explicit Buffer(int64_t count)
      : data(static_cast<A*>(
            ::operator new(static_cast<size_t>(count) * sizeof(A), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data;
};
