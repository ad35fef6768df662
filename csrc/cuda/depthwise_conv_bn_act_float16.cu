#include "depthwise_conv_bn_act_launches.cuh"

template struct effnet::cuda::DepthwiseLaunches<__half>;
