// What goes on in the background of the emulated kernels: copies, mbarriers, warpgroup products.
//
// Everything is as late as the device may be: a copy arrives when somebody waits for it, and until then its target is
// NaN; a product is taken when its warpgroup waits, and until then its accumulator is NaN. So what is read too early,
// overwritten too early or never waited for is a wrong number or an error here, as it could be on a device.
#pragma once

#include "cuda_emulation.h"

namespace protoken::cuda::emulation {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
inline void begin_copy(const Copy& copy) {
  const auto* to = static_cast<const unsigned char*>(copy.to);
  if (to < shared_base || to + copy.bytes > shared_base + shared_size)
    throw std::runtime_error("emulated copy: its target is not in the block's shared memory");
  std::memset(copy.to, 0xff, copy.bytes);
}
inline void finish_copy(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

struct Product {  // one wgmma under way
  const uint32_t* a;
  uint32_t held[4];  // a when it was issued
  uint64_t descriptor;
  bool committed;
};
struct Background {        // of one thread
  std::vector<Copy> open;  // cp.async, not yet committed
  std::vector<std::vector<Copy>> groups;
  bool fenced = false;
  std::vector<Product> products;
  float* accumulator = nullptr;
  std::vector<float> before;  // what the accumulator held
};
struct Barrier {  // mbarrier: PTX manual, "Phase of the mbarrier object" and "tx-count"
  uint32_t expected, pending;
  int64_t bytes;
  uint32_t phase;
};
struct Transfer {
  uint64_t* barrier;
  Copy copy;
};
constexpr uint64_t kBarrierMark = 0x6d62617272696572;  // stands where the device keeps its state
constexpr int64_t kMostTransferred = (1 << 20) - 1;

inline thread_local std::vector<Background> backgrounds;
inline thread_local std::map<uint64_t*, Barrier> mbarriers;
inline thread_local std::vector<Transfer> transfers;
inline thread_local std::vector<Meeting> warpgroups;

inline void begin_background(int threads) {
  backgrounds.assign(threads, Background());
  warpgroups.assign((threads + 127) / 128, Meeting());
  mbarriers.clear();
  transfers.clear();
}
inline void end_background() {
  if (!transfers.empty()) throw std::runtime_error("emulated block ends while a bulk copy is under way");
  for (const Background& thread : backgrounds)
    if (!thread.open.empty() || !thread.groups.empty() || !thread.products.empty())
      throw std::runtime_error("emulated thread ends while copies or products of it are under way");
}

inline Barrier& barrier_at(uint64_t* address) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) throw std::runtime_error("emulated mbarrier was never initialised");
  if (*address != kBarrierMark) throw std::runtime_error("emulated mbarrier was overwritten");
  return found->second;
}
inline void complete(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
}

inline void meet_warpgroup() {
  if (warpgroups.size() * 128 != static_cast<size_t>(block_size.x))
    throw std::runtime_error("emulated wgmma: the block is not made of whole warpgroups");
  meet(warpgroups[current / 128], 128);
}

// d += A B: A from the fragments of the warp, B as the descriptor says, in core matrices of 8 columns x 16 bytes that
// lie `leading` apart along k and `stride` along n.
template <int kN, bool kHalf>
void multiply(float* d, const Product& product) {
  const uint64_t descriptor = product.descriptor;
  if (descriptor >> 49) throw std::runtime_error("emulated wgmma knows only the layout without swizzle");
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = ((descriptor >> 16) & 0x3fff) << 4,
                 stride = ((descriptor >> 32) & 0x3fff) << 4;
  if (start + leading + (kN / 8 - 1) * stride + 128 > shared_size)
    throw std::runtime_error("emulated wgmma: B reaches beyond the shared memory");
  uint32_t* mine = lane_slot(lane());
  for (int i = 0; i < 4; ++i) mine[i] = product.held[i];
  meet_warp();
  const uint32_t* lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = lane_slot(i);
  for (int n = 0; n < kN / 8; ++n)
    for (int i = 0; i < 4; ++i) {
      const int row = lane() / 4 + 8 * (i / 2), column = 2 * (lane() % 4) + i % 2;
      for (int k = 0; k < 16; ++k) {
        uint16_t bits;
        std::memcpy(&bits, shared_base + start + (k / 8) * leading + n * stride + column * 16 + (k % 8) * 2, 2);
        d[4 * n + i] += fragment_a<kHalf>(lanes, row, k) * element<kHalf>(bits, 0);
      }
    }
  meet_warp();
}

inline thread_local void (*multiply_now)(float*, const Product&) = nullptr;  // set by every wgmma

}  // namespace protoken::cuda::emulation

