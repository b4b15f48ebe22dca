/* Sits between the node and the system, for tests of faults; loaded with LD_PRELOAD.
 *
 * It watches the files below FAULT_DIR and what leaves through TCP sockets.
 *
 *   FAULT_TRACE=file    Appends each change of a file, each sync and each send to this file,
 *                       in the order in which they happened: a record is written before the
 *                       next such call of any thread begins. What a disk can hold after a
 *                       power cut, and what had been said by then, follows from it.
 *   FAULT_SENDS_ONLY=1  Only what leaves is written down.
 *   FAULT_AT=n          The n-th call on a watched file fails (the first is number 1).
 *   FAULT_KIND=...      eio: any call fails with EIO. enospc: a call that needs room fails
 *                       with ENOSPC. short: a write writes half. full: a write writes half,
 *                       and all that need room after it fail with ENOSPC. kill: the process
 *                       is killed before the call, as by `kill -9`.
 *   FAULT_FOREVER=1     So do all calls after the n-th.
 *   FAULT_BAD=offset    A sector that cannot be read: whatever reads this byte of
 *                       FAULT_DIR/db/db fails with EIO.
 *
 * A record is: u32 length of what follows, u8 kind, i32 descriptor, u64 number, u64 number,
 * u32 length of the text, text, bytes; all little-endian. The kinds are in trace.rs.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { START = 1, OPEN, CLOSE, WRITE, SYNC, TRUNCATE, RENAME, UNLINK, MKDIR, RMDIR, SEND, FAULT, EXCHANGE };
enum { UNKNOWN = 0, WATCHED, SOCKET, OTHER };
enum { NONE = 0, EIO_KIND, ENOSPC_KIND, SHORT_KIND, FULL_KIND, KILL_KIND };
/* What a call is, for the kinds of fault that only some calls can meet. */
enum { READS = 0, NEEDS_ROOM, WRITES };

#define MAX_FD 65536
static atomic_uchar kinds[MAX_FD];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char watched_dir[PATH_MAX];
static size_t watched_len;
static int trace_fd = -1, sends_only, fault_kind, fault_forever;
static uint64_t fault_at, calls;
static off64_t bad_at = -1;

static void set_kind(int fd, int kind) {
    if (fd >= 0 && fd < MAX_FD) atomic_store(&kinds[fd], kind);
}

/* Safe in a signal handler, which may write to a pipe of the runtime. */
static int kind_of(int fd) {
    if (fd < 0 || fd >= MAX_FD) return OTHER;
    int kind = atomic_load(&kinds[fd]);
    if (kind != UNKNOWN) return kind;
    int before = errno;
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    int inet = getsockname(fd, (struct sockaddr *)&address, &length) == 0 &&
               (address.ss_family == AF_INET || address.ss_family == AF_INET6);
    errno = before;
    kind = inet ? SOCKET : OTHER;
    atomic_store(&kinds[fd], kind);
    return kind;
}

static void record(int kind, int fd, uint64_t a, uint64_t b, const char *text, const void *bytes, size_t n) {
    if (trace_fd < 0 || (sends_only && kind != SEND && kind != CLOSE && kind != START && kind != FAULT)) return;
    int before = errno;
    uint32_t text_length = text ? strlen(text) : 0;
    unsigned char head[29];
    uint32_t length = (uint32_t)(sizeof head - 4 + text_length + n);
    int32_t fd32 = fd;
    memcpy(head, &length, 4);
    head[4] = (unsigned char)kind;
    memcpy(head + 5, &fd32, 4);
    memcpy(head + 9, &a, 8);
    memcpy(head + 17, &b, 8);
    memcpy(head + 25, &text_length, 4);
    struct iovec parts[3] = {{head, sizeof head}, {(void *)text, text_length}, {(void *)bytes, n}};
    size_t wanted = 4 + (size_t)length;
    if (syscall(SYS_writev, trace_fd, parts, 3) != (long)wanted) {
        static const char words[] = "shim: the trace cannot be written\n";
        syscall(SYS_write, 2, words, sizeof words - 1);
        abort();
    }
    errno = before;
}

