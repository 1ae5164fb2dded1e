// The CPU module: exports only. Pointers come as integers, the GIL is released, exceptions pass through pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "client_scores.h"

namespace py = pybind11;
using namespace protoken;

namespace {

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of protoken. Every pointer is an address given as an integer.";
  m.def(
      "client_scores",
      [](int64_t layers, int64_t layer_count, int64_t clients, int64_t tokens, int64_t out, int64_t threads) {
        py::gil_scoped_release release;
        client_scores(at<const ScoresLayer>(layers), layer_count, clients, tokens, at<float>(out), threads);
      },
      py::arg("layers"), py::arg("layer_count"), py::arg("clients"), py::arg("tokens"), py::arg("out"),
      py::arg("threads"));
}
