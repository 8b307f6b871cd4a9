/* Logs everything that a process writes below a folder, for bench/drills/simulated_disk.py; loaded with LD_PRELOAD.

   DISK_ROOT is the folder, DISK_LOG the file of the log. A record is: operation (1 byte), length of path and of
   second path (4 bytes each), offset and length of data (8 bytes each), then the paths and the data. A record is
   written after its call has returned and under a lock, so a flush covers exactly the writes before it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, name)

static char root[PATH_MAX];
static size_t root_len;
static int log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void open_log(void)
{
    const char *file = getenv("DISK_LOG"), *folder = getenv("DISK_ROOT");
    if (!file || !folder || strlen(folder) >= sizeof root) return;
    strcpy(root, folder);
    root_len = strlen(root);
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    /* A high number, so that no program closes it by counting. */
    log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900);
    syscall(SYS_close, fd);
}

/* A forked child needs a lock of its own on the log. */
static void forked(void)
{
    pthread_mutex_init(&lock, NULL);
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    open_log();
}

__attribute__((constructor)) static void begin(void)
{
    open_log();
    pthread_atfork(NULL, NULL, forked);
}

static int inside(const char *path)
{
    return log_fd >= 0 && strncmp(path, root, root_len) == 0 && (path[root_len] == '/' || path[root_len] == 0);
}

static int path_of_fd(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    if (n <= 0) return 0;
    out[n] = 0;
    return inside(out);
}

static int path_at(int dir, const char *path, char *out)
{
    char base[PATH_MAX];
    if (path[0] == '/') snprintf(out, PATH_MAX, "%s", path);
    else {
        if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, base, PATH_MAX - 1);
            if (n <= 0) return 0;
            base[n] = 0;
        }
        if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    }
    return inside(out);
}

static void hold(void) { pthread_mutex_lock(&lock); flock(log_fd, LOCK_EX); }
static void drop(void) { flock(log_fd, LOCK_UN); pthread_mutex_unlock(&lock); }

static void record(char op, const char *path, const char *second, uint64_t offset, const void *data, uint64_t size)
{
    int before = errno;
    uint32_t n1 = strlen(path), n2 = second ? strlen(second) : 0;
    char head[25];
    head[0] = op;
    memcpy(head + 1, &n1, 4);
    memcpy(head + 5, &n2, 4);
    memcpy(head + 9, &offset, 8);
    memcpy(head + 17, &size, 8);
    struct iovec parts[4] = {{head, 25}, {(void *)path, n1}, {(void *)second, n2}, {(void *)data, size}};
    size_t whole = 25 + n1 + n2 + size;
    if ((size_t)syscall(SYS_writev, log_fd, parts, 4) != whole) abort();
    errno = before;
}

/* What a call wrote, as the file has it now: right for every kind of call. */
static void written(int fd, const char *path, uint64_t offset, uint64_t size)
{
    char *data = malloc(size);
    uint64_t done = 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    /* Opened again, because the descriptor may be write-only. */
    int again = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC);
    while (done < size) {
        ssize_t n = syscall(SYS_pread64, again, data + done, size - done, offset + done);
        if (n <= 0) abort();
        done += n;
    }
    syscall(SYS_close, again);
    record('W', path, NULL, offset, data, size);
    free(data);
}

#define AFTER_WRITE(call) \
    char path[PATH_MAX]; \
    if (!path_of_fd(fd, path)) return call; \
    hold(); \
    ssize_t n = call; \
    if (n > 0) written(fd, path, syscall(SYS_lseek, fd, 0, SEEK_CUR) - n, n); \
    drop(); \
    return n;

#define AFTER_PWRITE(call) \
    char path[PATH_MAX]; \
    if (!path_of_fd(fd, path)) return call; \
    hold(); \
    ssize_t n = call; \
    if (n > 0) written(fd, path, offset, n); \
    drop(); \
    return n;

ssize_t write(int fd, const void *data, size_t size)
{ REAL(ssize_t, "write", int, const void *, size_t); AFTER_WRITE(real(fd, data, size)) }

ssize_t writev(int fd, const struct iovec *parts, int count)
{ REAL(ssize_t, "writev", int, const struct iovec *, int); AFTER_WRITE(real(fd, parts, count)) }

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{ REAL(ssize_t, "pwrite", int, const void *, size_t, off_t); AFTER_PWRITE(real(fd, data, size, offset)) }

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{ REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t); AFTER_PWRITE(real(fd, data, size, offset)) }

ssize_t sendfile(int fd, int from, off_t *offset, size_t size)
{ REAL(ssize_t, "sendfile", int, int, off_t *, size_t); AFTER_WRITE(real(fd, from, offset, size)) }

ssize_t sendfile64(int fd, int from, off64_t *offset, size_t size)
{ REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t); AFTER_WRITE(real(fd, from, offset, size)) }

ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags)
{
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    AFTER_WRITE(real(from, a, fd, b, size, flags))
}

static int opened(int fd, const char *path, int truncates)
{
    if (fd >= 0) record('O', path, NULL, truncates, NULL, 0);
    return fd;
}

#define OPENS(dir, call) \
    char whole[PATH_MAX]; \
    if (!(flags & (O_CREAT | O_TRUNC)) || !path_at(dir, path, whole)) return call; \
    hold(); \
    int fd = opened(call, whole, flags & O_TRUNC ? 1 : 0); \
    drop(); \
    return fd;

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }

int open(const char *path, int flags, ...)
{ REAL(int, "open", const char *, int, ...); MODE OPENS(AT_FDCWD, real(path, flags, mode)) }

