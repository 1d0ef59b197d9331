// Preloaded into a run (LD_PRELOAD), this stands between it and the file system, below FAULTS_ROOT:
// it records what changes files (FAULTS_LOG), ends the process at change number FAULTS_KILL, half of
// it done, or lets changes from number FAULTS_FROM up to FAULTS_TO fail with error FAULTS_ERRNO.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FDS 4096

static char names[FDS][PATH_MAX];  // of open files below the root
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
static long changes;

void faults_reset(void) { changes = 0; }

static const char *setting(const char *name) { return getenv(name); }

static long number(const char *name, long other) {
  const char *text = setting(name);
  return text ? atol(text) : other;
}

// The absolute path if it is below the root, else NULL.
static char *below(int folder, const char *path, char *out) {
  const char *root = setting("FAULTS_ROOT");
  if (!root || !path) return NULL;
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
  } else if (folder >= 0 && folder < FDS && names[folder][0]) {
    snprintf(out, PATH_MAX, "%.2000s/%.2000s", names[folder], path);
  } else {
    char here[PATH_MAX], link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = folder == AT_FDCWD ? readlink("/proc/self/cwd", here, PATH_MAX - 1)
                                   : readlink(link, here, PATH_MAX - 1);
    if (n < 0) return NULL;
    here[n] = 0;
    snprintf(out, PATH_MAX, "%.2000s/%.2000s", here, path);
  }
  size_t n = strlen(root), m = strlen(out);
  while (m > 1 && out[m - 1] == '/') out[--m] = 0;
  return strncmp(out, root, n) == 0 && (out[n] == '/' || out[n] == 0) ? out : NULL;
}

static char *open_below(int fd) { return fd >= 0 && fd < FDS && names[fd][0] ? names[fd] : NULL; }

static void record(char kind, const char *path, const char *other, long offset, const void *data,
                   size_t size) {
  const char *log = setting("FAULTS_LOG");
  if (!log) return;
  int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  int64_t head[5] = {kind, strlen(path), other ? strlen(other) : 0, offset, size};
  struct iovec parts[4] = {{head, sizeof head},
                           {(void *)path, head[1]},
                           {(void *)other, head[2]},
                           {(void *)data, size}};
  syscall(SYS_writev, fd, parts, 4);
  syscall(SYS_close, fd);
}

// Counts a change; whether it is to fail. Half of it may be done by `tear` before the end.
static int fails(int fd, const void *data, size_t size) {
  long n = __sync_add_and_fetch(&changes, 1);
  if (n == number("FAULTS_KILL", -1)) {
    if (size > 1) syscall(SYS_write, fd, data, size / 2);
    syscall(SYS_kill, getpid(), SIGKILL);
  }
  if (n >= number("FAULTS_FROM", LONG_MAX) && n <= number("FAULTS_TO", LONG_MAX)) {
    errno = number("FAULTS_ERRNO", EIO);
    return 1;
  }
  return 0;
}

static int opened(int fd, int folder, const char *path, int flags) {
  char out[PATH_MAX];
  if (fd >= 0 && fd < FDS) {
    names[fd][0] = 0;
    if (below(folder, path, out)) strcpy(names[fd], out);
  }
  return fd;
}

static int open_any(int folder, const char *path, int flags, int mode) {
  char out[PATH_MAX];
  int changes_files = flags & (O_CREAT | O_TRUNC) && below(folder, path, out);
  pthread_mutex_lock(&one);
  int fd;
  if (changes_files && fails(-1, NULL, 0)) {
    fd = -1;
  } else {
    struct stat before;
    int existed = changes_files && stat(out, &before) == 0;
    fd = opened(syscall(SYS_openat, folder, path, flags, mode), folder, path, flags);
    if (fd >= 0 && changes_files && !existed) record('c', out, NULL, 0, NULL, 0);
    if (fd >= 0 && changes_files && existed && flags & O_TRUNC) record('t', out, NULL, 0, NULL, 0);
  }
  int kept = errno;
  pthread_mutex_unlock(&one);
  errno = kept;
  return fd;
}

#define MODE                        \
  int mode = 0;                     \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list more;                   \
    va_start(more, flags);          \
    mode = va_arg(more, int);       \
    va_end(more);                   \
  }

