// Alternative designs of the kernels, to be compared on a GPU. bench/NOTES.md lists the expectations. They are for
// developers: no design changes a result.
#pragma once

#include "tables.h"

namespace fused_adaptive::cuda {

struct Design {
  Order chunks = Order::ranges;
  bool powers_are_given = true;  // the host computes powers if counts are on the host
  int blocks = kMostBlocks;      // maximum per multiprocessor in an update
};

// Returns the design in FUSED_ADAPTIVE_CUDA_DESIGN, for example "chunks=ticket,blocks=2". Choices that are not named
// have the defaults of Design. Throws std::runtime_error with the known choices for an unknown word.
Design chosen_design();

}  // namespace fused_adaptive::cuda
