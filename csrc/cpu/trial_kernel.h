// One trial of a line search for a range of chunks. Included once for each instruction set.

template <class A>
void trial_chunks(const TrialArgs& args, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const A* point = static_cast<const A*>(args.point);
  const A* direction = static_cast<const A*>(args.direction);
  const V alpha = broadcast<V>(static_cast<A>(args.alpha));
  Buffer<A> buffer(kTile);
  A* out = buffer.data;
  const int64_t chunks_end = args.plan.chunk_end(end - 1);
  for (int64_t at = args.plan.chunk_begin(begin); at < chunks_end; at += kTile) {
    const int64_t count = min_of(kTile, chunks_end - at);
    int64_t i = 0;
    for (; i + V::lanes <= count; i += V::lanes) {
      store(out + i, fma(load<V>(direction + at + i), alpha, load<V>(point + at + i)));
    }
    if (i < count) {
      A w[V::lanes] = {}, u[V::lanes] = {};
      __builtin_memcpy(w, point + at + i, static_cast<size_t>(count - i) * sizeof(A));
      __builtin_memcpy(u, direction + at + i, static_cast<size_t>(count - i) * sizeof(A));
      store(out + i, fma(load<V>(u), alpha, load<V>(w)));
    }
    unstage_list(args.list, at, at + count, out);
  }
}

void trial(const TrialArgs& args, int64_t begin, int64_t end) {
  args.wide ? trial_chunks<double>(args, begin, end) : trial_chunks<float>(args, begin, end);
}
