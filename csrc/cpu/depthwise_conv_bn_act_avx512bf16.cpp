#if defined(__x86_64__)
#define EFFNET_TARGET_AVX512BF16
#include "target.h"

#include "depthwise_conv_bn_act_kernels.h"

EFFNET_TARGET_END
#endif
