/* An allocator for benchmarks/kernels.py, to be preloaded. While it is on, every block that is asked for with the
 * alignment of numbers (64 bytes and more: torch's tensors, oneDNN's memory) ends at a page that cannot be touched, so
 * that the first access past its end is a segmentation fault. Bytes between the block and the ends of its pages hold a
 * pattern that is looked at when it is freed: what was written there ends the process. Blocks are never used again, and
 * freed ones cannot be touched either.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

enum { PAGE = 4096, LEAST = 64, PATTERN = 0xA5, FRESH = 0x7F, FILLED = 1 << 16 };
static const size_t ROOM = (size_t)1 << 40;

static _Atomic(uintptr_t) next;
static uintptr_t base;
static volatile int on;

typedef struct {
    size_t size, pages; /* of the block, and of the pages that hold it */
    unsigned char *block;
} Header; /* alone in the page before them */

void fence(int wanted) {
    if (!base) {
        base = (uintptr_t)mmap(NULL, ROOM, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        atomic_store(&next, base);
    }
    on = wanted;
}

static int fenced(const void *block) {
    return base && (uintptr_t)block >= base && (uintptr_t)block < base + ROOM;
}

static Header *header(const void *block) {
    /* The block begins in the first of its pages, unless its alignment is larger than what fits before it. */
    uintptr_t page = (uintptr_t)block & ~(uintptr_t)(PAGE - 1);
    return (Header *)(page - PAGE);
}

static void die(const char *text) {
    if (write(2, text, strlen(text)) < 0) _exit(98);
    _exit(97);
}

static void *make(size_t align, size_t size) {
    size_t pages = (size + PAGE - 1) / PAGE;
    size_t taken = (pages + 2) * PAGE + (align > PAGE ? align : 0);
    uintptr_t at = atomic_fetch_add(&next, taken);
    uintptr_t data = at + PAGE;
    if (align > PAGE) data = (data + align - 1) & ~(uintptr_t)(align - 1);
    uintptr_t end = data + pages * PAGE;
    uintptr_t block = (end - size) & ~(uintptr_t)(align - 1);
    if (block < data) die("fence: no place\n");
    if (mprotect((void *)(data - PAGE), (pages + 1) * PAGE, PROT_READ | PROT_WRITE)) die("fence: no memory\n");
    memset((void *)data, PATTERN, block - data);
    memset((void *)(block + size), PATTERN, end - block - size);
    memset((void *)block, FRESH, size < FILLED ? size : FILLED);
    *(Header *)(data - PAGE) = (Header){size, pages, (unsigned char *)block};
    return (void *)block;
}

static void drop(void *block) {
    Header *head = header(block);
    if (head->block != block) die("fence: a freed block is none, or its header was overwritten\n");
    unsigned char *first = (unsigned char *)head + PAGE, *end = first + head->pages * PAGE;
    for (unsigned char *at = first; at < head->block; at++)
        if (*at != PATTERN) die("fence: written before a block\n");
    for (unsigned char *at = head->block + head->size; at < end; at++)
        if (*at != PATTERN) die("fence: written past a block\n");
    size_t length = (head->pages + 1) * PAGE;
    madvise(head, length, MADV_DONTNEED);
    mprotect(head, length, PROT_NONE);
}

void *memalign(size_t align, size_t size) {
    return on && align >= LEAST ? make(align, size) : __libc_memalign(align, size);
}

void *aligned_alloc(size_t align, size_t size) { return memalign(align, size); }

int posix_memalign(void **out, size_t align, size_t size) {
    void *block = memalign(align, size);
    if (!block) return ENOMEM;
    *out = block;
    return 0;
}

void free(void *block) {
    if (fenced(block)) drop(block);
    else __libc_free(block);
}

void *realloc(void *block, size_t size) {
    if (!fenced(block)) return __libc_realloc(block, size);
    size_t old = header(block)->size;
    void *made = __libc_memalign(LEAST, size);
    memcpy(made, block, old < size ? old : size);
    free(block);
    return made;
}

size_t malloc_usable_size(void *block) { return fenced(block) ? header(block)->size : 0; }
