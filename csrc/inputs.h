// The checked arguments of the ops, shared by CPU and CUDA: each struct checks what came and holds
// the torch-free arguments, whose plan is left to the CPU ops, together with what they point to.
// Nothing is written before all is checked.
#pragma once

#include <cmath>

#include "stable_utils.h"

namespace dldr {

struct ReconstructInputs {
  ReconstructInputs(const char* op, const std::optional<Tensor>& origin, const Tensor& basis,
                    const Tensor& theta, const std::optional<Tensor>& scale) {
    args.basis = check_basis(op, basis, scale);
    theta_ = check_theta(op, "theta", theta, args.basis, basis);
    args.theta = theta_->data_ptr();
    if (origin) {
      origin_ =
          check_vector(op, "origin", *origin, args.basis.numel, wide_of(args.basis.dtype), basis);
      args.origin = origin_->data_ptr();
    }
  }

  ReconstructArgs args;

 private:
  std::optional<Tensor> theta_, origin_;
};

struct ResidualInputs {
  ResidualInputs(const char* op, const Tensor& basis, const Tensor& theta,
                 const Tensor& coordinates, const std::vector<Tensor>& tensors,
                 const std::optional<Tensor>& scale) {
    args.basis = check_basis(op, basis, scale);
    const Rows& rows = args.basis;
    theta_ = check_theta(op, "theta", theta, rows, basis);
    coordinates_ = check_theta(op, "coordinates", coordinates, rows, basis);
    list_ = TensorList(op, "tensors", tensors, rows.numel, "columns of basis", basis,
                       TensorList::Access::read);
    direction = torch::stable::new_empty(basis, {rows.numel}, wide_of(rows.dtype));
    residual = torch::stable::new_empty(basis, {rows.numel}, wide_of(rows.dtype));
    args.list = list_.view();
    args.theta = theta_->data_ptr();
    args.coordinates = coordinates_->data_ptr();
    args.direction = direction->data_ptr();
    args.residual = residual->data_ptr();
  }

  ResidualArgs args;
  std::optional<Tensor> direction, residual;

 private:
  std::optional<Tensor> theta_, coordinates_;
  TensorList list_;
};

struct TrialInputs {
  TrialInputs(const char* op, const std::vector<Tensor>& params, const Tensor& point,
              const Tensor& direction, double alpha) {
    const ScalarType type = point.scalar_type();
    check_type(type == ScalarType::Float || type == ScalarType::Double, op,
               "point: expected float32 or float64, got ", name_of(type));
    check_value(point.dim() == 1, op, "point: expected 1 dimension, got shape ", shape_of(point));
    check_value(std::isfinite(alpha), op, "alpha: expected a finite number, got ", alpha);
    point_ = check_vector(op, "point", point, point.numel(), type, point);
    direction_ = check_vector(op, "direction", direction, point.numel(), type, point);
    list = TensorList(op, "params", params, point.numel(), "size of point", point,
                      TensorList::Access::write);
    args.list = list.view();
    args.point = point_->data_ptr();
    args.direction = direction_->data_ptr();
    args.alpha = alpha;
    args.wide = type == ScalarType::Double;
  }

  TrialArgs args;
  TensorList list;  // to be written back

 private:
  std::optional<Tensor> point_, direction_;
};

struct StoreInputs {
  StoreInputs(const char* op, const Tensor& snapshots, int64_t index,
              const std::vector<Tensor>& params, const Tensor& anchor,
              const std::optional<Tensor>& scale) {
    args.snapshots = check_rows(op, "snapshots", snapshots, scale);
    const Rows& rows = args.snapshots;
    check_value(index >= 0 && index < rows.rows, op, "index: expected 0 <= index < ", rows.rows,
                " (rows of snapshots), got ", index);
    anchor_ = check_vector(op, "anchor", anchor, rows.numel, wide_of(rows.dtype), snapshots);
    list_ = TensorList(op, "params", params, rows.numel, "columns of snapshots", snapshots,
                       TensorList::Access::read);
    args.list = list_.view();
    args.anchor = anchor_->data_ptr();
    args.index = index;
    args.row =
        static_cast<char*>(snapshots.data_ptr()) + index * rows.stride * dtype_size(rows.dtype);
    if (rows.scale != nullptr) {
      args.row_scale =
          static_cast<float*>(scale->data_ptr()) + index * ceil_div(rows.numel, kScaleBlock);
    }
  }

  GramAppendArgs args;

