// SPDX-License-Identifier: Apache-2.0
/*
 * The bridge's side of the memory in layout.h: a library that bridge/sources/native/memory.py loads.
 *
 * Programs that the bridge does not trust write that memory at any time. So a value of it is read
 * once and bounded, and what has to be right is kept in the reader's own memory: which blocks belong
 * to which module, and which blocks were ever covered. The memory cannot be resized (it is sealed),
 * so that no access to it faults.
 *
 * Not thread-safe: one thread at a time calls it.
 */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "layout.h"

#define EXPORT __attribute__((visibility("default")))
#define LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define EXCHANGE(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)

#define THREAD_SHIFT 56

/* A module as the reader was told, in the order of its first blocks. */
struct placed {
	uint32_t first;
	uint32_t end;
	uint64_t first_pc; /* 0: its blocks have no PCs */
	/* KBN_TEXT: for each block its slot from FIRST_PC on, or a value below 0; else NULL. */
	const int32_t *slots;
};

/* The memory of a process. */
struct process {
	int fd; /* of its /proc/PID/mem: of this memory, whatever gets the number. -1: it has ended */
	pid_t number;
};

/* Counters in a process that the bridge has looked at. */
struct counters {
	struct process process;
	uint32_t entry;
	uint64_t address;
	uint32_t first;
	uint32_t count;
};

#define MOST_WORDS 64

/* The counters of a Go program, which are words among others: see go.py. */
struct words {
	struct process process;
	uint64_t address;
	uint32_t count;
	int flags; /* they are set and not counted up */
	/* Of each word: its block, -1 for one that is no counter, or UNKNOWN. */
	const int32_t *slots;
	uint32_t *before; /* what each was at the last look; 0 for one that is UNKNOWN */
	uint8_t *used; /* of WORDS_PER_GROUP words each: whether one was ever not 0 BEFORE */
	struct placed placed;
};

#define WORDS_PER_GROUP 16

#define UNKNOWN (-2)

struct kbn_reader {
	char *memory;
	struct kbn_header *header;
	uint8_t *dirty;
	uint64_t *hit;
	const uint8_t *taken;
	uint8_t *ever; /* for each block, whether it was ever covered */
	uint64_t covered;
	uint64_t given;
	uint32_t known; /* modules that were placed */
	uint32_t end;	/* of their blocks, a multiple of KBN_GROUP */
	struct placed placed[KBN_MOST_MODULES];
	uint8_t *copy; /* of the counters of one process */
	uint32_t used; /* of the counters below */
	uint32_t process_of[KBN_MOST_RANGES]; /* that an entry had when it was looked at */
	uint32_t words_used;
	uint32_t unknown; /* a word was found that is UNKNOWN */
	uint32_t *copy_of_words;
	struct words words[MOST_WORDS];
	uint64_t compared; /* comparisons that were taken or lost */
	struct counters counters[KBN_MOST_RANGES];
};

static void *private_memory(size_t bytes)
{
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return map == MAP_FAILED ? NULL : map;
}

/* Bytes of what is kept of a program's words: BEFORE and then USED. */
static size_t words_bytes(uint32_t count)
{
	return 4ull * count + count / WORDS_PER_GROUP + 1;
}

static void end_words(struct words *words)
{
	if (words->process.fd < 0)
		return;
	close(words->process.fd);
	words->process.fd = -1;
	munmap(words->before, words_bytes(words->count));
}

EXPORT void kbn_close(struct kbn_reader *reader)
{
	uint32_t i;

	if (!reader)
		return;
	if (reader->memory)
		munmap(reader->memory, KBN_BYTES);
	if (reader->ever)
		munmap(reader->ever, KBN_MOST_BLOCKS);
	if (reader->copy)
		munmap(reader->copy, KBN_MOST_BLOCKS);
	if (reader->copy_of_words)
		munmap(reader->copy_of_words, 4ull * KBN_MOST_BLOCKS);
	for (i = 0; i < reader->used; i++)
		if (reader->counters[i].process.fd >= 0)
			close(reader->counters[i].process.fd);
	for (i = 0; i < reader->words_used; i++)
		end_words(&reader->words[i]);
	munmap(reader, sizeof(*reader));
}

