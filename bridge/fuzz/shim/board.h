/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The board: one page of memory between a slot (bridge/fuzz/slot.py) and its shim (kcov-shim.c).
 *
 * The guest never sees it, so both sides believe what it says. bridge/fuzz/board.py mirrors it;
 * tests/fuzz/test_board.py compares the two. Every field is a 64-bit word with one writer, alone or
 * with others of the same writer on its cache line.
 */
#ifndef KCOV_BRIDGE_BOARD_H
#define KCOV_BRIDGE_BOARD_H

#include <stdint.h>

#define KB_BOARD_MAGIC		0x4452414f4256434bULL	/* "KCVBOARD" */
#define KB_BOARD_VERSION	1
#define KB_BOARD_BYTES		4096
#define KB_BOARD_AREAS		64	/* trace areas at most */

/* The environment variable that names the slot's socket, and the socket's first messages. */
#define KB_SLOT_VARIABLE	"KCOV_BRIDGE_SLOT"
#define KB_MESSAGE_BYTES	256	/* of a datagram at most */

enum kb_board_state {
	KB_BOARD_STARTING	= 0,
	KB_BOARD_READY		= 1,	/* the runner waits for a case */
	KB_BOARD_RESETTING	= 2,	/* a case that runs now is lost, and is run again */
	KB_BOARD_GONE		= 3,	/* the slot ends */
};

enum kb_board_fold {
	KB_FOLD_EDGES	= 0,	/* ordered PCs: pairs of PCs that follow one another */
	KB_FOLD_BLOCKS	= 1,	/* PCs without a meaningful order */
};

/* A trace area: its place in the region, and its words with the count. */
struct kb_board_area {
	uint64_t offset;		/* bytes from the region's start */
	uint64_t words;
};

struct kb_board {
	/* Written by the slot before "welcome", and constant from then on. */
	uint64_t magic;
	uint64_t version;
	uint64_t map_size;		/* cells of the engine's map that the fold uses */
	uint64_t fold;			/* enum kb_board_fold */
	uint64_t reset_every;		/* executions between two resets; 0: never */
	uint64_t blind;			/* 1: the engine sees a map that never changes */
	uint64_t spin_ns;		/* the shim polls so long before it sleeps */
	uint64_t areas;			/* trace areas, KB_BOARD_AREAS at most */

	/* The lane's layout, in bytes from the region's start; constant too. */
	uint64_t lane_offset;		/* the control page */
	uint64_t lane_bytes;
	uint64_t input_offset;
	uint64_t input_bytes;		/* of a case at most */
	uint64_t output_offset;
	uint64_t output_bytes;
	uint64_t exit_is_suspect;	/* 1: statuses of exit() other than 0 are suspect; 0: signals are */
	uint64_t reserved_layout;

	/* Written by the slot at any time. */
	uint64_t state;			/* enum kb_board_state */
	uint64_t epoch;			/* resets so far; written before the state is ready again */
	uint64_t faults;		/* what the target, the console, the machine did wrong so far */
	uint64_t last_case;		/* number of the last case in the lane, before "welcome" and "go" */
	uint64_t reserved_slot[4];

	/* Written by the shim: sums since it started. */
	uint64_t executions;
	uint64_t ns_engine;		/* spent waiting for the engine */
	uint64_t ns_guest;		/* spent waiting for the guest */
	uint64_t ns_fold;
	uint64_t ns_slot;		/* spent waiting for the slot: news, evidence, resets */
	uint64_t new_cases;		/* executions that set a cell for the first time */
	uint64_t suspects;
	uint64_t timeouts;

	uint64_t cells;			/* cells that were ever set */
	uint64_t resets;		/* asked for by the shim */
	uint64_t repeated;		/* cases run again after a reset of the slot's own */
	uint64_t overflows;		/* areas that were full at the end of a case */
	uint64_t input_cut;		/* cases that were longer than input_bytes */
	uint64_t stand_in;		/* process that stands for the VM */
	uint64_t reserved_shim[2];

	struct kb_board_area area[KB_BOARD_AREAS];	/* constant, as the layout */
};

#endif
