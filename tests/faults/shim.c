/* Preloaded into a build: counts the calls that change files below one directory, and makes the chosen one fail.
 *
 * A call is counted if its kind is watched and its path (or that of its descriptor) is below the directory. Nothing
 * happens until fault_arm() is called, which a forked child does for itself.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum Kind { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, MKDIR = 16, UNLINK = 32, TRUNCATE = 64 };
enum { SHORT_WRITE = -1, FULL_AT = -2 };

static char directory[PATH_MAX];
static int watched;
static long fail_at; /* the call to fail, from 1; 0: none. With FULL_AT: bytes that fit. */
static int fault;    /* an errno, SHORT_WRITE or FULL_AT */
static atomic_long calls;
static atomic_long bytes;
static atomic_long failed;

__attribute__((visibility("default"))) void fault_arm(const char* below, int kinds, long at, int what) {
  snprintf(directory, sizeof directory, "%s", below);
  fail_at = at;
  fault = what;
  calls = bytes = failed = 0;
  watched = kinds;
}

__attribute__((visibility("default"))) long fault_calls(void) { return calls; }

__attribute__((visibility("default"))) long fault_failed(void) { return failed; }

static int below(const char* path) { return strncmp(path, directory, strlen(directory)) == 0; }

static int is_below(int at, const char* path) {
  char full[2 * PATH_MAX];
  if (path && path[0] == '/') return below(path);
  char link[64], place[PATH_MAX];
  if (at == AT_FDCWD)
    snprintf(link, sizeof link, "/proc/self/cwd");
  else
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  ssize_t length = readlink(link, place, sizeof place - 1);
  if (length < 0) return 0;
  place[length] = 0;
  snprintf(full, sizeof full, "%s/%s", place, path ? path : "");
  return below(full);
}

/* Counts a call; returns whether it is the one to fail. */
static int hit(enum Kind kind, int at, const char* path) {
  if (!(watched & kind)) return 0;
  int saved = errno;
  int mine = is_below(at, path);
  errno = saved;
  if (!mine) return 0;
  long number = atomic_fetch_add(&calls, 1) + 1;
  if (fault == FULL_AT || number != fail_at) return 0;
  atomic_fetch_add(&failed, 1);
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_OR(kind, at, path, call) \
  do {                                \
    if (hit(kind, at, path)) {        \
      errno = fault;                  \
      return -1;                      \
    }                                 \
    return call;                      \
  } while (0)

/* How many of `size` bytes may be written: all, half of them, or -1 with errno set. */
static ssize_t allowed(int fd, size_t size) {
  if (hit(WRITE, fd, NULL)) {
    if (fault == SHORT_WRITE) return size > 1 ? (ssize_t)(size / 2) : (ssize_t)size;
    errno = fault;
    return -1;
  }
  if (fault == FULL_AT && (watched & WRITE) && is_below(fd, NULL)) {
    long room = fail_at - atomic_fetch_add(&bytes, (long)size);
    if (room < (long)size) {
      atomic_fetch_add(&failed, 1);
      if (room > 0) return room;
      errno = ENOSPC;
      return -1;
    }
  }
  return (ssize_t)size;
}

ssize_t write(int fd, const void* data, size_t size) {
  ssize_t count = allowed(fd, size);
  return count < 0 ? -1 : REAL(write)(fd, data, (size_t)count);
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  ssize_t count = allowed(fd, size);
  return count < 0 ? -1 : REAL(pwrite)(fd, data, (size_t)count, offset);
}

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
  ssize_t count = allowed(fd, size);
  return count < 0 ? -1 : REAL(pwrite64)(fd, data, (size_t)count, offset);
}

ssize_t writev(int fd, const struct iovec* parts, int count) {
  size_t size = 0;
  for (int i = 0; i < count; ++i) size += parts[i].iov_len;
  ssize_t room = allowed(fd, size);
  if (room < 0) return -1;
  if ((size_t)room == size) return REAL(writev)(fd, parts, count);
  size_t first = parts[0].iov_len < (size_t)room ? parts[0].iov_len : (size_t)room;
  return REAL(write)(fd, parts[0].iov_base, first);
}