/*
 * Lay out the memory in a new memfd, and return its reader; NULL with errno.
 * The strings may be empty, and are cut where they do not fit.
 */
EXPORT struct kbn_reader *kbn_open(int fd, const char *epoch_path, uint64_t epoch_offset,
				   const char *handles)
{
	struct kbn_reader *reader = private_memory(sizeof(*reader));
	struct kbn_header *header;

	if (!reader)
		return NULL;
	if (ftruncate(fd, (off_t)KBN_BYTES) ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		goto failed;
	reader->memory = mmap(NULL, KBN_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
			      fd, 0);
	if (reader->memory == MAP_FAILED) {
		reader->memory = NULL;
		goto failed;
	}
	reader->ever = private_memory(KBN_MOST_BLOCKS);
	reader->copy = private_memory(KBN_MOST_BLOCKS);
	reader->copy_of_words = private_memory(4ull * KBN_MOST_BLOCKS);
	if (!reader->ever || !reader->copy || !reader->copy_of_words)
		goto failed;
	reader->header = header = (void *)reader->memory;
	reader->dirty = (uint8_t *)reader->memory + KBN_DIRTY_AT;
	reader->hit = (uint64_t *)(reader->memory + KBN_HIT_AT);
	reader->taken = (const uint8_t *)reader->memory + KBN_TAKEN_AT;
	reader->end = KBN_GROUP;
	header->layout = KBN_LAYOUT;
	header->bytes = KBN_BYTES;
	header->bridge_pid = (uint32_t)getpid();
	/* Block 0 stands for a guard that counts nothing. */
	header->next_block = KBN_GROUP;
	strncpy(header->epoch_path, epoch_path, sizeof(header->epoch_path) - 1);
	header->epoch_offset = epoch_offset;
	strncpy(header->handles, handles, sizeof(header->handles) - 1);
	header->active = 1;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	memcpy(header->magic, KBN_MAGIC, sizeof(header->magic));
	return reader;
failed:
	kbn_close(reader);
	return NULL;
}

/* What a program says of a module. */
struct kbn_said {
	uint32_t kind, first, count, has_pcs, id_bytes, call_target, call_bytes, spare;
	uint64_t text_start;
	uint8_t id[KBN_BUILD_ID];
	char path[KBN_PATH];
};

/* Return how many modules there are. */
EXPORT uint32_t kbn_modules(const struct kbn_reader *reader)
{
	uint32_t modules = LOAD(&reader->header->modules);

	return modules < KBN_MOST_MODULES ? modules : KBN_MOST_MODULES;
}

/* Copy what is said of a module, bounded. Return 0 if its blocks cannot be right. */
EXPORT int kbn_said(const struct kbn_reader *reader, uint32_t index, struct kbn_said *said)
{
	const struct kbn_module *entry;

	memset(said, 0, sizeof(*said));
	if (index >= KBN_MOST_MODULES)
		return 0;
	entry = (const void *)(reader->memory + KBN_MODULES_AT);
	entry += index;
	said->kind = LOAD(&entry->kind);
	said->first = LOAD(&entry->first);
	said->count = LOAD(&entry->count);
	said->has_pcs = LOAD(&entry->has_pcs);
	said->id_bytes = LOAD(&entry->id_bytes);
	said->call_target = LOAD(&entry->call_target);
	said->call_bytes = LOAD(&entry->call_bytes);
	said->text_start = LOAD(&entry->text_start);
	if (said->id_bytes > KBN_BUILD_ID)
		said->id_bytes = KBN_BUILD_ID;
	memcpy(said->id, entry->id, sizeof(said->id));
	memcpy(said->path, entry->path, sizeof(said->path) - 1);
	if (said->kind < KBN_GUARDS || said->kind > KBN_TEXT)
		return 0;
	return said->first % KBN_GROUP == 0 && said->first >= reader->end && said->count &&
	       said->first <= KBN_MOST_BLOCKS && said->count <= KBN_MOST_BLOCKS - said->first;
}

/*
 * Place the next module: its blocks get PCs from FIRST_PC on. SLOTS as in struct placed, with COUNT
 * numbers; it must stay there. With COUNT 0 its blocks are never looked at.
 */
EXPORT void kbn_place(struct kbn_reader *reader, uint32_t first, uint32_t count, uint64_t first_pc,
		      const int32_t *slots)
{
	struct kbn_module *entry = (void *)(reader->memory + KBN_MODULES_AT);
	struct placed *placed;

	if (reader->known >= KBN_MOST_MODULES)
		return;
	if (count && !slots)
		__atomic_store_n(&entry[reader->known].first_pc, first_pc, __ATOMIC_RELEASE);
	placed = &reader->placed[reader->known++];
	if (!count) {
		/* Keeps the order, and has no block. */
		first = reader->end;
	} else {
		reader->end = (first + count + KBN_GROUP - 1) / KBN_GROUP * KBN_GROUP;
	}
	placed->first = first;
	placed->end = first + count;
	placed->first_pc = first_pc;
	placed->slots = slots;
}

/* Return the places of all blocks in their modules; 0 is one that is not known. */
EXPORT const uint32_t *kbn_places(const struct kbn_reader *reader)
{
	return (const void *)(reader->memory + KBN_PCS_AT);
}

/* Count blocks that programs took themselves. */
static void count_taken(struct kbn_reader *reader)
{
	uint32_t i, block;

	if (!LOAD(&reader->header->taking))
		return;
	for (i = 0; i < reader->known; i++) {
		/* Nobody takes blocks of gcc's trace-pc, of which some have no PC. */
		if (reader->placed[i].slots)
			continue;
		for (block = reader->placed[i].first; block < reader->placed[i].end; block++) {
			if (reader->ever[block] || !LOAD(&reader->taken[block]))
				continue;
			reader->ever[block] = 1;
			reader->covered++;
		}
	}
}

EXPORT uint64_t kbn_covered(struct kbn_reader *reader)
{
	count_taken(reader);
	return reader->covered;
}

EXPORT const uint8_t *kbn_ever(struct kbn_reader *reader)
{
	count_taken(reader);
	return reader->ever;
}

/* Return a byte for each block that is not 0 if a program took it itself. */
EXPORT const uint8_t *kbn_taken(const struct kbn_reader *reader)
{
	return reader->taken;
}

/* A word of the header that says what was lost: blocks, or the layout of another run time. */
EXPORT uint64_t kbn_lost(const struct kbn_reader *reader)
{
	return LOAD(&reader->header->lost_blocks);
}

EXPORT uint32_t kbn_other_layout(const struct kbn_reader *reader)
{
	return LOAD(&reader->header->other_layout);
}

static const struct placed *find(const struct kbn_reader *reader, uint32_t block)
{
	uint32_t low = 0, high = reader->known;

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (reader->placed[middle].end <= block)
			low = middle + 1;
		else
			high = middle;
	}
	if (low == reader->known || block < reader->placed[low].first)
		return NULL;
	return &reader->placed[low];
}

