// SPDX-License-Identifier: Apache-2.0
/*
 * kcov-wire: run a program with a connection to the host's target through the shared region.
 *
 *	kcov-wire PORT CMD [ARG...]
 *
 * Connects to the target's endpoint with the port PORT and executes CMD, whose descriptor 3 is the
 * connection. Exit status: CMD's own; 125 if there is no connection, 126 if CMD cannot be executed,
 * 127 if it was not found.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "kcov.h"

#define DEVICE "/dev/kcov_wire"
#define CONNECTION 3

int main(int argc, char **argv)
{
	unsigned long port;
	char *end;
	int fd;

	if (argc < 3) {
		fprintf(stderr, "usage: kcov-wire PORT CMD [ARG...]\n");
		return 125;
	}
	port = strtoul(argv[1], &end, 10);
	if (!argv[1][0] || *end || port > 65535)
		errx(125, "%s is no port", argv[1]);
	fd = open(DEVICE, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		err(125, "%s", DEVICE);
	if (ioctl(fd, KCOV_BRIDGE_WIRE, port))
		err(125, "the target's port %lu", port);
	if (fd == CONNECTION ? fcntl(fd, F_SETFD, 0) : dup2(fd, CONNECTION) < 0)
		err(125, "the connection");
	execvp(argv[2], argv + 2);
	warn("%s", argv[2]);
	return errno == ENOENT ? 127 : 126;
}
