// The CPU ops under every instruction set that runs here, against sums in double precision: a program without Python,
// so that it also runs where there is no operating system (boot.S, kernel.c).
//
// Outputs are poisoned with NaN; the bounds are those of fp32 in tests/tolerances.py, for totals relative to what their
// terms come to when they do not cancel. A set's line ends with a hash of all its bits, the same wherever the set is
// run.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "client_scores.h"
#include "client_scores_lowrank.h"
#include "client_totals.h"
#include "cpu_features.h"
#include "dtypes.h"
#include "relevance_head.h"

using namespace protoken;

namespace {

constexpr double kRms = 1e-5, kMaximum = 2e-5;
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();
const char* const kNames[] = {"fp32", "bf16", "fp16", "int8", "fp8"};

uint64_t random_state;

double uniform() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<double>(random_state >> 11) * 0x1p-53;
}

// Nearly normal: the sum of twelve uniform numbers.
float normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return static_cast<float>(sum);
}

std::vector<float> normals(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal();
  return values;
}

// Some finite number of the dtype, of any size that the narrow ones have.
void write_element(char* to, int64_t dtype) {
  if (dtype == kFloat32) {
    const float value = normal();
    std::memcpy(to, &value, 4);
  } else if (dtype == kBfloat16) {
    const float value = normal();
    std::memcpy(to, reinterpret_cast<const char*>(&value) + 2, 2);
  } else if (dtype == kFloat16) {
    const auto bits = static_cast<uint16_t>(uniform() * 0x4400);  // up to 4, subnormal numbers too
    const uint16_t half = static_cast<uint16_t>(bits | (uniform() < 0.5 ? 0x8000 : 0));
    std::memcpy(to, &half, 2);
  } else {
    do {
      *to = static_cast<char>(static_cast<int>(uniform() * 256) - 128);
    } while (dtype == kFloat8E4M3 && (*to & 0x7f) == 0x7f);  // its two NaN
  }
}

void cut_to_bf16(std::vector<float>& values) {
  for (float& value : values) std::memset(&value, 0, 2);
}

// What one instruction set was asked and got wrong.
struct Record {
  std::string set;
  int cases = 0, wrong = 0;
  double worst = 0;
  uint64_t bits = 14695981039346656037ull;

  void complain(const std::string& what) {
    ++wrong;
    std::printf("WRONG: %s, %s\n", set.c_str(), what.c_str());
  }

  // `terms`: what a sum of that many such terms comes to when they do not cancel; errors are taken relative to it where
  // it is more than what is wanted.
  void compare(const std::string& what, const std::vector<float>& got, const std::vector<double>& wanted,
               double terms = 0) {
    double error = 0, norm = 0, largest_error = 0, largest = terms;
    bool finite = true;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const double difference = got[i] - wanted[i];
      finite = finite && std::isfinite(difference);
      error += difference * difference;
      norm += wanted[i] * wanted[i];
      largest_error = std::fmax(largest_error, std::fabs(difference));
      largest = std::fmax(largest, std::fabs(wanted[i]));
      uint32_t word;
      std::memcpy(&word, &got[i], 4);
      bits = (bits ^ word) * 1099511628211ull;
    }
    ++cases;
    norm = std::fmax(norm, terms * terms * static_cast<double>(wanted.size()));
    const double rms = std::sqrt(error / norm), maximum = largest_error / largest;
    worst = std::fmax(worst, rms);
    if (!finite || !(rms <= kRms) || !(maximum <= kMaximum)) {
      complain(what + ": relative RMS " + std::to_string(rms) + ", maximum " + std::to_string(maximum));
    }
  }

  void report(const char* what) {
    std::printf("%s, %s: %d cases, %d wrong, worst relative RMS %.1e, bits %016llx\n", set.c_str(), what, cases, wrong,
                worst, static_cast<unsigned long long>(bits));
    std::fflush(stdout);
  }
};

std::string numbers(std::initializer_list<int64_t> values) {
  std::string text;
  for (int64_t value : values) text += " " + std::to_string(value);
  return text;
}

struct Shape {
  int64_t clients, tokens, rows, columns;
};

// ---- dense banks
// -----------------------------------------------------------------------------------------------------

enum Layout { kRows, kColumns, kEveryOther, kMisaligned, kLayouts };

