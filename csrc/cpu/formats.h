// Storage formats and their scalar conversions. Each instruction-set unit includes this inside its
// own namespace, so that no unit can be linked against code compiled for a larger one.

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8e4m3 {
  uint8_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return static_cast<float>(x); }
inline float widen(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest << 13));  // Inf, NaN
  // Read as a float whose exponent is 112 too small; the product is exact, subnormals included.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
}

inline float widen(f8e4m3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  const uint32_t rest = x.bits & 0x7f;
  if (rest == 0x7f) return bits_float(sign | 0x7fc00000);  // the only NaN; there is no Inf
  return bits_float(sign | float_bits(bits_float(rest << 20) * 0x1p120f));
}

// Round to nearest even from here on; each is the only rounding of its conversion.
inline void narrow(float x, float& out) { out = x; }

inline void narrow(float x, bf16& out) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits =
      static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void narrow(float x, f16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65520 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the adder round at 2^-24
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

// |x| <= 448 (the caller scales), or NaN.
inline void narrow(float x, f8e4m3& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
  uint32_t code;
  if (magnitude > 0x43e80000) {  // above 464, or NaN
    code = 0x7f;
  } else if (magnitude < 0x3c800000) {  // subnormal: let the adder round at 2^-9
    code = float_bits(bits_float(magnitude) + 0x1p14f) - 0x46800000;
  } else {
    code = (magnitude + 0x7ffff + ((magnitude >> 20) & 1) - 0x3c000000) >> 20;
  }
  out.bits = static_cast<uint8_t>(sign | code);
}

// Clamped: a scaled number may exceed 127 by a rounding. A NaN becomes 0 (its scale is NaN).
inline void narrow(float x, int8_t& out) {
  const float low = x < 127.0f ? x : 127.0f;
  const float clamped = low > -127.0f ? low : -127.0f;
  out = static_cast<int8_t>(x == x ? __builtin_rintf(clamped) : 0);
}

// float64 to float32, rounded to odd: of the two neighbours of a number that float32 cannot hold,
// the one whose last bit is set. Rounding it once more to 8 or 11 bits gives what one rounding of x
// would, subnormal numbers included.
inline float round_to_odd(double x) {
  const float near = static_cast<float>(x);
  uint32_t bits = float_bits(near);
  const double size = __builtin_fabs(x), found = __builtin_fabs(static_cast<double>(near));
  if (bits % 2 == 0) bits += (size > found) - (size < found);
  return bits_float(bits);
}

// The largest stored magnitude of a scaled format.
template <class T>
struct scaled_format {
  static constexpr bool value = false;
  static constexpr float largest = 0;
};
template <>
struct scaled_format<int8_t> {
  static constexpr bool value = true;
  static constexpr float largest = 127;
};
template <>
struct scaled_format<f8e4m3> {
  static constexpr bool value = true;
  static constexpr float largest = 448;
};

// The working precision of a storage format.
template <class T>
struct wide_of {
  using type = float;
};
template <>
struct wide_of<double> {
  using type = double;
};

// Calls f with a null pointer of the storage type.
template <class F>
inline void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    case DType::i8:
      return f(static_cast<int8_t*>(nullptr));
    case DType::f8e4m3:
      return f(static_cast<f8e4m3*>(nullptr));
  }
}
// The same for the dtypes that parameters may have.
template <class F>
inline void dispatch_float(DType dtype, F&& f) {
  if (!is_quantized(dtype)) {
    dispatch(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (!scaled_format<T>::value) f(type);
    });
  }
}
