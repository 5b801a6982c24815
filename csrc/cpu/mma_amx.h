// Products of panels with AMX tiles: tdpbf16ps and tdpbssd.

// Panels that are multiplied at a time: four sums hide the latency of one.
constexpr int kMmaGroup = 2;
constexpr bool kMmaOffset = false;

inline void add_offset(__m512i (&)[16], __m512i&) {}

template <class N>
struct sum_of {
  using type = float;
};
template <>
struct sum_of<int8_t> {
  using type = int32_t;
};

// All eight tiles hold 16 rows of a cache line, in the thread that this lives in.
struct MmaUnit {
  MmaUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&config);
  }
  ~MmaUnit() { _tile_release(); }
  MmaUnit(const MmaUnit&) = delete;
  MmaUnit& operator=(const MmaUnit&) = delete;
};

// The tiles of an instruction are part of its code.
#define DLDR_DOT(sums, left, right)          \
  if constexpr (std::is_same_v<N, int8_t>) { \
    _tile_dpbssd(sums, left, right);         \
  } else {                                   \
    _tile_dpbf16ps(sums, left, right);       \
  }

// sums[((p * C + q) * 16 + r) * 16 + c] of left panel p and right panel q.
template <class N, int R, int C>
void multiply(const MmaArgs& args, int64_t, typename sum_of<N>::type* sums, Ahead& ahead) {
  constexpr int64_t kBytes = kCacheLine;
  // The compiler does not know that a tile is read from memory.
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const Word* left = args.left;
  for (int64_t repeat = 0; repeat < args.repeats; ++repeat) {
    const Word* right = args.right;
    for (int64_t w = 0; w < args.words; w += kMmaWords, left += kMmaBlock, right += kMmaBlock) {
      ahead.fetch(args.lines);
      _tile_loadd(4, left, kBytes);
      _tile_loadd(6, right, kBytes);
      DLDR_DOT(0, 4, 6)
      if constexpr (C == 2) {
        _tile_loadd(7, right + args.right_panel, kBytes);
        DLDR_DOT(1, 4, 7)
      }
      if constexpr (R == 2) {
        _tile_loadd(5, left + args.left_panel, kBytes);
        DLDR_DOT(2, 5, 6)
        if constexpr (C == 2) {
          DLDR_DOT(3, 5, 7)
        }
      }
    }
  }
  _tile_stored(0, sums, kBytes);
  if constexpr (C == 2) {
    _tile_stored(1, sums + kMmaBlock, kBytes);
  }
  if constexpr (R == 2) {
    _tile_stored(2, sums + C * kMmaBlock, kBytes);
    if constexpr (C == 2) {
      _tile_stored(3, sums + 3 * kMmaBlock, kBytes);
    }
  }
}

#undef DLDR_DOT
