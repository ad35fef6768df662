#include "fused_mbconv_launches.cuh"

template struct effnet::cuda::FusedLaunches<float>;
