// SPDX-License-Identifier: Apache-2.0
/* The area as memory that the kernel itself reads: for other processes, for I/O, for waiting. */
#include "kcov_test.h"

#include <linux/futex.h>
#include <sys/uio.h>

int main(int argc, char **argv)
{
	struct gate gate = gate_new();
	struct kcov kcov;
	uint64_t words[2] = { 0 };
	struct iovec here, there;
	char path[64];
	int fd;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	kcov.area[0] = 12;
	kcov.area[1] = 34;
	ok(write(gate.fds[1], kcov.area, 16) == 16 && read(gate.fds[0], words, 16) == 16 &&
	   words[0] == 12 && words[1] == 34, "write(2) from it");
	words[1] = 56;
	ok(write(gate.fds[1], words, 16) == 16 && read(gate.fds[0], kcov.area, 16) == 16 &&
	   kcov.area[1] == 56, "read(2) into it");
	snprintf(path, sizeof(path), "/proc/%d/mem", getpid());
	fd = open(path, O_RDWR | O_CLOEXEC);
	ok(pread(fd, words, 16, (off_t)kcov.area) == 16 && words[1] == 56, "/proc/PID/mem reads it");
	words[1] = 78;
	ok(pwrite(fd, words, 16, (off_t)kcov.area) == 16 && kcov.area[1] == 78,
	   "/proc/PID/mem writes it");
	close(fd);
	here = (struct iovec){ words, 16 };
	there = (struct iovec){ kcov.area, 16 };
	words[1] = 0;
	ok(process_vm_readv(getpid(), &here, 1, &there, 1, 0) == 16 && words[1] == 78,
	   "process_vm_readv");
	ok(syscall(SYS_futex, kcov.area, FUTEX_WAIT, 11, NULL, NULL, 0) == -1 && errno == EFAULT,
	   "a futex that others share has no place there: EFAULT");
	gate_free(&gate);
	kcov_free(&kcov);
	return end();
}
