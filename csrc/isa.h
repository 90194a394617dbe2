// isa.h: which table of kernels runs. Chosen once; see gossamer_isa in gossamer.h for the rules.
#pragma once

#include "kernels.h"

namespace gossamer {

// The active table, or null when GOSSAMER_ISA asks for what cannot run: isa_error() then says why.
const Kernels* active_kernels();
const char* isa_error();

}  // namespace gossamer