/* Counts a call on a watched file. 0: go on; an errno: fail so; -1: write half of it. */
static int fault(int what, const char *call) {
    if (!fault_kind) return 0;
    if (fault_kind == ENOSPC_KIND && what == READS) return 0;
    if (fault_kind == FULL_KIND && what == READS) return 0;
    if (fault_kind == SHORT_KIND && what != WRITES) return 0;
    uint64_t number = ++calls;
    if (number < fault_at || (number > fault_at && !fault_forever && fault_kind != FULL_KIND)) return 0;
    record(FAULT, -1, number, fault_kind, call, NULL, 0);
    if (fault_kind == KILL_KIND) kill(getpid(), SIGKILL);
    if (fault_kind == SHORT_KIND) return -1;
    if (fault_kind == FULL_KIND) return number == fault_at && what == WRITES ? -1 : ENOSPC;
    return fault_kind == EIO_KIND ? EIO : ENOSPC;
}

static int is_watched(const char *path) {
    return watched_len && strncmp(path, watched_dir, watched_len) == 0 &&
           (path[watched_len] == '/' || path[watched_len] == 0);
}

/* The absolute path of a name; empty where it cannot be watched. */
static void absolute(int dir, const char *path, char out[PATH_MAX]) {
    out[0] = 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    char base[PATH_MAX];
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) return;
        base[n] = 0;
    }
    if (strlen(base) + strlen(path) + 2 > PATH_MAX) return;
    strcpy(out, base);
    if (strcmp(path, ".") != 0) {
        strcat(out, "/");
        strcat(out, path);
    }
}

__attribute__((constructor)) static void begin(void) {
    const char *dir = getenv("FAULT_DIR"), *trace = getenv("FAULT_TRACE"), *at = getenv("FAULT_AT");
    const char *kind = getenv("FAULT_KIND");
    if (dir && realpath(dir, watched_dir)) watched_len = strlen(watched_dir);
    sends_only = getenv("FAULT_SENDS_ONLY") != NULL;
    fault_forever = getenv("FAULT_FOREVER") != NULL;
    if (getenv("FAULT_BAD")) bad_at = (off64_t)strtoull(getenv("FAULT_BAD"), NULL, 10);
    if (at && kind) {
        fault_at = strtoull(at, NULL, 10);
        fault_kind = !strcmp(kind, "eio")      ? EIO_KIND
                     : !strcmp(kind, "enospc") ? ENOSPC_KIND
                     : !strcmp(kind, "short")  ? SHORT_KIND
                     : !strcmp(kind, "kill")   ? KILL_KIND
                                               : FULL_KIND;
    }
    if (trace) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, trace, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (fd < 0) abort();
        trace_fd = fd;
        set_kind(fd, OTHER);
    }
    record(START, -1, (uint64_t)getpid(), 0, NULL, NULL, 0);
}

static int open_any(int dir, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    absolute(dir, path, full);
    if (!is_watched(full)) {
        int fd = (int)syscall(SYS_openat, dir, path, flags, mode);
        if (fd >= 0) set_kind(fd, UNKNOWN);
        return fd;
    }
    pthread_mutex_lock(&lock);
    int error = fault(flags & O_CREAT ? NEEDS_ROOM : READS, "open");
    int fd = -1;
    if (error > 0) {
        errno = error;
    } else {
        struct stat before;
        int existed = stat(full, &before) == 0;
        fd = (int)syscall(SYS_openat, dir, path, flags, mode);
        if (fd >= 0) {
            set_kind(fd, WATCHED);
            int created = !existed && (flags & O_CREAT);
            int truncated = existed && (flags & O_TRUNC) && before.st_size > 0;
            record(OPEN, fd, (uint64_t)flags, (uint64_t)(created | truncated << 1), full, NULL, 0);
        }
    }
    pthread_mutex_unlock(&lock);
    return fd;
}

static mode_t mode_of(int flags, va_list list) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
}

#define OPENER(name)                                     \
    int name(const char *path, int flags, ...) {         \
        va_list list;                                    \
        va_start(list, flags);                           \
        mode_t mode = mode_of(flags, list);              \
        va_end(list);                                    \
        return open_any(AT_FDCWD, path, flags, mode);    \
    }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name)                                       \
    int name(int dir, const char *path, int flags, ...) {     \
        va_list list;                                         \
        va_start(list, flags);                                \
        mode_t mode = mode_of(flags, list);                   \
        va_end(list);                                         \
        return open_any(dir, path, flags, mode);              \
    }
