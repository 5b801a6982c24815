// Vectors in plain loops that any compiler can map to what the target has.

struct VecF {
  static constexpr int lanes = 16;
  float v[16];
};
struct VecD {
  static constexpr int lanes = 8;
  double v[8];
};
// The vector of one machine register, for kernels that block over registers.
struct RegF {
  static constexpr int lanes = 4;
  float v[4];
};
struct RegD {
  static constexpr int lanes = 2;
  double v[2];
};
// Rows that dot_kernel.h reads side by side with one vector, and with two.
constexpr int kRowBlock = 4;
constexpr int kPairRows = 2;
// The patch of gram_kernel.h, and the vectors of each row after which a line is fetched.
constexpr int kGramRows = 4, kGramColumns = 2, kGramUnroll = 4;

#define DLDR_EACH(V) for (int k = 0; k < V::lanes; ++k)

template <class V, class S>
inline V broadcast(S x) {
  V r;
  DLDR_EACH(V) r.v[k] = x;
  return r;
}
template <class V>
inline V fma(V a, V b, V c) {
  DLDR_EACH(V) c.v[k] += a.v[k] * b.v[k];
  return c;
}
template <class V>
inline V add(V a, V b) {
  DLDR_EACH(V) a.v[k] += b.v[k];
  return a;
}
template <class V>
inline V sub(V a, V b) {
  DLDR_EACH(V) a.v[k] -= b.v[k];
  return a;
}

// load<V>(p): V::lanes stored numbers, widened.
template <class V, class T>
inline V load(const T* p) {
  V r;
  DLDR_EACH(V) r.v[k] = widen(p[k]);
  return r;
}
template <class V>
inline V load(const double* p) {
  V r;
  DLDR_EACH(V) r.v[k] = static_cast<std::remove_reference_t<decltype(r.v[0])>>(p[k]);
  return r;
}

// store(p, v): rounded once.
template <class T>
inline void store(T* p, VecF x) {
  DLDR_EACH(VecF) narrow(x.v[k], p[k]);
}
inline void store(double* p, VecF x) { DLDR_EACH(VecF) p[k] = x.v[k]; }
template <class T>
inline void store(T* p, VecD x) {
  DLDR_EACH(VecD) narrow(round_to_odd(x.v[k]), p[k]);
}
inline void store(float* p, VecD x) { DLDR_EACH(VecD) p[k] = static_cast<float>(x.v[k]); }
inline void store(double* p, VecD x) { DLDR_EACH(VecD) p[k] = x.v[k]; }

inline double sum(RegF x) {
  return (static_cast<double>(x.v[0]) + x.v[1]) + (static_cast<double>(x.v[2]) + x.v[3]);
}
inline double sum(RegD x) { return x.v[0] + x.v[1]; }

#undef DLDR_EACH
