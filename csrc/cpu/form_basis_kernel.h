// Basis rows as combinations of snapshots, accumulated in float64, for a range of chunks. Included
// once for each instruction set.

constexpr int64_t kFormTile = 256;
constexpr int kFormRows = 6;

// out[r][0, VecD::lanes) = sum over t of coefficients[r * T + t] * panel[t * kFormTile]
template <int R>
inline void form_block(const double* coefficients, int64_t snapshots, const double* panel,
                       VecD (&out)[R]) {
  for (auto& v : out) v = broadcast<VecD>(0.0);
  for (int64_t t = 0; t < snapshots; ++t) {
    const VecD x = load<VecD>(panel + t * kFormTile);
    for (int r = 0; r < R; ++r) {
      out[r] = fma(broadcast<VecD>(coefficients[r * snapshots + t]), x, out[r]);
    }
  }
}

template <int R, class Out>
inline void form_rows(const FormBasisArgs& args, int64_t row, const double* panel, int64_t at,
                      int64_t count) {
  Out* out = static_cast<Out*>(args.out) + row * args.plan.numel + at;
  const double* coefficients = args.coefficients + row * args.snapshots.rows;
  for (int64_t i = 0; i < count; i += VecD::lanes) {
    VecD sums[R];
    form_block(coefficients, args.snapshots.rows, panel + i, sums);
    const int64_t left = min_of(VecD::lanes, count - i);
    for (int r = 0; r < R; ++r) {
      Out* to = out + r * args.plan.numel + i;
      if (left == VecD::lanes) {
        store(to, sums[r]);
      } else {
        Out rest[VecD::lanes];
        store(rest, sums[r]);
        __builtin_memcpy(to, rest, static_cast<size_t>(left) * sizeof(Out));
      }
    }
  }
}

template <class T>
void form_basis_chunks(const FormBasisArgs& args, int64_t begin, int64_t end) {
  const int64_t snapshots = args.snapshots.rows;
  Buffer<double> buffer(max_of(snapshots, 1) * kFormTile);
  double* panel = buffer.data;
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += kFormTile) {
    const int64_t count = min_of(kFormTile, chunks_end - at);
    for (int64_t t = 0; t < snapshots; ++t) {
      widen_row<T>(args.snapshots, t, at, count, panel + t * kFormTile);
      for (int64_t i = count; i < kFormTile; ++i) panel[t * kFormTile + i] = 0;
    }
    dispatch_float(args.out_dtype, [&](auto* type) {
      using Out = std::remove_pointer_t<decltype(type)>;
      int64_t r = 0;
      for (; r + kFormRows <= args.dim; r += kFormRows) {
        form_rows<kFormRows, Out>(args, r, panel, at, count);
      }
      for (; r < args.dim; ++r) form_rows<1, Out>(args, r, panel, at, count);
    });
  }
}

void form_basis(const FormBasisArgs& args, int64_t begin, int64_t end) {
  dispatch(args.snapshots.dtype, [&](auto* type) {
    form_basis_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
