/* For `c++ --include=amx.h`: mends `_tile_loadconfig` of the GCCs that amx.py is about.
 *
 * Their own says that it reads 8 bytes of the configuration; this one says all 64, so that none of what is stored there
 * is taken for dead. The text lets llamastate know such a library from a broken one. */
#if defined(__cplusplus) && defined(__AMX_INT8__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
__attribute__((used)) static const char llamastate_amx_mended[] = "llamastate: ldtilecfg reads 64 bytes";
#endif
