// Basis rows as combinations of snapshots, accumulated in float64, for a range of chunks. Included
// once for each instruction set.

constexpr int64_t kFormTile = 256;
constexpr int kFormRows = 6;

// out[r] = sum over t of coefficients[r * T + t] * panel[t]
template <int R>
inline void form_block(const double* coefficients, int64_t snapshots, const double* panel,
                       VecD (&out)[R]) {
  for (auto& v : out) v = broadcast<VecD>(0.0);
  for (int64_t t = 0; t < snapshots; ++t) {
    const VecD x = load<VecD>(panel + t * VecD::lanes);
    for (int r = 0; r < R; ++r) {
      out[r] = fma(broadcast<VecD>(coefficients[r * snapshots + t]), x, out[r]);
    }
  }
}

// lines[r] = rows row + r of the result, `count` elements of them.
template <int R>
inline void form_rows(const FormBasisArgs& args, int64_t row, const double* panel, int64_t count,
                      double* lines) {
  const int64_t snapshots = args.snapshots.rows;
  for (int64_t i = 0; i < count; i += VecD::lanes) {
    VecD sums[R];
    form_block(args.coefficients + row * snapshots, snapshots, panel + i * snapshots, sums);
    for (int r = 0; r < R; ++r) store(lines + r * kFormTile + i, sums[r]);
  }
}

template <class T>
void form_basis_chunks(const FormBasisArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
  const int64_t snapshots = args.snapshots.rows;
  // A panel holds vectors of VecD::lanes elements, those of all snapshots side by side: it is read
  // from front to back.
  Buffer<double> buffer(snapshots * kFormTile), row(kFormTile), lines(kFormRows * kFormTile);
  double* panel = buffer.data;
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += kFormTile) {
    const int64_t count = min_of(kFormTile, chunks_end - at);
    // While this tile is worked on, the next one comes into L2.
    const int64_t ahead = min_of(kFormTile, chunks_end - at - count);
    for (int64_t t = 0; t < snapshots; ++t) {
      const T* next =
          static_cast<const T*>(args.snapshots.data) + t * args.snapshots.stride + at + kFormTile;
      for (int64_t i = 0; i < ahead; i += kLine) __builtin_prefetch(next + i, 0, 2);
      widen_row<T>(args.snapshots, t, at, count, row.data);
      for (int64_t i = count; i < kFormTile; ++i) row.data[i] = 0;
      for (int64_t i = 0; i < count; i += VecD::lanes) {
        store(panel + i * snapshots + t * VecD::lanes, load<VecD>(row.data + i));
      }
    }
    for (int64_t r = 0; r < args.dim;) {
      const int64_t left = args.dim - r;
      const int64_t rows = left >= kFormRows ? kFormRows : left >= 2 ? 2 : 1;
      if (rows == kFormRows) {
        form_rows<kFormRows>(args, r, panel, count, lines.data);
      } else if (rows == 2) {
        form_rows<2>(args, r, panel, count, lines.data);
      } else {
        form_rows<1>(args, r, panel, count, lines.data);
      }
      dispatch_float(args.out_dtype, [&](auto* type) {
        using Out = std::remove_pointer_t<decltype(type)>;
        Out* out = static_cast<Out*>(args.out) + r * args.plan.numel + at;
        for (int64_t k = 0; k < rows; ++k) {
          narrow_array(lines.data + k * kFormTile, count, out + k * args.plan.numel);
        }
      });
      r += rows;
    }
  }
}

void form_basis(const FormBasisArgs& args, int64_t begin, int64_t end) {
  dispatch(args.snapshots.dtype, [&](auto* type) {
    form_basis_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
