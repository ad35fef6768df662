// Where the CUDA kernels are registered. A build that is not the package's own (the CUDA emulator
// of the tests) gives its library another name and registers the CUDA kernels for CPU tensors.
#pragma once

#ifndef EFFNET_LIBRARY
#define EFFNET_LIBRARY effnet_kernels_cpp
#endif

#ifndef EFFNET_CUDA_DISPATCH_KEY
#define EFFNET_CUDA_DISPATCH_KEY CUDA
#endif
