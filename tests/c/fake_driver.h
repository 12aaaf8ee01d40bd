/* What the fake libcuda.so.1 offers beside the driver's functions. */

#ifndef FAKE_DRIVER_H
#define FAKE_DRIVER_H

#include "videomae_kernels.h"

/* The GPU's compute capability, 90 for 9.0, and the library's table, from which kernels are known by their cubins. */
typedef void fake_connect_function(int capability, size_t num_kernels, const vmk_kernel *(*kernel_at)(size_t));

/* Launches since the last fake_connect, one a line, as kernels/aot/golden.py writes them. */
typedef const char *fake_launches_function(void);

#endif
