/* SPDX-License-Identifier: Apache-2.0 */
/* Kinds of system calls that can be told from each other by PCs that no other kind leaves. */
#ifndef MARKERS_H
#define MARKERS_H

#include "kcov_test.h"

#define KINDS 8
#define MARKER_PCS 512

static const long marker_calls[KINDS] = {
	SYS_getppid, SYS_getuid, SYS_getegid, SYS_sched_get_priority_max,
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

/* Fills markers; the calling task must not trace. */
static inline void learn_markers(void)
{
	static uint64_t seen[KINDS][MARKER_PCS];
	static size_t length[KINDS];
	struct kcov kcov = kcov_new(WORDS);

	if (kcov_enable(&kcov))
		bail("KCOV_ENABLE");
	for (int kind = 0; kind < KINDS; kind++) {
		reset(&kcov);
		marker_call(kind);
		for (uint64_t i = 1; i <= count(&kcov) && length[kind] < MARKER_PCS; i++)
			seen[kind][length[kind]++] = kcov.area[i];
	}
	kcov_disable(&kcov);
	kcov_free(&kcov);
	for (int kind = 0; kind < KINDS; kind++) {
		for (size_t i = 0; i < length[kind] && !markers[kind]; i++) {
			int others = 0;

			for (int other = 0; other < KINDS; other++)
				for (size_t j = 0; other != kind && j < length[other]; j++)
					others += seen[other][j] == seen[kind][i];
			if (!others)
				markers[kind] = seen[kind][i];
		}
		if (!markers[kind]) {
			errno = ENODATA;
			bail("system call %ld leaves no PC of its own", marker_calls[kind]);
		}
	}
}

#endif
