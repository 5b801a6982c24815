// What the Gram kernels read next. Included once for each instruction set.

constexpr int64_t kCacheLine = 64;

// The panel that is read next: fetched, line by line, while the arithmetic on this one runs.
struct Ahead {
  const char* data = nullptr;  // the next cache line
  int64_t left = 0;            // lines left of this row
  int64_t lines = 0;           // of each row
  int64_t rows = 0;            // rows left behind this one
  int64_t step = 0;            // bytes from the end of a row's lines to the next row's first

  Ahead(const void* first, int64_t bytes, int64_t rows, int64_t stride)
      : data(static_cast<const char*>(first)),
        left(ceil_div(bytes, kCacheLine)),
        lines(left),
        rows(rows - 1),
        step(stride - left * kCacheLine) {}

  void fetch() {
    if (left == 0) return;
    __builtin_prefetch(data, 0, 2);  // no nearer than L2: the arithmetic has the L1
    data += kCacheLine;
    if (--left == 0 && rows > 0) {
      --rows;
      data += step;
      left = lines;
    }
  }

  void fetch(int64_t count) {
    for (; count > 0 && left > 0; --count) fetch();
  }
};
