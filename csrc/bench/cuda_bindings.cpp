// The CUDA kernels in the kernel bench: the submodule `dldr_kernels.cuda` drives them from NumPy
// arrays, carried out on the CPU by tests/kernels/emulated_cuda.h.
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "bench/arrays.h"
#include "cuda/cuda_kernels.h"
#include "cuda/formats.cuh"
#include "quasi_newton.h"

namespace dldr {
namespace {

using Scale = std::optional<py::array>;

// Scratch memory of the size that was asked for, full of NaN.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(new char[static_cast<size_t>(bytes)]) {
    std::memset(data_.get(), 0xff, static_cast<size_t>(bytes));
  }
  void* get() { return data_.get(); }

 private:
  std::unique_ptr<char[]> data_;
};

py::array make_wide(DType rows, std::vector<py::ssize_t> shape) {
  return rows == DType::f64 ? py::array(py::array_t<double>(std::move(shape)))
                            : py::array(py::array_t<float>(std::move(shape)));
}

py::array project(const py::array& basis, const py::sequence& tensors, int64_t lists,
                  const Scale& scale, int64_t multiprocessors) {
  const Rows rows = make_rows("basis", basis, scale);
  check_value(lists >= 1, "lists: expected at least 1, got ", lists);
  const auto entries = make_list("tensors", tensors, lists * rows.numel, false);
  py::array out = make_wide(rows.dtype, {lists, rows.rows});
  Scratch scratch(cuda::project_scratch(rows, view(entries).size, lists));
  cuda::project(rows, view(entries), lists, out.mutable_data(), scratch.get(),
                {nullptr, multiprocessors});
  return out;
}

void reconstruct_(const py::sequence& params, const std::optional<py::array>& origin,
                  const py::array& basis, const py::array& theta, const Scale& scale,
                  int64_t multiprocessors) {
  const Rows rows = make_rows("basis", basis, scale);
  const auto entries = make_list("params", params, rows.numel, true);
  if (origin) check_array("origin", *origin, wide_of_rows(rows), {rows.numel});
  check_array("theta", theta, wide_of_rows(rows), {rows.rows});
  Scratch scratch(cuda::reconstruct_scratch(view(entries).size));
  cuda::reconstruct(rows, origin ? origin->data() : nullptr, theta.data(), view(entries),
                    scratch.get(), {nullptr, multiprocessors});
}

py::tuple reconstruct_residual(const py::array& basis, const py::array& theta,
                               const py::array& coordinates, const py::sequence& tensors,
                               const Scale& scale, int64_t multiprocessors) {
  const Rows rows = make_rows("basis", basis, scale);
  const auto entries = make_list("tensors", tensors, rows.numel, false);
  check_array("theta", theta, wide_of_rows(rows), {rows.rows});
  check_array("coordinates", coordinates, wide_of_rows(rows), {rows.rows});
  py::array direction = make_wide(rows.dtype, {rows.numel});
  py::array residual = make_wide(rows.dtype, {rows.numel});
  Scratch scratch(cuda::reconstruct_residual_scratch(view(entries).size));
  cuda::reconstruct_residual(rows, theta.data(), coordinates.data(), view(entries),
                             direction.mutable_data(), residual.mutable_data(), scratch.get(),
                             {nullptr, multiprocessors});
  return py::make_tuple(direction, residual);
}

void trial_(const py::sequence& params, const py::array& point, const py::array& direction,
            double alpha) {
  const DType dtype = dtype_of("point", point);
  check_type(dtype == DType::f32 || dtype == DType::f64, "point: expected float32 or float64");
  check_array("point", point, dtype, {point.size()});
  check_array("direction", direction, dtype, {point.size()});
  const auto entries = make_list("params", params, point.size(), true);
  Scratch scratch(cuda::trial_scratch(view(entries).size));
  cuda::trial(view(entries), point.size(), point.data(), direction.data(), alpha,
              dtype == DType::f64, scratch.get(), {});
}

void store_snapshot_(py::array& snapshots, int64_t index, const py::sequence& params,
                     const py::array& anchor, Scale& scale) {
  const Rows rows = make_rows("snapshots", snapshots, scale);
  check_value(index >= 0 && index < rows.rows, "index: expected 0 <= index < ", rows.rows, ", got ",
              index);
  check_writeable("snapshots", snapshots);
  const auto entries = make_list("params", params, rows.numel, false);
  check_array("anchor", anchor, wide_of_rows(rows), {rows.numel});
  float* row_scale = nullptr;
  if (scale) {
    check_writeable("scale", *scale);
    row_scale =
        static_cast<float*>(scale->mutable_data()) + index * ceil_div(rows.numel, kScaleBlock);
  }
  Scratch scratch(cuda::store_snapshot_scratch(view(entries).size));
  cuda::store_snapshot(
      rows, view(entries), anchor.data(),
      static_cast<char*>(snapshots.mutable_data()) + index * rows.stride * dtype_size(rows.dtype),
      row_scale, scratch.get(), {});
}

void gram_block_(const py::array& snapshots, py::array& gram, int64_t index, int64_t count,
                 const Scale& scale, int64_t multiprocessors) {
  const Rows rows = make_rows("snapshots", snapshots, scale);
  check_value(index >= 0 && count >= 1 && index + count <= rows.rows,
              "index, count: expected rows of the snapshots, got ", index, " and ", count);
  check_value(gram.ndim() == 2, "gram: expected 2 dimensions, got shape ", shape_of(gram));
  check_array("gram", gram, DType::f64, {gram.shape(0), gram.shape(0)});
  check_value(gram.shape(0) >= index + count, "gram: too small");
  check_writeable("gram", gram);
  Scratch scratch(cuda::gram_block_scratch(rows, index, count));
  cuda::gram_block(rows, index, count, static_cast<double*>(gram.mutable_data()), gram.shape(0), 1,
                   scratch.get(), {nullptr, multiprocessors});
}

