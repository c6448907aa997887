// SPDX-License-Identifier: Apache-2.0
/* Mappings that are cut, moved and protected. */
#include "kcov_test.h"

int main(int argc, char **argv)
{
	struct kcov kcov, next;
	size_t bytes;
	char *moved, *room;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	bytes = kcov_bytes(&kcov);
	is(kcov_enable(&kcov), 0, "ENABLE");
	is(munmap((char *)kcov.area + bytes / 2, PAGE), 0, "a page in the middle is unmapped");
	is(munmap((char *)kcov.area + bytes - PAGE, PAGE), 0, "the last one too");
	ok(traces(&kcov), "tracing goes on in what is left");
	kcov.area[bytes / 2 / 8 - 1] = 9;
	set_count(&kcov, bytes / 2 / 8 - 2);
	calls(20);
	ok(count(&kcov) >= bytes / 2 / 8 - 2 + 20, "PCs go on where nothing is mapped");
	is(kcov_disable(&kcov), 0, "DISABLE");
	is(munmap((char *)kcov.area + bytes / 2 + PAGE, bytes / 2 - 2 * PAGE), 0, "the second part");
	is(munmap((char *)kcov.area, bytes / 2), 0, "the first part");
	close(kcov.fd);

	next = kcov_new(WORDS);
	ok(!next.area[0] && !next.area[bytes / 2 / 8 - 1] && !next.area[bytes / 2 / 8],
	   "the next instance is zero");
	room = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	moved = mremap(next.area, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, room);
	ok(moved == room, "mremap moves the mapping");
	next.area = (uint64_t *)moved;
	is(kcov_enable(&next), 0, "ENABLE");
	ok(traces(&next), "tracing goes on where it was moved to");
	ok(mremap(next.area, bytes, 2 * bytes, MREMAP_MAYMOVE) == MAP_FAILED && errno == EFAULT,
	   "mremap to more than the area is EFAULT");
	ok(mremap(next.area, bytes, bytes / 2, 0) == next.area, "mremap to less");
	ok(traces(&next), "tracing goes on");
	is(mprotect(next.area, bytes / 2, PROT_READ), 0, "mprotect to read-only");
	{
		uint64_t before = count(&next);

		call();
		ok(count(&next) > before, "the device writes where its user may not");
	}
	is(mprotect(next.area, bytes / 2, PROT_READ | PROT_WRITE), 0, "and back");
	ok(traces(&next), "tracing goes on");
	is(kcov_disable(&next), 0, "DISABLE");
	munmap(next.area, bytes / 2);
	close(next.fd);
	return end();
}
