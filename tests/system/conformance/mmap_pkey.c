// SPDX-License-Identifier: Apache-2.0
/* A mapping with a protection key: its user is locked out, the device is not. */
#include "kcov_test.h"

#include <setjmp.h>

static sigjmp_buf back;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	siglongjmp(back, info->si_code == SEGV_PKUERR ? 2 : 1);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
	struct kcov kcov;
	uint64_t before;
	int key, fault;

	begin(argc, argv);
	key = pkey_alloc(0, 0);
	if (key < 0) {
		skip("pkey_mprotect", "no protection keys in this kernel or processor");
		return end();
	}
	sigaction(SIGSEGV, &action, NULL);
	kcov = kcov_new(WORDS);
	is(pkey_mprotect(kcov.area, kcov_bytes(&kcov), PROT_READ | PROT_WRITE, key), 0,
	   "pkey_mprotect of the mapping");
	is(kcov_enable(&kcov), 0, "ENABLE");
	ok(traces(&kcov), "PCs come");
	before = count(&kcov);
	is(pkey_set(key, PKEY_DISABLE_WRITE), 0, "the key forbids writing");
	fault = sigsetjmp(back, 1);
	if (!fault)
		reset(&kcov);
	/* A handler runs with all keys locked, and longjmp leaves it so. */
	pkey_set(key, PKEY_DISABLE_WRITE);
	is(fault, 2, "a write by the user is a fault of the key");
	calls(5);
	ok(count(&kcov) > before, "the device's PCs still come");
	is(pkey_set(key, 0), 0, "the key allows writing");
	ok(traces(&kcov), "word 0 can be set again");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
	pkey_free(key);
	return end();
}
