// What the stable ABI of torch lacks, wrapped once: error messages, argument checks and tensor
// lists, shared by the CPU and the CUDA ops. Messages begin with the name of the Python exception
// that dldr_ext.ops raises; the raw ops raise RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace dldr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* kind, const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << kind << ": " << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
template <class... Parts>
void check_value(bool good, const char* op, const Parts&... parts) {
  if (!good) fail("ValueError", op, parts...);
}
template <class... Parts>
void check_type(bool good, const char* op, const Parts&... parts) {
  if (!good) fail("TypeError", op, parts...);
}

// What messages say of a tensor, put into words only if there is a message: good input, thousands
// of tensors of it, pays for no text.
struct name_of {
  ScalarType type;
  explicit name_of(ScalarType type_) : type(type_) {}
};
struct shape_of {
  const Tensor& tensor;
  explicit shape_of(const Tensor& tensor_) : tensor(tensor_) {}
};
struct device_of {
  const Tensor& tensor;
  explicit device_of(const Tensor& tensor_) : tensor(tensor_) {}
};
// Tensor number i of a list.
struct item_of {
  const char* list;
  size_t i;
};

inline std::ostream& operator<<(std::ostream& text, const name_of& name) {
  switch (name.type) {
    case ScalarType::Float:
      return text << "torch.float32";
    case ScalarType::Double:
      return text << "torch.float64";
    case ScalarType::BFloat16:
      return text << "torch.bfloat16";
    case ScalarType::Half:
      return text << "torch.float16";
    case ScalarType::Char:
      return text << "torch.int8";
    case ScalarType::Float8_e4m3fn:
      return text << "torch.float8_e4m3fn";
    default:
      return text << "dtype " << torch::headeronly::toString(name.type);
  }
}

inline std::ostream& operator<<(std::ostream& text, const shape_of& shape) {
  const Tensor& tensor = shape.tensor;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  return text << (tensor.dim() == 1 ? ",)" : ")");
}

inline std::ostream& operator<<(std::ostream& text, const device_of& device) {
  if (device.tensor.is_cpu()) return text << "cpu";
  return text << (device.tensor.is_cuda() ? "cuda:" : "device ")
              << device.tensor.get_device_index();
}

inline std::ostream& operator<<(std::ostream& text, const item_of& item) {
  return text << item.list << "[" << item.i << "]";
}

struct Place {
  explicit Place(const Tensor& tensor)
      : cpu(tensor.is_cpu()),
        cuda(!cpu && tensor.is_cuda()),
        index(cpu ? 0 : static_cast<int32_t>(tensor.get_device_index())) {}
  bool operator==(const Place& other) const {
    return cpu == other.cpu && cuda == other.cuda && index == other.index;
  }
  bool cpu, cuda;
  int32_t index;
};

// `reference`, which is at `place`, says where the tensor is to be.
template <class Name>
void check_device(const char* op, const Name& name, const Tensor& tensor, const Tensor& reference,
                  const Place& place) {
  check_value(Place(tensor) == place, op, name, ": expected a tensor on ", device_of(reference),
              ", got one on ", device_of(tensor));
}
template <class Name>
void check_device(const char* op, const Name& name, const Tensor& tensor, const Tensor& reference) {
  check_device(op, name, tensor, reference, Place(reference));
}

inline std::optional<DType> dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Char:
      return DType::i8;
    case ScalarType::Float8_e4m3fn:
      return DType::f8e4m3;
    default:
      return std::nullopt;
  }
}

