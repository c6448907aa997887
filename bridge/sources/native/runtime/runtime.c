// SPDX-License-Identifier: Apache-2.0
/*
 * libkcovbridge: the callbacks that compilers put into a program, for kcov-bridge.
 *
 * It is linked into the program under test. It has no dependencies but libc, allocates nothing,
 * starts no thread, and does nothing unless the bridge has started the program.
 *
 * Life: kbn_attach() maps the bridge's memory when the first module is registered. A module is
 * registered by its own constructor (clang) or by its first block (gcc), with a file lock on the
 * memory, which the kernel releases if the process dies. Nothing is ever unmapped.
 *
 * What a block costs that was covered since the last look: a load of its guard, of the thread's
 * number and of its byte in HIT.
 *
 * Why nothing is lost. The stores of a block and the clears of the reader (reader.c) form two
 * sequences on three levels:
 *
 *	thread:  HIT = number,  DIRTY = 1,  PENDING = COVERAGE_EPOCH = new value
 *	reader:  PENDING -> 0,  DIRTY -> 0,  HIT -> 0, which it reports
 *
 * 1. Each store and each clear is a locked exchange, so x86 keeps a thread's store of one level
 *    before its load of the next, and a clear before the load of the next level. A thread leaves a
 *    level alone only if it finds it set, which is before the reader's next clear of it; the reader
 *    looks at the levels below after that clear. So the block is reported by the look that is under
 *    way, or by the next one, whichever of the two a thread met.
 * 2. A thread relies on no other thread's next step: it looks at all levels itself. It skips them
 *    only where HIT has its own number, which it stored before it stored the levels above.
 * 3. The guest asks for coverage if the coverage epoch is another than at its last request. A
 *    thread leaves it alone only if it equals PENDING. A value is written once, and PENDING before
 *    the epoch. If the guest had seen this value, its request came after PENDING was set, and the
 *    reader has cleared it since, so it would not equal the epoch now.
 * 4. A thread that dies between two stores leaves a block that is set and not reported, until any
 *    other thread runs it and sets the levels above. The bridge looks at all blocks at the end.
 */
#define _GNU_SOURCE
#include "kcov_bridge.h"

#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "layout.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define EXPORT __attribute__((visibility("default")))
#define TLS __thread __attribute__((tls_model("initial-exec")))

#define MOST_LOCAL 256
#define NO_NUMBER 0xffff

const uint32_t kcov_bridge_layout EXPORT = KBN_LAYOUT;

/* NULL: the bridge did not start this program. Set once, by the thread that attaches. */
static struct kbn_header *shared;
static uint8_t *hit;
static uint8_t *dirty;
static uint32_t *pcs;
static uint8_t *taken;
/* A word of our own where nobody relies on the epoch. */
static uint64_t *epoch;
static uint64_t own_epoch;
static char path_of_memory[64];
static int attached; /* 0: not tried, 1: no, 2: yes */

/* Modules of this process. Appended under local_lock; local_count is published last. */
struct local {
	uintptr_t base;	 /* what the loader adds to addresses of the file */
	uintptr_t start; /* guards, counters or code */
	uintptr_t bytes; /* 0: it was unloaded */
	uint32_t first;
	uint32_t count;
	uint32_t module; /* index of its entry */
	uint32_t kind;
};
static struct local locals[MOST_LOCAL];
static uint32_t local_count;
static pthread_mutex_t local_lock = PTHREAD_MUTEX_INITIALIZER;

/* The number that this thread stores in HIT; NO_NUMBER: none that is its own alone. */
static TLS uint32_t fast_number = NO_NUMBER;
static TLS uint32_t number_of_thread;
static TLS uint32_t thread_id;
/* Takes this thread's blocks; see kcov_bridge.h. */
static TLS kcov_bridge_taker take_block;

#define LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define EXCHANGE(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)

/* ---- the memory */

static void *map_file(const char *path, size_t offset, size_t bytes)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	void *map;

	if (fd < 0)
		return NULL;
	map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
		   (off_t)offset);
	close(fd);
	return map == MAP_FAILED ? NULL : map;
}