OPENER_AT(openat)
OPENER_AT(openat64)

int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

int close(int fd) {
    int kind = fd >= 0 && fd < MAX_FD ? atomic_load(&kinds[fd]) : OTHER;
    if (kind != WATCHED && kind != SOCKET) {
        set_kind(fd, UNKNOWN);
        return (int)syscall(SYS_close, fd);
    }
    pthread_mutex_lock(&lock);
    set_kind(fd, UNKNOWN);
    record(CLOSE, fd, 0, 0, NULL, NULL, 0);
    int result = (int)syscall(SYS_close, fd);
    pthread_mutex_unlock(&lock);
    return result;
}

/* It closes the descriptor without a call that could be seen here. */
int closedir(DIR *directory) {
    int (*next)(DIR *) = (int (*)(DIR *))dlsym(RTLD_NEXT, "closedir");
    int fd = dirfd(directory);
    int kind = fd >= 0 && fd < MAX_FD ? atomic_load(&kinds[fd]) : OTHER;
    pthread_mutex_lock(&lock);
    if (kind == WATCHED) record(CLOSE, fd, 0, 0, NULL, NULL, 0);
    set_kind(fd, UNKNOWN);
    int result = next(directory);
    pthread_mutex_unlock(&lock);
    return result;
}

/* A write at an offset; -1 is where the descriptor stands. */
static ssize_t write_file(int fd, const void *bytes, size_t n, off64_t offset) {
    pthread_mutex_lock(&lock);
    int error = fault(WRITES, "write");
    ssize_t result = -1;
    if (error > 0) {
        errno = error;
    } else {
        if (error < 0 && n > 1) n /= 2;
        off64_t at = offset;
        if (offset < 0) {
            int flags = fcntl(fd, F_GETFL);
            at = lseek64(fd, 0, flags & O_APPEND ? SEEK_END : SEEK_CUR);
            result = syscall(SYS_write, fd, bytes, n);
        } else {
            result = syscall(SYS_pwrite64, fd, bytes, n, offset);
        }
        if (result > 0) record(WRITE, fd, (uint64_t)at, 0, NULL, bytes, (size_t)result);
    }
    pthread_mutex_unlock(&lock);
    /* A disk that fails takes its time, and those that wait for it are waiting by then. */
    if (error > 0) {
        usleep(20000);
        errno = error;
    }
    return result;
}

/* A record for what really left, made before the next call of any thread. */
static ssize_t sent(int fd, const struct iovec *parts, int count, ssize_t result) {
    size_t left = result > 0 ? (size_t)result : 0;
    for (int i = 0; i < count && left > 0; i++) {
        size_t n = parts[i].iov_len < left ? parts[i].iov_len : left;
        if (n) record(SEND, fd, 0, 0, NULL, parts[i].iov_base, n);
        left -= n;
    }
    return result;
}

