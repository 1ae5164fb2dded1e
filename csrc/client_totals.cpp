#include "client_totals.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu_features.h"
#include "parallel.h"

namespace protoken {
namespace {

constexpr int64_t kTileElements = 32768;  // of m per task: half a core's cache holds them while all clients pass

struct Layer {
  const TotalsLayer* given;
  int64_t size;
  int64_t tile_rows, tile_columns;  // of m per task
  int64_t row_tiles, column_tiles;
  int64_t tiles, first_tile;
};

Layer prepare(const TotalsLayer& given, int64_t clients) {
  Layer layer;
  layer.given = &given;
  require(given.rows > 0 && given.columns > 0, "rows and columns must be positive");
  require(given.stride_o >= 0 && given.stride_i >= 0, "strides must not be negative");
  layer.size = check_bank(given.dtype, given.pointers, clients);
  product(product(given.stride_o, layer.size), given.rows);
  product(product(given.stride_i, layer.size), given.columns);
  layer.tile_columns = std::min(given.columns, kTileElements);
  layer.tile_rows = std::max<int64_t>(1, std::min(given.rows, kTileElements / layer.tile_columns));
  layer.row_tiles = (given.rows + layer.tile_rows - 1) / layer.tile_rows;
  layer.column_tiles = (given.columns + layer.tile_columns - 1) / layer.tile_columns;
  layer.tiles = product(layer.row_tiles, layer.column_tiles);
  return layer;
}

double tile_dot(const Kernels& kernels, const Layer& layer, int64_t client, int64_t row, int64_t rows, int64_t column,
                int64_t columns) {
  const TotalsLayer& given = *layer.given;
  const char* base = reinterpret_cast<const char*>(given.pointers[client]) +
                     (row * given.stride_o + column * given.stride_i) * layer.size;
  const float* m = given.m + row * given.columns + column;
  const bool contiguous_rows = given.stride_i == 1 || given.columns == 1;
  if (contiguous_rows && given.scale == nullptr && columns == given.columns && given.stride_o == given.columns) {
    return kernels.dot[given.dtype](base, m, rows * columns);
  }
  double total = 0;
  for (int64_t o = 0; o < rows; ++o) {
    const char* d = base + o * given.stride_o * layer.size;
    double sum = 0;
    if (contiguous_rows) {
      sum = kernels.dot[given.dtype](d, m + o * given.columns, columns);
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        sum += static_cast<double>(load_element(d + i * given.stride_i * layer.size, given.dtype)) *
               static_cast<double>(m[o * given.columns + i]);
      }
    }
    total += given.scale ? sum * static_cast<double>(given.scale[client * given.rows + row + o]) : sum;
  }
  return total;
}

}  // namespace

void client_totals(const TotalsLayer* given, int64_t layer_count, int64_t clients, float* out, int64_t threads) {
  require(layer_count > 0 && clients > 0, "layers and clients must be positive");
  const Kernels& kernels = active_kernels();
  std::vector<Layer> layers;
  int64_t tiles = 0;
  for (int64_t l = 0; l < layer_count; ++l) {
    layers.push_back(prepare(given[l], clients));
    layers[l].first_tile = tiles;
    tiles += layers[l].tiles;
  }
  std::vector<double> partials(static_cast<size_t>(product(tiles, clients)));
  // A tile of m meets all clients, then the next: m is read once and every client once. Each product has its own
  // place, and a client's are added in one order.
  parallel_for(tiles, threads, [&](int64_t tile, int64_t) {
    const Layer* layer = &layers.back();
    while (layer->first_tile > tile) --layer;
    const int64_t row = (tile - layer->first_tile) / layer->column_tiles * layer->tile_rows;
    const int64_t column = (tile - layer->first_tile) % layer->column_tiles * layer->tile_columns;
    const int64_t rows = std::min(layer->tile_rows, layer->given->rows - row);
    const int64_t columns = std::min(layer->tile_columns, layer->given->columns - column);
    for (int64_t client = 0; client < clients; ++client) {
      partials[static_cast<size_t>(tile * clients + client)] =
          tile_dot(kernels, *layer, client, row, rows, column, columns);
    }
  });
  for (int64_t l = 0; l < layer_count; ++l) {
    for (int64_t client = 0; client < clients; ++client) {
      double total = 0;
      for (int64_t tile = layers[l].first_tile; tile < layers[l].first_tile + layers[l].tiles; ++tile) {
        total += partials[static_cast<size_t>(tile * clients + client)];
      }
      out[l * clients + client] = static_cast<float>(total);
    }
  }
}

}  // namespace protoken
