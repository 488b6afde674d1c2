/* Times a function of microseconds without Python in the loop: calling it through ctypes costs as much as it does. */
#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef size_t (*get_size_t)(void * ctx, int32_t seq_id, uint32_t flags);

double seconds_a_call(get_size_t get_size, void * ctx, int32_t seq_id, uint32_t flags, long calls) {
    struct timespec start, end;
    volatile size_t result = 0;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (long i = 0; i < calls; i++) {
        result += get_size(ctx, seq_id, flags);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    return ((double) (end.tv_sec - start.tv_sec) + 1e-9 * (double) (end.tv_nsec - start.tv_nsec)) / (double) calls;
}
