// Launches of translated kernels.
#pragma once

#include <string>

#include "ptx.h"

namespace ptx {

// shared: bytes apart from those that the kernel declares. Throws the errors of its threads.
void launch(const std::string& name, unsigned blocks, unsigned threads, unsigned shared, char* const* arguments);

}  // namespace ptx
