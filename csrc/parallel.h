// Runs a fixed list of tasks on a team of threads. Results must not depend on who runs which task.
#pragma once

#include <atomic>
#include <cstdint>

namespace protoken {

using MemberFunction = void (*)(void* context, int64_t member);

// Calls function(context, member) once for every member of a team of at most `threads`; members are numbered from 0.
// The team comes from the OpenMP runtime that the process has loaded already (torch's), so that two pools never spin
// against each other on the same cores; without one, from std::thread.
void run_team(int64_t threads, MemberFunction function, void* context);

// "OpenMP (path of the library)" or "std::thread".
const char* team_source();

// function(task, member) for every task in [0, tasks); it must not throw.
template <typename Function>
void parallel_for(int64_t tasks, int64_t threads, const Function& function) {
  struct Context {
    const Function* function;
    std::atomic<int64_t> next{0};
    int64_t tasks;
  } context;
  context.function = &function;
  context.tasks = tasks;
  const int64_t team = threads < tasks ? threads : tasks;
  if (team <= 1) {
    for (int64_t task = 0; task < tasks; ++task) function(task, 0);
    return;
  }
  run_team(
      team,
      [](void* opaque, int64_t member) {
        Context& shared = *static_cast<Context*>(opaque);
        for (int64_t task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;) {
          (*shared.function)(task, member);
        }
      },
      &context);
}

}  // namespace protoken
