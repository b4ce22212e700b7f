/* The kernels for what every processor of the platform has (SSE2 on x86-64). */
#include "halves.inc"

#define ISA baseline
#define LANES_FILE "lanes_baseline.inc"
#include "row_dtypes.inc"
