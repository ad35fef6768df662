#define EFFNET_TARGET_BASELINE
#include "target.h"

#include "depthwise_conv_bn_act_kernels.h"

EFFNET_TARGET_END
