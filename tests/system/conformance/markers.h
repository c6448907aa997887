/* SPDX-License-Identifier: Apache-2.0 */
/* Kinds of system calls that can be told from each other by PCs that no other kind leaves. */
#ifndef MARKERS_H
#define MARKERS_H

#include "kcov_test.h"

#define KINDS 8
#define MARKER_PCS 512

/* How often a kind is called before one believes that a PC is its own. */
#define MARKER_ROUNDS 4

/*
 * Calls that a kernel which was built with kcov has code of their own for: its scheduler and what
 * it does on the way in and out are not instrumented. With three arguments of 0 none does anything.
 */
static const long marker_calls[KINDS] = {
	SYS_getppid, SYS_getuid, SYS_getegid, SYS_times,
	SYS_getpgid, SYS_getpriority, SYS_getsid, SYS_personality,
};

/* A PC of each kind that no other kind leaves. */
static uint64_t markers[KINDS];

static inline void marker_call(int kind)
{
	/* What personality() takes for a question; the others do not mind. */
	if (marker_calls[kind] == SYS_personality)
		syscall(SYS_personality, 0xffffffffUL);
	else
		syscall(marker_calls[kind], 0, 0, 0);
}

static inline int holds(const struct kcov *kcov, uint64_t pc)
{
	uint64_t n = count(kcov);

	for (uint64_t i = 1; i <= n && i < kcov->words; i++)
		if (__atomic_load_n(&kcov->area[i], __ATOMIC_RELAXED) == pc)
			return 1;
	return 0;
}

static uint64_t marker_seen[MARKER_ROUNDS][KINDS][MARKER_PCS];
static size_t marker_length[MARKER_ROUNDS][KINDS];

static inline int marker_left(int round, int kind, uint64_t pc)
{
	for (size_t i = 0; i < marker_length[round][kind]; i++)
		if (marker_seen[round][kind][i] == pc)
			return 1;
	return 0;
}

/* Whether the kind leaves the PC each time, and no other kind ever does. */
static inline int marks(int kind, uint64_t pc)
{
	for (int round = 0; round < MARKER_ROUNDS; round++)
		for (int other = 0; other < KINDS; other++)
			if (marker_left(round, other, pc) != (other == kind))
				return 0;
	return 1;
}

/*
 * Fills markers; the calling task must not trace. A page fault or an interrupt may leave PCs at any
 * time: what comes each time is the call's.
 */
static inline void learn_markers(void)
{
	struct kcov kcov = kcov_new(WORDS);

	if (kcov_enable(&kcov))
		bail("KCOV_ENABLE");
	for (int round = 0; round < MARKER_ROUNDS; round++) {
		for (int kind = 0; kind < KINDS; kind++) {
			size_t *length = &marker_length[round][kind];

			reset(&kcov);
			marker_call(kind);
			for (uint64_t i = 1; i <= count(&kcov) && *length < MARKER_PCS; i++)
				marker_seen[round][kind][(*length)++] = kcov.area[i];
		}
	}
	kcov_disable(&kcov);
	kcov_free(&kcov);
	for (int kind = 0; kind < KINDS; kind++) {
		for (size_t i = 0; i < marker_length[0][kind] && !markers[kind]; i++)
			if (marks(kind, marker_seen[0][kind][i]))
				markers[kind] = marker_seen[0][kind][i];
		if (!markers[kind]) {
			errno = ENODATA;
			bail("system call %ld leaves no PC of its own", marker_calls[kind]);
		}
	}
}

#endif
