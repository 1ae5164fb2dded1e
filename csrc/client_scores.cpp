#include "client_scores.h"

#include "dtypes.h"

namespace protoken {

void client_scores(const ScoresLayer* layers, int64_t layer_count, int64_t clients, int64_t tokens, float* out,
                   int64_t) {
  for (int64_t l = 0; l < layer_count; ++l) {
    const ScoresLayer& layer = layers[l];
    const int64_t item = item_size(layer.dtype);
    for (int64_t k = 0; k < clients; ++k) {
      const char* matrix = reinterpret_cast<const char*>(layer.pointers[k]);
      for (int64_t t = 0; t < tokens; ++t) {
        double score = 0;
        for (int64_t o = 0; o < layer.rows; ++o) {
          double row = 0;
          for (int64_t i = 0; i < layer.columns; ++i) {
            const float weight = load_element(matrix + (o * layer.stride_o + i * layer.stride_i) * item, layer.dtype);
            row += static_cast<double>(weight) * layer.x[t * layer.columns + i];
          }
          score += row * layer.grad[t * layer.rows + o] * (layer.scale ? layer.scale[k * layer.rows + o] : 1.0f);
        }
        out[(l * clients + k) * tokens + t] = static_cast<float>(score);
      }
    }
  }
}

}  // namespace protoken
