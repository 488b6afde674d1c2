/* Preloaded: lets one call fail as a broken or full disk would. Python asks for it with fault_arm(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static const char *armed = "";
static int fault, countdown, hits;

void fault_arm(const char *call, int code, int nth) {
    armed = strdup(call);
    fault = code;
    countdown = nth;
    hits = 0;
}

/* How often the call came while armed; nothing fails any more. */
int fault_disarm(void) {
    armed = "";
    return hits;
}

static int fails(const char *call) {
    if (strcmp(call, armed)) return 0;
    hits++;
    if (--countdown) return 0;
    errno = fault;
    return 1;
}

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) {
    if (fd > 2 && fails("write")) return -1;
    /* half of it first, as full disks do */
    if (fd > 2 && !strcmp(armed, "write") && countdown == 1 && n > 1) n /= 2;
    return REAL(write)(fd, data, n);
}

ssize_t read(int fd, void *data, size_t n) { return fd > 2 && fails("read") ? -1 : REAL(read)(fd, data, n); }
int fsync(int fd) { return fails("fsync") ? -1 : REAL(fsync)(fd); }
int close(int fd) { int r = REAL(close)(fd); return fd > 2 && fails("close") ? -1 : r; }
int rename(const char *from, const char *to) { return fails("rename") ? -1 : REAL(rename)(from, to); }
int unlink(const char *path) { return fails("unlink") ? -1 : REAL(unlink)(path); }
