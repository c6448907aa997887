// SPDX-License-Identifier: Apache-2.0
/* KCOV_UNIQUE_ENABLE and KCOV_RESET_TRACE, as proposed for Linux in July 2025. */
#include "kcov_test.h"

#ifndef KCOV_UNIQUE_ENABLE
#define KCOV_UNIQUE_ENABLE	_IOW('c', 103, unsigned long)
#endif
#ifndef KCOV_RESET_TRACE
#define KCOV_RESET_TRACE	_IO('c', 104)
#endif

#define BITMAP	1024UL

static uint64_t load(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static int bits_set(const uint64_t *bitmap)
{
	int bits = 0;

	for (unsigned long i = 0; i < BITMAP; i++)
		bits += __builtin_popcountll(load(&bitmap[i]));
	return bits;
}

static void clear(uint64_t *area)
{
	memset(area, 0, BITMAP * sizeof(*area));
	__atomic_store_n(&area[BITMAP], 0, __ATOMIC_RELAXED);
}

static void unique(struct kcov *kcov)
{
	uint64_t *head = &kcov->area[BITMAP];
	uint64_t first, repeated, other, cleared;
	int bits, error;

	is(control(kcov->fd, KCOV_UNIQUE_ENABLE, 0), EINVAL, "a bitmap of no words: EINVAL");
	is(control(kcov->fd, KCOV_UNIQUE_ENABLE, kcov->words - 1), EINVAL,
	   "a bitmap that leaves less than two words: EINVAL");
	is(control(kcov->fd, KCOV_UNIQUE_ENABLE, BITMAP), 0, "UNIQUE_ENABLE");
	is(control(kcov->fd, KCOV_UNIQUE_ENABLE, BITMAP), EINVAL, "again: EINVAL");
	/* A report is a write(2) and leaves PCs too: first all figures, then the report. */
	clear(kcov->area);
	syscall(SYS_getppid);
	first = load(head);
	bits = bits_set(kcov->area);
	for (int i = 0; i < 100; i++)
		syscall(SYS_getppid);
	repeated = load(head);
	syscall(SYS_getuid);
	other = load(head);
	clear(kcov->area);
	syscall(SYS_getppid);
	cleared = load(head);
	ok(first > 0, "a system call leaves PCs behind the bitmap");
	is(bits, (long)first, "and a bit for each");
	is((long)repeated, (long)first, "the same call leaves no more");
	ok(other > repeated, "another one does");
	is((long)cleared, (long)first, "cleared by hand, it begins anew");
	is(control(kcov->fd, KCOV_RESET_TRACE, 1), EINVAL, "RESET_TRACE with an argument: EINVAL");
	error = control(kcov->fd, KCOV_RESET_TRACE, 0);
	first = load(head);
	bits = bits_set(kcov->area);
	is(error, 0, "RESET_TRACE");
	is(bits, (long)first, "clears count and bitmap, but for its own return");
	is(kcov_disable(kcov), 0, "DISABLE");
}

static void reset_of_a_plain_trace(struct kcov *kcov)
{
	is(kcov_enable(kcov), 0, "ENABLE after it");
	__atomic_store_n(&kcov->area[0], 0, __ATOMIC_RELAXED);
	for (int i = 0; i < 1000; i++)
		syscall(SYS_getppid);
	ok(load(&kcov->area[0]) >= 1000, "repeats are written again");
	is(control(kcov->fd, KCOV_RESET_TRACE, 0), 0, "RESET_TRACE of a plain trace");
	ok(load(&kcov->area[0]) < 1000, "empties it");
	is(kcov_disable(kcov), 0, "DISABLE");
	is(control(kcov->fd, KCOV_RESET_TRACE, 0), EINVAL, "RESET_TRACE without ENABLE: EINVAL");
}

int main(int argc, char **argv)
{
	struct kcov kcov;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	if (gvisor) {
		is(control(kcov.fd, KCOV_UNIQUE_ENABLE, BITMAP), ENOTTY, "UNIQUE_ENABLE: ENOTTY");
		is(control(kcov.fd, KCOV_RESET_TRACE, 0), ENOTTY, "RESET_TRACE: ENOTTY");
	} else if (control(kcov.fd, KCOV_RESET_TRACE, 0) == ENOTTY) {
		skip("unique coverage", "this kernel has neither ioctl");
	} else {
		unique(&kcov);
		reset_of_a_plain_trace(&kcov);
	}
	kcov_free(&kcov);
	return end();
}