static void forked(void);

static void attach_locked(void)
{
	const char *path = getenv(KBN_VARIABLE);
	struct kbn_header *header;

	if (!path || strlen(path) >= sizeof(path_of_memory))
		return;
	header = map_file(path, 0, sizeof(*header));
	if (!header)
		return;
	if (memcmp(header->magic, KBN_MAGIC, sizeof(header->magic))) {
		munmap(header, sizeof(*header));
		return;
	}
	if (header->layout != KBN_LAYOUT || header->bytes < KBN_BYTES) {
		header->other_layout = KBN_LAYOUT;
		munmap(header, sizeof(*header));
		return;
	}
	munmap(header, sizeof(*header));
	header = map_file(path, 0, KBN_BYTES);
	if (!header)
		return;
	strcpy(path_of_memory, path);
	epoch = &own_epoch;
	if (header->epoch_path[0]) {
		size_t page = (size_t)sysconf(_SC_PAGESIZE);
		size_t start = header->epoch_offset / page * page;
		char *map = map_file(header->epoch_path, start, page);

		if (map)
			epoch = (uint64_t *)(map + (header->epoch_offset - start));
	}
	hit = (uint8_t *)header + KBN_HIT_AT;
	dirty = (uint8_t *)header + KBN_DIRTY_AT;
	pcs = (uint32_t *)((char *)header + KBN_PCS_AT);
	taken = (uint8_t *)header + KBN_TAKEN_AT;
	/* The bridge reads counters in this process; with Yama it has to be let. */
	prctl(PR_SET_PTRACER, (unsigned long)header->bridge_pid, 0, 0, 0);
	pthread_atfork(NULL, NULL, forked);
	STORE(&shared, header);
}

static struct kbn_header *attach(void)
{
	if (unlikely(LOAD(&attached) == 0)) {
		pthread_mutex_lock(&local_lock);
		if (!attached) {
			attach_locked();
			STORE(&attached, shared ? 2 : 1);
		}
		pthread_mutex_unlock(&local_lock);
	}
	return LOAD(&shared);
}

