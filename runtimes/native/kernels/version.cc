#include "modcompile_kernels.h"

const char* modcompile_kernels_version(void) { return MODCOMPILE_VERSION; }