namespace protoken::cuda {

inline void copy16_async(void* shared, const void* global) {
  check_alignment(shared, 16);
  check_alignment(global, 16);
  const emu::Copy copy = {shared, global, 16};
  emu::begin_copy(copy);
  emu::backgrounds[emu::current].open.push_back(copy);
}
inline void copy_commit() {
  emu::Background& mine = emu::backgrounds[emu::current];
  mine.groups.push_back(std::exchange(mine.open, {}));
}
template <int kPending>
void copy_wait() {
  auto& groups = emu::backgrounds[emu::current].groups;
  while (groups.size() > kPending) {
    for (const emu::Copy& copy : groups.front()) emu::finish_copy(copy);
    groups.erase(groups.begin());
  }
}

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  check_alignment(barrier, 8);
  if (arrivals < 1 || arrivals > emu::kMostTransferred || emu::mbarriers.count(barrier))
    throw std::runtime_error("emulated mbarrier: initialised twice, or for no arrivals or too many");
  emu::mbarriers[barrier] = {arrivals, arrivals, 0, 0};
  *barrier = emu::kBarrierMark;
}
inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  emu::Barrier& state = emu::barrier_at(barrier);
  if (state.pending == 0) throw std::runtime_error("emulated mbarrier: more arrivals than it was initialised for");
  state.bytes += bytes;
  if (state.bytes > emu::kMostTransferred) throw std::runtime_error("emulated mbarrier: 2^20 bytes or more under way");
  --state.pending;
  emu::complete(state);
}
// Each look at the barrier lets one copy arrive.
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (emu::barrier_at(barrier).phase == parity) {
    for (size_t i = 0; i < emu::transfers.size(); ++i) {
      if (emu::transfers[i].barrier != barrier) continue;
      const emu::Transfer arrived = emu::transfers[i];
      emu::transfers.erase(emu::transfers.begin() + static_cast<std::ptrdiff_t>(i));
      emu::finish_copy(arrived.copy);
      emu::Barrier& state = emu::barrier_at(barrier);
      state.bytes -= static_cast<int64_t>(arrived.copy.bytes);
      emu::complete(state);
      break;
    }
    emu::yield();
  }
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16 || bytes == 0) throw std::runtime_error("emulated bulk copy: size is not a multiple of 16");
  check_alignment(shared, 16);
  check_alignment(global, 16);
  emu::barrier_at(barrier);
  const emu::Transfer transfer = {barrier, {shared, global, bytes}};
  emu::begin_copy(transfer.copy);
  emu::transfers.push_back(transfer);
}

inline void wgmma_fence() { emu::backgrounds[emu::current].fenced = true; }
inline void wgmma_commit() {
  for (emu::Product& product : emu::backgrounds[emu::current].products) product.committed = true;
}
inline void wgmma_wait() {
  emu::Background& mine = emu::backgrounds[emu::current];
  emu::meet_warpgroup();
  for (const float* at = mine.accumulator; at < mine.accumulator + mine.before.size(); ++at)
    if (float_bits(*at) != 0xffffffffu) throw std::runtime_error("emulated wgmma: its accumulator was written to");
  for (size_t i = 0; i < mine.before.size(); ++i) mine.accumulator[i] = mine.before[i];
  for (const emu::Product& product : mine.products) {
    if (!product.committed) throw std::runtime_error("emulated wgmma: waited for before it was committed");
    if (std::memcmp(product.a, product.held, sizeof(product.held)))
      throw std::runtime_error("emulated wgmma: A was written to while it was multiplied");
    emu::multiply_now(mine.accumulator, product);
  }
  mine.products.clear();
  mine.before.clear();
  mine.fenced = false;
}
inline void pin(float&) {}
template <int kN, bool kHalf>
struct Wgmma {
  static void run(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t descriptor) {
    emu::Background& mine = emu::backgrounds[emu::current];
    if (!mine.fenced) throw std::runtime_error("emulated wgmma: no fence since its registers were written");
    if (mine.products.empty()) {
      mine.accumulator = reinterpret_cast<float*>(&d);
      mine.before.assign(mine.accumulator, mine.accumulator + kN / 2);
      std::memset(mine.accumulator, 0xff, sizeof(d));
    } else if (mine.accumulator != reinterpret_cast<float*>(&d)) {
      throw std::runtime_error("emulated wgmma: one accumulator at a time");
    }
    emu::Product product = {a, {a[0], a[1], a[2], a[3]}, descriptor, false};
    mine.products.push_back(product);
    emu::multiply_now = &emu::multiply<kN, kHalf>;
  }
};

}  // namespace protoken::cuda