/* Append the PC of a block that was hit by the thread with this number; return the new length. */
static size_t give(struct kbn_reader *reader, const struct placed *placed, uint32_t block,
		   uint64_t number, uint64_t *out, size_t at, size_t room)
{
	int32_t slot = (int32_t)(block - placed->first);
	uint64_t pc;

	if (!placed->first_pc || at == room)
		return at;
	if (placed->slots) {
		slot = placed->slots[slot];
		if (slot < 0)
			return at;
	}
	if (!reader->ever[block]) {
		reader->ever[block] = 1;
		reader->covered++;
	}
	pc = placed->first_pc + (uint64_t)slot * KBN_SLOT_BYTES;
	if (number && number < 0xff)
		pc = (pc & ((1ull << THREAD_SHIFT) - 1)) | number << THREAD_SHIFT;
	out[at] = pc;
	return at + 1;
}

/* Append the PCs of a group's blocks that were hit; clear them. */
static size_t take_group(struct kbn_reader *reader, uint32_t group, uint64_t *out, size_t at,
			 size_t room)
{
	uint64_t *words = reader->hit + (size_t)group * KBN_GROUP / 8;
	int by_thread = LOAD(&reader->header->by_thread);
	const struct placed *placed = NULL;
	unsigned int i;

	for (i = 0; i < KBN_GROUP / 8; i++) {
		uint64_t bytes;

		if (!LOAD(&words[i]))
			continue;
		bytes = EXCHANGE(&words[i], 0);
		while (bytes) {
			unsigned int byte = (unsigned int)__builtin_ctzll(bytes) / 8;
			uint32_t block = group * KBN_GROUP + i * 8 + byte;
			uint64_t number = by_thread ? bytes >> (8 * byte) & 0xff : 0;

			bytes &= ~(0xffull << (8 * byte));
			if (!placed || block < placed->first || block >= placed->end)
				placed = find(reader, block);
			if (placed)
				at = give(reader, placed, block, number, out, at, room);
		}
	}
	return at;
}

