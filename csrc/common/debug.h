// The debug switch: when it is on, ops look at the values of their index arguments before any
// write, which waits for the GPU. Set by kvcompress.set_debug or, at load, by KVCOMPRESS_DEBUG=1.
#pragma once

#include <string>

#include "common/check.h"

namespace kvc {

bool debug_enabled();

struct IndexRule {
  int64_t low, high;  // every entry lies in [low, high)
  bool ascending = false;
  bool distinct = false;
  bool sorted = false;
  const Tensor* indptr = nullptr;  // of a packed index: its parts ascend each for itself
};

// Fails with "op: argument must be <must>, got <value> at [b, h, i]" for the first entry of an
// int32 tensor of one to three dimensions that breaks `rule`. Call it behind debug_enabled(), so
// that `must` costs nothing.
void check_index_values(const char* op, const char* argument, const Tensor& t,
                        const IndexRule& rule, const std::string& must);

}  // namespace kvc