// The dtype of the arithmetic on rows of this dtype.
inline ScalarType wide_of(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

template <class Name>
DType float_dtype(const char* op, const Name& name, const Tensor& tensor) {
  const auto dtype = dtype_of(tensor.scalar_type());
  check_type(dtype && !is_quantized(*dtype), op, name,
             ": expected float32, bfloat16, float16 or float64, got ",
             name_of(tensor.scalar_type()));
  return *dtype;
}

// A (rows, n) matrix of stored numbers with its scale.
inline Rows check_rows(const char* op, const char* name, const Tensor& tensor,
                       const std::optional<Tensor>& scale) {
  check_value(tensor.dim() == 2, op, name, ": expected 2 dimensions (rows, n), got shape ",
              shape_of(tensor));
  const auto dtype = dtype_of(tensor.scalar_type());
  check_type(dtype.has_value(), op, name,
             ": expected float32, bfloat16, float16, float64, int8 or float8_e4m3fn, got ",
             name_of(tensor.scalar_type()));
  Rows rows;
  rows.dtype = *dtype;
  rows.rows = tensor.size(0);
  rows.numel = tensor.size(1);
  rows.stride = tensor.stride(0);
  check_value(rows.rows >= 1, op, name, ": expected at least one row, got shape ",
              shape_of(tensor));
  check_value(rows.numel <= 1 || (tensor.stride(1) == 1 && (rows.rows == 1 || rows.stride > 0)), op,
              name, ": expected contiguous rows, got strides (", tensor.stride(0), ", ",
              tensor.stride(1), "); call .contiguous() first");
  rows.data = tensor.data_ptr();
  if (!is_quantized(rows.dtype)) {
    check_value(!scale.has_value(), op, "scale: expected None with ", name, " of ",
                name_of(tensor.scalar_type()), ", got a tensor");
    return rows;
  }
  const int64_t blocks = ceil_div(rows.numel, kScaleBlock);
  check_value(scale.has_value(), op, "scale: expected a float32 tensor of shape (", rows.rows, ", ",
              blocks, ") with ", name, " of ", name_of(tensor.scalar_type()), ", got None");
  check_device(op, "scale", *scale, tensor);
  check_type(scale->scalar_type() == ScalarType::Float, op, "scale: expected torch.float32, got ",
             name_of(scale->scalar_type()));
  check_value(scale->dim() == 2 && scale->size(0) == rows.rows && scale->size(1) == blocks, op,
              "scale: expected shape (", rows.rows, ", ", blocks, "), one per row and block of ",
              kScaleBlock, ", got ", shape_of(*scale));
  check_value(scale->is_contiguous(), op, "scale: expected a contiguous tensor");
  rows.scale = static_cast<const float*>(scale->data_ptr());
  return rows;
}

inline Rows check_basis(const char* op, const Tensor& basis, const std::optional<Tensor>& scale) {
  const Rows rows = check_rows(op, "basis", basis, scale);
  check_value(rows.rows <= kMaxDim, op, "basis: expected at most ", kMaxDim, " rows, got ",
              rows.rows);
  return rows;
}

// A contiguous vector of `numel` numbers of one dtype; a strided one is copied.
inline Tensor check_vector(const char* op, const char* name, const Tensor& tensor, int64_t numel,
                           ScalarType type, const Tensor& reference) {
  check_device(op, name, tensor, reference);
  check_type(tensor.scalar_type() == type, op, name, ": expected ", name_of(type), ", got ",
             name_of(tensor.scalar_type()));
  check_value(tensor.dim() == 1 && tensor.numel() == numel, op, name, ": expected shape (", numel,
              ",), got ", shape_of(tensor));
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Small coefficients (theta and the like) in the dtype of the arithmetic.
inline Tensor check_small(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                          const Tensor& reference) {
  check_device(op, name, tensor, reference);
  float_dtype(op, name, tensor);
  const Tensor wide = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

inline Tensor check_theta(const char* op, const char* name, const Tensor& theta, const Rows& basis,
                          const Tensor& reference) {
  check_value(theta.dim() == 1 && theta.numel() == basis.rows, op, name, ": expected shape (",
              basis.rows, ",), one number per row of basis, got ", shape_of(theta));
  return check_small(op, name, theta, wide_of(basis.dtype), reference);
}

// A list of parameter tensors as the kernels read it. Tensors that are not contiguous in logical
// order travel through a contiguous copy, which this object owns.
class TensorList {
 public:
  enum class Access { read, write };

  TensorList() = default;

  TensorList(const char* op, const char* name, const std::vector<Tensor>& tensors, int64_t numel,
             const char* numel_source, const Tensor& reference, Access access) {
    entries_.reserve(tensors.size());
    const Place place(reference);
    for (size_t i = 0; i < tensors.size(); ++i) {
      add(op, {name, i}, tensors[i], reference, place, access);
    }
    check_value(numel_ == numel, op, name, ": expected ", numel, " elements in all (", numel_source,
                "), got ", numel_);
  }

  // `lists` lists of `numel` elements each, one behind the other, to be read.
  static std::vector<TensorList> split(const char* op, const char* name,
                                       const std::vector<Tensor>& tensors, int64_t lists,
                                       int64_t numel, const char* numel_source,
                                       const Tensor& reference) {
    std::vector<TensorList> result(static_cast<size_t>(lists));
    const Place place(reference);
    size_t at = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (result[at].numel_ >= numel && at + 1 < result.size()) ++at;
      result[at].add(op, {name, i}, tensors[i], reference, place, Access::read);
    }
    for (size_t k = 0; k < result.size(); ++k) {
      check_value(result[k].numel_ == numel, op, name, ": expected ", lists, " lists of ", numel,
                  " elements each (", numel_source, "), got ", result[k].numel_, " in list ", k);
    }
    return result;
  }

  // Hands what was written into the copies on to the tensors themselves.
  void write_back() {
    for (auto& [tensor, copy] : copies_) torch::stable::copy_(tensor, copy);
  }

  EntryList view() const { return {entries_.data(), static_cast<int64_t>(entries_.size())}; }

 private:
  void add(const char* op, const item_of& label, const Tensor& tensor, const Tensor& reference,
           const Place& place, Access access) {
    check_device(op, label, tensor, reference, place);
    Entry entry;
    entry.dtype = float_dtype(op, label, tensor);
    entry.numel = tensor.numel();
    if (entry.numel == 0) return;
    entry.begin = numel_;
    numel_ += entry.numel;
    if (tensor.is_contiguous()) {
      entry.data = tensor.data_ptr();
    } else {
      add_strided(op, label, tensor, access, entry);
    }
    entries_.push_back(entry);
  }

  void add_strided(const char* op, const item_of& label, const Tensor& tensor, Access access,
                   Entry& entry) {
    bool constant = true, overlapping = false;
    for (int64_t k = 0; k < tensor.dim(); ++k) {
      if (tensor.size(k) > 1) {
        constant = constant && tensor.stride(k) == 0;
        overlapping = overlapping || tensor.stride(k) == 0;
      }
    }
    if (access == Access::write) {
      check_value(!overlapping, op, label,
                  ": expected a tensor that can be written, got an expanded one (a stride of 0)");
      copies_.emplace_back(tensor, torch::stable::new_empty(tensor, tensor.sizes()));
      entry.data = copies_.back().second.data_ptr();
    } else if (constant) {
      entry.data = tensor.data_ptr();
      entry.constant = true;
    } else {
      copies_.emplace_back(tensor, torch::stable::contiguous(tensor));
      entry.data = copies_.back().second.data_ptr();
    }
  }

  int64_t numel_ = 0;
  std::vector<Entry> entries_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

// The list of one contiguous tensor, seen flat.
inline Entry flat_entry(const Tensor& tensor) {
  Entry entry;
  entry.data = tensor.data_ptr();
  entry.numel = tensor.numel();
  entry.dtype = *dtype_of(tensor.scalar_type());
  return entry;
}

}  // namespace dldr
