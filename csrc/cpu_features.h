// Which instruction sets this processor and this system let us run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace protoken {

// Names of the sets that can run here, best first; "portable" is always there.
std::vector<std::string> instruction_sets();

// The set in use: the best one, unless another was chosen.
const Kernels& active_kernels();

// Choose a set by name for the whole process (tests run every one, and "amx-emulated", which is never chosen by itself,
// where AVX-512 is). Throws std::invalid_argument with the ones there
// are.
void use_instruction_set(const std::string& name);

}  // namespace protoken
