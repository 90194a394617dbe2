#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace gossamer {
namespace {

struct Isa {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
bool has_neon() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#endif
bool always() { return true; }

// Best first: the order in which they are tried. base ends the list and runs anywhere.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {&avx512vnni::kernels, has_avx512vnni},
    {&avxvnni::kernels, has_avxvnni},
    {&avx2::kernels, has_avx2},
#elif defined(__aarch64__)
    {&neon::kernels, has_neon},
#endif
    {&base::kernels, always},
};
constexpr int kIsaCount = sizeof kIsas / sizeof kIsas[0];

struct Supported {
  const char* names[kIsaCount + 1] = {};
  char text[128] = "";  // the names again, for messages

  Supported() {
    int count = 0;
    for (const Isa& isa : kIsas) {
      if (!isa.supported()) continue;
      if (count) std::strcat(text, ", ");
      std::strcat(text, isa.kernels->isa);
      names[count++] = isa.kernels->isa;
    }
  }
};

const Supported& supported() {
  static const Supported value;
  return value;
}

const Kernels* find(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.kernels->isa, name) == 0 && isa.supported()) return isa.kernels;
  }
  return nullptr;
}

struct Choice {
  const Kernels* kernels;
  char error[384] = "";

  Choice() {
    const char* wanted = std::getenv("GOSSAMER_ISA");
    kernels = find(wanted && *wanted ? wanted : supported().names[0]);
    if (!kernels) {
      std::snprintf(error, sizeof error,
                    "GOSSAMER_ISA=%.64s names no instruction set that this CPU has: use one of %s",
                    wanted, supported().text);
    }
  }
};

const Choice& choice() {
  static const Choice value;
  return value;
}

// What gossamer_use_isa set; null until then.
std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const Kernels* active_kernels() {
  const Kernels* kernels = forced.load(std::memory_order_acquire);
  return kernels ? kernels : choice().kernels;
}

const char* isa_error() { return choice().error; }

}  // namespace gossamer

extern "C" const char* const* gossamer_isas(void) { return gossamer::supported().names; }

extern "C" int gossamer_use_isa(const char* name) {
  const gossamer::Kernels* kernels = name ? gossamer::find(name) : nullptr;
  if (!kernels) return GOSSAMER_INVALID;
  gossamer::forced.store(kernels, std::memory_order_release);
  return GOSSAMER_OK;
}
