// client_totals on the CPU: tiles of m, each against every client's same tile.
//
// A tile has at most 32,768 numbers of m (128 KB, half a core's cache), whole rows where they fit: it stays there while
// all clients pass, so m is read from memory once and every client once. Sums are doubles, each tile and client in a
// place of its own, added in one order: the same bits for any number of threads and order of clients. Up to four
// clients are read at once (dot_clients in dense_kernels.inc.h), since one alone leaves half of the bandwidth unused.
#include "client_totals.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu_features.h"
#include "parallel.h"

namespace protoken {
namespace {

constexpr int64_t kTileElements = 32768;  // of m per task: half a core's cache holds them while all clients pass
constexpr int64_t kEvenTiles = 16;        // their number is a multiple of this where the shape allows

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
  if (layer.tile_columns == given.columns) {  // tiles of one size, so that no thread waits for the last one
    const int64_t tiles = (given.rows + layer.tile_rows - 1) / layer.tile_rows;
    const int64_t even = (tiles + kEvenTiles - 1) / kEvenTiles * kEvenTiles;
    layer.tile_rows = (given.rows + even - 1) / even;
  }
  layer.row_tiles = (given.rows + layer.tile_rows - 1) / layer.tile_rows;
  layer.column_tiles = (given.columns + layer.tile_columns - 1) / layer.tile_columns;
  layer.tiles = product(layer.row_tiles, layer.column_tiles);
  return layer;
}

struct Tile {
  int64_t row, rows, column, columns;
};

// Totals of clients whose matrices no kernel reads: element by element.
double gathered(const TotalsLayer& given, const char* d, const float* m, int64_t columns, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < columns; ++i) {
    sum += static_cast<double>(load_element(d + i * given.stride_i * size, given.dtype)) * static_cast<double>(m[i]);
  }
  return sum;
}

// out[client] = < tile of m, tile of the client's matrix > for all clients. addresses: room for one each.
void tile_dots(const Kernels& kernels, const Layer& layer, int64_t clients, const Tile& tile, const char** addresses,
               double* out) {
  const TotalsLayer& given = *layer.given;
  const int64_t offset = (tile.row * given.stride_o + tile.column * given.stride_i) * layer.size;
  for (int64_t k = 0; k < clients; ++k) addresses[k] = reinterpret_cast<const char*>(given.pointers[k]) + offset;
  const float* m = given.m + tile.row * given.columns + tile.column;
  const float* scale = given.scale ? given.scale + tile.row : nullptr;
  const int64_t row_stride = given.stride_o * layer.size;
  if (given.stride_i == 1 || given.columns == 1) {
    DotTile dots{addresses, row_stride, clients, tile.rows, tile.columns, m, given.columns, scale, given.rows};
    if (scale == nullptr && tile.columns == given.columns && given.stride_o == given.columns) {  // one long row
      dots.columns *= dots.rows;
      dots.rows = 1;
    }
    kernels.dot[given.dtype](dots, out);
    return;
  }
  std::fill(out, out + clients, 0.0);
  for (int64_t o = 0; o < tile.rows; ++o, m += given.columns) {
    for (int64_t k = 0; k < clients; ++k) {
      const double sum = gathered(given, addresses[k] + o * row_stride, m, tile.columns, layer.size);
      out[k] += scale ? sum * static_cast<double>(scale[k * given.rows + o]) : sum;
    }
  }
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
  std::vector<const char*> addresses(static_cast<size_t>(product(std::max<int64_t>(threads, 1), clients)));
  // A tile of m meets all clients, then the next: m is read once and every client once. Each product has its own
  // place, and a client's are added in one order.
  parallel_for(tiles, threads, [&](int64_t index, int64_t member) {
    const Layer* layer = &layers.back();
    while (layer->first_tile > index) --layer;
    Tile tile;
    tile.row = (index - layer->first_tile) / layer->column_tiles * layer->tile_rows;
    tile.column = (index - layer->first_tile) % layer->column_tiles * layer->tile_columns;
    tile.rows = std::min(layer->tile_rows, layer->given->rows - tile.row);
    tile.columns = std::min(layer->tile_columns, layer->given->columns - tile.column);
    tile_dots(kernels, *layer, clients, tile, addresses.data() + member * clients, partials.data() + index * clients);
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