/*
 * Entries of counters that were not looked at yet, or that another process has since: write up to
 * ROOM of them as five numbers each (entry, process, address, count, module) and return how many.
 */
EXPORT uint32_t kbn_new_ranges(struct kbn_reader *reader, uint64_t *out, uint32_t room)
{
	const struct kbn_range *range = (const void *)(reader->memory + KBN_RANGES_AT);
	uint32_t ranges = LOAD(&reader->header->ranges), i, at = 0;

	if (ranges > KBN_MOST_RANGES)
		ranges = KBN_MOST_RANGES;
	for (i = 0; i < ranges && at < room; i++) {
		uint32_t process = LOAD(&range[i].process);

		if (process == reader->process_of[i])
			continue;
		reader->process_of[i] = process;
		if (!process)
			continue;
		out[5 * at] = i;
		out[5 * at + 1] = process;
		out[5 * at + 2] = LOAD(&range[i].address);
		out[5 * at + 3] = LOAD(&range[i].count);
		out[5 * at + 4] = LOAD(&range[i].module);
		at++;
	}
	return at;
}

/*
 * Copy memory of a process; return 0 if it has ended, executed another program, or unmapped it.
 *
 * process_vm_readv() takes half as long as a read of /proc/PID/mem, but goes by the process's number,
 * which another program may have by now. So what it has copied counts only if is_alive() afterwards.
 */
static int copy_from(const struct process *process, void *to, size_t bytes, uint64_t address)
{
	struct iovec local = { to, bytes }, remote = { (void *)(uintptr_t)address, bytes };

	return process_vm_readv(process->number, &local, 1, &remote, 1, 0) == (ssize_t)bytes ||
	       pread(process->fd, to, bytes, (off_t)address) == (ssize_t)bytes;
}

/* Return whether the process still has the memory that it had when it was added. */
static int is_alive(const struct process *process, uint64_t address)
{
	char byte;

	return pread(process->fd, &byte, 1, (off_t)address) == 1;
}

/*
 * Read counters of a process from now on; FD is of its /proc/PID/mem and becomes the reader's. Return 0
 * if there is no room.
 */
EXPORT int kbn_add_range(struct kbn_reader *reader, int fd, uint32_t number, uint32_t entry,
			 uint64_t address, uint32_t first, uint32_t count)
{
	struct counters *counters = NULL;
	uint32_t i;

	for (i = 0; i < reader->used && !counters; i++)
		if (reader->counters[i].process.fd < 0)
			counters = &reader->counters[i];
	if (!counters) {
		if (reader->used == KBN_MOST_RANGES)
			return 0;
		counters = &reader->counters[reader->used++];
	}
	counters->process = (struct process){ fd, (pid_t)number };
	counters->entry = entry;
	counters->address = address;
	counters->first = first;
	counters->count = count;
	return 1;
}

