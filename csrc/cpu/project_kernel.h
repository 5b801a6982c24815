// P^T g of one or several lists for a range of chunks. Included once for each instruction set.

template <class T>
void project_chunks(const ProjectArgs& args, int64_t begin, int64_t end) {
  using A = typename wide_of<T>::type;
  const int64_t dim = args.basis.rows, width = args.count * dim;
  const int64_t stage = args.count == 1 ? kStage : kTile;  // several vectors must share the L2
  Buffer<A> buffer(args.count * stage);
  double* const sums = args.partials + begin * width;
  for (int64_t k = 0; k < (end - begin) * width; ++k) sums[k] = 0;
  const Products<A> products = {buffer.data, stage, sums, dim, args.plan, begin, width};
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += stage) {
    const int64_t count = min_of(stage, chunks_end - at);
    for (int64_t k = 0; k < args.count; ++k) {
      A* x = buffer.data + k * stage;
      stage_list(args.lists[k], at, at + count, x);
      pad_stage(x, count);
    }
    dot_all<T>(args.basis, 0, dim, at, count, products, args.count);
  }
}

void project(const ProjectArgs& args, int64_t begin, int64_t end) {
  dispatch(args.basis.dtype, [&](auto* type) {
    project_chunks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}
