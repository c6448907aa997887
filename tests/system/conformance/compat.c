// SPDX-License-Identifier: Apache-2.0
/* System calls of the 32-bit table, made from a 64-bit program by int $0x80. */
#include "kcov_test.h"

#include <setjmp.h>

#ifdef __x86_64__
#define NR_GETPID_32 20

static sigjmp_buf back;

static void on_fault(int number)
{
	(void)number;
	siglongjmp(back, 1);
}

static long call_32(long nr)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(nr) : "memory", "r8", "r9", "r10", "r11");
	return result;
}

int main(int argc, char **argv)
{
	struct kcov kcov;
	int possible = 0;

	begin(argc, argv);
	signal(SIGSEGV, on_fault);
	if (!sigsetjmp(back, 1))
		possible = call_32(NR_GETPID_32) == getpid();
	if (!possible) {
		skip("int $0x80", "no 32-bit system calls in this kernel");
		return end();
	}
	kcov = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");
	reset(&kcov);
	is(call_32(NR_GETPID_32), getpid(), "a 32-bit system call");
	ok(count(&kcov) > 0, "leaves PCs");
	reset(&kcov);
	for (int i = 0; i < 100; i++)
		call_32(NR_GETPID_32);
	ok(count(&kcov) >= 100, "each does");
	ok(traces(&kcov), "and tracing goes on");
	is(kcov_disable(&kcov), 0, "DISABLE");
	reset(&kcov);
	call_32(NR_GETPID_32);
	is(count(&kcov), 0, "nothing after DISABLE");
	kcov_free(&kcov);
	return end();
}
#else
int main(int argc, char **argv)
{
	begin(argc, argv);
	skip("int $0x80", "not an x86-64 program");
	return end();
}
#endif