py::array gram(const py::array& snapshots, const Scale& scale) {
  const Rows rows = make_rows("snapshots", snapshots, scale);
  py::array_t<double> out({rows.rows, rows.rows});
  Scratch scratch(cuda::gram_scratch(rows));
  cuda::gram(rows, out.mutable_data(), scratch.get(), {});
  return out;
}

void form_basis_(py::array& out, const py::array& snapshots, const py::array& coefficients,
                 const Scale& scale) {
  const Rows rows = make_rows("snapshots", snapshots, scale);
  check_value(coefficients.ndim() == 2 && coefficients.shape(0) >= 1,
              "coefficients: expected shape (d, T), got ", shape_of(coefficients));
  const int64_t dim = coefficients.shape(0);
  check_array("coefficients", coefficients, DType::f64, {dim, rows.rows});
  const Rows result = make_rows("out", out, std::nullopt);
  check_value(result.rows == dim && result.numel == rows.numel, "out: wrong shape ", shape_of(out));
  check_writeable("out", out);
  cuda::form_basis(rows, static_cast<const double*>(coefficients.data()), dim, out.mutable_data(),
                   result.dtype, result.stride, {});
}

py::tuple quasi_newton_(py::array& b, const py::array& guess, const py::array& c,
                        const std::optional<py::array>& s, const std::optional<py::array>& y,
                        const std::optional<py::array>& hs, bool fresh, bool damped, bool published,
                        bool one_thread) {
  QuasiNewtonArgs args;
  args.dim = guess.size();
  const auto vector = [&](const char* name, const py::array& array) {
    check_array(name, array, DType::f64, {args.dim});
    return static_cast<const double*>(array.data());
  };
  check_array("b", b, DType::f64, {args.dim, args.dim});
  check_writeable("b", b);
  args.H = static_cast<double*>(b.mutable_data());
  args.initial = vector("guess", guess);
  args.c = vector("c", c);
  check_value(s.has_value() == y.has_value(), "y: expected beside s, and only there");
  if (s) args.s = vector("s", *s);
  if (y) args.y = vector("y", *y);
  if (hs) args.hs = vector("hs", *hs);
  args.fresh = fresh;
  args.damped = damped;
  args.published = published;
  py::array_t<double> p(args.dim), info(kQuasiNewtonInfo);
  args.p = p.mutable_data();
  args.info = info.mutable_data();
  Scratch scratch(8 * quasi_newton_scratch(args.dim));
  args.scratch = static_cast<double*>(scratch.get());
  if (one_thread) {
    QuasiNewton<Alone>(Alone(), args).run();
  } else {
    cuda::quasi_newton(args, {});
  }
  return py::make_tuple(p, info);
}

}  // namespace

void bind_cuda(py::module_& parent) {
  using py::kw_only, py::arg;
  py::module_ m = parent.def_submodule("cuda", "The CUDA kernels, carried out on the CPU.");
#if defined(DLDR_EMULATED_THREADS)
  m.attr("THREADS") = true;
#else
  m.attr("THREADS") = false;
#endif
  m.def("project", &project, arg("basis"), arg("tensors"), arg("lists") = 1, kw_only(),
        arg("scale") = py::none(), arg("multiprocessors") = 2, "Shape (lists, d).");
  m.def("reconstruct_", &reconstruct_, arg("params"), arg("origin").none(true), arg("basis"),
        arg("theta"), kw_only(), arg("scale") = py::none(), arg("multiprocessors") = 2);
  m.def("reconstruct_residual", &reconstruct_residual, arg("basis"), arg("theta"),
        arg("coordinates"), arg("tensors"), kw_only(), arg("scale") = py::none(),
        arg("multiprocessors") = 2);
  m.def("trial_", &trial_, arg("params"), arg("point"), arg("direction"), arg("alpha"));
  m.def("store_snapshot_", &store_snapshot_, arg("snapshots"), arg("index"), arg("params"),
        arg("anchor"), kw_only(), arg("scale") = py::none());
  m.def("gram_block_", &gram_block_, arg("snapshots"), arg("gram"), arg("index"), arg("count"),
        kw_only(), arg("scale") = py::none(), arg("multiprocessors") = 2);
  m.def("gram", &gram, arg("snapshots"), kw_only(), arg("scale") = py::none());
  m.def("form_basis_", &form_basis_, arg("out"), arg("snapshots"), arg("coefficients"), kw_only(),
        arg("scale") = py::none());
  m.def("quasi_newton_", &quasi_newton_, arg("b"), arg("guess"), arg("c"), arg("s").none(true),
        arg("y").none(true), arg("hs").none(true), kw_only(), arg("fresh"), arg("damped"),
        arg("published"), arg("one_thread") = false,
        "b learns in place; returns (p, info). one_thread: as the CPU op does it.");
  m.def(
      "sample_blocks", [](int64_t count) { emulated::sampled_blocks = count; }, arg("count"),
      "Of larger grids run only so many blocks at either end; 0: all.");
}

}  // namespace dldr