struct Bank {
  std::vector<char> memory;
  std::vector<int64_t> pointers;
  std::vector<float> scale;
  int64_t stride_o, stride_i;
};

Bank make_bank(int64_t dtype, const Shape& shape, int layout) {
  const int64_t size = item_size(dtype), step = layout == kEveryOther ? 2 : 1;
  const int64_t each = shape.rows * shape.columns * step;
  Bank bank;
  bank.memory.resize(static_cast<size_t>(shape.clients * each * size + 64));
  bank.stride_o = layout == kColumns ? 1 : shape.columns * step;
  bank.stride_i = layout == kColumns ? shape.rows : step;
  for (int64_t k = 0; k < shape.clients; ++k) {
    char* matrix = bank.memory.data() + (k * each + (layout == kMisaligned ? 1 : 0)) * size;
    for (int64_t i = 0; i < each; ++i) write_element(matrix + i * size, dtype);
    bank.pointers.push_back(reinterpret_cast<int64_t>(matrix));
  }
  if (dtype == kInt8 || dtype == kFloat8E4M3) {
    for (float value : normals(shape.clients * shape.rows)) bank.scale.push_back(std::fabs(value) + 0.1f);
  }
  return bank;
}

void check_dense(Record& record, const Shape& shape, int64_t dtype, int layout) {
  const auto [clients, tokens, rows, columns] = shape;
  const Bank bank = make_bank(dtype, shape, layout);
  std::vector<float> x = normals(tokens * columns);
  std::vector<float> grad = normals(tokens * rows);
  const std::vector<float> m = normals(rows * columns);
  // Where a processor multiplies pairs of bf16, or AMX may leave terms out. A turned matrix is multiplied by grad.
  if (dtype != kFloat32 && layout != kEveryOther) cut_to_bf16(layout == kColumns ? grad : x);
  std::vector<double> scores(static_cast<size_t>(clients * tokens)), totals(static_cast<size_t>(clients));
  double squares = 0;  // of the terms of the totals
  for (int64_t k = 0; k < clients; ++k) {
    const char* matrix = reinterpret_cast<const char*>(bank.pointers[k]);
    for (int64_t o = 0; o < rows; ++o) {
      const double scale = bank.scale.empty() ? 1.0 : bank.scale[k * rows + o];
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t place = (o * bank.stride_o + i * bank.stride_i) * item_size(dtype);
        const double weight = scale * load_element(matrix + place, dtype);
        const double term = weight * m[o * columns + i];
        totals[k] += term;
        squares += term * term;
        for (int64_t t = 0; t < tokens; ++t) scores[k * tokens + t] += weight * grad[t * rows + o] * x[t * columns + i];
      }
    }
  }
  const std::string what = std::string(kNames[dtype]) + ", layout, clients, tokens, rows, columns" +
                           numbers({layout, clients, tokens, rows, columns});
  const float* scale = bank.scale.empty() ? nullptr : bank.scale.data();
  const ScoresLayer layer{x.data(),      grad.data(),   rows, columns, dtype, bank.pointers.data(),
                          bank.stride_o, bank.stride_i, scale};
  std::vector<float> got(scores.size(), kPoison), again(scores.size(), kPoison), sums(totals.size(), kPoison);
  client_scores(&layer, 1, clients, tokens, got.data(), 1);
  record.compare("client_scores " + what, got, scores);
  client_scores(&layer, 1, clients, tokens, again.data(), 1);
  if (std::memcmp(got.data(), again.data(), got.size() * sizeof(float)) != 0) {
    record.complain("client_scores " + what + ": other bits the second time");
  }
  const TotalsLayer of_sums{m.data(), rows, columns, dtype, bank.pointers.data(), bank.stride_o, bank.stride_i, scale};
  client_totals(&of_sums, 1, clients, sums.data(), 1);
  record.compare("client_totals " + what, sums, totals, std::sqrt(squares / static_cast<double>(clients)));
}

// ---- low-rank banks
// --------------------------------------------------------------------------------------------------

enum FactorLayout { kMixedRanks, kRankTwo, kRanksInsideA, kRanksOutsideB, kFactorLayouts };

int64_t rank_of(int64_t client, int64_t tokens, int layout) {
  constexpr int64_t ranks[] = {1, 2, 3, 8, 16, 64, 5, 1, 1, 4, 70, 12};
  return layout == kRankTwo ? 2 : ranks[(client * 5 + tokens) % 12];
}