int open(const char *path, int flags, ...) { MODE return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_any(AT_FDCWD, path, flags, mode); }
int openat(int f, const char *path, int flags, ...) { MODE return open_any(f, path, flags, mode); }
int openat64(int f, const char *path, int flags, ...) { MODE return open_any(f, path, flags, mode); }

int close(int fd) {
  if (fd >= 0 && fd < FDS) names[fd][0] = 0;
  return syscall(SYS_close, fd);
}

static ssize_t write_any(int fd, const void *data, size_t size, off_t offset) {
  char *path = open_below(fd);
  if (!path)
    return offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
  pthread_mutex_lock(&one);
  ssize_t n = -1;
  if (!fails(fd, data, size)) {
    n = offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
    long at = offset < 0 ? syscall(SYS_lseek, fd, 0, SEEK_CUR) - n : offset;
    if (n > 0) record('w', path, NULL, at, data, n);
  }
  int kept = errno;
  pthread_mutex_unlock(&one);
  errno = kept;
  return n;
}

ssize_t write(int fd, const void *data, size_t size) { return write_any(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return write_any(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return write_any(fd, data, size, at); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
  if (!open_below(fd)) return syscall(SYS_writev, fd, parts, count);
  for (int i = 0; i < count; i++)  // the first part alone: a short write
    if (parts[i].iov_len) return write(fd, parts[i].iov_base, parts[i].iov_len);
  return 0;
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
  if (!open_below(fd)) return syscall(SYS_pwritev, fd, parts, count, at, 0);
  for (int i = 0; i < count; i++)
    if (parts[i].iov_len) return pwrite(fd, parts[i].iov_base, parts[i].iov_len, at);
  return 0;
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t at) {
  return pwritev(fd, parts, count, at);
}

#define CHANGE(path, call, kind, other, offset)                \
  pthread_mutex_lock(&one);                                    \
  int result = -1;                                             \
  if (!fails(-1, NULL, 0)) {                                   \
    result = call;                                             \
    if (result == 0) record(kind, path, other, offset, NULL, 0); \
  }                                                            \
  int kept = errno;                                            \
  pthread_mutex_unlock(&one);                                  \
  errno = kept;                                                \
  return result;

int ftruncate(int fd, off_t size) {
  char *path = open_below(fd);
  if (!path) return syscall(SYS_ftruncate, fd, size);
  CHANGE(path, syscall(SYS_ftruncate, fd, size), 't', NULL, size)
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

int fsync(int fd) {
  char *path = open_below(fd);
  if (!path) return syscall(SYS_fsync, fd);
  CHANGE(path, syscall(SYS_fsync, fd), 's', NULL, 0)
}
int fdatasync(int fd) { return fsync(fd); }

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  char x[PATH_MAX], y[PATH_MAX];
  char *source = below(a, from, x), *target = below(b, to, y);
  if (!source || !target) return syscall(SYS_renameat2, a, from, b, to, flags);
  CHANGE(source, syscall(SYS_renameat2, a, from, b, to, flags), 'r', target, 0)
}
int renameat(int a, const char *from, int b, const char *to) { return renameat2(a, from, b, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int folder, const char *path, int flags) {
  char out[PATH_MAX];
  if (!below(folder, path, out)) return syscall(SYS_unlinkat, folder, path, flags);
  CHANGE(out, syscall(SYS_unlinkat, folder, path, flags), flags & AT_REMOVEDIR ? 'R' : 'u', NULL, 0)
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t mode) {
  char out[PATH_MAX];
  if (!below(folder, path, out)) return syscall(SYS_mkdirat, folder, path, mode);
  CHANGE(out, syscall(SYS_mkdirat, folder, path, mode), 'm', NULL, 0)
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int a, const char *from, int b, const char *to, int flags) {
  char x[PATH_MAX], y[PATH_MAX];
  char *source = below(a, from, x), *target = below(b, to, y);
  if (!source || !target) return syscall(SYS_linkat, a, from, b, to, flags);
  CHANGE(source, syscall(SYS_linkat, a, from, b, to, flags), 'l', target, 0)
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
