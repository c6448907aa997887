/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kcov-doc [PATH]: covers a single read, in the way that the kernel's dev-tools/kcov.rst
 * ("Coverage collection") describes, and prints the PCs. It does not depend on the bridge.
 *
 * Without PATH the read is read(-1, NULL, 0), as there. With it, the file is opened before the
 * area is reset, so that the read alone is covered.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kcov.h"

#define COVER_SIZE (64 << 10)

static void fail(const char *what)
{
	fprintf(stderr, "kcov-doc: %s: %s\n", what, strerror(errno));
	exit(1);
}

int main(int argc, char **argv)
{
	const char *device = getenv("KCOV_EXEC_DEVICE");
	char buffer[4096];
	unsigned long *cover, n;
	int fd, file = -1;

	if (!device)
		device = "/sys/kernel/debug/kcov";
	/* One thread can trace through one descriptor. */
	fd = open(device, O_RDWR);
	if (fd == -1)
		fail(device);
	/* Set mode and size of the trace. */
	if (ioctl(fd, KCOV_INIT_TRACE, COVER_SIZE))
		fail("KCOV_INIT_TRACE");
	/* Map the area that the kernel and this program share. */
	cover = mmap(NULL, COVER_SIZE * sizeof(*cover), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (cover == MAP_FAILED)
		fail("mmap");
	if (argc > 1) {
		file = open(argv[1], O_RDONLY);
		if (file == -1)
			fail(argv[1]);
	}
	/* From here on this thread traces. */
	if (ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))
		fail("KCOV_ENABLE");
	/* Discard the PCs from the end of the ioctl. */
	__atomic_store_n(&cover[0], 0, __ATOMIC_RELAXED);
	if (read(file, argc > 1 ? buffer : NULL, argc > 1 ? sizeof(buffer) : 0) < 0 && argc > 1)
		fail("read");
	/* The number of PCs. */
	n = __atomic_load_n(&cover[0], __ATOMIC_RELAXED);
	for (unsigned long i = 0; i < n; i++)
		printf("0x%lx\n", cover[i + 1]);
	/* This thread, or another one, could enable it again after this. */
	if (ioctl(fd, KCOV_DISABLE, 0))
		fail("KCOV_DISABLE");
	if (munmap(cover, COVER_SIZE * sizeof(*cover)))
		fail("munmap");
	if (close(fd))
		fail("close");
	return 0;
}