ssize_t write(int fd, const void *bytes, size_t n) {
    switch (kind_of(fd)) {
    case WATCHED:
        return write_file(fd, bytes, n, -1);
    case SOCKET: {
        struct iovec part = {(void *)bytes, n};
        pthread_mutex_lock(&lock);
        ssize_t result = sent(fd, &part, 1, syscall(SYS_write, fd, bytes, n));
        pthread_mutex_unlock(&lock);
        return result;
    }
    default:
        return syscall(SYS_write, fd, bytes, n);
    }
}

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t offset) {
    if (kind_of(fd) == WATCHED) return write_file(fd, bytes, n, offset);
    return syscall(SYS_pwrite64, fd, bytes, n, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t offset) { return pwrite(fd, bytes, n, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    switch (kind_of(fd)) {
    case WATCHED: {
        for (int i = 0; i < count; i++)
            if (parts[i].iov_len) return write_file(fd, parts[i].iov_base, parts[i].iov_len, -1);
        return 0;
    }
    case SOCKET: {
        pthread_mutex_lock(&lock);
        ssize_t result = sent(fd, parts, count, syscall(SYS_writev, fd, parts, count));
        pthread_mutex_unlock(&lock);
        return result;
    }
    default:
        return syscall(SYS_writev, fd, parts, count);
    }
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    if (kind_of(fd) != WATCHED)
        return syscall(SYS_pwritev, fd, parts, count, (unsigned long)offset, 0UL);
    for (int i = 0; i < count; i++)
        if (parts[i].iov_len) return write_file(fd, parts[i].iov_base, parts[i].iov_len, offset);
    return 0;
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return pwritev(fd, parts, count, offset);
}

ssize_t sendto(int fd, const void *bytes, size_t n, int flags, const struct sockaddr *to, socklen_t length) {
    if (kind_of(fd) != SOCKET) return syscall(SYS_sendto, fd, bytes, n, flags, to, length);
    struct iovec part = {(void *)bytes, n};
    pthread_mutex_lock(&lock);
    ssize_t result = sent(fd, &part, 1, syscall(SYS_sendto, fd, bytes, n, flags, to, length));
    pthread_mutex_unlock(&lock);
    return result;
}

ssize_t send(int fd, const void *bytes, size_t n, int flags) { return sendto(fd, bytes, n, flags, NULL, 0); }

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    if (kind_of(fd) != SOCKET) return syscall(SYS_sendmsg, fd, message, flags);
    pthread_mutex_lock(&lock);
    ssize_t result = syscall(SYS_sendmsg, fd, message, flags);
    sent(fd, message->msg_iov, (int)message->msg_iovlen, result);
    pthread_mutex_unlock(&lock);
    return result;
}

/* Whether a read meets the sector that cannot be read. */
static int is_bad(int fd, off64_t offset, size_t n) {
    if (bad_at < 0 || offset > bad_at || bad_at - offset >= (off64_t)n) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, path, sizeof path);
    return length == (ssize_t)watched_len + 6 && memcmp(path, watched_dir, watched_len) == 0 &&
           memcmp(path + watched_len, "/db/db", 6) == 0;
}

ssize_t read(int fd, void *bytes, size_t n) {
    int kind = fd >= 0 && fd < MAX_FD ? atomic_load(&kinds[fd]) : OTHER;
    if (kind == WATCHED && bad_at >= 0 && is_bad(fd, lseek64(fd, 0, SEEK_CUR), n)) {
        errno = EIO;
        return -1;
    }
    if (kind == WATCHED && fault_kind) {
        pthread_mutex_lock(&lock);
        int error = fault(READS, "read");
        pthread_mutex_unlock(&lock);
        if (error > 0) {
            errno = error;
            return -1;
        }
    }
    return syscall(SYS_read, fd, bytes, n);
}

ssize_t pread64(int fd, void *bytes, size_t n, off64_t offset) {
    int kind = fd >= 0 && fd < MAX_FD ? atomic_load(&kinds[fd]) : OTHER;
    if (kind == WATCHED && is_bad(fd, offset, n)) {
        errno = EIO;
        return -1;
    }
    if (kind == WATCHED && fault_kind) {
        pthread_mutex_lock(&lock);
        int error = fault(READS, "pread");
        pthread_mutex_unlock(&lock);
        if (error > 0) {
            errno = error;
            return -1;
        }
    }
    return syscall(SYS_pread64, fd, bytes, n, offset);
}

ssize_t pread(int fd, void *bytes, size_t n, off_t offset) { return pread64(fd, bytes, n, offset); }

/* A call on a descriptor that changes what is durable, or how long the file is. */
#define ON_FILE(kind, what, name, a, call)                            \
    if (kind_of(fd) != WATCHED) return (int)(call);                   \
    pthread_mutex_lock(&lock);                                        \
    int error = fault(what, name);                                    \
    int result = -1;                                                  \
    if (error > 0) {                                                  \
        errno = error;                                                \
    } else {                                                          \
        result = (int)(call);                                         \
        if (result == 0 && kind) record(kind, fd, a, 0, NULL, NULL, 0); \
    }                                                                 \
    pthread_mutex_unlock(&lock);                                      \
    return result

