// The schemas of all ops, one line each. Sizes that vary are SymInt, enums are int codes that the
// Python functions name, what is written is Tensor(a!). Layouts: see the documented functions in
// python/kvcompress.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(kvcompress, library) {
  // score
  library.def("window_scores(Tensor q, Tensor k, Tensor? lse, Tensor? weights, Tensor? seq_start, SymInt first_query, SymInt num_scored, SymInt kernel_size, int window_reduce, int group_reduce, int pool, float softmax_scale, bool pool_first) -> Tensor");
  library.def("history_scores(Tensor history, Tensor positions, Tensor lengths, Tensor seen, SymInt window, int fuse) -> Tensor");
  library.def("column_sums(Tensor q, Tensor k, Tensor? lse, Tensor? query_weights, Tensor? query_positions, Tensor? seq_start, Tensor? v, Tensor? output, SymInt first_query, int statistic, int group_reduce, float softmax_scale) -> Tensor");
  // budget
  library.def("cosine_importance(Tensor before, Tensor after, Tensor? seq_start, bool is_update) -> Tensor");
  library.def("mass_count(Tensor mass, float share) -> Tensor");
  // select
  library.def("topk(Tensor scores, Tensor? counts, Tensor? seq_start, Tensor? seq_end, SymInt k, SymInt sink, SymInt window) -> Tensor");
  library.def("topk_ragged(Tensor scores, Tensor counts, Tensor? seq_start, Tensor? seq_end, SymInt total, SymInt sink, SymInt window) -> (Tensor, Tensor)");
  library.def("head_counts(Tensor scores, Tensor totals, Tensor? floors, Tensor? caps, Tensor? seq_start, Tensor? seq_end) -> Tensor");
  // store
  library.def("compact_(Tensor(a!)[] tensors, Tensor index) -> ()");
  library.def("compact_ragged_(Tensor(a!)[] tensors, Tensor index, Tensor indptr, Tensor row_start) -> ()");
  library.def("gather(Tensor[] tensors, Tensor index, SymInt capacity) -> Tensor[]");
  library.def("gather_ragged(Tensor[] tensors, Tensor index, Tensor indptr, Tensor row_start, SymInt total) -> Tensor[]");
  library.def("append_(Tensor(a!)[] buffers, Tensor[] rows, Tensor slots) -> ()");
  library.def("evict_append_(Tensor(a!)[] buffers, Tensor[] rows, Tensor(b!) positions, Tensor(c!) lengths, Tensor(d!) seen, Tensor(e!)? scores, Tensor(f!)? history, Tensor? limits, Tensor? sinks, Tensor? inv_freq, SymInt sink, SymInt window, float fresh, int fuse) -> Tensor");
  library.def("ragged_evict_append_(Tensor(a!)[] buffers, Tensor[] rows, Tensor(b!) positions, Tensor row_start, Tensor(c!) lengths, Tensor(d!) seen, Tensor limits, Tensor(e!)? scores, Tensor(f!)? history, SymInt max_length, SymInt sink, SymInt window, float fresh, int fuse) -> Tensor");
  // attend
  library.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, float softmax_scale, bool return_logits) -> (Tensor, Tensor, Tensor)");
  library.def("ragged_decode_attention(Tensor q, Tensor k, Tensor v, Tensor row_start, Tensor lengths, SymInt max_length, float softmax_scale, bool return_logits) -> (Tensor, Tensor, Tensor)");
  library.def("observed_decode_attention_(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor(a!)? sums, Tensor? weights, Tensor(b!)? history, Tensor? seen, float softmax_scale, float decay, int power, int group_reduce) -> (Tensor, Tensor)");
  library.def("observed_ragged_decode_attention_(Tensor q, Tensor k, Tensor v, Tensor row_start, Tensor lengths, Tensor(a!)? sums, Tensor? weights, Tensor(b!)? history, Tensor? seen, SymInt max_length, float softmax_scale, float decay, int power, int group_reduce) -> (Tensor, Tensor)");
  library.def("output_terms_(Tensor(a!) sums, Tensor out, Tensor v, Tensor logits, Tensor lse, Tensor? lengths, float decay, int terms) -> ()");
  library.def("set_debug(bool enabled) -> ()");
  library.def("build_id() -> int");
}
// clang-format on
