/* Faults on demand: every call that changes files below FAULT_ROOT is counted, and the one that is asked for goes wrong.
 *
 *   FAULT_ROOT=/folder            the calls that count
 *   FAULT="call:N:what;…"         what happens at the Nth call of this name ("*": of any name)
 *       error=28, error=28+       fail with this errno, once or from then on
 *       kill=9, after=9           this signal before the call, or after it
 *       short                     half of the bytes
 *   FAULT_LOG=/file               a line for every call: name, tab, path, tab, result
 *   FAULT_CLOCK=seconds           the wall clock jumps back and forth by so much, at every look
 *
 * An LD_PRELOAD library for the tests. Python calls the C library for all of these, which a test compares with strace.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum { GO, FAIL, HALF };
typedef struct { int deed, after; } verdict;

static __thread char where[2 * PATH_MAX];

static const char *path_of(int folder, const char *path) {
    char link[64];
    where[0] = 0;
    if (path && path[0] == '/') {
        snprintf(where, sizeof where, "%s", path);
        return where;
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(where, PATH_MAX)) return where;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, where, PATH_MAX - 1);
        where[length < 0 ? 0 : length] = 0;
    }
    if (path) {
        size_t length = strlen(where);
        snprintf(where + length, sizeof where - length, "/%s", path);
    }
    return where;
}

#define MANY 8192
static int counted_all;
static struct { const char *name; int count; } counted[64];

static int count_of(const char *name) {
    for (int i = 0; i < 64; i++) {
        if (!counted[i].name) counted[i].name = name;
        if (!strcmp(counted[i].name, name)) return __sync_add_and_fetch(&counted[i].count, 1);
    }
    abort();
}

static void note(const char *name, const char *path, const char *result) {
    const char *log = getenv("FAULT_LOG");
    if (!log) return;
    char line[MANY];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", name, path, result);
    int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file >= 0) {
        syscall(SYS_write, file, line, (size_t)length);
        syscall(SYS_close, file);
    }
}

static verdict judge(const char *name, const char *path) {
    verdict found = {GO, 0};
    int saved = errno;
    const char *root = getenv("FAULT_ROOT"), *faults = getenv("FAULT");
    if (!root || strncmp(path, root, strlen(root))) return found;
    int reading = !strcmp(name, "pread") || !strcmp(name, "flock"); /* they change nothing: only faults by their own name hit them */
    int nth = count_of(name), any = reading ? -1 : __sync_add_and_fetch(&counted_all, 1);
    char copy[1024], *rest = copy;
    char result[64] = "go";
    snprintf(copy, sizeof copy, "%s", faults ? faults : "");
    for (char *fault; (fault = strsep(&rest, ";"));) {
        char call[64], what[64];
        int at;
        if (sscanf(fault, "%63[^:]:%d:%63s", call, &at, what) != 3) continue;
        int now = !strcmp(call, "*") ? any : !strcmp(call, name) ? nth : -1;
        int lasting = what[strlen(what) - 1] == '+';
        if (now != at && !(lasting && now > at)) continue;
        if (!strncmp(what, "error=", 6)) found.deed = FAIL, saved = atoi(what + 6);
        if (!strncmp(what, "after=", 6)) found.after = atoi(what + 6);
        if (!strcmp(what, "short")) found.deed = HALF;
        strcpy(result, what);
        if (!strncmp(what, "kill=", 5)) {
            note(name, path, what);
            /* A process that is stopped by another thread's signal goes on for a moment: this one must not get past its call. */
            int number = atoi(what + 5), self = number == SIGSTOP || number == SIGKILL;
            self ? syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), number) : kill(getpid(), number);
        }
    }
    if (!reading || found.deed != GO) note(name, path, result);
    errno = saved;
    return found;
}

#define AFTER(value) do { __typeof__(value) out_ = (value); int saved_ = errno; if (v_.after) kill(getpid(), v_.after); errno = saved_; return out_; } while (0)
#define JUDGED(name, path) verdict v_ = judge(name, path); if (v_.deed == FAIL) return -1

/* files and names */
static int opened(int folder, const char *path, int flags, mode_t mode) {
    if (flags & O_CREAT) {
        path_of(folder, path);
        JUDGED("create", where);
        AFTER((int)syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode));
    }
    return (int)syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);
}
#define MODE mode_t mode = 0; if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }

int mkdir(const char *path, mode_t mode) { JUDGED("mkdir", path_of(AT_FDCWD, path)); AFTER(REAL(mkdir)(path, mode)); }
int mkdirat(int folder, const char *path, mode_t mode) { JUDGED("mkdir", path_of(folder, path)); AFTER(REAL(mkdirat)(folder, path, mode)); }
int rmdir(const char *path) { JUDGED("unlink", path_of(AT_FDCWD, path)); AFTER(REAL(rmdir)(path)); }
int unlink(const char *path) { JUDGED("unlink", path_of(AT_FDCWD, path)); AFTER(REAL(unlink)(path)); }
int unlinkat(int folder, const char *path, int flags) { JUDGED("unlink", path_of(folder, path)); AFTER(REAL(unlinkat)(folder, path, flags)); }
int link(const char *old, const char *new) { JUDGED("link", path_of(AT_FDCWD, new)); AFTER(REAL(link)(old, new)); }
int linkat(int a, const char *old, int b, const char *new, int flags) { JUDGED("link", path_of(b, new)); AFTER(REAL(linkat)(a, old, b, new, flags)); }
int rename(const char *old, const char *new) { JUDGED("rename", path_of(AT_FDCWD, new)); AFTER(REAL(rename)(old, new)); }
int renameat(int a, const char *old, int b, const char *new) { JUDGED("rename", path_of(b, new)); AFTER(REAL(renameat)(a, old, b, new)); }
int renameat2(int a, const char *old, int b, const char *new, unsigned flags) { JUDGED("renameat2", path_of(b, new)); AFTER((int)syscall(SYS_renameat2, a, old, b, new, flags)); }
int chmod(const char *path, mode_t mode) { JUDGED("chmod", path_of(AT_FDCWD, path)); AFTER(REAL(chmod)(path, mode)); }
int fchmod(int file, mode_t mode) { JUDGED("chmod", path_of(file, 0)); AFTER(REAL(fchmod)(file, mode)); }
int fchmodat(int folder, const char *path, mode_t mode, int flags) { JUDGED("chmod", path_of(folder, path)); AFTER(REAL(fchmodat)(folder, path, mode, flags)); }

