#include "mbconv_launches.cuh"

template struct effnet::cuda::ExpandLaunches<__nv_bfloat16>;
