// dldr_ext::store_snapshot_, dldr_ext::gram_append_ and dldr_ext::gram_block_ on CUDA.
#include "stream.h"

namespace dldr {
namespace {

void store(const char* op, cuda::Call& call, const Tensor& snapshots, int64_t index,
           const std::vector<Tensor>& params, const Tensor& anchor,
           const std::optional<Tensor>& scale) {
  const StoreInputs inputs(op, snapshots, index, params, anchor, scale);
  const GramAppendArgs& args = inputs.args;
  cuda::store_snapshot(args.snapshots, args.list, args.anchor, args.row, args.row_scale,
                       call.scratch(cuda::store_snapshot_scratch(args.list.size)), call.stream());
}

void multiply(cuda::Call& call, const GramBlockArgs& args, const Tensor& gram) {
  cuda::gram_block(args.snapshots, args.index, args.count, static_cast<double*>(gram.data_ptr()),
                   gram.stride(0), gram.stride(1),
                   call.scratch(cuda::gram_block_scratch(args.snapshots, args.index, args.count)),
                   call.stream());
}

void store_snapshot_(const Tensor& snapshots, int64_t index, const std::vector<Tensor>& params,
                     const Tensor& anchor, const std::optional<Tensor>& scale) {
  cuda::Call call(snapshots);
  store("store_snapshot_", call, snapshots, index, params, anchor, scale);
}

// The row is stored first and then read back as one of the rows: 2 n b bytes more than the floor
// n b (t + 1) + 8 n, and the same bits as gram_block_.
void gram_append_(const Tensor& snapshots, const Tensor& gram, int64_t index,
                  const std::vector<Tensor>& params, const Tensor& anchor,
                  const std::optional<Tensor>& scale) {
  constexpr const char* op = "gram_append_";
  cuda::Call call(snapshots);
  const GramBlockArgs args = check_gram_block(op, snapshots, gram, index, 1, scale);
  store(op, call, snapshots, index, params, anchor, scale);
  multiply(call, args, gram);
}

void gram_block_(const Tensor& snapshots, const Tensor& gram, int64_t index, int64_t count,
                 const std::optional<Tensor>& scale) {
  cuda::Call call(snapshots);
  multiply(call, check_gram_block("gram_block_", snapshots, gram, index, count, scale), gram);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CUDA, m) {
  m.impl("store_snapshot_", TORCH_BOX(&store_snapshot_));
  m.impl("gram_append_", TORCH_BOX(&gram_append_));
  m.impl("gram_block_", TORCH_BOX(&gram_block_));
}

}  // namespace dldr