int fsync(int fd) { ON_FILE(SYNC, NEEDS_ROOM, "fsync", 0, syscall(SYS_fsync, fd)); }
int fdatasync(int fd) { ON_FILE(SYNC, NEEDS_ROOM, "fdatasync", 0, syscall(SYS_fdatasync, fd)); }
/* It writes pages back, which may or may not be on the platter then: no sync. */
int sync_file_range(int fd, off64_t offset, off64_t n, unsigned flags) {
    ON_FILE(0, NEEDS_ROOM, "sync_file_range", 0, syscall(SYS_sync_file_range, fd, offset, n, flags));
}
int ftruncate(int fd, off_t length) {
    ON_FILE(TRUNCATE, NEEDS_ROOM, "ftruncate", (uint64_t)length, syscall(SYS_ftruncate, fd, length));
}
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

/* Nothing here uses these on a database; whoever begins to has to teach the replay. */
#define NOT_TAUGHT(fd)                                                        \
    if (kind_of(fd) == WATCHED) {                                             \
        static const char words[] = "shim: a call that the replay does not know\n"; \
        syscall(SYS_write, 2, words, sizeof words - 1);                       \
        abort();                                                              \
    }
int fallocate(int fd, int mode, off_t offset, off_t n) {
    NOT_TAUGHT(fd)
    return (int)syscall(SYS_fallocate, fd, mode, offset, n);
}
int fallocate64(int fd, int mode, off64_t offset, off64_t n) { return fallocate(fd, mode, offset, n); }
void *mmap64(void *at, size_t n, int protection, int flags, int fd, off64_t offset) {
    if (fd >= 0) { NOT_TAUGHT(fd) }
    return (void *)syscall(SYS_mmap, at, n, protection, flags, fd, offset);
}
/* The caller then copies by reading and writing. */
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    (void)in, (void)from, (void)out, (void)to, (void)n, (void)flags;
    errno = ENOSYS;
    return -1;
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t n) {
    (void)out, (void)in, (void)offset, (void)n;
    errno = ENOSYS;
    return -1;
}
ssize_t sendfile(int out, int in, off_t *offset, size_t n) { return sendfile64(out, in, offset, n); }

/* A call on names. */
static int on_name(int kind, int what, const char *name, const char *path, long (*call)(const char *, long), long arg) {
    char full[PATH_MAX];
    absolute(AT_FDCWD, path, full);
    if (!is_watched(full)) return (int)call(path, arg);
    pthread_mutex_lock(&lock);
    int error = fault(what, name);
    int result = -1;
    if (error > 0) {
        errno = error;
    } else {
        result = (int)call(path, arg);
        if (result == 0) record(kind, -1, 0, 0, full, NULL, 0);
    }
    pthread_mutex_unlock(&lock);
    return result;
}
static long do_unlink(const char *path, long unused) { (void)unused; return syscall(SYS_unlink, path); }
static long do_rmdir(const char *path, long unused) { (void)unused; return syscall(SYS_rmdir, path); }
static long do_mkdir(const char *path, long mode) { return syscall(SYS_mkdir, path, mode); }

int unlink(const char *path) { return on_name(UNLINK, READS, "unlink", path, do_unlink, 0); }
int rmdir(const char *path) { return on_name(RMDIR, READS, "rmdir", path, do_rmdir, 0); }
int mkdir(const char *path, mode_t mode) { return on_name(MKDIR, NEEDS_ROOM, "mkdir", path, do_mkdir, (long)mode); }
int unlinkat(int dir, const char *path, int flags) {
    char full[PATH_MAX];
    absolute(dir, path, full);
    if (!is_watched(full)) return (int)syscall(SYS_unlinkat, dir, path, flags);
    return flags & AT_REMOVEDIR ? rmdir(full) : unlink(full);
}

static int rename_with(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    char full_from[PATH_MAX], full_to[PATH_MAX];
    absolute(from_dir, from, full_from);
    absolute(to_dir, to, full_to);
    int watched = is_watched(full_from) || is_watched(full_to);
    if (!watched) return (int)syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
    pthread_mutex_lock(&lock);
    int error = fault(NEEDS_ROOM, "rename");
    int result = -1;
    if (error > 0) {
        errno = error;
    } else {
        result = (int)syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
        int kind = flags & RENAME_EXCHANGE ? EXCHANGE : RENAME;
        if (result == 0) record(kind, -1, 0, 0, full_from, full_to, strlen(full_to));
    }
    pthread_mutex_unlock(&lock);
    return result;
}
int rename(const char *from, const char *to) { return rename_with(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    return rename_with(from_dir, from, to_dir, to, flags);
}
