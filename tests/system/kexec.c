/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kexec KERNEL INITRD: starts another kernel in the place of this one, out of a task that traces.
 *
 * The new kernel gets this one's command line.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KCOV_INIT_TRACE _IOR('c', 1, unsigned long)
#define KCOV_ENABLE _IO('c', 100)
#define WORDS (1UL << 19)

static int fail(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	char line[4096];
	uint64_t *area;
	ssize_t length;
	int kcov, kernel, initrd, fd;

	if (argc != 3)
		return 2;
	kernel = open(argv[1], O_RDONLY | O_CLOEXEC);
	initrd = open(argv[2], O_RDONLY | O_CLOEXEC);
	fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	if (kernel < 0 || initrd < 0 || fd < 0)
		return fail("open");
	length = read(fd, line, sizeof(line) - 1);
	if (length <= 0)
		return fail("/proc/cmdline");
	line[length - 1] = '\0'; /* in place of the newline */

	kcov = open("/sys/kernel/debug/kcov", O_RDWR | O_CLOEXEC);
	if (kcov < 0 || ioctl(kcov, KCOV_INIT_TRACE, WORDS))
		return fail("kcov");
	area = mmap(NULL, WORDS * sizeof(*area), PROT_READ | PROT_WRITE, MAP_SHARED, kcov, 0);
	if (area == MAP_FAILED || ioctl(kcov, KCOV_ENABLE, 0))
		return fail("KCOV_ENABLE");
	if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(line) + 1, line, 0))
		return fail("kexec_file_load");
	sync();
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
	return fail("reboot");
}
