// Asked once, at the first call: the processor by cpuid, the system by xgetbv (does it save the wide registers?) and,
// for AMX's tiles, by the permission that Linux wants to be asked for.
#include "cpu_features.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace protoken {
namespace {

#if defined(__x86_64__)
// The processor has tiles, the system saves them, and this process may use them (Linux asks to be asked).
bool amx_allowed() {
  unsigned a, b, c, d;
  constexpr unsigned kTilesAndBf16 = 1u << 24 | 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTilesAndBf16) != kTilesAndBf16) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 1u << 17 | 1u << 18;
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  // The compiler's check asks the system, too, whether it saves the wide registers.
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  if (pairs && amx_allowed()) found.push_back(amx_kernels());
  if (pairs) found.push_back(avx512_bf16_kernels());
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
  std::vector<const Kernels*> all = sets();
  for (const Kernels* kernels : sets()) {
    if (kernels == avx512_kernels()) all.push_back(amx_emulated_kernels());
  }
  for (const Kernels* kernels : all) {
    if (name == kernels->name) {
      chosen.store(kernels, std::memory_order_relaxed);
      return;
    }
    known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("instruction set: expected one of " + known + ", got " + name);
}

}  // namespace protoken
