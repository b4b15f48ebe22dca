/* What sled calls to put a piece of its log on the disk; linked into every program of this package
 * in the place of the C library's function of that name (docs/adr/0015).
 *
 * That function leaves bytes in the disk's own cache, but sled counts them as stable, and what is
 * stable may be overwritten where it stood before: after two more of its segments, 1 MiB, at the
 * earliest. So of what was called stable here never more than LIMIT bytes are not durable. The rest
 * need not wait: whoever commits syncs the file anyway.
 */
#include <stdatomic.h>
#include <unistd.h>

enum { LIMIT = 128 * 1024, FILES = 65536 };

/* Of each descriptor, in bytes: what was called stable, and what is being made durable. */
static atomic_llong stable[FILES], syncing[FILES];

int sync_file_range(int file, long long offset, long long bytes, unsigned flags) {
    (void)offset;
    (void)flags;
    if (file < 0 || file >= FILES) return fdatasync(file);
    long long all = atomic_fetch_add(&stable[file], bytes) + bytes;
    if (all + atomic_load(&syncing[file]) <= LIMIT) return 0;
    /* Counted until it is durable. Whoever adds something meanwhile comes here too. */
    atomic_fetch_add(&syncing[file], all);
    atomic_store(&stable[file], 0);
    int result = fdatasync(file);
    atomic_fetch_sub(&syncing[file], all);
    return result;
}