/*
 * Take the counters of a process that are not 0, and clear just these: one that was 0 when it was
 * read may have been raised since. One that was raised between reading and clearing is in this
 * answer; one whose raise began before the clearing and ended after it is in the next one too.
 */
static size_t take_counters(struct kbn_reader *reader, struct counters *counters, uint64_t *out,
			    size_t at, size_t room)
{
	static const uint8_t zeroes[4096];
	const struct placed *placed = find(reader, counters->first);
	uint32_t i = 0, count = counters->count;
	int alive = 0;

	if (!placed || !copy_from(&counters->process, reader->copy, count, counters->address))
		goto ended;
	while (i < count) {
		uint32_t start;

		while (i + 16 <= count &&
		       _mm_movemask_epi8(_mm_cmpeq_epi8(
			       _mm_loadu_si128((const __m128i *)(reader->copy + i)),
			       _mm_setzero_si128())) == 0xffff)
			i += 16;
		while (i < count && !reader->copy[i])
			if (++i % 16 == 0)
				break;
		if (i == count || !reader->copy[i])
			continue;
		if (!alive && !is_alive(&counters->process, counters->address))
			goto ended;
		alive = 1;
		start = i;
		while (i < count && reader->copy[i] && i - start < sizeof(zeroes))
			at = give(reader, placed, counters->first + i++, 0, out, at, room);
		if (pwrite(counters->process.fd, zeroes, i - start,
			   (off_t)(counters->address + start)) < 0)
			return at;
	}
	return at;
ended:
	close(counters->process.fd);
	counters->process.fd = -1;
	return at;
}

/*
 * Read counters of a Go program from now on; FD and NUMBER as for kbn_add_range(). FLAGS and SLOTS as in
 * struct words, the latter must stay there; its blocks have numbers from FIRST on for kbn_ever(), and PCs
 * from FIRST_PC on. Return the number of their entry, from 1 on, which may be that of a process that has
 * ended; 0 if there is no room.
 */
EXPORT uint32_t kbn_add_words(struct kbn_reader *reader, int fd, uint32_t number,
			      uint64_t address, uint32_t count, int flags, const int32_t *slots,
			      uint32_t first, uint32_t blocks, uint64_t first_pc)
{
	struct words *words = NULL;
	uint32_t *before;
	uint32_t i;

	for (i = 0; i < reader->words_used && !words; i++)
		if (reader->words[i].process.fd < 0)
			words = &reader->words[i];
	if (!count || count > KBN_MOST_BLOCKS || blocks > KBN_MOST_BLOCKS - first)
		return 0;
	if (!words && reader->words_used == MOST_WORDS)
		return 0;
	before = private_memory(words_bytes(count));
	if (!before)
		return 0;
	if (!words)
		words = &reader->words[reader->words_used++];
	*words = (struct words){ { fd, (pid_t)number }, address, count, flags, slots, before,
				 (uint8_t *)(before + count), { first, first + blocks, first_pc, NULL } };
	return (uint32_t)(words - reader->words) + 1;
}

/* Return whether words were found since the last call that are UNKNOWN. */
EXPORT uint32_t kbn_unknown(struct kbn_reader *reader)
{
	uint32_t unknown = reader->unknown;

	reader->unknown = 0;
	return unknown;
}

/* Return the first word from AT on, up to END, that is another than at the last look. */
static uint32_t next_changed(const uint32_t *now, const uint32_t *before, uint32_t at, uint32_t end)
{
	while (at < end && now[at] == before[at])
		at++;
	return at;
}

/* Return whether a whole group of words is 0. */
static int is_clear(const uint32_t *group)
{
	const __m128i *four = (const void *)group;
	__m128i any = _mm_or_si128(
		_mm_or_si128(_mm_loadu_si128(four), _mm_loadu_si128(four + 1)),
		_mm_or_si128(_mm_loadu_si128(four + 2), _mm_loadu_si128(four + 3)));

	return _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff;
}

