// Which entries of a slice are kept, as bits; and bits as positions, in order.
#pragma once

#include "select/score_slice.cuh"

namespace kvc {

constexpr int kGroup = kWarp * 32;  // entries whose bits a warp turns into positions at once

// A bit an entry of the slice, from its first chunk on: in shared memory, or where that is too
// small made anew from the scores.
template <bool kInShared>
struct SliceBits {
  uint32_t *above, *tied;

  // The words that the lanes of a warp have of a chunk, eight lanes the same one.
  __device__ __forceinline__ void set(uint32_t chunk, uint32_t above_word,
                                      uint32_t tied_word) const {
    if (threadIdx.x % 8 == 0) {
      above[chunk * 4 + threadIdx.x % kWarp / 8] = above_word;
      tied[chunk * 4 + threadIdx.x % kWarp / 8] = tied_word;
    }
  }
};

// Four bits of each lane -> the word of its 32 entries, known to the eight lanes that made it.
__device__ __forceinline__ uint32_t join_bits(uint32_t four) {
  uint32_t word = four << threadIdx.x % 8 * 4;
#pragma unroll
  for (int offset = 1; offset < 8; offset *= 2) word |= __shfl_xor_sync(0xffffffffu, word, offset);
  return word;
}

// The words of a group of 32, one a lane: entries above the threshold, entries equal to it.
template <bool kInShared>
__device__ __forceinline__ uint2 group_bits(const Slice& slice, const SliceBits<kInShared>& bits,
                                            uint32_t threshold, uint32_t first_word,
                                            uint32_t last_word) {
  const uint32_t lane = threadIdx.x % kWarp;
  if constexpr (kInShared) {
    const uint32_t word = first_word + lane;
    return word < last_word ? make_uint2(bits.above[word], bits.tied[word]) : make_uint2(0, 0);
  } else {
    uint2 mine{};
#pragma unroll 2
    for (uint32_t step = 0; step < kGroup / kChunk; ++step) {
      uint32_t keys[4];
      slice.edge_keys(slice.position(first_word / (kChunk / 32) + step), keys);
      uint32_t above = 0, tied = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        above |= static_cast<uint32_t>(keys[j] > threshold) << j;
        tied |= static_cast<uint32_t>(keys[j] == threshold) << j;
      }
      above = __shfl_sync(0xffffffffu, join_bits(above), lane % 4 * 8);
      tied = __shfl_sync(0xffffffffu, join_bits(tied), lane % 4 * 8);
      if (lane / 4 == step) mine = {above, tied};
    }
    return first_word + lane < last_word ? mine : make_uint2(0, 0);
  }
}

// Writes the positions of a group's kept entries to `out` and returns how many: all above the
// threshold, and of those equal to it what is left of `ties` behind the `before` of earlier groups,
// to which this group's are added. A warp, each lane the words of 32 entries, counted from `base`;
// `staged` has room for the positions of as many as may be set.
__device__ __forceinline__ uint32_t write_group(uint16_t* staged, uint2 bits, uint32_t ties,
                                                uint32_t& before, uint32_t base, int32_t* out) {
  const uint32_t lane = threadIdx.x % kWarp, own_ties = __popc(bits.y);
  const uint32_t ties_through = before + warp_inclusive_sum(own_ties);
  const uint32_t ties_left = ties - min(ties, ties_through - own_ties);
  before = __shfl_sync(0xffffffffu, ties_through, kWarp - 1);
  uint32_t kept = bits.x | lowest_bits(bits.y, min(own_ties, ties_left));
  const uint32_t through = warp_inclusive_sum(__popc(kept));
  for (uint32_t slot = through - __popc(kept); kept != 0; kept &= kept - 1) {
    staged[slot++] = static_cast<uint16_t>(lane * 32 + __ffs(kept) - 1);
  }
  __syncwarp();
  const uint32_t count = __shfl_sync(0xffffffffu, through, kWarp - 1);
  for (uint32_t j = lane; j < count; j += kWarp) out[j] = static_cast<int32_t>(base + staged[j]);
  __syncwarp();
  return count;
}

}  // namespace kvc
