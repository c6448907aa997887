/* SPDX-License-Identifier: Apache-2.0 */
/* A harness whose first byte says what it does to the machine that runs it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int initialized;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	initialized = *argc > 1 && strstr((*argv)[1], "hostile") != NULL;
	return 0;
}

static void fill_the_disk(const char *path)
{
	static char block[1 << 16];
	int fd = open(path, O_WRONLY | O_CREAT, 0600);

	while (fd >= 0 && write(fd, block, sizeof(block)) > 0)
		;
	if (fd >= 0)
		close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	switch (size ? data[0] : 0) {
	case 'i': /* LLVMFuzzerInitialize has run; the directory is empty */
		if (!initialized || !access("left", F_OK))
			abort();
		break;
	case 'c':
		getppid();
		break;
	case 'a':
		fprintf(stderr, "assertion of the harness\n");
		abort();
	case 'e':
		exit(3);
	case '_':
		_exit(4);
	case 'D': /* closes descriptors, those of kcov and of the runner */
		for (int fd = 0; fd < 1024; fd++)
			close(fd);
		break;
	case 'k':
		kill(getppid(), SIGKILL);
		break;
	case 'K':
		kill(-1, SIGKILL);
		break;
	case 's':
		kill(getppid(), SIGSTOP);
		break;
	case 'f': /* leaves processes in sessions of their own */
		for (int i = 0; i < 20; i++) {
			if (!fork()) {
				setsid();
				pause();
				_exit(0);
			}
		}
		break;
	case 'F': /* forks until it cannot */
		while (fork() >= 0)
			;
		_exit(5);
	case 'd':
		fill_the_disk("/tmp/full");
		break;
	case 'R':
		fill_the_disk("/var/full");
		break;
	case 'l':
		close(open("left", O_WRONLY | O_CREAT, 0600));
		break;
	case 'm':
		for (;;) {
			char *memory = malloc(1 << 20);

			if (memory)
				memset(memory, 1, 1 << 20);
		}
	case 'h':
		for (;;)
			pause();
	}
	return 0;
}
