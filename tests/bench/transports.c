// SPDX-License-Identifier: Apache-2.0
/*
 * For bench_transports.py, in the guest.
 *
 *	transports join PORT COMMAND...		COMMAND with a socket as descriptor 3 that leads to PORT
 *	transports stat ROUNDS PATH...		the time of a stat() of each path, in turn, in microseconds
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BATCH 5

static void copy(int from, int to)
{
	static char buffer[128 << 10];

	for (;;) {
		ssize_t size = read(from, buffer, sizeof(buffer));

		if (size <= 0)
			exit(0);
		for (ssize_t at = 0, sent; at < size; at += sent) {
			sent = write(to, buffer + at, (size_t)(size - at));
			if (sent < 0)
				exit(1);
		}
	}
}

static int join(char **argv)
{
	int pair[2], port = open(argv[2], O_RDWR);

	if (port < 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		err(1, "%s", argv[2]);
	if (!fork()) {
		close(pair[0]);
		setsid();
		if (!fork())
			copy(port, pair[1]);
		copy(pair[1], port);
	}
	close(pair[1]);
	if (pair[0] != 3 && dup2(pair[0], 3) < 0)
		err(1, "dup2");
	execvp(argv[3], argv + 3);
	err(1, "%s", argv[3]);
}

int main(int argc, char **argv)
{
	struct timespec begin, end;
	struct stat status;

	if (argc > 3 && !strcmp(argv[1], "join"))
		return join(argv);
	if (argc < 4 || strcmp(argv[1], "stat"))
		errx(2, "usage: transports join PORT COMMAND... | stat ROUNDS PATH...");
	for (long round = atol(argv[2]); round > 0; round--)
		for (int i = 3; i < argc; i++) {
			clock_gettime(CLOCK_MONOTONIC, &begin);
			for (int j = 0; j < BATCH; j++)
				if (stat(argv[i], &status))
					err(1, "%s", argv[i]);
			clock_gettime(CLOCK_MONOTONIC, &end);
			printf("%d %.1f\n", i - 3,
			       ((double)(end.tv_sec - begin.tv_sec) * 1e9 +
				(double)(end.tv_nsec - begin.tv_nsec)) / 1e3 / BATCH);
		}
	return 0;
}
