/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A harness for tests, linked with kcov-runner.c: each byte of a case is an operation in /tmp, so each
 * operation that no case had before makes system calls that none made before. The byte '!' is a
 * failed assertion.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define MOST 8

static int begin(void)
{
	return chdir("/tmp");
}

static void list(void)
{
	DIR *directory = opendir(".");

	while (directory && readdir(directory))
		;
	if (directory)
		closedir(directory);
}

static void write_file(void)
{
	int fd = open("made", O_WRONLY | O_CREAT, 0644);

	if (fd >= 0 && write(fd, "made", 4) == 4)
		close(fd);
}

static void read_file(void)
{
	int fd = open("read", O_RDONLY);
	char byte;

	if (fd >= 0 && read(fd, &byte, 1) == 1)
		close(fd);
}

static int run(const uint8_t *data, size_t length)
{
	struct stat state;
	size_t i;

	for (i = 0; i < length && i < MOST; i++) {
		switch (data[i]) {
		case '!':
			raise(SIGABRT);
			break;
		case 'l':
			list();
			break;
		case 'w':
			write_file();
			break;
		case 'r':
			read_file();
			break;
		case 'd':
			mkdir("folder", 0755);
			break;
		case 'u':
			unlink("made");
			break;
		default:
			stat(".", &state);
		}
	}
	return 0;
}

RUNNER_HARNESS(operations) = { .name = "operations", .begin = begin, .run = run };
