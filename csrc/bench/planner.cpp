// The planner and the scalar conversions of the kernel bench (bench/bindings.cpp).
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bench/arrays.h"
#include "kernels.h"

namespace dldr {
namespace {

#include "cpu/formats.h"

// ---- planner ----

// Entries of these sizes that point nowhere; the planner never looks at the data.
std::vector<Entry> pretended_entries(const std::vector<int64_t>& sizes) {
  std::vector<Entry> entries;
  int64_t at = 0;
  for (const int64_t size : sizes) {
    check_value(size >= 0, "sizes: expected sizes of at least 0, got ", size);
    if (size == 0) continue;
    Entry entry;
    entry.begin = at;
    entry.numel = size;
    entries.push_back(entry);
    at += size;
  }
  return entries;
}

int64_t find_pretended(const std::vector<int64_t>& sizes, int64_t index) {
  const auto entries = pretended_entries(sizes);
  const int64_t total = entries.empty() ? 0 : entries.back().begin + entries.back().numel;
  check_value(index >= 0 && index < total, "index: expected 0 <= index < ", total, ", got ", index);
  return find_entry(view(entries), index);
}

using Piece = std::tuple<int64_t, int64_t, int64_t, int64_t>;

std::vector<Piece> pieces(const std::vector<int64_t>& sizes, int64_t begin, int64_t end) {
  const auto entries = pretended_entries(sizes);
  const int64_t total = entries.empty() ? 0 : entries.back().begin + entries.back().numel;
  check_value(begin >= 0 && end <= total, "expected 0 <= begin and end <= ", total, ", got ", begin,
              " and ", end);
  std::vector<Piece> found;
  for_each_piece(view(entries), begin, end,
                 [&](const Entry& entry, int64_t offset, int64_t position, int64_t count) {
                   found.emplace_back(&entry - entries.data(), offset, position, count);
                 });
  return found;
}

// ---- scalar conversions ----

py::array widen_codes(const py::array& codes) {
  check_array("codes", codes, dtype_of("codes", codes), {codes.size()});
  py::array_t<double> values(codes.size());
  double* to = values.mutable_data();
  dispatch(dtype_of("codes", codes), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(codes.data());
    for (int64_t i = 0; i < codes.size(); ++i) {
      if constexpr (std::is_same_v<T, double>) {
        to[i] = from[i];
      } else {
        to[i] = widen(from[i]);
      }
    }
  });
  return values;
}

// The codes as unsigned integers.
py::array narrow_values(const py::array& values, const std::string& dtype) {
  check_array("values", values, DType::f32, {values.size()});
  py::array_t<uint32_t> codes(values.size());
  const float* from = static_cast<const float*>(values.data());
  uint32_t* to = codes.mutable_data();
  dispatch(dtype_by_name(dtype), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<T, double>) {
      for (int64_t i = 0; i < values.size(); ++i) {
        T code;
        narrow(from[i], code);
        to[i] = 0;
        __builtin_memcpy(&to[i], &code, sizeof(T));
      }
    }
  });
  return codes;
}

}  // namespace

void bind_planner(py::module_& m) {
  using py::arg;
  m.attr("TILE") = kTile;
  m.attr("SCALE_BLOCK") = kScaleBlock;
  m.attr("MAX_CHUNKS") = kMaxChunks;
  m.attr("MAX_DIM") = kMaxDim;

  py::class_<Plan>(m, "Plan")
      .def_readonly("numel", &Plan::numel)
      .def_readonly("tile", &Plan::tile)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("tiles_per_chunk", &Plan::tiles_per_chunk)
      .def_readonly("chunks", &Plan::chunks)
      .def("chunk_begin", &Plan::chunk_begin)
      .def("chunk_end", &Plan::chunk_end);
  m.def("make_plan", &make_plan, arg("numel"), arg("tile") = kTile, arg("max_chunks") = kMaxChunks);
  m.def("make_gram_plan", &make_gram_plan, arg("rows"), arg("numel"));
  m.def("find_entry", &find_pretended, arg("sizes"), arg("index"),
        "The tensor that holds element `index`, counting those of size 0 out.");
  m.def("pieces", &pieces, arg("sizes"), arg("begin"), arg("end"),
        "(tensor, offset in it, position in [begin, end), count), tensors of size 0 not counted.");
  m.def("widen", &widen_codes, arg("codes"));
  m.def("narrow", &narrow_values, arg("values"), arg("dtype"));
}

}  // namespace dldr