int open64(const char *path, int flags, ...)
{ REAL(int, "open64", const char *, int, ...); MODE OPENS(AT_FDCWD, real(path, flags, mode)) }

int openat(int dir, const char *path, int flags, ...)
{ REAL(int, "openat", int, const char *, int, ...); MODE OPENS(dir, real(dir, path, flags, mode)) }

int openat64(int dir, const char *path, int flags, ...)
{ REAL(int, "openat64", int, const char *, int, ...); MODE OPENS(dir, real(dir, path, flags, mode)) }

static FILE *opened_file(FILE *(*real)(const char *, const char *), const char *path, const char *mode)
{
    char whole[PATH_MAX];
    if (mode[0] == 'r' || !path_at(AT_FDCWD, path, whole)) return real(path, mode);
    hold();
    FILE *file = real(path, mode);
    if (file) record('O', whole, NULL, mode[0] == 'w', NULL, 0);
    drop();
    return file;
}

FILE *fopen(const char *path, const char *mode)
{ REAL(FILE *, "fopen", const char *, const char *); return opened_file(real, path, mode); }

FILE *fopen64(const char *path, const char *mode)
{ REAL(FILE *, "fopen64", const char *, const char *); return opened_file(real, path, mode); }

#define AFTER_FD(op, number, call) \
    char path[PATH_MAX]; \
    if (!path_of_fd(fd, path)) return call; \
    hold(); \
    int result = call; \
    if (result == 0) record(op, path, NULL, number, NULL, 0); \
    drop(); \
    return result;

int ftruncate(int fd, off_t size) { REAL(int, "ftruncate", int, off_t); AFTER_FD('T', size, real(fd, size)) }
int ftruncate64(int fd, off64_t size) { REAL(int, "ftruncate64", int, off64_t); AFTER_FD('T', size, real(fd, size)) }

/* safetensors renames its file with a system call of its own, which nothing can log: the file is known by its flush. */
static void renamed_unseen(int fd, const char *path)
{
    struct stat found;
    size_t n = strlen(path);
    if (n < 12 || strcmp(path + n - 12, ".safetensors") || fstat(fd, &found)) return;
    record('O', path, NULL, 1, NULL, 0);
    if (found.st_size) written(fd, path, 0, found.st_size);
}

#define FLUSHES(call) \
    char path[PATH_MAX]; \
    if (!path_of_fd(fd, path)) return call; \
    hold(); \
    int result = call; \
    if (result == 0) { renamed_unseen(fd, path); record('F', path, NULL, 0, NULL, 0); } \
    drop(); \
    return result;

int fsync(int fd) { REAL(int, "fsync", int); FLUSHES(real(fd)) }
int fdatasync(int fd) { REAL(int, "fdatasync", int); FLUSHES(real(fd)) }

#define AFTER_NAME(op, dir, name, call) \
    char whole[PATH_MAX]; \
    if (!path_at(dir, name, whole)) return call; \
    hold(); \
    int result = call; \
    if (result == 0) record(op, whole, NULL, 0, NULL, 0); \
    drop(); \
    return result;

int unlink(const char *path) { REAL(int, "unlink", const char *); AFTER_NAME('U', AT_FDCWD, path, real(path)) }
int remove(const char *path) { REAL(int, "remove", const char *); AFTER_NAME('U', AT_FDCWD, path, real(path)) }
int rmdir(const char *path) { REAL(int, "rmdir", const char *); AFTER_NAME('U', AT_FDCWD, path, real(path)) }
int mkdir(const char *path, mode_t mode)
{ REAL(int, "mkdir", const char *, mode_t); AFTER_NAME('M', AT_FDCWD, path, real(path, mode)) }
int mkdirat(int dir, const char *path, mode_t mode)
{ REAL(int, "mkdirat", int, const char *, mode_t); AFTER_NAME('M', dir, path, real(dir, path, mode)) }
int unlinkat(int dir, const char *path, int flags)
{ REAL(int, "unlinkat", int, const char *, int); AFTER_NAME('U', dir, path, real(dir, path, flags)) }

#define AFTER_NAMES(op, d1, p1, d2, p2, call) \
    char first[PATH_MAX], second[PATH_MAX]; \
    int in_first = path_at(d1, p1, first), in_second = path_at(d2, p2, second); \
    if (!in_first && !in_second) return call; \
    hold(); \
    int result = call; \
    if (result == 0) record(op, first, second, 0, NULL, 0); \
    drop(); \
    return result;

int rename(const char *a, const char *b)
{ REAL(int, "rename", const char *, const char *); AFTER_NAMES('R', AT_FDCWD, a, AT_FDCWD, b, real(a, b)) }
int renameat(int d1, const char *a, int d2, const char *b)
{ REAL(int, "renameat", int, const char *, int, const char *); AFTER_NAMES('R', d1, a, d2, b, real(d1, a, d2, b)) }
int renameat2(int d1, const char *a, int d2, const char *b, unsigned flags)
{
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    AFTER_NAMES('R', d1, a, d2, b, real(d1, a, d2, b, flags))
}
int link(const char *a, const char *b)
{ REAL(int, "link", const char *, const char *); AFTER_NAMES('L', AT_FDCWD, a, AT_FDCWD, b, real(a, b)) }
int linkat(int d1, const char *a, int d2, const char *b, int flags)
{
    REAL(int, "linkat", int, const char *, int, const char *, int);
    AFTER_NAMES('L', d1, a, d2, b, real(d1, a, d2, b, flags))
}
