// SPDX-License-Identifier: Apache-2.0
/* KCOV_INIT_TRACE: which sizes it takes, and the order of its checks. */
#include "kcov_test.h"

static int init(unsigned long words)
{
	int fd = kcov_open();
	int error = control(fd, KCOV_INIT_TRACE, words);

	close(fd);
	return error;
}

int main(int argc, char **argv)
{
	const unsigned long most = 0x7fffffffUL / 8;
	int fd, error;

	begin(argc, argv);
	is(init(0), EINVAL, "0 words are EINVAL");
	is(init(1), EINVAL, "1 word is EINVAL");
	is(init(~0UL), EINVAL, "2^64-1 words are EINVAL");
	is(init(1UL << 61), EINVAL, "a number of words whose bytes are 0 modulo 2^64 is EINVAL");
	is(init((1UL << 32) + PAGE_WORDS), EINVAL, "all 64 bits of the size count");
	is(init(0x7fffffffUL / 8 + 1), EINVAL, "more than INT_MAX bytes are EINVAL");
	is(init(PAGE_WORDS), 0, "one page is taken");
	is(init(512 << 10), 0, "4 MiB are taken");
	if (gvisor) {
		is(init(2), EINVAL, "2 words, no whole page, are EINVAL");
		is(init(PAGE_WORDS + 1), EINVAL, "a size that is no multiple of a page is EINVAL");
		is(init((10UL << 20) + PAGE_WORDS), EINVAL, "more than 10 Mi words are EINVAL");
	} else {
		is(init(2), 0, "2 words are taken");
		is(init(PAGE_WORDS + 1), 0, "a size that is no multiple of a page is taken");
		error = init(most);
		ok(error == 0 || error == ENOMEM, "INT_MAX / 8 words are taken or are ENOMEM");
	}

	fd = kcov_open();
	is(control(fd, KCOV_INIT_TRACE, 1), EINVAL, "a refused size");
	is(control(fd, KCOV_INIT_TRACE, WORDS), 0, "leaves the instance as it was");
	is(control(fd, KCOV_INIT_TRACE, WORDS), EBUSY, "INIT_TRACE again is EBUSY");
	is(control(fd, KCOV_INIT_TRACE, 2 * WORDS), EBUSY, "also with another size");
	is(control(fd, KCOV_INIT_TRACE, 1), gvisor ? EBUSY : EINVAL,
	   gvisor ? "EBUSY is checked before the size" : "the size is checked before EBUSY");
	close(fd);
	return end();
}
