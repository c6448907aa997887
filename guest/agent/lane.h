/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The lane: memory of the shared region through which test cases go into a guest, between the host
 * (bridge/fuzz/lane.py, bridge/fuzz/shim) and the runner (kcov-runner.c). bridge/fuzz/lane.py has
 * the same numbers; tests/fuzz/test_lane.py compares them.
 *
 * A lane is a control area (index 0) and trace areas (1 to areas), which the runner opens with
 * KCOV_BRIDGE_LANE. The control area is a page of words, the case, the case's output, and what the
 * harness keeps from one start of the runner to the next:
 *
 *	host					runner
 *	writes generation, starts it
 *						opens and maps everything, loads the harness
 *						ready = generation
 *	writes the case, length, flags
 *	case_number = n, a new number	-->
 *						started = n; sets the counts of the areas to 0,
 *						runs the harness; status, area_counts, ...
 *					<--	done = n
 *
 * Words have one writer and are written and read by one aligned access. case_number and done are
 * written last, with release semantics, and read first, with acquire semantics. The host believes
 * nothing: it bounds each of the runner's words before it uses it, and reads back none of its own.
 */
#ifndef KCOV_BRIDGE_AGENT_LANE_H
#define KCOV_BRIDGE_AGENT_LANE_H

#include <stdint.h>

#define LANE_MAGIC 0x454e414c56434bULL /* "KCVLANE" in memory */
#define LANE_VERSION 2

#define LANE_CONTROL_BYTES 4096
#define LANE_INPUT_OFFSET LANE_CONTROL_BYTES
#define LANE_INPUT_BYTES (1 << 20)
#define LANE_OUTPUT_OFFSET (LANE_INPUT_OFFSET + LANE_INPUT_BYTES)
#define LANE_OUTPUT_BYTES (1 << 16)
#define LANE_KEPT_OFFSET (LANE_OUTPUT_OFFSET + LANE_OUTPUT_BYTES)
#define LANE_KEPT_BYTES (3 << 16)
/* Of the whole control area, which is mapped in one piece. */
#define LANE_BYTES (LANE_KEPT_OFFSET + LANE_KEPT_BYTES)

#define LANE_MOST_AREAS 16 /* trace areas of a lane */

enum lane_flags {
	/* The first trace area gets comparisons instead of PCs (KCOV_TRACE_CMP). */
	LANE_COMPARISONS = 1,
	/* The runner writes ns, which costs two looks at the guest's clock. */
	LANE_TIMED = 2,
};

struct lane {
	/* Written by the host before it starts the runner. */
	uint64_t magic;
	uint64_t version;
	uint64_t generation; /* differs for each start of the runner; never 0 */
	uint64_t areas;	     /* number of trace areas, 1 to LANE_MOST_AREAS */
	uint64_t area_words; /* size of each */
	uint64_t spin_ns;    /* how long the runner polls for the next case before it sleeps */
	uint64_t kept;	     /* bytes that an earlier runner has kept */
	uint64_t host_pad0[1];
	/* Written by the host for each case, case_number last. */
	uint64_t case_number;
	uint64_t length; /* of the case, in bytes */
	uint64_t flags;	 /* enum lane_flags */
	uint64_t host_pad1[5];
	/* Written by the runner, done last. */
	uint64_t done;	       /* number of the last case that is done */
	uint64_t status;       /* of that case: 0, or a wait status, as waitpid() returns it */
	uint64_t areas_used;   /* trace areas that have been in use up to now: 1 to this number */
	uint64_t output_length; /* bytes of output of that case */
	uint64_t ns;	       /* what the harness took; with LANE_TIMED */
	uint64_t started;      /* number of the last case that was begun */
	uint64_t ready;	       /* generation, once the harness is loaded */
	uint64_t children;     /* how often a child that runs cases was started */
	/* By trace area, index 1 first: its count when the case was done. Later PCs are not its. */
	uint64_t area_counts[LANE_MOST_AREAS];
	/* Bytes that the harness keeps for later runners; before ready. */
	uint64_t keep;
};

#endif
