// SPDX-License-Identifier: Apache-2.0
/* What the device does not do: other ioctls, read, write, seeking; and poll. */
#include "kcov_test.h"

#include <poll.h>

static void refuse(int fd, const char *when)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN | POLLOUT };
	char byte = 0;

	printf("# %s\n", when);
	is(control(fd, _IO('c', 99), 0), ENOTTY, "an unknown ioctl of kcov's type: ENOTTY");
	is(control(fd, _IO('c', 0), 0), ENOTTY, "number 0: ENOTTY");
	is(control(fd, 0x5401, (unsigned long)&byte), ENOTTY, "a terminal's ioctl: ENOTTY");
	is(control(fd, _IOR('c', 1, int), WORDS), ENOTTY, "INIT_TRACE with another size: ENOTTY");
	is(control(fd, _IOW('c', 100, int), 0), ENOTTY, "ENABLE with a direction: ENOTTY");
	ok(read(fd, &byte, 1) == -1 && errno == EINVAL, "read: EINVAL");
	ok(write(fd, &byte, 1) == -1 && errno == EINVAL, "write: EINVAL");
	ok(pread(fd, &byte, 1, 0) == -1 && errno == ESPIPE, "pread: ESPIPE");
	ok(pwrite(fd, &byte, 1, 0) == -1 && errno == ESPIPE, "pwrite: ESPIPE");
	ok(lseek(fd, 0, SEEK_SET) == -1 && errno == ESPIPE, "lseek: ESPIPE");
	ok(poll(&poll_fd, 1, 0) == 1 && poll_fd.revents == (POLLIN | POLLOUT),
	   "poll: ready, as anything without a poll of its own");
}

int main(int argc, char **argv)
{
	struct kcov kcov;
	int fd;

	begin(argc, argv);
	fd = kcov_open();
	refuse(fd, "before INIT_TRACE");
	close(fd);
	kcov = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");
	refuse(kcov.fd, "enabled");
	ok(traces(&kcov), "PCs come all the while");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
	return end();
}
