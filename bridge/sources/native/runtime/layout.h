/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory that instrumented programs share with the bridge: a memfd that the bridge makes.
 *
 * Everything that the bridge reads here was written by a program that it does not trust: it bounds
 * each value. The bridge finds all of it through reader.c, so this file is the only definition.
 *
 * A *module* is an executable or a shared object. Its blocks have consecutive numbers. Programs
 * that load the same module (forked workers, programs that execute themselves again) share its
 * entry and its numbers.
 *
 * Three levels say what was covered since the last look: PENDING, a byte for each 64 blocks in
 * DIRTY, a byte for each block in HIT. A program stores in the order HIT, DIRTY, PENDING, coverage
 * epoch; the reader clears in the order PENDING, DIRTY, HIT. runtime.c says why nothing is lost.
 */
#ifndef KCOV_BRIDGE_LAYOUT_H
#define KCOV_BRIDGE_LAYOUT_H

#include <stdint.h>

#define KBN_MAGIC "kcovnatv"
#define KBN_LAYOUT 1
#define KBN_VARIABLE "KCOV_BRIDGE_NATIVE"

#define KBN_GROUP 64
#define KBN_MOST_BLOCKS (1u << 24)
#define KBN_MOST_MODULES 1024
#define KBN_MOST_RANGES 4096
#define KBN_BUILD_ID 32
#define KBN_PATH 256

/* As in bridge/sources/python/threads.py, whose reader serves both. */
#define KBN_THREADS_AT 512
#define KBN_THREAD_BYTES 64
#define KBN_LAST_THREAD 254
#define KBN_OTHER_THREAD 1
#define KBN_THREAD_NAME 54

enum kbn_kind {
	KBN_GUARDS = 1,	  /* clang's trace-pc-guard: a block for each guard */
	KBN_COUNTERS = 2, /* clang's inline-8bit-counters and inline-bool-flag: one for each counter */
	KBN_TEXT = 3,	  /* gcc's trace-pc: one for each four bytes of code, as calls have five */
};

struct kbn_header {
	char magic[8];
	uint32_t layout;	 /* this word and OTHER_LAYOUT stay in place in all layouts */
	uint8_t by_thread;	 /* unused here: the reader's switch for bridge/sources/by_thread.py */
	uint8_t next_thread;	 /* where the search for a thread's number begins */
	uint8_t spare[2];
	uint32_t other_layout;	 /* written by a run time that has another layout */
	uint32_t active;	 /* the bridge takes what is covered */
	uint64_t bytes;		 /* of this memory */
	uint32_t bridge_pid;
	uint32_t modules;	 /* entries that are complete */
	uint32_t next_block;	 /* blocks from here on are free */
	uint32_t ranges;	 /* entries of counters that were ever used */
	uint64_t lost_blocks;	 /* of modules that found no room */
	uint64_t epoch_offset;	 /* of the coverage epoch in EPOCH_PATH, a multiple of 8 */
	uint64_t pending;	 /* a value of the coverage epoch; 0: nothing is covered */
	uint64_t compares;	 /* number of comparisons that were recorded */
	uint32_t comparing;	 /* the bridge takes comparisons */
	uint32_t taking;	 /* a program takes blocks of its threads itself */
	uint8_t line[40];
	char epoch_path[128];	 /* empty: nobody relies on the coverage epoch */
	char handles[108];	 /* name of the abstract socket that takes handles */
};

struct kbn_thread {
	uint32_t process;
	uint32_t thread;
	uint8_t state;
	uint8_t length;
	char name[KBN_THREAD_NAME];
};

enum kbn_thread_state { KBN_FREE = 0, KBN_USED = 1, KBN_CLAIMED = 3 };

struct kbn_module {
	uint32_t kind;
	uint32_t first;	    /* number of the first block, a multiple of KBN_GROUP */
	uint32_t count;
	uint32_t has_pcs;   /* PCS has the place of each block */
	uint32_t id_bytes;  /* 0: without a build id */
	uint32_t call_target; /* KBN_TEXT: where calls of __sanitizer_cov_trace_pc lead to: the
				 callee, or the word that has its address if CALL_BYTES is 6 */
	uint64_t text_start;  /* KBN_TEXT: place of the first byte of code */
	uint8_t id[KBN_BUILD_ID];
	char path[KBN_PATH];
	uint32_t call_bytes; /* KBN_TEXT: 5 or 6 */
	uint8_t spare[4];
	/* Of the first block, written by the bridge; 0: not yet, or blocks and PCs do not go together. */
	uint64_t first_pc;
	uint8_t spare_end[176];
};

/* Counters that lie in the memory of a process. */
struct kbn_range {
	uint32_t process; /* 0: free; stored last */
	uint32_t module;
	uint64_t address;
	uint32_t count;
	uint32_t spare;
};

/*
 * A comparison, in a ring of KBN_MOST_COMPARES. SEQUENCE is its number from 1 on, stored last, so that
 * one that is half written, or was written over, is told apart.
 */
struct kbn_compare {
	uint64_t sequence;
	uint64_t type; /* as in Linux' include/uapi/linux/kcov.h: KCOV_CMP_CONST, KCOV_CMP_SIZE() */
	uint64_t left;
	uint64_t right;
	uint32_t module;
	uint32_t place; /* behind the call of the callback */
};

#define KBN_MOST_COMPARES (1u << 16)

/* Bytes between the PCs of two blocks: SLOT_BYTES in bridge/sources/pcs.py. */
#define KBN_SLOT_BYTES 16

#define KBN_MODULES_AT 20480
#define KBN_RANGES_AT (KBN_MODULES_AT + 512u * KBN_MOST_MODULES)
#define KBN_DIRTY_AT (KBN_RANGES_AT + 24u * KBN_MOST_RANGES)
#define KBN_PCS_AT (KBN_DIRTY_AT + KBN_MOST_BLOCKS / KBN_GROUP)
#define KBN_HIT_AT (KBN_PCS_AT + 4ull * KBN_MOST_BLOCKS)
#define KBN_COMPARES_AT (KBN_HIT_AT + KBN_MOST_BLOCKS)
/* A byte for each block: 1 if the program itself recorded it, see kcov_bridge_take_blocks(). */
#define KBN_TAKEN_AT (KBN_COMPARES_AT + 40ull * KBN_MOST_COMPARES)
#define KBN_BYTES (KBN_TAKEN_AT + KBN_MOST_BLOCKS)

_Static_assert(sizeof(struct kbn_thread) == KBN_THREAD_BYTES, "as in threads.py");
_Static_assert(sizeof(struct kbn_module) == 512, "KBN_RANGES_AT");
_Static_assert(sizeof(struct kbn_range) == 24, "KBN_DIRTY_AT");
_Static_assert(sizeof(struct kbn_compare) == 40, "KBN_TAKEN_AT");
_Static_assert(__builtin_offsetof(struct kbn_header, by_thread) == 12, "as in threads.py");
_Static_assert(__builtin_offsetof(struct kbn_header, pending) == 64, "a cache line of its own");
_Static_assert(sizeof(struct kbn_header) <= KBN_THREADS_AT, "the threads follow");

#endif
