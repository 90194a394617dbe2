// error.h: the sentence behind a status, one a thread.
#pragma once

namespace gossamer {

// Keeps the sentence for gossamer_error() and returns GOSSAMER_INVALID.
__attribute__((format(printf, 1, 2))) int fail(const char* format, ...);

using Long = long long;  // for %lld

}  // namespace gossamer
