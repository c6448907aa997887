// SPDX-License-Identifier: Apache-2.0
/*
 * The same call 300 times, with the area emptied before each: how many traces have how many PCs.
 *
 *	exit_work DEVICE
 *
 * prints a line "PCS TRACES" for each number of PCs.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORDS		(64UL << 10)
#define ROUNDS		300
#define INIT_TRACE	_IOR('c', 1, uint64_t)
#define ENABLE		_IO('c', 100)
#define DISABLE		_IO('c', 101)
#define RESET_TRACE	_IO('c', 104)

static int traces[WORDS];

int main(int argc, char **argv)
{
	int fd = argc == 2 ? open(argv[1], O_RDWR) : -1;
	volatile uint64_t *area;

	if (fd < 0 || ioctl(fd, INIT_TRACE, WORDS))
		return 1;
	area = mmap(NULL, WORDS * sizeof(*area), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (area == MAP_FAILED || ioctl(fd, ENABLE, 0))
		return 1;
	for (int i = 0; i < ROUNDS; i++) {
		if (ioctl(fd, RESET_TRACE, 0))
			return 1;
		syscall(SYS_read, -1, NULL, 0);
		traces[area[0]]++;
	}
	if (ioctl(fd, DISABLE, 0))
		return 1;
	for (uint64_t n = 0; n < WORDS; n++)
		if (traces[n])
			printf("%lu %d\n", (unsigned long)n, traces[n]);
	return 0;
}
