// The CPU module: exports only. Pointers come as integers, the GIL is released, exceptions pass through pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>

#include "client_scores.h"
#include "client_scores_lowrank.h"
#include "client_totals.h"
#include "cpu_features.h"
#include "gated_tail.h"
#include "parallel.h"
#include "relevance_head.h"

namespace py = pybind11;
using namespace protoken;

namespace {

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// A layer whose inputs come apart from `fields`, what stays the same as long as the bank.
template <typename Layer, size_t Inputs>
Layer layer_of(const int64_t (&inputs)[Inputs], int64_t fields) {
  static_assert(sizeof(Layer) > sizeof(inputs), "the inputs' addresses come first in a layer");
  Layer layer;
  char* to = reinterpret_cast<char*>(&layer);
  std::memcpy(to, inputs, sizeof(inputs));
  std::memcpy(to + sizeof(inputs), at<const char>(fields), sizeof(Layer) - sizeof(inputs));
  return layer;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of protoken. Every pointer is an address given as an integer.";
  m.def("instruction_sets", &instruction_sets, "Instruction sets that can run here, best first.");
  m.def("instruction_set", [] { return active_kernels().name; }, "The one in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"));
  m.def("team_source", &team_source, "Whose threads do the work.");
  m.def(
      "client_scores",
      [](int64_t layers, int64_t layer_count, int64_t clients, int64_t tokens, int64_t out, int64_t threads) {
        py::gil_scoped_release release;
        client_scores(at<const ScoresLayer>(layers), layer_count, clients, tokens, at<float>(out), threads);
      },
      py::arg("layers"), py::arg("layer_count"), py::arg("clients"), py::arg("tokens"), py::arg("out"),
      py::arg("threads"));
  m.def(
      "client_scores_lowrank",
      [](int64_t layers, int64_t layer_count, int64_t clients, int64_t tokens, int64_t out, int64_t threads) {
        py::gil_scoped_release release;
        client_scores_lowrank(at<const LowRankLayer>(layers), layer_count, clients, tokens, at<float>(out), threads);
      },
      py::arg("layers"), py::arg("layer_count"), py::arg("clients"), py::arg("tokens"), py::arg("out"),
      py::arg("threads"));
  m.def(
      "client_totals",
      [](int64_t layers, int64_t layer_count, int64_t clients, int64_t out, int64_t threads) {
        py::gil_scoped_release release;
        client_totals(at<const TotalsLayer>(layers), layer_count, clients, at<float>(out), threads);
      },
      py::arg("layers"), py::arg("layer_count"), py::arg("clients"), py::arg("out"), py::arg("threads"));
  m.def(
      "client_scores_one",
      [](int64_t fields, int64_t x, int64_t grad, int64_t clients, int64_t tokens, int64_t out, int64_t threads) {
        py::gil_scoped_release release;
        const auto layer = layer_of<ScoresLayer>({x, grad}, fields);
        client_scores(&layer, 1, clients, tokens, at<float>(out), threads);
      },
      py::arg("fields"), py::arg("x"), py::arg("grad"), py::arg("clients"), py::arg("tokens"), py::arg("out"),
      py::arg("threads"));
  m.def(
      "client_scores_lowrank_one",
      [](int64_t fields, int64_t x, int64_t grad, int64_t clients, int64_t tokens, int64_t out, int64_t threads) {
        py::gil_scoped_release release;
        const auto layer = layer_of<LowRankLayer>({x, grad}, fields);
        client_scores_lowrank(&layer, 1, clients, tokens, at<float>(out), threads);
      },
      py::arg("fields"), py::arg("x"), py::arg("grad"), py::arg("clients"), py::arg("tokens"), py::arg("out"),
      py::arg("threads"));
  m.def(
      "client_totals_one",
      [](int64_t fields, int64_t m, int64_t clients, int64_t out, int64_t threads) {
        py::gil_scoped_release release;
        const auto layer = layer_of<TotalsLayer>({m}, fields);
        client_totals(&layer, 1, clients, at<float>(out), threads);
      },
      py::arg("fields"), py::arg("m"), py::arg("clients"), py::arg("out"), py::arg("threads"));
  m.attr("head_tokens") = kHeadTokens;
  m.def(
      "relevance_head",
      [](int64_t head, double scale, double softcap, int64_t mean, int64_t mass, int64_t threads) {
        py::gil_scoped_release release;
        relevance_head(*at<const HeadArguments>(head), static_cast<float>(scale), static_cast<float>(softcap),
                       at<float>(mean), at<float>(mass), threads);
      },
      py::arg("head"), py::arg("scale"), py::arg("softcap"), py::arg("mean"), py::arg("mass"), py::arg("threads"));
  m.def(
      "gated_tail",
      [](int64_t tail, double epsilon, double final_epsilon, int64_t at_leaving, int64_t at_entering, int64_t threads) {
        py::gil_scoped_release release;
        gated_tail(*at<const GatedTail>(tail), static_cast<float>(epsilon), static_cast<float>(final_epsilon),
                   at<float>(at_leaving), at<float>(at_entering), threads);
      },
      py::arg("tail"), py::arg("epsilon"), py::arg("final_epsilon"), py::arg("at_leaving"), py::arg("at_entering"),
      py::arg("threads"));
}
