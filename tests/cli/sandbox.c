// SPDX-License-Identifier: Apache-2.0
/*
 * What syzkaller's executor does before its programs run (sandbox none), and a program of ours.
 *
 *	sandbox PATH ADDRESS PORT
 *
 * In an empty root with the binds of the executor, and a network namespace of its own, it prints
 *
 *	read BYTES		of the file PATH, while PCs are traced
 *	pc PC			for each of them
 *	cmp TYPE ARG1 ARG2 PC	for each comparison of getpid()
 *	unreachable ERRNO	of a connection of its own network namespace to the 9P server there
 *	version BYTES		of the server's answer, on a socket of the guest's namespace
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/kcov.h>

#define WORDS (64 << 10)
#define WORDS_PER_CMP 4 /* KCOV_WORDS_PER_CMP in kernel/kcov.c */
#define ROOT "./syz-tmp/newroot"

static void show(const char *from, const char *to)
{
	if (mkdir(to, 0700) && errno != EEXIST)
		err(1, "%s", to);
	if (mount(from, to, NULL, MS_BIND | MS_REC | MS_PRIVATE, NULL))
		err(1, "mount %s", from);
}

static void enter_sandbox(void)
{
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    unshare(CLONE_NEWNET))
		err(1, "namespaces");
	if (mkdir("./syz-tmp", 0777) || mount("", "./syz-tmp", "tmpfs", 0, NULL) ||
	    mkdir(ROOT, 0777) || mkdir("./syz-tmp/pivot", 0777))
		err(1, "syz-tmp");
	show("/dev", ROOT "/dev");
	show("/sys", ROOT "/sys");
	show("/syz-inputs", ROOT "/syz-inputs");
	if (syscall(SYS_pivot_root, "./syz-tmp", "./syz-tmp/pivot") || chdir("/") ||
	    umount2("./pivot", MNT_DETACH) || chroot("./newroot") || chdir("/"))
		err(1, "pivot_root");
}

static void begin(int fd, unsigned long mode, uint64_t *area)
{
	if (ioctl(fd, KCOV_ENABLE, mode))
		err(1, "KCOV_ENABLE %lu", mode);
	__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
}

static uint64_t end(int fd, uint64_t *area)
{
	uint64_t count = __atomic_load_n(&area[0], __ATOMIC_RELAXED);

	if (ioctl(fd, KCOV_DISABLE, 0))
		err(1, "KCOV_DISABLE");
	return count;
}

static void trace(const char *path)
{
	int kcov = open("/sys/kernel/debug/kcov", O_RDWR);
	static char buffer[4096];
	uint64_t *area, count;
	ssize_t got;
	int fd;

	if (kcov < 0 || ioctl(kcov, KCOV_INIT_TRACE, (unsigned long)WORDS))
		err(1, "kcov");
	area = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, kcov, 0);
	if (area == MAP_FAILED)
		err(1, "mmap");
	begin(kcov, KCOV_TRACE_PC, area);
	fd = open(path, O_RDONLY);
	got = read(fd, buffer, sizeof(buffer));
	count = end(kcov, area);
	if (got < 0)
		err(1, "%s", path);
	printf("read %zd\n", got);
	for (uint64_t i = 1; i <= count; i++)
		printf("pc %#lx\n", area[i]);
	begin(kcov, KCOV_TRACE_CMP, area);
	syscall(SYS_getpid);
	count = end(kcov, area);
	for (uint64_t *at = area + 1; count; count--, at += WORDS_PER_CMP)
		printf("cmp %#lx %#lx %#lx %#lx\n", at[0], at[1], at[2], at[3]);
}

static void use_network(int outside, const char *address, int port)
{
	/* Tversion: size[4] type[1] tag[2] msize[4] version[s], of version(5) in Plan 9. */
	static const char request[] = "\x13\0\0\0\x64\xff\xff\0\x20\0\0\x06\0"
				      "9P2000";
	struct sockaddr_in there = { .sin_family = AF_INET, .sin_port = htons(port) };
	int own = open("/proc/self/ns/net", O_RDONLY), fd;
	char answer[64];

	inet_pton(AF_INET, address, &there.sin_addr);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	if (!connect(fd, (struct sockaddr *)&there, sizeof(there)))
		errx(1, "the sandbox's own network leads to %s", address);
	printf("unreachable %d\n", errno);
	/* As syz_init_net_socket does. */
	if (own < 0 || setns(outside, 0))
		err(1, "setns");
	fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd < 0 || setns(own, 0))
		err(1, "setns");
	if (connect(fd, (struct sockaddr *)&there, sizeof(there)))
		err(1, "connect");
	if (write(fd, request, sizeof(request) - 1) != sizeof(request) - 1)
		err(1, "write");
	printf("version %zd\n", read(fd, answer, sizeof(answer)));
}

int main(int argc, char **argv)
{
	int outside = open("/proc/self/ns/net", O_RDONLY), status;
	pid_t pid;

	if (argc != 4)
		errx(2, "sandbox PATH ADDRESS PORT");
	if (outside < 0 || unshare(CLONE_NEWPID))
		err(1, "unshare");
	pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (pid) {
		if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
			errx(1, "the sandbox ended with status %#x", status);
		return WEXITSTATUS(status);
	}
	enter_sandbox();
	if (mkdir("/proc", 0700) || mount("syz-proc", "/proc", "proc", 0, NULL))
		err(1, "proc");
	trace(argv[1]);
	use_network(outside, argv[2], atoi(argv[3]));
	exit(0);
}