/*
 * Take the counters of a Go program that have changed since the last look, and leave them as they are. One
 * that is 0 now was cleared by the program itself. A counter that runs 2^32 times between two looks is
 * missed. Flags are cleared: one that is set between reading and clearing is in this answer, as above.
 */
static size_t take_words(struct kbn_reader *reader, struct words *words, uint64_t *out, size_t at,
			 size_t room)
{
	static const uint32_t zero;
	uint32_t *now = reader->copy_of_words, *before = words->before, count = words->count;
	uint32_t group, end, i;
	int alive = 0;

	if (!copy_from(&words->process, now, sizeof(*now) * (size_t)count, words->address))
		goto ended;
	for (group = 0; group < count; group = end) {
		uint8_t *used = &words->used[group / WORDS_PER_GROUP];

		end = group + WORDS_PER_GROUP < count ? group + WORDS_PER_GROUP : count;
		/* Most functions have never run: their words are 0, and what they were is not read. */
		if (!*used && end == group + WORDS_PER_GROUP && is_clear(now + group))
			continue;
		for (i = next_changed(now, before, group, end); i < end;
		     i = next_changed(now, before, i + 1, end)) {
			int32_t slot = words->slots[i];

			if (!alive && !is_alive(&words->process, words->address))
				goto ended;
			alive = 1;
			if (slot == UNKNOWN) {
				reader->unknown = 1;
				continue;
			}
			if (slot >= 0 && now[i])
				at = give(reader, &words->placed,
					  words->placed.first + (uint32_t)slot, 0, out, at, room);
			if (slot < 0 || !words->flags) {
				before[i] = now[i];
				*used = 1;
			} else if (pwrite(words->process.fd, &zero, sizeof(zero),
					  (off_t)(words->address + sizeof(zero) * i)) < 0) {
				return at;
			}
		}
	}
	return at;
ended:
	end_words(words);
	return at;
}

/* Write the PCs of blocks that ran on behalf of a handle; return how many have one. */
EXPORT uint32_t kbn_apart(struct kbn_reader *reader, const uint32_t *blocks, uint32_t count,
			  uint64_t *out)
{
	size_t at = 0;
	uint32_t i;

	for (i = 0; i < count; i++) {
		const struct placed *placed = find(reader, blocks[i]);

		if (placed)
			at = give(reader, placed, blocks[i], 0, out, at, count);
	}
	return (uint32_t)at;
}

/* A comparison as it is taken. */
struct kbn_taken {
	uint64_t type, left, right, module, place;
};

EXPORT void kbn_compare(struct kbn_reader *reader, uint32_t on)
{
	reader->compared = LOAD(&reader->header->compares);
	__atomic_store_n(&reader->header->comparing, on, __ATOMIC_SEQ_CST);
}

/* Take up to ROOM comparisons, in order. Return their number; add to LOST how many are gone. */
EXPORT uint32_t kbn_take_compares(struct kbn_reader *reader, struct kbn_taken *out, uint32_t room,
				  uint64_t *lost)
{
	const struct kbn_compare *records = (const void *)(reader->memory + KBN_COMPARES_AT);
	uint64_t end = __atomic_load_n(&reader->header->compares, __ATOMIC_ACQUIRE);
	uint32_t at = 0;

	if (end - reader->compared > KBN_MOST_COMPARES) {
		/* Far more is what a program has written over. */
		uint64_t gone = end - reader->compared - KBN_MOST_COMPARES;

		*lost += gone < (1ull << 40) ? gone : 1;
		reader->compared = end - KBN_MOST_COMPARES;
	}
	while (reader->compared < end && at < room) {
		const struct kbn_compare *record = &records[reader->compared % KBN_MOST_COMPARES];
		struct kbn_taken *taken = &out[at];
		uint64_t wanted = ++reader->compared;

		if (__atomic_load_n(&record->sequence, __ATOMIC_ACQUIRE) != wanted) {
			/* Half written by a thread that does not answer yet, or written over. */
			++*lost;
			continue;
		}
		taken->type = LOAD(&record->type);
		taken->left = LOAD(&record->left);
		taken->right = LOAD(&record->right);
		taken->module = LOAD(&record->module);
		taken->place = LOAD(&record->place);
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (LOAD(&record->sequence) != wanted)
			++*lost;
		else
			at++;
	}
	return at;
}

