// P^T g of one or several lists for a range of chunks. Included once for each instruction set.

template <class T>
void project_chunks(const ProjectArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const int64_t dim = args.basis.rows;
  Buffer<A> buffer(args.count * kTile);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sums = args.partials + chunk * args.count * dim;
    for (int64_t k = 0; k < args.count * dim; ++k) sums[k] = 0;
    const int64_t chunk_end = args.plan.chunk_end(chunk);
    for (int64_t at = args.plan.chunk_begin(chunk); at < chunk_end; at += kTile) {
      const int64_t count = min_of(kTile, chunk_end - at);
      for (int64_t k = 0; k < args.count; ++k) {
        A* x = buffer.data + k * kTile;
        stage_list(args.lists[k], at, at + count, x);
        pad_tile(x, count);
      }
      const Products<A> products = {buffer.data, sums, dim};
      dot_all<T>(args.basis, 0, dim, at, count, products, args.count);
    }
  }
}

void project(const ProjectArgs& args, int64_t begin, int64_t end) {
  dispatch(args.basis.dtype, [&](auto* type) {
    project_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
