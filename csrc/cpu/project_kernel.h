// P^T g for a range of chunks. Included once for each instruction set.

template <class T>
void project_chunks(const ProjectArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const int64_t dim = args.basis.rows;
  Buffer<A> buffer(kTile);
  A* x = buffer.data;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sums = args.partials + chunk * dim;
    for (int64_t r = 0; r < dim; ++r) sums[r] = 0;
    const int64_t chunk_end = args.plan.chunk_end(chunk);
    for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += kTile) {
      const int64_t count = min_of(kTile, chunk_end - at);
      stage_list(args.list, at, at + count, x);
      for (int64_t i = count; i < kTile && i % kCacheLine != 0; ++i) x[i] = 0;
      dot_all<T>(args.basis, dim, at, count, x, sums);
    }
  }
}

void project(const ProjectArgs& args, int64_t begin, int64_t end) {
  dispatch(args.basis.dtype, [&](auto* type) {
    project_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
