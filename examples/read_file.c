/* SPDX-License-Identifier: Apache-2.0 */
/*
 * read_file PATH: print the PCs that one read(2) of a file covers. Any program that uses kcov in
 * this way runs unchanged; KCOV_INIT_TRACE and the others are those of <linux/kcov.h>.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define KCOV_INIT_TRACE _IOR('c', 1, unsigned long)
#define KCOV_ENABLE _IO('c', 100)
#define KCOV_DISABLE _IO('c', 101)
#define KCOV_TRACE_PC 0
#define COVER_SIZE (64 << 10) /* words: the count, then PCs */

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	static char buffer[4096];
	unsigned long *cover, count, i;
	int kcov, file;

	if (argc != 2) {
		fprintf(stderr, "usage: read_file PATH\n");
		return 2;
	}
	kcov = open("/sys/kernel/debug/kcov", O_RDWR);
	if (kcov < 0)
		fail("/sys/kernel/debug/kcov");
	if (ioctl(kcov, KCOV_INIT_TRACE, COVER_SIZE))
		fail("KCOV_INIT_TRACE");
	cover = mmap(NULL, COVER_SIZE * sizeof(*cover), PROT_READ | PROT_WRITE, MAP_SHARED, kcov, 0);
	if (cover == MAP_FAILED)
		fail("mmap");
	file = open(argv[1], O_RDONLY);
	if (file < 0)
		fail(argv[1]);

	if (ioctl(kcov, KCOV_ENABLE, KCOV_TRACE_PC))
		fail("KCOV_ENABLE");
	__atomic_store_n(&cover[0], 0, __ATOMIC_RELAXED); /* forget the rest of the ioctl */
	if (read(file, buffer, sizeof(buffer)) < 0)
		fail("read");
	count = __atomic_load_n(&cover[0], __ATOMIC_RELAXED);
	if (ioctl(kcov, KCOV_DISABLE, 0))
		fail("KCOV_DISABLE");

	for (i = 0; i < count; i++)
		printf("0x%lx\n", cover[i + 1]);
	return 0;
}