/* bytes */
int ftruncate(int file, off_t size) { JUDGED("ftruncate", path_of(file, 0)); AFTER((int)syscall(SYS_ftruncate, file, size)); }
int ftruncate64(int file, off64_t size) { JUDGED("ftruncate", path_of(file, 0)); AFTER((int)syscall(SYS_ftruncate, file, size)); }
int posix_fallocate(int file, off_t at, off_t size) { verdict v_ = judge("fallocate", path_of(file, 0)); if (v_.deed == FAIL) return errno; AFTER(REAL(posix_fallocate)(file, at, size)); }
int posix_fallocate64(int file, off64_t at, off64_t size) { verdict v_ = judge("fallocate", path_of(file, 0)); if (v_.deed == FAIL) return errno; AFTER(REAL(posix_fallocate64)(file, at, size)); }
int fallocate(int file, int mode, off_t at, off_t size) { JUDGED("fallocate", path_of(file, 0)); AFTER(REAL(fallocate)(file, mode, at, size)); }
int fallocate64(int file, int mode, off64_t at, off64_t size) { JUDGED("fallocate", path_of(file, 0)); AFTER(REAL(fallocate64)(file, mode, at, size)); }
int fsync(int file) { JUDGED("fsync", path_of(file, 0)); AFTER(REAL(fsync)(file)); }
int fdatasync(int file) { JUDGED("fsync", path_of(file, 0)); AFTER(REAL(fdatasync)(file)); }
int flock(int file, int how) { JUDGED("flock", path_of(file, 0)); AFTER(REAL(flock)(file, how)); }

#define LESS(size) (v_.deed == HALF && (size) > 1 ? (size) / 2 : (size))
ssize_t write(int file, const void *data, size_t size) { JUDGED("write", path_of(file, 0)); AFTER((ssize_t)syscall(SYS_write, file, data, LESS(size))); }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) { JUDGED("write", path_of(file, 0)); AFTER((ssize_t)syscall(SYS_pwrite64, file, data, LESS(size), at)); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) { JUDGED("write", path_of(file, 0)); AFTER((ssize_t)syscall(SYS_pwrite64, file, data, LESS(size), at)); }
ssize_t writev(int file, const struct iovec *parts, int count) { JUDGED("write", path_of(file, 0)); AFTER((ssize_t)syscall(SYS_writev, file, parts, LESS(count))); }
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) { JUDGED("write", path_of(file, 0)); AFTER(REAL(pwritev)(file, parts, LESS(count), at)); }
ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t at) { JUDGED("write", path_of(file, 0)); AFTER(REAL(pwritev64)(file, parts, LESS(count), at)); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) { JUDGED("write", path_of(to, 0)); AFTER((ssize_t)syscall(SYS_copy_file_range, from, a, to, b, LESS(size), flags)); }
ssize_t sendfile(int to, int from, off_t *at, size_t size) { JUDGED("write", path_of(to, 0)); AFTER((ssize_t)syscall(SYS_sendfile, to, from, at, LESS(size))); }
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) { JUDGED("write", path_of(to, 0)); AFTER((ssize_t)syscall(SYS_sendfile, to, from, at, LESS(size))); }
ssize_t pread(int file, void *data, size_t size, off_t at) { JUDGED("pread", path_of(file, 0)); return (ssize_t)syscall(SYS_pread64, file, data, LESS(size), at); }
ssize_t pread64(int file, void *data, size_t size, off64_t at) { JUDGED("pread", path_of(file, 0)); return (ssize_t)syscall(SYS_pread64, file, data, LESS(size), at); }
ssize_t preadv(int file, const struct iovec *parts, int count, off_t at) {
    JUDGED("pread", path_of(file, 0));
    return v_.deed == HALF ? (ssize_t)syscall(SYS_pread64, file, parts->iov_base, LESS(parts->iov_len), at) : REAL(preadv)(file, parts, count, at);
}
ssize_t preadv64(int file, const struct iovec *parts, int count, off64_t at) {
    JUDGED("pread", path_of(file, 0));
    return v_.deed == HALF ? (ssize_t)syscall(SYS_pread64, file, parts->iov_base, LESS(parts->iov_len), at) : REAL(preadv64)(file, parts, count, at);
}

/* time */
int clock_gettime(clockid_t which, struct timespec *now) {
    int code = (int)syscall(SYS_clock_gettime, which, now);
    const char *jump = getenv("FAULT_CLOCK");
    static int looks;
    if (jump && which == CLOCK_REALTIME) now->tv_sec += (__sync_add_and_fetch(&looks, 1) % 2 ? 1 : -1) * atol(jump);
    return code;
}
