// Designs that compete until a GPU has decided between them; bench/NOTES.md says what is believed of each. For
// developers: no design changes a result.
#pragma once

#include "tables.h"

namespace fused_adaptive::cuda {

struct Design {
  Order chunks = Order::ranges;
  bool powers_are_given = true;  // by the host, where it counts
  int blocks = kMostBlocks;      // of an update on a multiprocessor, at most
};

// The designs that FUSED_ADAPTIVE_CUDA_DESIGN names, as "chunks=ticket,blocks=2"; what it leaves out is as above. An
// unknown word is a std::runtime_error that names the choices.
Design chosen_design();

}  // namespace fused_adaptive::cuda