 private:
  std::optional<Tensor> anchor_;
  TensorList list_;
};

inline void check_gram(const char* op, const Tensor& gram, int64_t rows, const Tensor& snapshots) {
  check_device(op, "gram", gram, snapshots);
  check_type(gram.scalar_type() == ScalarType::Double, op, "gram: expected torch.float64, got ",
             name_of(gram.scalar_type()));
  check_value(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) >= rows, op,
              "gram: expected a square matrix of at least ", rows, " rows, got shape ",
              shape_of(gram));
}

inline GramBlockArgs check_gram_block(const char* op, const Tensor& snapshots, const Tensor& gram,
                                      int64_t index, int64_t count,
                                      const std::optional<Tensor>& scale) {
  GramBlockArgs args;
  args.snapshots = check_rows(op, "snapshots", snapshots, scale);
  const int64_t stored = args.snapshots.rows;
  check_value(index >= 0 && index < stored, op, "index: expected 0 <= index < ", stored,
              " (rows of snapshots), got ", index);
  check_value(count >= 1 && count <= stored - index, op,
              "count: expected 1 <= count <= ", stored - index,
              " (rows of snapshots from index on), got ", count);
  check_gram(op, gram, index + count, snapshots);
  args.index = index;
  args.count = count;
  return args;
}

struct FormBasisInputs {
  FormBasisInputs(const char* op, const Tensor& snapshots, const Tensor& coefficients,
                  const std::optional<Tensor>& scale, const std::optional<ScalarType>& dtype) {
    args.snapshots = check_rows(op, "snapshots", snapshots, scale);
    const Rows& rows = args.snapshots;
    check_value(
        coefficients.dim() == 2 && coefficients.size(1) == rows.rows && coefficients.size(0) >= 1,
        op, "coefficients: expected shape (d, ", rows.rows, "), one column per snapshot, got ",
        shape_of(coefficients));
    coefficients_ = check_small(op, "coefficients", coefficients, ScalarType::Double, snapshots);
    args.coefficients = static_cast<const double*>(coefficients_->data_ptr());
    args.dim = coefficients.size(0);
    check_value(args.dim <= kMaxDim, op, "coefficients: expected at most ", kMaxDim, " rows, got ",
                args.dim);
    type = dtype ? *dtype : is_quantized(rows.dtype) ? ScalarType::Float : snapshots.scalar_type();
    const auto out = dtype_of(type);
    check_type(out && !is_quantized(*out), op,
               "dtype: expected float32, bfloat16, float16 or float64, got ", name_of(type));
    args.out_dtype = *out;
  }

  FormBasisArgs args;
  ScalarType type;  // of the result

 private:
  std::optional<Tensor> coefficients_;
};

struct QuasiNewtonInputs {
  QuasiNewtonInputs(const char* op, const Tensor& b, const Tensor& guess, const Tensor& c,
                    const std::optional<Tensor>& s, const std::optional<Tensor>& y,
                    const std::optional<Tensor>& hs, bool fresh, bool damped, bool published) {
    check_type(b.scalar_type() == ScalarType::Double, op, "b: expected torch.float64, got ",
               name_of(b.scalar_type()));
    check_value(b.dim() == 2 && b.size(0) == b.size(1) && b.size(0) >= 1 && b.size(0) <= kMaxDim,
                op, "b: expected a square matrix of 1 to ", kMaxDim, " rows, got shape ",
                shape_of(b));
    check_value(b.is_contiguous(), op, "b: expected a contiguous tensor");
    args.dim = b.size(0);
    args.H = static_cast<double*>(b.data_ptr());
    args.initial = vector(op, "guess", guess, b);
    args.c = vector(op, "c", c, b);
    check_value(s.has_value() == y.has_value(), op, "y: expected beside s, and only there");
    if (s) {
      args.s = vector(op, "s", *s, b);
      args.y = vector(op, "y", *y, b);
      check_value(hs.has_value() || !damped || published, op,
                  "hs: expected H^-1 s for damping, got None");
    }
    if (hs) args.hs = vector(op, "hs", *hs, b);
    args.fresh = fresh;
    args.damped = damped;
    args.published = published;
    p = torch::stable::new_empty(b, {args.dim});
    info = torch::stable::new_empty(b, {kQuasiNewtonInfo});
    args.p = static_cast<double*>(p->data_ptr());
    args.info = static_cast<double*>(info->data_ptr());
  }

  QuasiNewtonArgs args;
  std::optional<Tensor> p, info;

 private:
  const double* vector(const char* op, const char* name, const Tensor& tensor, const Tensor& b) {
    kept_.push_back(check_vector(op, name, tensor, b.size(0), ScalarType::Double, b));
    return static_cast<const double*>(kept_.back().data_ptr());
  }
  std::vector<Tensor> kept_;
};

}  // namespace dldr
