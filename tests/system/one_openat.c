// SPDX-License-Identifier: Apache-2.0
/*
 * Traces one openat of a file and prints its PCs. Built in the guest: with nothing but the ABI of
 * the kernel's kcov.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORDS (64 << 10)
#define KCOV_INIT_TRACE _IOR('c', 1, unsigned long)
#define KCOV_ENABLE _IO('c', 100)
#define KCOV_DISABLE _IO('c', 101)

int main(int argc, char **argv)
{
	uint64_t *area, count;
	int kcov, file;

	if (argc != 3)
		return 2;
	kcov = open(argv[1], O_RDWR);
	if (kcov < 0 || ioctl(kcov, KCOV_INIT_TRACE, (unsigned long)WORDS))
		return 3;
	area = mmap(NULL, WORDS * sizeof(*area), PROT_READ | PROT_WRITE, MAP_SHARED, kcov, 0);
	if (area == MAP_FAILED || ioctl(kcov, KCOV_ENABLE, 0))
		return 4;
	__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
	file = syscall(SYS_openat, AT_FDCWD, argv[2], O_RDONLY);
	count = __atomic_load_n(&area[0], __ATOMIC_RELAXED);
	if (file < 0 || ioctl(kcov, KCOV_DISABLE, 0))
		return 5;
	for (uint64_t i = 1; i <= count; i++)
		printf("%#lx\n", area[i]);
	return 0;
}
