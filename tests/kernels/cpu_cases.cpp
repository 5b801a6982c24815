// Every CPU kernel of the portable path on fixed inputs: prints a digest of the bits of each
// result. test_kernel_aarch64.py compares what two machines print.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

namespace dldr {

namespace portable {
extern const CpuKernels kernels;
}

namespace {

constexpr int64_t kNumel = 9001, kRows = 7, kDim = 5;
constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16,
                            DType::f16, DType::i8,  DType::f8e4m3};
const char* const kNames[] = {"float32", "float64", "bfloat16", "float16", "int8", "float8"};

uint64_t state = 1;

uint32_t random() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

// In [-1, 1), exact in float32.
double number() { return (static_cast<double>(random() >> 7) - (1 << 23)) / (1 << 23); }

// Finite numbers between 2^-6 and 2 in magnitude, as they are stored.
std::vector<uint8_t> stored(DType dtype, int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count * dtype_size(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    const auto put = [&](auto value) {
      std::memcpy(bytes.data() + i * static_cast<int64_t>(sizeof(value)), &value, sizeof(value));
    };
    const uint32_t sign = random() & 1, exponent = random() % 6, mantissa = random();
    if (dtype == DType::f64) put(number());
    if (dtype == DType::f32) put(static_cast<float>(number()));
    if (dtype == DType::bf16) {
      put(static_cast<uint16_t>(sign << 15 | (122 + exponent) << 7 | (mantissa & 0x7f)));
    }
    if (dtype == DType::f16) {
      put(static_cast<uint16_t>(sign << 15 | (10 + exponent) << 10 | (mantissa & 0x3ff)));
    }
    if (dtype == DType::i8) put(static_cast<int8_t>(mantissa % 255 - 127));
    if (dtype == DType::f8e4m3) {
      put(static_cast<uint8_t>(sign << 7 | (2 + exponent) << 3 | (mantissa & 7)));
    }
  }
  return bytes;
}

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(number());
  return values;
}

// Vectors that are float64 with float64 rows, float32 otherwise.
struct Wide {
  Wide(DType dtype, int64_t count)
      : bytes(stored(dtype == DType::f64 ? DType::f64 : DType::f32, count)) {}
  std::vector<uint8_t> bytes;
};

// Four tensors of several dtypes, one of which is a constant.
struct List {
  List() {
    const DType dtypes[] = {DType::f32, DType::bf16, DType::f32, DType::f16, DType::f64};
    const int64_t sizes[] = {4100, 77, 301, 4000, kNumel - 8478};
    data.reserve(5);
    int64_t begin = 0;
    for (int k = 0; k < 5; ++k) {
      data.push_back(stored(dtypes[k], sizes[k]));
      entries.push_back({data.back().data(), begin, sizes[k], dtypes[k], k == 2});
      begin += sizes[k];
    }
  }
  EntryList list() const { return {entries.data(), static_cast<int64_t>(entries.size())}; }
  std::vector<std::vector<uint8_t>> data;
  std::vector<Entry> entries;
};

void digest(const std::string& kernel, const char* dtype, const void* data, size_t bytes) {
  uint64_t hash = 1469598103934665603u;
  for (size_t i = 0; i < bytes; ++i) {
    hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  }
  std::printf("%s %s %016llx\n", kernel.c_str(), dtype, static_cast<unsigned long long>(hash));
}

template <class T>
void digest(const std::string& kernel, const char* dtype, const std::vector<T>& values) {
  digest(kernel, dtype, values.data(), values.size() * sizeof(T));
}

void run(DType dtype, const char* name) {
  const CpuKernels& kernels = portable::kernels;
  const bool scaled = is_quantized(dtype);
  const int64_t blocks = ceil_div(kNumel, kScaleBlock);
  std::vector<uint8_t> data = stored(dtype, kRows * kNumel);
  std::vector<float> scale(static_cast<size_t>(kRows * blocks));
  for (float& value : scale) value = static_cast<float>(1 + number() / 2) / 64;
  const Rows rows{data.data(), dtype, kRows, kNumel, kNumel, scaled ? scale.data() : nullptr};
  const Plan plan = make_plan(kNumel), gram_plan = make_gram_plan(kRows, kNumel);
  const auto partials = [](const Plan& cut, int64_t width) {
    return std::vector<double>(static_cast<size_t>(cut.chunks * width));
  };

  const List lists[2];
  const EntryList both[] = {lists[0].list(), lists[1].list()};
  std::vector<double> sums = partials(plan, 2 * kRows);
  kernels.project({plan, rows, both, 2, sums.data()}, 0, plan.chunks);
  digest("project", name, sums);

  const Wide theta(dtype, kRows), coordinates(dtype, kRows), point(dtype, kNumel);
  {
    List out;
    kernels.reconstruct({plan, rows, out.list(), point.bytes.data(), theta.bytes.data()}, 0,
                        plan.chunks);
    for (const auto& tensor : out.data) digest("reconstruct", name, tensor);
    Wide direction(dtype, kNumel), residual(dtype, kNumel);
    kernels.reconstruct_residual(
        {plan, rows, out.list(), theta.bytes.data(), coordinates.bytes.data(),
         direction.bytes.data(), residual.bytes.data()},
        0, plan.chunks);
    digest("direction", name, direction.bytes);
    digest("residual", name, residual.bytes);
    kernels.trial(
        {plan, out.list(), point.bytes.data(), direction.bytes.data(), 0.3, dtype == DType::f64}, 0,
        plan.chunks);
    for (const auto& tensor : out.data) digest("trial", name, tensor);
  }

  const int64_t last = kRows - 1;
  sums = partials(gram_plan, kRows);
  kernels.gram_append({gram_plan, rows, lists[0].list(), point.bytes.data(), last,
                       data.data() + last * kNumel * dtype_size(dtype),
                       scaled ? scale.data() + last * blocks : nullptr, sums.data()},
                      0, gram_plan.chunks);
  digest("gram_append", name, sums);
  digest("row", name, data);
  digest("scale", name, scale);
  sums = partials(gram_plan, 2 * kRows);
  kernels.gram_block({gram_plan, rows, kRows - 2, 2, 0, sums.data()}, 0, gram_plan.chunks);
  digest("gram_block", name, sums);
  sums = partials(gram_plan, kRows * kRows);
  kernels.gram({gram_plan, rows, sums.data()}, 0, gram_plan.chunks * gram_strips(kRows));
  digest("gram", name, sums);

  const std::vector<double> coefficients = numbers<double>(kDim * kRows);
  for (const DType out_dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    std::vector<uint8_t> out(static_cast<size_t>(kDim * kNumel * dtype_size(out_dtype)));
    kernels.form_basis({plan, rows, coefficients.data(), kDim, out.data(), out_dtype}, 0,
                       plan.chunks);
    digest("form_basis", name, out);
  }
}

}  // namespace
}  // namespace dldr

int main() {
  for (int k = 0; k < 6; ++k) dldr::run(dldr::kTypes[k], dldr::kNames[k]);
}
