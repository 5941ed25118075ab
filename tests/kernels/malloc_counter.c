/* Preloaded by test_step_costs: counts what the C library's allocator is asked for. */
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

static long count;

long allocations(void) { return __atomic_load_n(&count, __ATOMIC_RELAXED); }

static void one(void) { __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED); }

void* malloc(size_t size) { return one(), __libc_malloc(size); }
void* calloc(size_t items, size_t size) { return one(), __libc_calloc(items, size); }
void* realloc(void* old, size_t size) { return one(), __libc_realloc(old, size); }
void* aligned_alloc(size_t alignment, size_t size) { return one(), __libc_memalign(alignment, size); }
int posix_memalign(void** to, size_t alignment, size_t size) { return one(), !(*to = __libc_memalign(alignment, size)); }
