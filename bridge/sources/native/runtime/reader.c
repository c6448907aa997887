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

#define SLOT_BYTES 16
#define THREAD_SHIFT 56

/* A module as the reader was told, in the order of its first blocks. */
struct placed {
	uint32_t first;
	uint32_t end;
	uint64_t first_pc; /* 0: its blocks have no PCs */
	/* KBN_TEXT: for each block its slot from FIRST_PC on, or a value below 0; else NULL. */
	const int32_t *slots;
};

struct kbn_reader {
	char *memory;
	struct kbn_header *header;
	uint8_t *dirty;
	uint64_t *hit;
	uint8_t *ever; /* for each block, whether it was ever covered */
	uint64_t covered;
	uint64_t given;
	uint32_t known; /* modules that were placed */
	uint32_t end;	/* of their blocks, a multiple of KBN_GROUP */
	struct placed placed[KBN_MOST_MODULES];
};

static void *private_memory(size_t bytes)
{
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return map == MAP_FAILED ? NULL : map;
}

EXPORT void kbn_close(struct kbn_reader *reader)
{
	if (!reader)
		return;
	if (reader->memory)
		munmap(reader->memory, KBN_BYTES);
	if (reader->ever)
		munmap(reader->ever, KBN_MOST_BLOCKS);
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
	if (!reader->ever)
		goto failed;
	reader->header = header = (void *)reader->memory;
	reader->dirty = (uint8_t *)reader->memory + KBN_DIRTY_AT;
	reader->hit = (uint64_t *)(reader->memory + KBN_HIT_AT);
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
	uint32_t kind, first, count, has_pcs, id_bytes, call_target;
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
	struct placed *placed;

	if (reader->known >= KBN_MOST_MODULES)
		return;
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

EXPORT uint64_t kbn_covered(const struct kbn_reader *reader)
{
	return reader->covered;
}

EXPORT const uint8_t *kbn_ever(const struct kbn_reader *reader)
{
	return reader->ever;
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
			uint64_t number = bytes >> (8 * byte) & 0xff, pc;
			int32_t slot;

			bytes &= ~(0xffull << (8 * byte));
			if (!placed || block < placed->first || block >= placed->end)
				placed = find(reader, block);
			if (!placed || !placed->first_pc || at == room)
				continue;
			slot = (int32_t)(block - placed->first);
			if (placed->slots) {
				slot = placed->slots[slot];
				if (slot < 0)
					continue;
			}
			if (!reader->ever[block]) {
				reader->ever[block] = 1;
				reader->covered++;
			}
			pc = placed->first_pc + (uint64_t)slot * SLOT_BYTES;
			if (by_thread && number < 0xff)
				pc = (pc & ((1ull << THREAD_SHIFT) - 1)) | number << THREAD_SHIFT;
			out[at++] = pc;
		}
	}
	return at;
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

	if (!force && !all && kbn_modules(reader) > reader->known)
		return -1;
	if (!force && !all && !LOAD(&reader->header->pending))
		return 0;
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
	reader->given += at;
	return (long)at;
}
