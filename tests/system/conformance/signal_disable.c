// SPDX-License-Identifier: Apache-2.0
/* A signal handler may enable and disable; leaving it by longjmp is no return of a call. */
#include "kcov_test.h"

#include <setjmp.h>

static struct kcov kcov;
static sigjmp_buf back;
static int error;

static void do_disable(int number)
{
	(void)number;
	error = kcov_disable(&kcov);
}

static void do_enable(int number)
{
	(void)number;
	error = kcov_enable(&kcov);
}

static void jump(int number)
{
	(void)number;
	siglongjmp(back, 1);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	kcov = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");
	signal(SIGUSR1, do_disable);
	raise(SIGUSR1);
	is(error, 0, "DISABLE in a handler");
	ok(traces_not(&kcov), "no PC comes any more");
	kcov_again(&kcov);
	signal(SIGUSR1, do_enable);
	raise(SIGUSR1);
	is(error, 0, "ENABLE in a handler");
	ok(traces(&kcov), "PCs come again");
	signal(SIGUSR1, jump);
	if (!sigsetjmp(back, 1))
		raise(SIGUSR1);
	ok(traces(&kcov), "left by longjmp, tracing goes on");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
	return end();
}
