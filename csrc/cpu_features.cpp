#include "cpu_features.h"

#include <atomic>
#include <stdexcept>

namespace protoken {
namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  // The compiler's check asks the system, too, whether it saves the wide registers.
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (avx512) found.push_back(avx512_kernels());
  if (avx2) found.push_back(avx2_kernels());
#endif
  found.push_back(portable_kernels());
  return found;
}

const std::vector<const Kernels*>& sets() {
  static const std::vector<const Kernels*> found = runnable();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : sets()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& active_kernels() {
  const Kernels* kernels = chosen.load(std::memory_order_relaxed);
  return kernels != nullptr ? *kernels : *sets().front();
}

void use_instruction_set(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : sets()) {
    if (name == kernels->name) {
      chosen.store(kernels, std::memory_order_relaxed);
      return;
    }
    known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("instruction set: expected one of " + known + ", got " + name);
}

}  // namespace protoken
