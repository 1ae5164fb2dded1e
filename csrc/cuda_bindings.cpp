// Python's view of the CUDA kernels: addresses, sizes, dtype codes, device index and stream, all integers.
#include <pybind11/pybind11.h>

#include "cuda_ops.h"

namespace py = pybind11;
using namespace protoken::cuda;

#ifdef PROTOKEN_EMULATE
#define PT_MODULE _C_cuda_emulated
#else
#define PT_MODULE _C_cuda
#endif

static const int64_t* table_at(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

template <class Call>
static void run(int device, uintptr_t workspace, int64_t bytes, uintptr_t stream, const Call& call,
                void (*op)(const Call&, const Device&, void*, int64_t, cudaStream_t)) {
  const py::gil_scoped_release unlocked;
  const Current current(device);
  op(call, device_of(device), reinterpret_cast<void*>(workspace), bytes, reinterpret_cast<cudaStream_t>(stream));
}

PYBIND11_MODULE(PT_MODULE, m) {
  m.doc() = "protoken's CUDA kernels; csrc/cuda_ops.h lists the columns of the tables.";
  m.def(
      "device",
      [](int index) {
        const Device d = device_of(index);
        return py::make_tuple(d.major, d.minor, d.processors, d.shared_bytes);
      },
      py::arg("index"), "(major, minor, multiprocessors, shared bytes per block).");
  m.def(
      "versions",
      [] {
        const Versions v = versions();
        return py::make_tuple(v.driver, v.runtime);
      },
      "(CUDA that the driver serves, CUDA that this was built with), 13000 for 13.0; driver 0: there is none.");

  m.def("client_scores_workspace", [](uintptr_t table, int64_t layers, int64_t clients, int64_t tokens, int format,
                                      int planes_x, bool vectors, int path, int device) {
    return client_scores_workspace({table_at(table), layers, clients, tokens, format, planes_x, vectors, path},
                                   device_of(device));
  });
  m.def("client_scores", [](uintptr_t table, int64_t layers, int64_t clients, int64_t tokens, int format, int planes_x,
                            bool vectors, int path, uintptr_t workspace, int64_t bytes, int device, uintptr_t stream) {
    run<ScoresCall>(device, workspace, bytes, stream,
                    {table_at(table), layers, clients, tokens, format, planes_x, vectors, path}, &client_scores);
  });

  m.def("client_scores_lowrank_workspace", [](uintptr_t table, int64_t jobs, int64_t tokens, int format, int planes_x,
                                              int path, int device) {
    return client_scores_lowrank_workspace({table_at(table), jobs, tokens, format, planes_x, path}, device_of(device));
  });
  m.def("client_scores_lowrank", [](uintptr_t table, int64_t jobs, int64_t tokens, int format, int planes_x, int path,
                                    uintptr_t workspace, int64_t bytes, int device, uintptr_t stream) {
    run<LowRankCall>(device, workspace, bytes, stream, {table_at(table), jobs, tokens, format, planes_x, path},
                     &client_scores_lowrank);
  });

  m.def("client_totals_workspace", [](uintptr_t table, int64_t layers, int64_t clients, int format, bool vectors) {
    return client_totals_workspace({table_at(table), layers, clients, format, vectors});
  });
  m.def("client_totals", [](uintptr_t table, int64_t layers, int64_t clients, int format, bool vectors,
                            uintptr_t workspace, int64_t bytes, int device, uintptr_t stream) {
    run<TotalsCall>(device, workspace, bytes, stream, {table_at(table), layers, clients, format, vectors},
                    &client_totals);
  });

  m.def("relevance_head_workspace", [](uintptr_t table, int format, bool vectors, int norm, bool logprob, int path,
                                       float eps, float scale, float softcap, int device) {
    return relevance_head_workspace({table_at(table), format, vectors, norm, logprob, path, eps, scale, softcap},
                                    device_of(device));
  });
  m.def("relevance_head",
        [](uintptr_t table, int format, bool vectors, int norm, bool logprob, int path, float eps, float scale,
           float softcap, uintptr_t workspace, int64_t bytes, int device, uintptr_t stream) {
          run<HeadCall>(device, workspace, bytes, stream,
                        {table_at(table), format, vectors, norm, logprob, path, eps, scale, softcap}, &relevance_head);
        });

  m.def("capture_append", [](uintptr_t table, int64_t buffers, int64_t capacity, int64_t tokens, uintptr_t cursor,
                             int device, uintptr_t stream) {
    const py::gil_scoped_release unlocked;
    const Current current(device);
    capture_append({table_at(table), buffers, capacity, tokens, static_cast<int64_t>(cursor)},
                   reinterpret_cast<cudaStream_t>(stream));
  });
}
