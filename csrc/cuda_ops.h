// The CUDA module's functions as plain C++: what the bindings call. A call travels as a table of int64, one row per
// layer, whose columns are listed here; addresses are device addresses unless said otherwise.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#ifdef PROTOKEN_EMULATE
using cudaStream_t = void*;
#else
#include <cuda_runtime.h>
#endif

namespace protoken::cuda {

struct Device {
  int index, major, minor, processors, shared_bytes;
};
Device device_of(int index);  // read once per device

struct Versions {
  int driver, runtime;  // as CUDA numbers them, 13000 for 13.0; driver 0: there is none
};
Versions versions();

// Makes a device current for the length of a call.
class Current {
 public:
  explicit Current(int index);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_;
};

void check_launch(const char* kernel);  // throws what the runtime says of the last launch
// Lets a kernel have so much dynamic shared memory on the current device. The limit is the kernel's, not a launch's, so
// it only grows: another thread may be about to launch the same kernel with more.
void allow_shared(const void* kernel, int bytes, const Device& device);

enum Path : int { kPathAuto = 0, kPathMma = 1, kPathWgmma = 2 };

// x, stride_t, stride_i, dtype; grad, stride_t, stride_o, dtype; O, I; base, bytes between clients, table (0: base
// is used); stride_o, stride_i of a client's matrix in elements; scale (0: none); out [K, T].
constexpr int64_t kScoreColumns = 17;
struct ScoresCall {
  const int64_t* table;  // on the host
  int64_t layers, clients, tokens;
  int format;    // Format of cuda_tiles.cuh
  int planes_x;  // 1: every x is bf16 (or fp16 with kHalf), so one plane holds it
  bool vectors;  // rows are contiguous, aligned to 16 bytes and a multiple of 16 bytes long
  int path;
};
int64_t client_scores_workspace(const ScoresCall& call, const Device& device);
void client_scores(const ScoresCall& call, const Device& device, void* workspace, int64_t bytes, cudaStream_t stream);

// Per job (a layer's clients of one rank): x, stride_t, stride_i, dtype; grad, stride_t, stride_o, dtype; O, I;
// table int64 [.., 7] as LowRankBank.table (0: the next four and the six strides are used); base of A, bytes between
// clients' A, base of B, bytes between clients' B; stride_r, stride_i of A, stride_o, stride_r of B; clients of the
// job; their numbers int64 (0: 0, 1, ..); rank; scale [K]; out [K, T]; mode of A, mode of B (LoadMode).
constexpr int64_t kLowRankColumns = 26;
struct LowRankCall {
  const int64_t* table;
  int64_t jobs, tokens;
  int format;    // kF32, kBF16, kF16 or kHalf
  int planes_x;  // 1: every x and grad is bf16 (or fp16 with kHalf)
  int path;      // 0: chosen by the amount of work, 1: whole sums in a block, 2: sums split over blocks
};
int64_t client_scores_lowrank_workspace(const LowRankCall& call, const Device& device);
void client_scores_lowrank(const LowRankCall& call, const Device& device, void* workspace, int64_t bytes,
                           cudaStream_t stream);

// m, stride_o, stride_i, dtype; O, I; base, bytes between clients, table; stride_o, stride_i; scale; out [K].
constexpr int64_t kTotalsColumns = 13;
struct TotalsCall {
  const int64_t* table;
  int64_t layers, clients;
  int format;  // kF32, kBF16, kF16, kI8 or kE4M3
  bool vectors;
};
int64_t client_totals_workspace(const TotalsCall& call);
void client_totals(const TotalsCall& call, const Device&, void* workspace, int64_t bytes, cudaStream_t stream);

// One row: hidden [T, d], stride_t, stride_d, dtype; targets, stride; weight [V, d], stride_v, stride_d; bias, stride,
// dtype; norm weight, stride, dtype; norm bias, stride, dtype (address 0: none); grad [T, d], value [T]; T, d, V.
constexpr int64_t kHeadColumns = 23;
enum HeadPath : int { kHeadAuto = 0, kHeadOnce = 1, kHeadTwice = 2 };
struct HeadCall {
  const int64_t* table;
  int format;    // of the weight: kF32, kBF16 or kF16
  bool vectors;  // as in ScoresCall
  int norm;      // HeadNorm of relevance_head.cuh
  bool logprob;  // else the raw logit
  int path;
  float eps, scale, softcap;  // softcap 0: none
};
int64_t relevance_head_workspace(const HeadCall& call, const Device& device);
void relevance_head(const HeadCall& call, const Device& device, void* workspace, int64_t bytes, cudaStream_t stream);

// Per buffer: buffer [C, n], stride between rows, dtype; step [T, n], stride_t, stride_n, dtype; n. dtype 6: fp64.
constexpr int64_t kAppendTableColumns = 8;
struct AppendCall {
  const int64_t* table;
  int64_t buffers, capacity, tokens, cursor;  // cursor: address of int64 [1]
};
void capture_append(const AppendCall& call, cudaStream_t stream);

}  // namespace protoken::cuda
