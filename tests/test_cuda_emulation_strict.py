"""The emulated device forgives nothing that a real one would not: kernels with one fault each, which must show."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from emulated_cuda import COMPILER, FLAGS, ROOT

SOURCE = r"""
#include "cuda_primitives.cuh"
#include "cuda_wgmma.cuh"

#include <cmath>

using namespace protoken::cuda;

static bool faulty(const char* name, const char* fault) { return std::string(name) == fault; }

alignas(16) static unsigned char source[4096];

__global__ void bulk(float* out, const char* fault) {
  PT_SHARED(shared);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
  if (threadIdx.x == 0) {
    if (!faulty("no barrier", fault)) mbarrier_init(barrier, 1);
    if (faulty("barrier twice", fault)) mbarrier_init(barrier, 1);
    if (faulty("barrier overwritten", fault)) *barrier = 0;
    mbarrier_expect(barrier, faulty("too few bytes", fault) ? 1040 : 1024);
    if (faulty("too many arrivals", fault)) mbarrier_expect(barrier, 0);
    bulk_copy(shared + (faulty("misaligned", fault) ? 8 : faulty("beyond", fault) ? 512 : 0), source,
              faulty("odd size", fault) ? 1016 : 1024, barrier);
  }
  __syncthreads();
  if (!faulty("not waited for", fault) && !faulty("wrong phase", fault)) mbarrier_wait(barrier, 0);
  if (faulty("wrong phase", fault)) mbarrier_wait(barrier, 1);
  out[threadIdx.x] = reinterpret_cast<const float*>(shared)[threadIdx.x];
}

__global__ void async_copies(float* out, const char* fault) {
  PT_SHARED(shared);
  for (int n = 0; n < 2; ++n) {
    copy16_async(shared + n * 16, source + n * 16);
    copy_commit();
  }
  if (faulty("one group too few", fault)) copy_wait<1>();
  if (!faulty("one group too few", fault) && !faulty("not waited for", fault)) copy_wait<0>();
  out[0] = reinterpret_cast<const float*>(shared)[4];
  if (!faulty("left under way", fault)) copy_wait<0>();
  if (faulty("left under way", fault)) copy16_async(shared, source);
}

__global__ void products(float* out, const char* fault) {
  PT_SHARED(shared);
  for (int i = threadIdx.x; i < 64 * 16; i += 128) reinterpret_cast<uint16_t*>(shared)[i] = 0x3f80;
  __syncthreads();
  float acc[8][4] = {};
  uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  uint64_t b = shared_address(shared) >> 4 | uint64_t{64} << 16 | uint64_t{8} << 32;
  if (faulty("beyond", fault)) b += 1;
  if (faulty("swizzled", fault)) b |= uint64_t{1} << 62;
  if (!faulty("unfenced", fault)) wgmma_fence();
  Wgmma<64, false>::run(acc, a, b);
  if (faulty("A overwritten", fault)) a[2] = 0;
  if (faulty("accumulator overwritten", fault)) acc[1][1] = 0;
  if (faulty("read early", fault)) out[threadIdx.x] = acc[0][0];
  if (!faulty("uncommitted", fault)) wgmma_commit();
  if (!faulty("not waited for", fault) && !(faulty("three warps", fault) && threadIdx.x >= 96)) wgmma_wait();
  if (!faulty("read early", fault)) out[threadIdx.x] = acc[7][3];
}

__global__ void nothing(int) {}
__global__ void overrun(int bytes) {
  PT_SHARED(shared);
  shared[bytes] = 0;
}

int main(int, char** arguments) {
  const std::string kernel = arguments[1];
  const char* fault = arguments[2];
  float* ones = reinterpret_cast<float*>(source);
  for (int i = 0; i < 1024; ++i) ones[i] = 1.0f;
  std::vector<float> values(128, 1.0f);
  float* out = values.data();
  try {
    const int threads = faulty("too few bytes", fault) ? 1 : 32;
    if (kernel == "bulk") PT_LAUNCH(bulk, dim3(1), dim3(threads), 1032, nullptr, out, fault);
    if (kernel == "async") PT_LAUNCH(async_copies, dim3(1), dim3(1), 64, nullptr, out, fault);
    if (kernel == "wgmma") PT_LAUNCH(products, dim3(1), dim3(128), 2048, nullptr, out, fault);
    if (kernel == "overrun") PT_LAUNCH(overrun, dim3(1), dim3(1), 64, nullptr, 64);
    if (kernel == "shared") {
      const void* address = reinterpret_cast<const void*>(&nothing);
      const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
      if (!faulty("not allowed", fault)) cudaFuncSetAttribute(address, limit, 50000);
      if (faulty("lowered", fault)) cudaFuncSetAttribute(address, limit, 49999);
      PT_LAUNCH(nothing, dim3(1), dim3(1), 50000, nullptr, 0);
    }
  } catch (const std::runtime_error& error) {
    std::printf("%s", error.what());
    return 0;
  }
  for (float value : values)
    if (!(value == 1.0f || value == 16.0f)) {
      std::printf("wrong number");
      return 0;
    }
  std::printf("right");
}
"""
FAULTS = {
    "bulk": {
        "none": "right",
        "no barrier": "never initialised",
        "barrier twice": "initialised twice",
        "barrier overwritten": "overwritten",
        "too few bytes": "hangs",
        "too many arrivals": "more arrivals",
        "misaligned": "misaligned",
        "beyond": "not in the block's shared memory",
        "odd size": "not a multiple of 16",
        "not waited for": "under way",
        "wrong phase": "under way",
    },
    "async": {
        "none": "right",
        "one group too few": "wrong number",
        "not waited for": "wrong number",
        "left under way": "under way",
    },
    "wgmma": {
        "none": "right",
        "unfenced": "no fence",
        "uncommitted": "before it was committed",
        "A overwritten": "A was written to",
        "accumulator overwritten": "accumulator was written to",
        "read early": "wrong number",
        "not waited for": "under way",
        "three warps": "hangs",
        "beyond": "beyond the shared memory",
        "swizzled": "without swizzle",
    },
    "overrun": {"write": "beyond its shared memory"},
    "shared": {"none": "right", "not allowed": "allowed to have", "lowered": "lowered"},
}


@cache
def program() -> Path:
    folder = Path(mkdtemp())
    (folder / "faults.cpp").write_text(SOURCE)
    command = [str(COMPILER), *FLAGS, f"-I{ROOT / 'csrc'}", str(folder / "faults.cpp"), "-o", str(folder / "faults")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder / "faults"


@pytest.mark.parametrize(("kernel", "fault"), [(kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]])
def test_a_fault_shows(kernel: str, fault: str) -> None:
    run = subprocess.run([program(), kernel, fault], capture_output=True, text=True, check=True, timeout=300)
    assert FAULTS[kernel][fault] in run.stdout
