/* SPDX-License-Identifier: Apache-2.0 */
/* Empties directories. */
#define _GNU_SOURCE
#include "sweep.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	MOST_DEPTH = 32,    /* of directories in each other */
	MOST_ROUNDS = 64,   /* of reading a directory */
	MOST_ENTRIES = 4096, /* removed in one of them; a target may serve endless trees */
};

bool sweep_is_dots(const char *name)
{
	return !strcmp(name, ".") || !strcmp(name, "..");
}

bool sweep_remove(int at, const char *name)
{
	if (!unlinkat(at, name, 0) || errno == ENOENT || errno == ENOTDIR)
		return true;
	return !unlinkat(at, name, AT_REMOVEDIR) || errno == ENOENT;
}

/* Empty a directory. Returns whether it is empty. */
static bool sweep(int at, const char *path, int depth)
{
	/* Removing while reading may skip names, and a target may always have another one. */
	for (int round = 0; round < MOST_ROUNDS; round++) {
		int fd = openat(at, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		DIR *directory = fd >= 0 ? fdopendir(fd) : NULL;
		int removed = 0, kept = 0, left = MOST_ENTRIES;
		struct dirent *entry;

		if (!directory) {
			if (fd >= 0)
				close(fd);
			return false;
		}
		while (left-- > 0 && (errno = 0, entry = readdir(directory))) {
			if (sweep_is_dots(entry->d_name))
				continue;
			if (sweep_remove(fd, entry->d_name)) {
				removed++;
				continue;
			}
			/* A server may ask for permissions that root does not need elsewhere. */
			fchmodat(fd, entry->d_name, 0700, 0);
			if (depth < MOST_DEPTH && sweep(fd, entry->d_name, depth + 1) &&
			    sweep_remove(fd, entry->d_name))
				removed++;
			else
				kept++;
		}
		bool complete = left >= 0 && !errno;
		closedir(directory);
		if (!removed)
			return complete && !kept;
	}
	return false;
}

bool sweep_all(void)
{
	return sweep(AT_FDCWD, ".", 0);
}