/* Lock the tables against other processes. A descriptor of its own, since a fork shares locks. */
static int lock_tables(void)
{
	int fd = open(path_of_memory, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		return -1;
	while (flock(fd, LOCK_EX)) {
		if (errno != EINTR) {
			close(fd);
			return -1;
		}
	}
	return fd;
}

/* ---- threads */

static struct kbn_thread *thread_entry(unsigned int number)
{
	return (struct kbn_thread *)((char *)shared + KBN_THREADS_AT) + number;
}

/* Return whether this thread now has an entry that was free, or whose thread is gone. */
static int claim_thread(struct kbn_thread *entry)
{
	uint8_t state = LOAD(&entry->state);

	if (state == KBN_CLAIMED)
		return 0;
	if (state == KBN_USED &&
	    (syscall(SYS_tgkill, entry->process, entry->thread, 0) == 0 || errno != ESRCH))
		return 0;
	return __atomic_compare_exchange_n(&entry->state, &state, KBN_CLAIMED, 0, __ATOMIC_SEQ_CST,
					   __ATOMIC_RELAXED);
}

/* Give this thread a number, KBN_OTHER_THREAD if all are taken. */
static void __attribute__((noinline)) take_number(void)
{
	int saved = errno;
	unsigned int begin, i;

	thread_id = (uint32_t)syscall(SYS_gettid);
	begin = LOAD(&shared->next_thread);
	for (i = 0; i < KBN_LAST_THREAD; i++) {
		unsigned int number = 2 + (begin + i) % (KBN_LAST_THREAD - 1);
		struct kbn_thread *entry = thread_entry(number);

		if (!claim_thread(entry))
			continue;
		entry->process = (uint32_t)getpid();
		entry->thread = thread_id;
		memset(entry->name, 0, sizeof(entry->name));
		prctl(PR_GET_NAME, entry->name, 0, 0, 0);
		entry->length = (uint8_t)strnlen(entry->name, sizeof(entry->name));
		STORE(&entry->state, (uint8_t)KBN_USED);
		STORE(&shared->next_thread, (uint8_t)(number - 1));
		number_of_thread = number;
		if (!take_block)
			fast_number = number;
		errno = saved;
		return;
	}
	number_of_thread = KBN_OTHER_THREAD;
	errno = saved;
}

/* ---- blocks */

static uint64_t new_epoch(void)
{
	struct timespec now;
	uint64_t ns;

	/* As coverage_epoch_value() of bridge/device/coverage_epoch.py. Thread ids and process ids
	 * are of the same numbers, so that no two writers have the same. */
	clock_gettime(CLOCK_MONOTONIC, &now);
	ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
	return ns << 23 | (uint64_t)thread_id << 1 | 1;
}

static int is_apart(void);
static void keep_apart(uint32_t block, uint32_t place);
static int give_to_taker(uint32_t block, uint32_t place);

/* Set all levels of a block whose HIT may be set; place is 0, or where it lies in its module. */
static void __attribute__((noinline)) note(uint32_t block, uint32_t place)
{
	uint64_t pending;

	if (unlikely(is_apart())) {
		keep_apart(block, place);
		return;
	}
	if (unlikely(take_block) && give_to_taker(block, place))
		return;
	if (unlikely(!number_of_thread))
		take_number();
	if (!LOAD(&hit[block])) {
		if (place && !LOAD(&pcs[block]))
			STORE(&pcs[block], place);
		EXCHANGE(&hit[block], (uint8_t)number_of_thread);
	}
	if (!LOAD(&dirty[block / KBN_GROUP]))
		EXCHANGE(&dirty[block / KBN_GROUP], (uint8_t)1);
	pending = LOAD(&shared->pending);
	if (!pending || LOAD(epoch) != pending) {
		pending = new_epoch();
		EXCHANGE(&shared->pending, pending);
		STORE(epoch, pending);
	}
}

/* ---- modules */

struct found {
	uintptr_t address; /* what to look for */
	uintptr_t base;
	uintptr_t text_start; /* the executable segment with ADDRESS, if there is one */
	uintptr_t text_bytes;
	uint32_t id_bytes;
	uint8_t id[KBN_BUILD_ID];
	char path[KBN_PATH];
	int done;
};

static void read_build_id(struct found *found, const char *note, size_t bytes)
{
	while (bytes >= sizeof(ElfW(Nhdr))) {
		const ElfW(Nhdr) *header = (const void *)note;
		size_t name = (header->n_namesz + 3) & ~3ul, desc = (header->n_descsz + 3) & ~3ul;

		if (name > bytes - sizeof(*header) || desc > bytes - sizeof(*header) - name)
			return;
		if (header->n_type == NT_GNU_BUILD_ID && header->n_namesz == 4 &&
		    !memcmp(note + sizeof(*header), "GNU", 4)) {
			found->id_bytes = header->n_descsz < KBN_BUILD_ID ? header->n_descsz
									  : KBN_BUILD_ID;
			memcpy(found->id, note + sizeof(*header) + name, found->id_bytes);
			return;
		}
		note += sizeof(*header) + name + desc;
		bytes -= sizeof(*header) + name + desc;
	}
}

static int look_at_module(struct dl_phdr_info *info, size_t size, void *argument)
{
	struct found *found = argument;
	int i, inside = 0;

	(void)size;
	for (i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
		uintptr_t start = info->dlpi_addr + segment->p_vaddr;

		if (segment->p_type != PT_LOAD || found->address - start >= segment->p_memsz)
			continue;
		inside = 1;
		if (segment->p_flags & PF_X) {
			found->text_start = start;
			found->text_bytes = segment->p_memsz;
		}
	}
	if (!inside)
		return 0;
	found->base = info->dlpi_addr;
	for (i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *segment = &info->dlpi_phdr[i];

		if (segment->p_type == PT_NOTE && !found->id_bytes)
			read_build_id(found, (const char *)(info->dlpi_addr + segment->p_vaddr),
				      segment->p_memsz);
	}
	if (info->dlpi_name && info->dlpi_name[0]) {
		strncpy(found->path, info->dlpi_name, KBN_PATH - 1);
	} else if (readlink("/proc/self/exe", found->path, KBN_PATH - 1) < 0) {
		found->path[0] = 0;
	}
	found->done = 1;
	return 1;
}

static struct kbn_module *module_entry(uint32_t index)
{
	return (struct kbn_module *)((char *)shared + KBN_MODULES_AT) + index;
}

/* Return the index of the entry that this module has or gets; -1 if there is no room. */
static int enter_module(const struct found *found, uint32_t kind, uint32_t count)
{
	uint32_t modules = LOAD(&shared->modules), first, i;
	struct kbn_module *entry;

	if (modules > KBN_MOST_MODULES)
		return -1;
	for (i = 0; i < modules; i++) {
		entry = module_entry(i);
		if (entry->kind == kind && entry->count == count &&
		    entry->id_bytes == found->id_bytes &&
		    !memcmp(entry->id, found->id, found->id_bytes) &&
		    (found->id_bytes || !strcmp(entry->path, found->path)))
			return (int)i;
	}
	first = LOAD(&shared->next_block);
	if (modules == KBN_MOST_MODULES || first > KBN_MOST_BLOCKS ||
	    count > KBN_MOST_BLOCKS - first) {
		shared->lost_blocks += count;
		return -1;
	}
	entry = module_entry(modules);
	entry->kind = kind;
	entry->first = first;
	entry->count = count;
	entry->id_bytes = found->id_bytes;
	memcpy(entry->id, found->id, sizeof(entry->id));
	memcpy(entry->path, found->path, sizeof(entry->path));
	if (kind == KBN_TEXT)
		entry->text_start = found->text_start - found->base;
	STORE(&shared->next_block, first + (count + KBN_GROUP - 1) / KBN_GROUP * KBN_GROUP);
	STORE(&shared->modules, modules + 1);
	return (int)modules;
}

/*
 * Register guards, counters or code of this process, once. Return what it is here, or NULL if
 * nothing of it is counted.
 */
static struct local *add_local(uint32_t kind, uintptr_t start, uintptr_t bytes, uint32_t count,
			       const struct found *found)
{
	struct local *local = NULL;
	uint32_t known = local_count, i;
	int fd, index;

	/* After dlclose another module may lie there. */
	for (i = 0; i < known; i++)
		if (locals[i].kind == kind && (locals[i].start == start || !locals[i].bytes))
			local = &locals[i];
	if (!local && known == MOST_LOCAL) {
		__atomic_fetch_add(&shared->lost_blocks, count, __ATOMIC_RELAXED);
		return NULL;
	}
	fd = lock_tables();
	if (fd < 0)
		return NULL;
	index = enter_module(found, kind, count);
	close(fd);
	if (index < 0)
		return NULL;
	if (!local)
		local = &locals[known];
	local->base = found->base;
	local->start = start;
	local->first = module_entry((uint32_t)index)->first;
	local->count = count;
	local->module = (uint32_t)index;
	local->kind = kind;
	/* Last: code is found by it. */
	STORE(&local->bytes, bytes);
	if (local == &locals[known])
		STORE(&local_count, known + 1);
	return local;
}

static struct found find_module(uintptr_t address)
{
	struct found found;

	memset(&found, 0, sizeof(found));
	found.address = address;
	dl_iterate_phdr(look_at_module, &found);
	return found;
}

/* ---- counters, which the compiler's own code adds to: the bridge reads them in this process */

static struct kbn_range *range_entry(uint32_t index)
{
	return (struct kbn_range *)((char *)shared + KBN_RANGES_AT) + index;
}

/* Tell the bridge of counters of this process; under local_lock. */
static void enter_range(const struct local *local)
{
	uint32_t process = (uint32_t)getpid(), i;
	int fd = lock_tables();

	if (fd < 0)
		return;
	for (i = 0; i < KBN_MOST_RANGES; i++) {
		struct kbn_range *range = range_entry(i);

		if (LOAD(&range->process))
			continue;
		range->module = local->module;
		range->address = local->start;
		range->count = local->count;
		STORE(&range->process, process);
		if (i >= LOAD(&shared->ranges))
			STORE(&shared->ranges, i + 1);
		break;
	}
	if (i == KBN_MOST_RANGES)
		shared->lost_blocks += local->count;
	close(fd);
}

static void forked(void)
{
	uint32_t i;

	fast_number = NO_NUMBER;
	number_of_thread = 0;
	take_block = NULL;
	/* Another thread of the parent may have held it. */
	pthread_mutex_init(&local_lock, NULL);
	for (i = 0; i < local_count; i++)
		if (locals[i].kind == KBN_COUNTERS)
			enter_range(&locals[i]);
}

/* What the bridge has not read is given to it, since it cannot read this process any more. */
static void __attribute__((destructor)) leave(void)
{
	uint32_t process = (uint32_t)getpid(), i, j;

	if (!LOAD(&shared))
		return;
	for (i = 0; i < local_count; i++) {
		uint8_t *counters = (uint8_t *)locals[i].start;
		struct found found;

		if (locals[i].kind != KBN_COUNTERS)
			continue;
		/* Its library may have been unloaded. */
		found = find_module(locals[i].start);
		if (!found.done || found.base != locals[i].base)
			continue;
		for (j = 0; j < locals[i].count; j++)
			if (counters[j]) {
				counters[j] = 0;
				note(locals[i].first + j, 0);
			}
	}
	for (i = 0; i < LOAD(&shared->ranges) && i < KBN_MOST_RANGES; i++)
		if (LOAD(&range_entry(i)->process) == process)
			STORE(&range_entry(i)->process, 0u);
}

static void add_counters(uint8_t *start, uint8_t *stop)
{
	uint32_t i;
	struct found found;
	struct local *local;

	if (start == stop || !attach())
		return;
	found = find_module((uintptr_t)start);
	if (!found.done)
		return;
	pthread_mutex_lock(&local_lock);
	for (i = 0; i < local_count; i++)
		/* Called by another object file of the module, or it has guards too. */
		if (locals[i].base == found.base &&
		    (locals[i].start == (uintptr_t)start || locals[i].kind == KBN_GUARDS))
			break;
	if (i == local_count) {
		local = add_local(KBN_COUNTERS, (uintptr_t)start, (uintptr_t)(stop - start),
				  (uint32_t)(stop - start), &found);
		if (local)
			enter_range(local);
	}
	pthread_mutex_unlock(&local_lock);
}

EXPORT void __sanitizer_cov_8bit_counters_init(uint8_t *start, uint8_t *stop)
{
	add_counters(start, stop);
}

EXPORT void __sanitizer_cov_bool_flag_init(uint8_t *start, uint8_t *stop)
{
	add_counters(start, stop);
}

/* ---- gcc: trace-pc, which says nothing but its return address */

static const struct local *find_text(uintptr_t address)
{
	uint32_t count = __atomic_load_n(&local_count, __ATOMIC_ACQUIRE), i;

	for (i = 0; i < count; i++)
		if (locals[i].kind == KBN_TEXT && address - locals[i].start < locals[i].bytes)
			return &locals[i];
	return NULL;
}

static int still_there(struct dl_phdr_info *info, size_t size, void *argument)
{
	const struct local *local = argument;

	(void)size;
	return info->dlpi_addr == local->base;
}

/*
 * In place of the C library's, which it calls: forget code that is gone, because trace-pc does not say
 * that another library lies there now. No thread runs code of a library that is unloaded.
 */
EXPORT int dlclose(void *handle)
{
	static int (*next)(void *handle);
	uint32_t i;
	int result;

	if (!LOAD(&next))
		STORE(&next, (int (*)(void *))dlsym(RTLD_NEXT, "dlclose"));
	/* In a program that is linked statically there is no other: the library stays. */
	if (!LOAD(&next))
		return 0;
	result = LOAD(&next)(handle);
	pthread_mutex_lock(&local_lock);
	for (i = 0; i < local_count; i++)
		if (locals[i].kind == KBN_TEXT && locals[i].bytes &&
		    !dl_iterate_phdr(still_there, &locals[i]))
			STORE(&locals[i].bytes, 0);
	pthread_mutex_unlock(&local_lock);
	return result;
}

static const struct local *__attribute__((noinline)) add_text(uintptr_t address)
{
	const uint8_t *call = (const uint8_t *)address;
	uint32_t bytes = 0;
	int32_t distance;
	const struct local *local;
	struct kbn_module *entry;
	struct found found;

	if (!attach())
		return NULL;
	found = find_module(address);
	if (!found.done || !found.text_bytes)
		return NULL;
	if (call[-5] == 0xe8)
		bytes = 5;
	else if (call[-6] == 0xff && call[-5] == 0x15)
		bytes = 6;
	memcpy(&distance, call - 4, sizeof(distance));
	pthread_mutex_lock(&local_lock);
	local = find_text(address);
	if (!local)
		local = add_local(KBN_TEXT, found.text_start, found.text_bytes,
				  (uint32_t)(found.text_bytes / 4 + 1), &found);
	if (local && bytes) {
		entry = module_entry(local->module);
		entry->call_target = (uint32_t)(address + (uintptr_t)distance - found.base);
		STORE(&entry->call_bytes, bytes);
	}
	pthread_mutex_unlock(&local_lock);
	return local;
}

EXPORT void __sanitizer_cov_trace_pc(void)
{
	uintptr_t address = (uintptr_t)__builtin_return_address(0);
	const struct local *local;
	uint32_t block;

	if (unlikely(LOAD(&attached) == 1))
		return;
	local = find_text(address);
	if (unlikely(!local)) {
		local = add_text(address);
		if (!local)
			return;
	}
	block = local->first + (uint32_t)((address - local->start) / 4);
	if (likely(LOAD(&hit[block]) == fast_number))
		return;
	note(block, (uint32_t)(address - local->base));
}

/* ---- clang: trace-pc-guard */

EXPORT void __sanitizer_cov_trace_pc_guard_init(uint32_t *start, uint32_t *stop)
{
	uint32_t count = (uint32_t)(stop - start), i;
	struct found found;
	struct local *local;

	/* Each object file of a module calls it for all of them. */
	if (start == stop || *start || !attach())
		return;
	found = find_module((uintptr_t)start);
	if (!found.done)
		return;
	pthread_mutex_lock(&local_lock);
	local = add_local(KBN_GUARDS, (uintptr_t)start, count * sizeof(*start), count, &found);
	if (local && local->first)
		for (i = 0; i < count; i++)
			start[i] = local->first + i;
	pthread_mutex_unlock(&local_lock);
}

/* Without a table of places (pc-table) a block's place is where its call returns to. */
static uint32_t __attribute__((noinline)) place_in_module(uintptr_t address)
{
	struct found found = find_module(address);

	return found.done ? (uint32_t)(address - found.base) : 0;
}

EXPORT void __sanitizer_cov_trace_pc_guard(uint32_t *guard)
{
	uint32_t block = LOAD(guard);

	if (!block)
		return;
	if (likely(LOAD(&hit[block]) == fast_number))
		return;
	if (unlikely(!LOAD(&pcs[block])))
		note(block, place_in_module((uintptr_t)__builtin_return_address(0)));
	else
		note(block, 0);
}

/* The places of a module's blocks; an entry is an address and flags. */
EXPORT void __sanitizer_cov_pcs_init(const uintptr_t *start, const uintptr_t *stop)
{
	uint32_t count = (uint32_t)((stop - start) / 2), i, j;
	struct found found;

	if (!count || !attach())
		return;
	found = find_module((uintptr_t)start);
	if (!found.done)
		return;
	pthread_mutex_lock(&local_lock);
	for (i = 0; i < local_count; i++) {
		struct local *local = &locals[i];
		struct kbn_module *entry = module_entry(local->module);

		if (local->base != found.base || local->count != count || local->kind == KBN_TEXT ||
		    LOAD(&entry->has_pcs))
			continue;
		for (j = 0; j < count; j++)
			pcs[local->first + j] = (uint32_t)(start[2 * j] - found.base);
		STORE(&entry->has_pcs, 1u);
	}
	pthread_mutex_unlock(&local_lock);
}

/* ---- comparisons: the callbacks of trace-cmp, with the records of Linux' kernel/kcov.c */

#define CMP_CONST 1
#define CMP_SIZE(n) ((n) << 1)

static void compare(uint64_t type, uint64_t left, uint64_t right, uintptr_t address)
{
	struct kbn_compare *record;
	const struct local *local = NULL;
	uint32_t count, i;
	uint64_t number;

	if (likely(!LOAD(&shared)) || likely(!LOAD(&shared->comparing)) || is_apart())
		return;
	count = __atomic_load_n(&local_count, __ATOMIC_ACQUIRE);
	for (i = 0; i < count; i++)
		/* Modules lie apart, so the one that begins last below is its own. */
		if (locals[i].base <= address && (!local || locals[i].base > local->base))
			local = &locals[i];
	if (!local)
		return;
	number = __atomic_fetch_add(&shared->compares, 1, __ATOMIC_RELAXED);
	record = (struct kbn_compare *)((char *)shared + KBN_COMPARES_AT) +
		 number % KBN_MOST_COMPARES;
	STORE(&record->sequence, (uint64_t)0);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	record->type = type;
	record->left = left;
	record->right = right;
	record->module = local->module;
	record->place = (uint32_t)(address - local->base);
	STORE(&record->sequence, number + 1);
	/* The guest asks for comparisons as it asks for blocks. */
	if (unlikely(!number_of_thread))
		take_number();
	if (!LOAD(&shared->pending) || LOAD(epoch) != LOAD(&shared->pending)) {
		uint64_t pending = new_epoch();

		EXCHANGE(&shared->pending, pending);
		STORE(epoch, pending);
	}
}

#define COMPARE(name, bits, type)                                                                  \
	EXPORT void __sanitizer_cov_trace_##name(uint##bits##_t left, uint##bits##_t right)        \
	{                                                                                          \
		compare(type, left, right, (uintptr_t)__builtin_return_address(0));                \
	}

COMPARE(cmp1, 8, CMP_SIZE(0))
COMPARE(cmp2, 16, CMP_SIZE(1))
COMPARE(cmp4, 32, CMP_SIZE(2))
COMPARE(cmp8, 64, CMP_SIZE(3))
COMPARE(const_cmp1, 8, CMP_SIZE(0) | CMP_CONST)
COMPARE(const_cmp2, 16, CMP_SIZE(1) | CMP_CONST)
COMPARE(const_cmp4, 32, CMP_SIZE(2) | CMP_CONST)
COMPARE(const_cmp8, 64, CMP_SIZE(3) | CMP_CONST)

/* CASES: their number, the bits of VALUE, then each literal. */
EXPORT void __sanitizer_cov_trace_switch(uint64_t value, uint64_t *cases)
{
	uint64_t type, i;

	if (likely(!LOAD(&shared)) || likely(!LOAD(&shared->comparing)))
		return;
	switch (cases[1]) {
	case 8:
		type = CMP_SIZE(0) | CMP_CONST;
		break;
	case 16:
		type = CMP_SIZE(1) | CMP_CONST;
		break;
	case 32:
		type = CMP_SIZE(2) | CMP_CONST;
		break;
	case 64:
		type = CMP_SIZE(3) | CMP_CONST;
		break;
	default:
		return;
	}
	for (i = 0; i < cases[0]; i++)
		compare(type, cases[i + 2], value, (uintptr_t)__builtin_return_address(0));
}

/* gcc's callbacks for floating point, which Linux does not have either. */
EXPORT void __sanitizer_cov_trace_cmpf(float left, float right)
{
	(void)left;
	(void)right;
}

EXPORT void __sanitizer_cov_trace_cmpd(double left, double right)
{
	(void)left;
	(void)right;
}

/* What clang's trace-div, trace-gep and indirect calls are for, nobody here asks. */
EXPORT void __sanitizer_cov_trace_div4(uint32_t value)
{
	(void)value;
}

EXPORT void __sanitizer_cov_trace_div8(uint64_t value)
{
	(void)value;
}

EXPORT void __sanitizer_cov_trace_gep(uintptr_t index)
{
	(void)index;
}

EXPORT void __sanitizer_cov_trace_pc_indir(uintptr_t callee)
{
	(void)callee;
}

/* ---- handles: see kcov_bridge.h */

#define MOST_APART 4096

struct apart {
	uint64_t handle;
	uint64_t count;
	uint32_t blocks[MOST_APART];
};

static TLS struct apart *apart;

static int is_apart(void)
{
	return apart != NULL;
}

/* Keep a block for the handle of this thread; each once, in the order of their first run. */
static void keep_apart(uint32_t block, uint32_t place)
{
	uint64_t i;

	if (place && !LOAD(&pcs[block]))
		STORE(&pcs[block], place);
	for (i = apart->count; i > 0; i--)
		if (apart->blocks[i - 1] == block)
			return;
	if (apart->count < MOST_APART)
		apart->blocks[apart->count++] = block;
	else
		__atomic_fetch_add(&shared->lost_blocks, 1, __ATOMIC_RELAXED);
}

EXPORT void kcov_bridge_handle_begin(uint64_t handle)
{
	if (!attach() || apart || !shared->handles[0])
		return;
	apart = mmap(NULL, sizeof(*apart), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		     0);
	if (apart == MAP_FAILED) {
		apart = NULL;
		return;
	}
	apart->handle = handle;
	fast_number = NO_NUMBER;
}

/* Give the blocks to the bridge and wait until they are in the area, or the bridge is gone. */
static void deliver(const struct apart *done)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	size_t name = strnlen(shared->handles, sizeof(shared->handles));
	size_t bytes = offsetof(struct apart, blocks) + done->count * sizeof(done->blocks[0]);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), size = 1 << 16;
	char answer;

	if (fd < 0)
		return;
	if (name >= sizeof(address.sun_path))
		name = sizeof(address.sun_path) - 1;
	memcpy(address.sun_path + 1, shared->handles, name);
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	if (connect(fd, (struct sockaddr *)&address,
		    (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + name)) ||
	    send(fd, done, bytes, MSG_NOSIGNAL) < 0 || recv(fd, &answer, 1, 0) < 0)
		__atomic_fetch_add(&shared->lost_blocks, done->count, __ATOMIC_RELAXED);
	close(fd);
}

