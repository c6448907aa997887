/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init: files, mounts, modules, time. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("kcov-init: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
}

void sleep_ms(long ms)
{
	struct timespec pause = { ms / 1000, ms % 1000 * 1000000L };

	nanosleep(&pause, NULL);
}

long uptime_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return now.tv_sec * 1000L + now.tv_nsec / 1000000L;
}

void read_text(const char *path, char *text, size_t size)
{
	size_t length = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd >= 0) {
		ssize_t got;

		while (length < size - 1 && (got = read(fd, text + length, size - 1 - length)) > 0)
			length += (size_t)got;
		close(fd);
	}
	text[length] = '\0';
}

bool kernel_argument(const char *word)
{
	char text[4096], *rest = text, *token;

	read_text("/proc/cmdline", text, sizeof(text));
	while ((token = strsep(&rest, " \n")))
		if (!strcmp(token, word))
			return true;
	return false;
}

bool mount_at(const char *type, const char *at, unsigned long flags, const char *options)
{
	if (mkdir(at, 0755) && errno != EEXIST)
		say("mkdir %s: %s", at, strerror(errno));
	if (mount(type, at, type, flags, options) && errno != EBUSY) {
		say("mount %s on %s: %s", type, at, strerror(errno));
		return false;
	}
	return true;
}

int load_module(const char *path, const char *parameters)
{
	int error = 0, fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	if (syscall(SYS_finit_module, fd, parameters, 0) && errno != EEXIST)
		error = errno;
	close(fd);
	return error;
}