int fsync(int fd) { FAIL_OR(SYNC, fd, NULL, REAL(fsync)(fd)); }

int fdatasync(int fd) { FAIL_OR(SYNC, fd, NULL, REAL(fdatasync)(fd)); }

int sync_file_range(int fd, off64_t offset, off64_t count, unsigned int flags) {
  FAIL_OR(SYNC, fd, NULL, REAL(sync_file_range)(fd, offset, count, flags));
}

int rename(const char* from, const char* to) { FAIL_OR(RENAME, AT_FDCWD, to, REAL(rename)(from, to)); }

int renameat(int from_at, const char* from, int to_at, const char* to) {
  FAIL_OR(RENAME, to_at, to, REAL(renameat)(from_at, from, to_at, to));
}

int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned int flags) {
  FAIL_OR(RENAME, to_at, to, REAL(renameat2)(from_at, from, to_at, to, flags));
}

int link(const char* from, const char* to) { FAIL_OR(RENAME, AT_FDCWD, to, REAL(link)(from, to)); }

int mkdir(const char* path, mode_t mode) { FAIL_OR(MKDIR, AT_FDCWD, path, REAL(mkdir)(path, mode)); }

int mkdirat(int at, const char* path, mode_t mode) { FAIL_OR(MKDIR, at, path, REAL(mkdirat)(at, path, mode)); }

int unlink(const char* path) { FAIL_OR(UNLINK, AT_FDCWD, path, REAL(unlink)(path)); }

int unlinkat(int at, const char* path, int flags) { FAIL_OR(UNLINK, at, path, REAL(unlinkat)(at, path, flags)); }

int rmdir(const char* path) { FAIL_OR(UNLINK, AT_FDCWD, path, REAL(rmdir)(path)); }

int ftruncate(int fd, off_t size) { FAIL_OR(TRUNCATE, fd, NULL, REAL(ftruncate)(fd, size)); }

int ftruncate64(int fd, off64_t size) { FAIL_OR(TRUNCATE, fd, NULL, REAL(ftruncate64)(fd, size)); }

int fallocate(int fd, int mode, off_t offset, off_t size) {
  FAIL_OR(TRUNCATE, fd, NULL, REAL(fallocate)(fd, mode, offset, size));
}

int fallocate64(int fd, int mode, off64_t offset, off64_t size) {
  FAIL_OR(TRUNCATE, fd, NULL, REAL(fallocate64)(fd, mode, offset, size));
}

/* posix_fallocate returns the error instead of setting errno. */
int posix_fallocate(int fd, off_t offset, off_t size) {
  if (hit(TRUNCATE, fd, NULL)) return fault;
  return REAL(posix_fallocate)(fd, offset, size);
}

int posix_fallocate64(int fd, off64_t offset, off64_t size) {
  if (hit(TRUNCATE, fd, NULL)) return fault;
  return REAL(posix_fallocate64)(fd, offset, size);
}

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

static mode_t mode_of(int flags, va_list list) {
  return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(list, mode_t) : 0;
}

#define OPEN_LIKE(name, at, path_of_call, ...)        \
  va_list list;                                       \
  va_start(list, flags);                              \
  mode_t mode = mode_of(flags, list);                 \
  va_end(list);                                       \
  if (writes(flags) && hit(OPEN, at, path_of_call)) { \
    errno = fault;                                    \
    return -1;                                        \
  }                                                   \
  return REAL(name)(__VA_ARGS__, flags, mode)

int open(const char* path, int flags, ...) { OPEN_LIKE(open, AT_FDCWD, path, path); }

int open64(const char* path, int flags, ...) { OPEN_LIKE(open64, AT_FDCWD, path, path); }

int openat(int at, const char* path, int flags, ...) { OPEN_LIKE(openat, at, path, at, path); }

int openat64(int at, const char* path, int flags, ...) { OPEN_LIKE(openat64, at, path, at, path); }