void check_lowrank(Record& record, const Shape& shape, int64_t dtype, int layout) {
  const auto [clients, tokens, rows, columns] = shape;
  const int64_t size = item_size(dtype);
  int64_t all_ranks = 0;
  for (int64_t k = 0; k < clients; ++k) all_ranks += rank_of(k, tokens, layout);
  std::vector<char> a(static_cast<size_t>(all_ranks * columns * size)), b(static_cast<size_t>(all_ranks * rows * size));
  for (int64_t i = 0; i < all_ranks * columns; ++i) write_element(a.data() + i * size, dtype);
  for (int64_t i = 0; i < all_ranks * rows; ++i) write_element(b.data() + i * size, dtype);
  std::vector<float> x = normals(tokens * columns), grad = normals(tokens * rows);
  const std::vector<float> scale = normals(clients);
  if (dtype == kBfloat16 && layout != kMixedRanks) cut_to_bf16(x);
  if (dtype == kBfloat16 && layout != kRankTwo) cut_to_bf16(grad);
  std::vector<LowRankClient> bank;
  std::vector<double> scores(static_cast<size_t>(clients * tokens));
  int64_t first = 0;  // rank of the client: its factors lie behind those of the client before
  for (int64_t k = 0; k < clients; ++k) {
    const int64_t rank = rank_of(k, tokens, layout);
    const char* own_a = a.data() + first * columns * size;
    const char* own_b = b.data() + first * rows * size;
    first += rank;
    const LowRankClient client{reinterpret_cast<int64_t>(own_a),
                               layout == kRanksInsideA ? 1 : columns,
                               layout == kRanksInsideA ? rank : 1,
                               reinterpret_cast<int64_t>(own_b),
                               layout == kRanksOutsideB ? 1 : rank,
                               layout == kRanksOutsideB ? rows : 1,
                               rank};
    bank.push_back(client);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < rank; ++j) {
        double left = 0, right = 0;
        for (int64_t i = 0; i < columns; ++i) {
          const int64_t place = (j * client.a_stride_r + i * client.a_stride_i) * size;
          left += static_cast<double>(load_element(own_a + place, dtype)) * x[t * columns + i];
        }
        for (int64_t o = 0; o < rows; ++o) {
          const int64_t place = (o * client.b_stride_o + j * client.b_stride_r) * size;
          right += static_cast<double>(load_element(own_b + place, dtype)) * grad[t * rows + o];
        }
        scores[k * tokens + t] += scale[k] * left * right;
      }
    }
  }
  const std::string what = std::string("client_scores_lowrank ") + kNames[dtype] +
                           ", layout, clients, tokens, rows, columns" +
                           numbers({layout, clients, tokens, rows, columns});
  const LowRankLayer layer{x.data(), grad.data(), rows, columns, dtype, bank.data(), scale.data()};
  std::vector<float> got(scores.size(), kPoison);
  client_scores_lowrank(&layer, 1, clients, tokens, got.data(), 1);
  record.compare(what, got, scores);
  for (int64_t k = 0; k < clients; ++k) {
    const LowRankLayer alone{x.data(), grad.data(), rows, columns, dtype, &bank[k], &scale[k]};
    std::vector<float> own(static_cast<size_t>(tokens), kPoison);
    client_scores_lowrank(&alone, 1, 1, tokens, own.data(), 1);
    if (std::memcmp(own.data(), got.data() + k * tokens, own.size() * sizeof(float)) != 0) {
      record.complain(what + ": other bits alone, client" + numbers({k}));
    }
  }
}

// ---- the head
// --------------------------------------------------------------------------------------------------------

