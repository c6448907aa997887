// SPDX-License-Identifier: Apache-2.0
/* Calls that never enter the kernel leave nothing. */
#include "kcov_test.h"

#include <setjmp.h>
#include <time.h>

static sigjmp_buf back;

static void on_fault(int number)
{
	(void)number;
	siglongjmp(back, 1);
}

int main(int argc, char **argv)
{
	/* The coarse clock needs no hardware that would make the vDSO ask the kernel. */
	time_t (*volatile vsyscall_time)(time_t *) = (void *)0xffffffffff600400;
	struct timespec now, later;
	struct kcov kcov;
	volatile time_t vsyscall = 0;
	uint64_t left = 0;
	int wrong = 0;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");
	/* What is to be found and mapped is, before anything counts. */
	clock_gettime(CLOCK_REALTIME_COARSE, &now);
	time(NULL);
	/* On Linux an owner that is preempted leaves some as it comes back; not every time. */
	for (int tries = 0; tries < 100; tries++) {
		reset(&kcov);
		for (int i = 0; i < 1000; i++) {
			wrong += clock_gettime(CLOCK_REALTIME_COARSE, &later) != 0;
			wrong += time(NULL) < now.tv_sec;
		}
		left = count(&kcov);
		if (!left)
			break;
	}
	is(wrong, 0, "clock_gettime and time in the vDSO");
	is(left, 0, "leave nothing");
	reset(&kcov);
	syscall(SYS_clock_gettime, CLOCK_REALTIME_COARSE, &later);
	ok(count(&kcov) > 0, "the same as a system call leaves PCs");

	signal(SIGSEGV, on_fault);
	if (!sigsetjmp(back, 1))
		vsyscall = vsyscall_time(NULL);
	if (vsyscall)
		ok(vsyscall >= now.tv_sec, "the old vsyscall page works for an owner");
	else
		skip("the old vsyscall page", "this kernel has none");
	ok(traces(&kcov), "tracing goes on after it");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
	return end();
}