EXPORT void kcov_bridge_handle_end(void)
{
	struct apart *done = apart;
	int saved = errno;

	if (!done)
		return;
	apart = NULL;
	if (number_of_thread > KBN_OTHER_THREAD && !take_block)
		fast_number = number_of_thread;
	if (done->count)
		deliver(done);
	munmap(done, sizeof(*done));
	errno = saved;
}

/* ---- blocks that the program takes itself: see kcov_bridge.h */

/* Give a block to this thread's taker; return 0 if it is none of trace-pc-guard. */
static int give_to_taker(uint32_t block, uint32_t place)
{
	uint32_t count = __atomic_load_n(&local_count, __ATOMIC_ACQUIRE), i;
	int saved = errno;

	for (i = 0; i < count; i++) {
		uint32_t number = block - locals[i].first;
		uint64_t first_pc;

		if (locals[i].kind != KBN_GUARDS || number >= locals[i].count)
			continue;
		if (place && !LOAD(&pcs[block]))
			STORE(&pcs[block], place);
		/* Before the bridge has given the module its PCs, nobody traces. */
		first_pc = LOAD(&module_entry(locals[i].module)->first_pc);
		if (first_pc && take_block(first_pc + (uint64_t)number * KBN_SLOT_BYTES))
			STORE(&taken[block], (uint8_t)1);
		errno = saved;
		return 1;
	}
	return 0;
}

EXPORT kcov_bridge_taker kcov_bridge_take_blocks(kcov_bridge_taker take)
{
	kcov_bridge_taker before = take_block;

	if (!attach())
		return NULL;
	take_block = take;
	fast_number = NO_NUMBER;
	if (take)
		STORE(&shared->taking, 1u);
	else if (number_of_thread > KBN_OTHER_THREAD && !is_apart())
		fast_number = number_of_thread;
	return before;
}
