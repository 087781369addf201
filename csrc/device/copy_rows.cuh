// Copies rows of bytes between tensors, up to kMaxTensors of them in one launch: the kernel behind
// every op that writes entries from one buffer into another.
//
// Block = up to kRowsPerBlock rows of one tensor. Its threads first say where each row comes from
// and goes to, one row each, then copy words of the widest size that the tensor's rows allow,
// kUnroll loads in flight a thread. Bound: each byte read once and written once.
#pragma once

#include <algorithm>

#include "device/check.cuh"
#include "host/rows.h"

namespace kvc {

struct alignas(16) Word16 {
  uint32_t part[4];
};
struct alignas(8) Word8 {
  uint32_t part[2];
};

// Calls f(Word{}) with the word of `width` bytes, a power of two up to 16.
template <typename F>
__device__ __forceinline__ void visit_word(int width, F&& f) {
  if (width == 16) return f(Word16{});
  if (width == 8) return f(Word8{});
  if (width == 4) return f(uint32_t{});
  if (width == 2) return f(uint16_t{});
  return f(uint8_t{});
}

struct RowMove {
  const char* from;  // null: the row becomes zeros
  char* to;          // null: nothing is written
};

// Walks the words tid, tid + step, ... of rows of `words` words each, with one division in all.
struct WordWalk {
  uint32_t row, column, rows_a_step, columns_a_step, words;

  __device__ WordWalk(uint32_t first, uint32_t step, uint32_t words_a_row)
      : row(first / words_a_row),
        column(first % words_a_row),
        rows_a_step(step / words_a_row),
        columns_a_step(step % words_a_row),
        words(words_a_row) {}

  __device__ void advance() {
    row += rows_a_step;
    column += columns_a_step;
    if (column >= words) {
      column -= words;
      ++row;
    }
  }
};

namespace copy_rows {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kRowsPerBlock = 256;
constexpr int64_t kBytesPerBlock = kThreads * kUnroll * 16;

// How one tensor is spread over blocks.
struct Share {
  int64_t first_block;
  int64_t rows;  // to be written
  int64_t bytes;
  int32_t rows_per_block, width;
};

struct Plan {
  Share shares[kMaxTensors];
  int64_t blocks = 0;
  int32_t num_tensors = 0;

  void add(int64_t rows, const Rows& from, const Rows& to) {
    Share& share = shares[num_tensors++];
    share.first_block = blocks;
    share.rows = rows;
    share.bytes = to.bytes;
    share.rows_per_block =
        static_cast<int32_t>(std::clamp<int64_t>(kBytesPerBlock / to.bytes, 1, kRowsPerBlock));
    share.width = static_cast<int32_t>(std::min(access_width(from), access_width(to)));
    blocks += (rows + share.rows_per_block - 1) / share.rows_per_block;
  }
};

template <typename Word>
__device__ __forceinline__ void copy_words(const RowMove* moves, uint32_t rows, uint32_t words) {
  WordWalk walk(threadIdx.x, kThreads, words);
  while (walk.row < rows) {
    Word data[kUnroll];
    Word* to[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      to[j] = nullptr;
      if (walk.row < rows) {
        const RowMove move = moves[walk.row];
        if (move.to != nullptr) {
          to[j] = reinterpret_cast<Word*>(move.to) + walk.column;
          data[j] =
              move.from == nullptr ? Word{} : reinterpret_cast<const Word*>(move.from)[walk.column];
        }
        walk.advance();
      }
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (to[j] != nullptr) *to[j] = data[j];
    }
  }
}

// `job(tensor, row)` names the RowMove of each of the tensor's rows.
template <typename Job>
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(const __grid_constant__ Plan plan, const __grid_constant__ Job job) {
  __shared__ RowMove moves[kRowsPerBlock];
  int tensor = 0;
  while (tensor + 1 < plan.num_tensors && blockIdx.x >= plan.shares[tensor + 1].first_block) {
    ++tensor;
  }
  const Share& share = plan.shares[tensor];
  const int64_t first = (blockIdx.x - share.first_block) * share.rows_per_block;
  const int64_t left = share.rows - first;
  const int rows = left < share.rows_per_block ? static_cast<int>(left) : share.rows_per_block;
  for (int row = threadIdx.x; row < rows; row += kThreads) moves[row] = job(tensor, first + row);
  __syncthreads();
  visit_word(share.width, [&](auto word) {
    using Word = decltype(word);
    copy_words<Word>(moves, rows, static_cast<uint32_t>(share.bytes / sizeof(Word)));
  });
}

template <typename Job>
void launch(const char* op, const Plan& plan, const Job& job, cudaStream_t stream) {
  if (plan.blocks == 0) return;
  copy_rows_kernel<<<static_cast<unsigned>(plan.blocks), kThreads, 0, stream>>>(plan, job);
  launch_check(op);
}

}  // namespace copy_rows
}  // namespace kvc
