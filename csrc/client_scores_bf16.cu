// client_scores' kernels for one format; apart so that the formats compile side by side.
#include "client_scores_kernel.cuh"

namespace protoken::cuda {
template void launch_scores<kBF16>(const ScoreParams&, const LaunchShape&, bool, const Device&, cudaStream_t);
}
