/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The plan: memory that the bridge and the plugin in QEMU share. The guest cannot see it.
 *
 * bridge/sources/guest_kernel/plan.py describes it; tests/sources/guest_kernel/test_plan.py
 * compares the two. Every field is a 64-bit word with one writer.
 */
#ifndef KCOV_PLAN_H
#define KCOV_PLAN_H

#include <stdint.h>

#define PLAN_MAGIC		0x4e414c50564f434bULL	/* "KCOVPLAN" */
#define PLAN_VERSION		5
#define PLAN_CPUS		256
#define PLAN_SLOTS		1024
#define PLAN_VECTORS		256
#define PLAN_RANGES		65536
#define PLAN_BLOCKS		(1UL << 20)

#define PLAN_CPUS_OFFSET	4096
#define PLAN_SLOTS_OFFSET	(PLAN_CPUS_OFFSET + PLAN_CPUS * 64)
#define PLAN_VECTORS_OFFSET	(PLAN_SLOTS_OFFSET + PLAN_SLOTS * 64)
#define PLAN_RANGES_OFFSET	(PLAN_VECTORS_OFFSET + PLAN_VECTORS * 8)
#define PLAN_BLOCKS_OFFSET	(PLAN_RANGES_OFFSET + PLAN_RANGES * 32)
#define PLAN_BYTES		(PLAN_BLOCKS_OFFSET + PLAN_BLOCKS * 16)

/* The marker is within this many bytes from plan_header.marker. */
#define PLAN_MARKER_BYTES	64

/* Stands for no offset in plan_cpu.current, plan_cpu.preempt and plan_header.marker_offset. */
#define PLAN_NOWHERE		UINT64_MAX

/* A slot's hidden word; enum kb_hidden in guest/module/kcov_bridge_abi.h. */
enum plan_hidden {
	PLAN_HIDDEN_NO		= 0,
	PLAN_HIDDEN_SEEN	= 2,	/* written by the plugin once the owner is watched */
	PLAN_HIDDEN_EXIT	= 3,	/* the plugin writes NO once the exit work is done */
	PLAN_HIDDEN_EXIT_LATER	= 4,	/* not yet: the plugin writes EXIT when it starts */
	/* Blocks are hidden if any of these bits is set. */
	PLAN_HIDDEN_MASK	= 3,
};

enum plan_ram {
	PLAN_RAM_FOUND	= 1,
	PLAN_RAM_REFUSED = 2,	/* the marker is not at the offset that the guest reported */
};

enum plan_range_flags {
	/* Blocks of this range are recorded. */
	PLAN_RECORD		= 1,
	/* Code before preempt_count counts an interrupt, and after (.entry.text, .noinstr.text). */
	PLAN_NOINSTR		= 2,
	/* __schedule(): the task's own work, as for kcov, ... */
	PLAN_SCHEDULE		= 4,
	/* ... until it reaches one of these functions, where the switch starts, ... */
	PLAN_SWITCH_START	= 16,
	/* ... and again once the task is back in finish_task_switch(), or after the call. */
	PLAN_SCHEDULE_END	= 8,
	/* Code that runs in each interrupt while preempt_count counts it. */
	PLAN_INTERRUPT_COUNT	= 32,
	/* Functions called for the work of a task before it returns to user mode ... */
	PLAN_EXIT_WORK		= 64,
	/* ... and code that runs once that is done, or when a signal is delivered. */
	PLAN_EXIT_DONE		= 128,
};

struct plan_header {
	/* Written once by the bridge. */
	uint64_t magic;
	uint64_t version;
	/* Offset of slot n's hidden flag in the region: hidden + n * hidden_stride. */
	uint64_t hidden;
	uint64_t hidden_stride;
	uint64_t ram_bytes;	/* size of the guest's memory */
	uint64_t barriers;	/* 1: the bridge can make QEMU's threads pass a barrier */
	uint64_t coverage_epoch;	/* offset in the region: COVERAGE_EPOCH in bridge/device/abi.py */
	uint64_t pad0[1];
	/* Written by the bridge. */
	uint64_t want;		/* 1: watch the kernel's blocks, 0: run at full speed */
	uint64_t epoch;		/* changes with slots and cpus */
	uint64_t ranges_epoch;	/* changes with ranges and vectors; odd while they are written */
	uint64_t ranges;	/* number of ranges */
	uint64_t syscall_entry;
	uint64_t slots;		/* no slot from here on has an owner */
	uint64_t marker;	/* address of the guest's marker */
	uint64_t marker_offset;	/* its offset in the guest's memory */
	/* Written by the plugin. */
	uint64_t have;		/* the value of want that is in effect */
	uint64_t api;
	uint64_t resets;
	uint64_t translated;
	uint64_t blocks;	/* number of entries in the table of blocks */
	uint64_t blocks_lost;	/* blocks that had no room */
	uint64_t ram;		/* enum plan_ram; 0: no marker seen yet */
	uint64_t expedited;	/* 1: the plugin relies on the bridge's barriers */
};

struct plan_cpu {
	/* Written by the bridge: offsets in the guest's memory. */
	uint64_t current;	/* of its current_task */
	uint64_t preempt;	/* of its preempt_count */
	uint64_t pad0[2];
	/* Written by the plugin. */
	uint64_t busy;		/* slot + 1 while the vCPU writes to its area */
	uint64_t pad1[3];
};

struct plan_slot {
	/* Written by the bridge. */
	uint64_t task;		/* the guest's task_struct, 0: no owner */
	uint64_t area;		/* offset in the region, bytes */
	uint64_t words;
	uint64_t bitmap_words;	/* size of the bitmap before the count; 0: none */
	uint64_t number;	/* another one for each owner: a task's address may be used again */
	/* Written by the plugin. */
	uint64_t appended;
	uint64_t dropped;
	uint64_t pad[1];
};

/* Code from start up to end; sorted, disjoint. */
struct plan_range {
	uint64_t start;
	uint64_t end;
	uint64_t delta;		/* canonical address - address */
	uint64_t flags;
};

/* A block that was recorded at least once; in the order of first recording. */
struct plan_block {
	uint64_t start;		/* canonical */
	uint64_t bytes;
};

#endif
