// SPDX-License-Identifier: Apache-2.0
/* MAP_FIXED between guard pages, as fuzzers map it. */
#include "kcov_test.h"

/* Whether the kernel can read a byte there; no access of ours. */
static int readable(const char *at)
{
	struct gate gate = gate_new();
	int good = write(gate.fds[1], at, 1) == 1;

	gate_free(&gate);
	return good;
}

int main(int argc, char **argv)
{
	struct kcov kcov = { .words = WORDS };
	size_t bytes = kcov_bytes(&kcov);
	char *room, *at;

	begin(argc, argv);
	room = mmap(NULL, bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	kcov.fd = kcov_open();
	is(control(kcov.fd, KCOV_INIT_TRACE, WORDS), 0, "INIT_TRACE");
	at = mmap(room + PAGE, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, kcov.fd, 0);
	ok(at == room + PAGE, "mapped where it was asked for");
	kcov.area = (uint64_t *)at;
	is(kcov_enable(&kcov), 0, "ENABLE");
	reset(&kcov);
	set_count(&kcov, WORDS - 2);
	calls(3);
	is(count(&kcov), WORDS - 1, "filled to its end");
	ok(!readable(room), "the page before it is no one's");
	ok(readable(at) && readable(at + bytes - 1), "the area is readable to its end");
	ok(!readable(at + bytes), "the page behind it is no one's");
	if (gvisor) {
		is(kcov_disable(&kcov), 0, "DISABLE");
		at = mmap(room + PAGE, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, kcov.fd,
			  0);
		ok(at == room + PAGE, "mapped once more over itself");
		is(kcov_enable(&kcov), 0, "ENABLE");
	} else {
		at = mmap(room + PAGE, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, kcov.fd, 0);
		ok(at == room + PAGE, "mapped once more over itself, read-only, while enabled");
		is(count(&kcov), WORDS - 1, "with the same contents");
		is(mprotect(at, bytes, PROT_READ | PROT_WRITE), 0, "made writable");
	}
	ok(traces(&kcov), "and tracing goes on");
	is(kcov_disable(&kcov), 0, "DISABLE");
	munmap(room, bytes + 2 * PAGE);
	close(kcov.fd);
	return end();
}
