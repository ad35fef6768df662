#include "fused_mbconv_launches.cuh"

template struct effnet::cuda::FusedLaunches<__nv_bfloat16>;
