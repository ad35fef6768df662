#define EFFNET_TARGET_BASELINE
// clang-format off: the target comes first
#include "target.h"
#include "fused_mbconv_kernels.h"
// clang-format on

EFFNET_TARGET_END
