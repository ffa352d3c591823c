#include <cstdlib>
#include <string>

#include "plugins/cpu/op.h"

namespace glm {
namespace {

// With the operating system's part: __builtin_cpu_supports asks it whether it saves the wide registers.
Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (!avx2) return Isa::scalar;
  return avx512 ? Isa::avx512 : Isa::avx2;
#else
  return Isa::scalar;
#endif
}

}  // namespace

const char* name_of(Isa isa) {
  if (isa == Isa::scalar) return "scalar";
  return isa == Isa::avx2 ? "avx2" : "avx512";
}

Isa isa() {
  static const Isa machine = best();
  const char* variable = std::getenv("GLM_EXPORT_CPU");
  const std::string wanted = variable ? variable : "";
  if (wanted.empty()) return machine;
  for (Isa known : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (wanted != name_of(known)) continue;
    if (known > machine) {
      throw Error("GLM_EXPORT_CPU is " + wanted + ", which this machine can not run: it has " + name_of(machine) + ".");
    }
    return known;
  }
  if (wanted == "portable") throw Error("GLM_EXPORT_CPU is portable: the kernels are to be left out.");
  throw Error("GLM_EXPORT_CPU is '" + wanted + "': choose one of scalar, avx2, avx512, portable.");
}

}  // namespace glm