void check_head(Record& record, int64_t tokens, int64_t width, int64_t dtype, float softcap) {
  constexpr int64_t vocabulary = 301;
  constexpr float scale = 0.2f;
  const int64_t size = item_size(dtype);
  std::vector<char> weight(static_cast<size_t>(vocabulary * width * size));
  for (int64_t i = 0; i < vocabulary * width; ++i) write_element(weight.data() + i * size, dtype);
  const std::vector<float> normed = normals(tokens * width), bias = normals(vocabulary);
  std::vector<double> mean(static_cast<size_t>(tokens * width)), mass(static_cast<size_t>(tokens));
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> logits, slopes;
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t v = 0; v < vocabulary; ++v) {
      double z = bias[v];
      for (int64_t i = 0; i < width; ++i) {
        z += static_cast<double>(load_element(weight.data() + (v * width + i) * size, dtype)) * normed[t * width + i];
      }
      const double bent = softcap == 0 ? 0 : std::tanh(scale * z / softcap);
      logits.push_back(softcap == 0 ? scale * z : softcap * bent);
      slopes.push_back(scale * (1 - bent * bent));
      top = std::fmax(top, logits.back());
    }
    for (double z : logits) sum += std::exp(z - top);
    mass[t] = top + std::log(sum);
    for (int64_t v = 0; v < vocabulary; ++v) {
      const double share = std::exp(logits[v] - mass[t]) * slopes[v];
      for (int64_t i = 0; i < width; ++i) {
        mean[t * width + i] += share * load_element(weight.data() + (v * width + i) * size, dtype);
      }
    }
  }
  const HeadArguments head{
      normed.data(), tokens, width, vocabulary, dtype, reinterpret_cast<int64_t>(weight.data()), width, bias.data()};
  std::vector<float> got_mean(mean.size(), kPoison), got_mass(mass.size(), kPoison);
  relevance_head(head, scale, softcap, got_mean.data(), got_mass.data(), 1);
  const std::string what =
      std::string("relevance_head ") + kNames[dtype] + ", tokens, width" + numbers({tokens, width});
  record.compare(what + ", mean", got_mean, mean);
  record.compare(what + ", mass", got_mass, mass);
}

int check_set(const std::string& name) {
  // One of everything, primes, whole and broken tiles of every set, more rows than a task takes.
  const Shape dense[] = {{1, 1, 1, 1},     {2, 1, 97, 131},   {3, 2, 7, 11},     {2, 5, 200, 64},  {1, 7, 96, 1024},
                         {3, 8, 31, 129},  {2, 9, 40, 288},   {2, 13, 101, 300}, {2, 16, 64, 256}, {1, 17, 98, 320},
                         {2, 33, 97, 257}, {1, 67, 193, 515}, {2, 130, 5, 31},   {1, 200, 33, 96}};
  const Shape factors[] = {{1, 1, 1, 1},    {4, 1, 97, 131},  {5, 3, 64, 48},   {7, 8, 33, 65},   {6, 9, 40, 120},
                           {9, 16, 48, 64}, {5, 33, 97, 150}, {3, 130, 31, 40}, {12, 400, 16, 24}};
  use_instruction_set(name);
  random_state = 88172645463325252ull;
  Record scores{name};
  for (const Shape& shape : dense) {
    const bool large = shape.clients * shape.tokens * shape.rows * shape.columns > 3'000'000;
    for (int64_t dtype = 0; dtype < kDtypes; ++dtype) {
      for (int layout = 0; layout < (large ? 1 : kLayouts); ++layout) check_dense(scores, shape, dtype, layout);
    }
  }
  scores.report("scores and totals");
  Record lowrank{name};
  for (const Shape& shape : factors) {
    for (int64_t dtype : {kFloat32, kBfloat16, kFloat16}) {
      for (int layout = 0; layout < kFactorLayouts; ++layout) check_lowrank(lowrank, shape, dtype, layout);
    }
  }
  lowrank.report("low rank");
  Record head{name};
  for (int64_t tokens : {1, 3, 8, 16}) {
    for (int64_t width : {17, 64, 200}) {
      for (int64_t dtype : {kFloat32, kBfloat16, kFloat16}) {
        for (float softcap : {0.0f, 5.0f}) check_head(head, tokens, width, dtype, softcap);
      }
    }
  }
  head.report("head");
  return scores.wrong + lowrank.wrong + head.wrong;
}

}  // namespace

int main() {
  std::vector<std::string> sets = instruction_sets();
  for (const std::string& name : instruction_sets()) {
    if (name == "avx512") sets.emplace_back("amx-emulated");
  }
  std::printf("instruction sets:");
  for (const std::string& name : sets) std::printf(" %s", name.c_str());
  std::printf("\n");
  int wrong = 0;
  for (const std::string& name : sets) wrong += check_set(name);
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
