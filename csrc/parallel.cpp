// No pool of our own: two teams of threads on the same cores wait for each other. The team is borrowed from the OpenMP
// runtime that torch has loaded, found among the loaded libraries by name and called through GOMP_parallel, which
// libgomp, libomp and libiomp5 all export; so nothing is linked against any of them.
#include "parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace protoken {
namespace {

// The entry point that GCC compiles `#pragma omp parallel` to; libgomp, libomp and libiomp5 all export it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string source = "std::thread";
};

int look_for_openmp(dl_phdr_info* info, size_t, void* opaque) {
  const char* path = info->dlpi_name;
  if (path == nullptr) return 0;
  const char* slash = std::strrchr(path, '/');
  const char* name = slash ? slash + 1 : path;
  const bool known = std::strncmp(name, "libgomp", 7) == 0 || std::strncmp(name, "libiomp5", 8) == 0 ||
                     std::strncmp(name, "libomp", 6) == 0;
  // Several packages may bring a runtime of their own: torch's comes first.
  std::string& found = *static_cast<std::string*>(opaque);
  if (known && (found.empty() || std::strstr(path, "/torch") != nullptr)) found = path;
  return 0;
}

Runtime find_runtime() {
  Runtime runtime;
  std::string path;
  dl_iterate_phdr(look_for_openmp, &path);
  if (path.empty()) return runtime;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return runtime;
  runtime.parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  if (runtime.parallel != nullptr) runtime.source = "OpenMP (" + path + ")";
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Team {
  MemberFunction function;
  void* context;
  std::atomic<int64_t> joined{0};
};

void join_team(void* opaque) {
  Team& team = *static_cast<Team*>(opaque);
  team.function(team.context, team.joined.fetch_add(1, std::memory_order_relaxed));
}

}  // namespace

void run_team(int64_t threads, MemberFunction function, void* context) {
  Team team;
  team.function = function;
  team.context = context;
  if (runtime().parallel != nullptr) {
    runtime().parallel(join_team, &team, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t member = 1; member < threads; ++member) others.emplace_back(join_team, &team);
  join_team(&team);
  for (std::thread& other : others) other.join();
}

const char* team_source() { return runtime().source.c_str(); }

}  // namespace protoken
