/* SPDX-License-Identifier: Apache-2.0 */
/* A harness for tests: one case in some ten fails one of eight assertions. */
#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#define FAILS(letter)                      \
	static void fail_##letter(void)    \
	{                                  \
		assert(!"this is " #letter); \
	}

FAILS(a)
FAILS(b)
FAILS(c)
FAILS(d)
FAILS(e)
FAILS(f)
FAILS(g)
FAILS(h)

static void (*const fails[])(void) = {
	fail_a, fail_b, fail_c, fail_d, fail_e, fail_f, fail_g, fail_h,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t i;

	for (i = 0; i < size && i < 8; i++) {
		char name[2] = { (char)data[i], 0 };

		access(name, F_OK);
		if (data[i] & 2)
			alarm(0);
	}
	if (size > 1 && data[1] < 24)
		fails[data[1] % 8]();
	return 0;
}
