// NumPy arrays as the kernels see them: formats, checks with clear errors, rows and lists. NumPy
// lacks two storage formats: arrays of uint16 hold bfloat16 codes, and arrays of uint8
// float8_e4m3fn codes.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"

namespace dldr {

namespace py = pybind11;

template <class Error, class... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}
template <class... Parts>
void check_value(bool good, const Parts&... parts) {
  check<py::value_error>(good, parts...);
}
template <class... Parts>
void check_type(bool good, const Parts&... parts) {
  check<py::type_error>(good, parts...);
}

struct Format {
  const char* name;
  char kind;
  int64_t size;
  DType dtype;
};
constexpr Format kFormats[] = {
    {"float32", 'f', 4, DType::f32},   {"float64", 'f', 8, DType::f64},
    {"bfloat16", 'u', 2, DType::bf16}, {"float16", 'f', 2, DType::f16},
    {"int8", 'i', 1, DType::i8},       {"float8_e4m3fn", 'u', 1, DType::f8e4m3},
};

inline DType dtype_of(const std::string& name, const py::array& array) {
  for (const Format& format : kFormats) {
    if (array.dtype().kind() == format.kind && array.itemsize() == format.size) return format.dtype;
  }
  throw py::type_error(name + ": expected float32, float64, float16, int8, uint16 (bfloat16) or " +
                       "uint8 (float8_e4m3fn), got " + std::string(py::str(array.dtype())));
}
inline DType dtype_by_name(const std::string& name) {
  for (const Format& format : kFormats) {
    if (name == format.name) return format.dtype;
  }
  throw py::value_error("dtype: unknown name '" + name + "'");
}

inline std::string shape_of(const py::array& array) { return py::str(array.attr("shape")); }

inline void check_writeable(const std::string& name, const py::array& array) {
  check_value(array.writeable(), name, ": expected a writeable array");
}

// A contiguous array of this shape and dtype.
inline void check_array(const std::string& name, const py::array& array, DType dtype,
                        const std::vector<int64_t>& shape) {
  check_type(dtype_of(name, array) == dtype, name, ": wrong dtype ",
             std::string(py::str(array.dtype())));
  bool same = array.ndim() == static_cast<int64_t>(shape.size());
  for (size_t k = 0; same && k < shape.size(); ++k) same = array.shape(k) == shape[k];
  std::ostringstream expected;
  for (const int64_t size : shape) expected << size << ",";
  check_value(same, name, ": expected shape (", expected.str(), "), got ", shape_of(array));
  check_value((array.flags() & py::array::c_style) != 0, name, ": expected a contiguous array");
}

inline Rows make_rows(const std::string& name, const py::array& array,
                      const std::optional<py::array>& scale) {
  Rows rows;
  rows.dtype = dtype_of(name, array);
  check_value(array.ndim() == 2 && array.shape(0) >= 1, name,
              ": expected shape (rows, n) with at least one row, got ", shape_of(array));
  rows.data = array.data();
  rows.rows = array.shape(0);
  rows.numel = array.shape(1);
  const int64_t size = array.itemsize();
  check_value(rows.numel <= 1 || array.strides(1) == size, name, ": expected contiguous rows");
  check_value(rows.rows == 1 || rows.numel == 0 ||
                  (array.strides(0) % size == 0 && array.strides(0) >= rows.numel * size),
              name, ": expected rows apart from each other, got a stride of ", array.strides(0),
              " bytes");
  rows.stride = array.strides(0) / size;
  check_value(scale.has_value() == is_quantized(rows.dtype), "scale: expected for int8 and ",
              "float8_e4m3fn rows, and for no others");
  if (scale) {
    check_array("scale", *scale, DType::f32, {rows.rows, ceil_div(rows.numel, kScaleBlock)});
    rows.scale = static_cast<const float*>(scale->data());
  }
  return rows;
}

inline DType wide_of_rows(const Rows& rows) {
  return rows.dtype == DType::f64 ? DType::f64 : DType::f32;
}

// A list of contiguous arrays; one whose strides are all 0 is read as a constant.
inline std::vector<Entry> make_list(const std::string& name, const py::sequence& arrays,
                                    int64_t numel, bool write) {
  std::vector<Entry> entries;
  int64_t at = 0, index = 0;
  for (const py::handle item : arrays) {
    const std::string label = name + "[" + std::to_string(index++) + "]";
    check_type(py::isinstance<py::array>(item), label, ": expected a NumPy array");
    const auto array = py::reinterpret_borrow<py::array>(item);
    Entry entry;
    entry.dtype = dtype_of(label, array);
    check_type(!is_quantized(entry.dtype), label, ": expected a floating-point array, got ",
               std::string(py::str(array.dtype())));
    entry.begin = at;
    entry.numel = array.size();
    entry.data = const_cast<void*>(array.data());
    if (entry.numel == 0) continue;
    if (!(array.flags() & py::array::c_style)) {
      entry.constant = true;
      for (int64_t k = 0; k < array.ndim(); ++k) {
        entry.constant = entry.constant && (array.shape(k) == 1 || array.strides(k) == 0);
      }
      check_value(entry.constant && !write, label, ": expected a contiguous array");
    }
    if (write) check_writeable(label, array);
    at += entry.numel;
    entries.push_back(entry);
  }
  check_value(at == numel, name, ": expected ", numel, " elements in all, got ", at);
  return entries;
}

inline EntryList view(const std::vector<Entry>& entries) {
  return {entries.data(), static_cast<int64_t>(entries.size())};
}

// The planner and the scalar conversions, in bench/planner.cpp.
void bind_planner(py::module_& m);

}  // namespace dldr
