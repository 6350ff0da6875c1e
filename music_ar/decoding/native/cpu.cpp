// Which kernels suit this CPU.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace music_ar {

static const Kernels& best_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every such CPU has F16C
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("MUSIC_AR_CPU");
  const bool any = asked == nullptr || *asked == 0;
  if (avx2 && wide && __builtin_cpu_supports("avx512vnni") && (any || std::strcmp(asked, "vnni") == 0))
    return kernels_vnni;
  if (avx2 && (any || std::strcmp(asked, "avx2") == 0)) return kernels_avx2;
#endif
  return kernels_portable;
}

const Kernels& chosen_kernels() { return best_kernels(); }

}  // namespace music_ar
