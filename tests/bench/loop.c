// SPDX-License-Identifier: Apache-2.0
/*
 * A loop of system calls, to be timed.
 *
 *	loop ROUNDS
 *
 * Each round: open(2), read(2) and close(2) of a file, and getppid(2).
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char buffer[64];

	for (long i = argc > 1 ? atol(argv[1]) : 0; i > 0; i--) {
		int fd = open("/etc/passwd", O_RDONLY);

		if (fd < 0 || read(fd, buffer, sizeof(buffer)) < 0 || close(fd))
			err(1, "/etc/passwd");
		syscall(SYS_getppid);
	}
	return 0;
}
