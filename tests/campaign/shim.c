/* Faults of the operating system, for files whose path holds a text; loaded with LD_PRELOAD.
 *
 * fault_arm(kind, at, count, text): the calls from number `at` on, `count` of them, fail.
 * Kinds: 1 ENOSPC on writes, 2 EIO on writes, 3 EIO on reads, 4 EMFILE on opens, 5 EINTR on reads
 * and writes, 6 writes of half the bytes, 7 EIO on fsync, 8 the clock jumps by an hour.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_int kind, left;
static atomic_long calls, first;
static char text[512];

void fault_arm(int which, long at, int count, const char *path) {
  strncpy(text, path, sizeof text - 1);
  atomic_store(&calls, 0);
  atomic_store(&first, at);
  atomic_store(&left, count);
  atomic_store(&kind, which);
}

int fault_left(void) { return atomic_load(&left); }

static int due(void) {
  if (atomic_fetch_add(&calls, 1) < atomic_load(&first)) return 0;
  return atomic_fetch_sub(&left, 1) > 0;
}

static int of_text(int file) {
  char link[64], path[1024];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size <= 0) return 0;
  path[size] = 0;
  return strstr(path, text) != NULL;
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* Of `size` bytes, how many may be written; -1: none, with errno. */
static ssize_t writable(int file, size_t size) {
  int which = atomic_load(&kind);
  if ((which != 1 && which != 2 && which != 5 && which != 6) || !of_text(file) || !due())
    return size;
  if (which == 6) return size > 1 ? size / 2 : size;
  errno = which == 1 ? ENOSPC : which == 2 ? EIO : EINTR;
  return -1;
}

static int unreadable(int file) {
  int which = atomic_load(&kind);
  if ((which != 3 && which != 5) || !of_text(file) || !due()) return 0;
  errno = which == 3 ? EIO : EINTR;
  return 1;
}

ssize_t write(int file, const void *data, size_t size) {
  REAL(write);
  ssize_t some = writable(file, size);
  return some < 0 ? -1 : real(file, data, some);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
  REAL(pwrite64);
  ssize_t some = writable(file, size);
  return some < 0 ? -1 : real(file, data, some, place);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  REAL(writev);
  return writable(file, 1) < 0 ? -1 : real(file, parts, count);
}

ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t place) {
  REAL(pwritev64);
  return writable(file, 1) < 0 ? -1 : real(file, parts, count, place);
}

ssize_t read(int file, void *data, size_t size) {
  REAL(read);
  return unreadable(file) ? -1 : real(file, data, size);
}

ssize_t pread64(int file, void *data, size_t size, off64_t place) {
  REAL(pread64);
  return unreadable(file) ? -1 : real(file, data, size, place);
}

int fsync(int file) {
  REAL(fsync);
  if (atomic_load(&kind) == 7 && of_text(file) && due()) {
    errno = EIO;
    return -1;
  }
  return real(file);
}

static int unopenable(const char *path) {
  if (atomic_load(&kind) != 4 || !path || !strstr(path, text) || !due()) return 0;
  errno = EMFILE;
  return 1;
}

#define OPEN(name, ...) \
  int name(__VA_ARGS__, int flags, ...) { \
    REAL(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list rest; \
      va_start(rest, flags); \
      mode = va_arg(rest, mode_t); \
      va_end(rest); \
    } \
    if (unopenable(path)) return -1; \
    return CALL(flags, mode); \
  }
#define CALL(flags, mode) real(path, flags, mode)
OPEN(open, const char *path)
OPEN(open64, const char *path)
#undef CALL
#define CALL(flags, mode) real(folder, path, flags, mode)
OPEN(openat, int folder, const char *path)
OPEN(openat64, int folder, const char *path)

int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime);
  int status = real(clock, now);
  if (atomic_load(&kind) == 8 && clock == CLOCK_REALTIME)
    if (atomic_fetch_add(&calls, 1) > atomic_load(&first))
      now->tv_sec += atomic_load(&left) % 2 ? 3600 : -3600;
  return status;
}