/*
 * Find the calls that lead to TARGET in code that lies at START: of five bytes to the callee, or of six
 * through a word at TARGET. Write where each returns to PLACES, and into SLOTS, one for each four bytes
 * of code and filled with -1 before, the number of each. Return how many there are.
 */
EXPORT uint32_t kbn_calls(const uint8_t *code, uint64_t bytes, uint64_t start, uint64_t target,
			  uint32_t call_bytes, uint32_t *places, int32_t *slots, uint32_t room)
{
	uint64_t i;
	uint32_t at = 0;

	for (i = call_bytes; i <= bytes && at < room; i++) {
		int32_t distance;

		if (call_bytes == 5 ? code[i - 5] != 0xe8
				    : code[i - 6] != 0xff || code[i - 5] != 0x15)
			continue;
		memcpy(&distance, code + i - 4, sizeof(distance));
		if (start + i + (uint64_t)(int64_t)distance != target)
			continue;
		places[at] = (uint32_t)(start + i);
		slots[i / 4] = (int32_t)at++;
	}
	return at;
}

static int has_new_range(const struct kbn_reader *reader)
{
	const struct kbn_range *range = (const void *)(reader->memory + KBN_RANGES_AT);
	uint32_t ranges = LOAD(&reader->header->ranges), i;

	if (ranges > KBN_MOST_RANGES)
		ranges = KBN_MOST_RANGES;
	for (i = 0; i < ranges; i++)
		if (LOAD(&range[i].process) != reader->process_of[i])
			return 1;
	return 0;
}

/*
 * Write the PCs of the blocks that were covered since the last call, and return their number; -1 if
 * there is a module that was not placed yet, unless FORCE is set, as it is after modules were placed. ROOM is at least the number of all
 * blocks. With ALL each block is looked at, for the end.
 */
EXPORT long kbn_drain(struct kbn_reader *reader, uint64_t *out, size_t room, int force, int all)
{
	uint32_t groups = reader->end / KBN_GROUP, group;
	uint8_t *dirty = reader->dirty;
	size_t at = 0;

	if (!force && !all &&
	    (kbn_modules(reader) > reader->known || has_new_range(reader)))
		return -1;
	for (group = 0; group < reader->used; group++)
		if (reader->counters[group].process.fd >= 0)
			at = take_counters(reader, &reader->counters[group], out, at, room);
	for (group = 0; group < reader->words_used; group++)
		if (reader->words[group].process.fd >= 0)
			at = take_words(reader, &reader->words[group], out, at, room);
	if (!force && !all && !LOAD(&reader->header->pending))
		goto done;
	EXCHANGE(&reader->header->pending, 0);
	for (group = 0; group < groups; group += 64) {
		const __m128i *line = (const __m128i *)(dirty + group);
		__m128i any = _mm_or_si128(
			_mm_or_si128(_mm_load_si128(line), _mm_load_si128(line + 1)),
			_mm_or_si128(_mm_load_si128(line + 2), _mm_load_si128(line + 3)));
		uint32_t end = group + 64 < groups ? group + 64 : groups, i;

		if (!all && _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff)
			continue;
		for (i = group; i < end; i++) {
			if (!all && !LOAD(&dirty[i]))
				continue;
			EXCHANGE(&dirty[i], 0);
			at = take_group(reader, i, out, at, room);
		}
	}
done:
	reader->given += at;
	return (long)at;
}
