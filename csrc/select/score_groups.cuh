// A slice of a row in groups of kGroupSize entries, a warp a group, and what is kept of a group as
// bits: 16 entries a lane, so that no lane has to hear of another's.
#pragma once

#include "select/score_slice.cuh"

namespace kvc {

constexpr int kGroupChunks = 4;
constexpr int kGroupSize = kGroupChunks * kChunk;  // entries
constexpr int kLaneBits = 4 * kGroupChunks;  // entries of a lane: four neighbours of each chunk

// The key of a score -> the score; -0 is no score's key.
__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The largest number below a score, both as keys.
__device__ __forceinline__ uint32_t key_below(uint32_t key) {
  return key - (key == topk_key(0) ? 2 : 1);
}

constexpr uint32_t kKeyInf = topk_key(0x7f800000u), kKeyMinusInf = topk_key(0xff800000u);

// Two ends among which a threshold is sought, as keys: from -inf up, and kTopkForced for none.
struct Cut {
  uint32_t low, high;
};

// The same cut with ends that are numbers: NaN cannot be told from padding by comparing, and -0, of
// which there is no key, would equal 0.
__device__ __forceinline__ Cut comparable(const Cut& cut) {
  constexpr uint32_t kMinusZero = topk_key(0) - 1;
  const uint32_t low = max(cut.low, kKeyMinusInf), high = max(cut.high, kKeyMinusInf + 1);
  return {low - (low == kMinusZero), high + (high == kMinusZero)};
}

// Of 16 scores, a bit each; bit 4 * chunk + i is the i-th neighbour.
struct LaneBits {
  uint32_t reached;  // at least the high end
  uint32_t marked;   // equal to either end
  uint32_t inside;   // between them
};

struct Compare {
  float below_high, high, low;

  __device__ __forceinline__ explicit Compare(const Cut& cut)
      : below_high(cut.high == kTopkForced ? INFINITY : score_of(key_below(cut.high))),
        high(cut.high == kTopkForced ? NAN : score_of(cut.high)),
        low(score_of(cut.low)) {}

  // Signs of differences, shifted in: an addition and a shift a bit. NaN is at no end and nowhere
  // in between: its difference is a NaN without a sign.
  __device__ __forceinline__ LaneBits operator()(const float4 (&x)[kGroupChunks]) const {
    uint32_t reached = 0, above_low = 0, marked = 0;
#pragma unroll
    for (int i = kLaneBits - 1; i >= 0; --i) {
      const float4& four = x[i / 4];
      const float score = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
      reached = __funnelshift_l(__float_as_uint(below_high - score), reached, 1);
      above_low = __funnelshift_l(__float_as_uint(low - score), above_low, 1);
      if (score == high || score == low) marked |= 1u << i;
    }
    return {reached, marked, above_low & ~reached};
  }
};

// The competing entries of one block. Positions count from the last multiple of 16 bytes at or
// before the row, so that four neighbours are one load; they fit 32 bits.
struct Groups {
  const float* scores;
  uint32_t begin, end;    // of the row's competing entries
  uint32_t first, count;  // groups of this block

  struct Batch {
    float4 x[kGroupChunks];
  };

  // Of the entries [begin, end) of a row, the part of one of `blocks` blocks.
  __device__ __forceinline__ static Groups make(const float* row, uint32_t begin, uint32_t end,
                                                uint32_t block, uint32_t blocks) {
    const uint32_t offset = Slice::offset_of(row);
    begin += offset, end += offset;
    const uint32_t all_first = begin / kGroupSize,
                   all = (end + kGroupSize - 1) / kGroupSize - all_first;
    const uint32_t most = (all + blocks - 1) / blocks, skipped = min(block * most, all);
    return {row - offset, begin, end, all_first + skipped, min(most, all - skipped)};
  }

  // The same entries in chunks; the border between two blocks may be another.
  __device__ __forceinline__ Slice slice(uint32_t block, uint32_t blocks) const {
    return Slice::make(scores, begin, end, block, blocks);
  }

  // What lies before this block's part.
  __device__ __forceinline__ uint32_t entries_before() const {
    return max(min(first * kGroupSize, end), begin) - begin;
  }

  // The first position of this lane in a group of the block.
  __device__ __forceinline__ uint32_t position(uint32_t group) const {
    return (first + group) * kGroupSize + 4 * (threadIdx.x % kWarp);
  }

  // A group as the lanes of a warp have it; what does not compete is NaN.
  __device__ __forceinline__ Batch load(uint32_t group) const {
    Batch batch;
    const uint32_t at = position(group), group_begin = (first + group) * kGroupSize;
    if (group_begin >= begin && group_begin + kGroupSize <= end) {
#pragma unroll
      for (int u = 0; u < kGroupChunks; ++u) {
        batch.x[u] = __ldg(reinterpret_cast<const float4*>(scores + at + u * kChunk));
      }
    } else {
#pragma unroll
      for (int u = 0; u < kGroupChunks; ++u) {
        const uint32_t i = at + u * kChunk;
        const auto one = [&](uint32_t j) {
          return j >= begin && j < end ? __ldg(scores + j) : NAN;
        };
        batch.x[u] = {one(i), one(i + 1), one(i + 2), one(i + 3)};
      }
    }
    return batch;
  }

  // A candidate's code: 16 * (32 * group + lane) + bit. Its score:
  __device__ __forceinline__ float score(uint32_t code) const {
    const uint32_t lane = code / kLaneBits % kWarp, bit = code % kLaneBits;
    const uint32_t group = first + code / (kLaneBits * kWarp);
    return __ldg(scores + group * kGroupSize + bit / 4 * kChunk + lane * 4 + bit % 4);
  }
};

// Order within a group: chunk, lane, neighbour. Of bits that a lane holds, how many of the group
// come before its first of each chunk.
struct GroupRank {
  uint32_t before;  // a byte a chunk: in this chunk, in lower lanes
  uint32_t totals;  // a byte a chunk

  __device__ __forceinline__ explicit GroupRank(uint32_t bits) {
    const uint32_t pairs = bits - (bits >> 1 & 0x5555u);
    const uint32_t fours = (pairs & 0x3333u) + (pairs >> 2 & 0x3333u);  // four of four bits
    const uint32_t wide = (fours | fours << 8) & 0x00ff00ffu;
    const uint32_t counts = (wide | wide << 4) & 0x0f0f0f0fu;  // at most 4 * 32 in a byte
    const uint32_t through = warp_inclusive_sum(counts);
    before = through - counts;
    totals = __shfl_sync(0xffffffffu, through, kWarp - 1);
  }
  // Bits of the first c chunks.
  __device__ __forceinline__ uint32_t chunks(int c) const {
    uint32_t sum = 0;
#pragma unroll
    for (int other = 0; other < kGroupChunks; ++other) {
      if (other < c) sum += totals >> 8 * other & 0xff;
    }
    return sum;
  }
  // Bits before this lane's of chunk c.
  __device__ __forceinline__ uint32_t operator()(int c) const {
    return chunks(c) + (before >> 8 * c & 0xff);
  }
};

}  // namespace kvc
