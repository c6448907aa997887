/* SPDX-License-Identifier: Apache-2.0 */
/* System calls of many kinds, to be traced: kinds[], after set_up(). */
#ifndef CALLS_H
#define CALLS_H

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/kcov.h>

static int null_fd, file_fd, dir_fd, pipe_fds[2], pair[2], epoll_fd, event_fd;
static char buffer[65536];
static void *page;
static uint32_t word;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

/* ---- system calls -------------------------------------------------------------------------- */

static long call_fork(void)
{
	pid_t pid = syscall(SYS_fork);
	int status;

	if (!pid)
		_exit(0);
	return pid < 0 ? -1 : waitpid(pid, &status, 0);
}

static long call_nanosleep(void)
{
	struct timespec time = { .tv_nsec = 50000 };

	return nanosleep(&time, NULL);
}

static long call_touch(void)
{
	madvise(page, 16 * 4096, MADV_DONTNEED);
	for (int i = 0; i < 16; i++)
		((volatile char *)page)[i * 4096] = 1;
	return 0;
}

static long call_open(void)
{
	int fd = open("/proc/self/status", O_RDONLY);
	long got = read(fd, buffer, sizeof(buffer));

	return close(fd) ? -1 : got;
}

static long call_dirs(void)
{
	return mkdir("/tmp/oracle.d", 0700) | rename("/tmp/oracle.d", "/tmp/oracle.e") |
	       rmdir("/tmp/oracle.e");
}

static long call_socket(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	return close(fd);
}

static long call_getdents(void)
{
	lseek(dir_fd, 0, SEEK_SET);
	return syscall(SYS_getdents64, dir_fd, buffer, sizeof(buffer));
}

static long call_pipe(void)
{
	return write(pipe_fds[1], buffer, 512) + read(pipe_fds[0], buffer, 512);
}

static long call_pair(void)
{
	send(pair[0], buffer, 1000, 0);
	return recv(pair[1], buffer, 1000, 0);
}

static long call_map(void)
{
	void *memory = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	memset(memory, 1, 65536);
	mprotect(memory, 4096, PROT_READ);
	return munmap(memory, 65536);
}

static long call_epoll(void)
{
	struct epoll_event event = { .events = EPOLLIN };
	uint64_t one = 1;

	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, event_fd, &event);
	if (write(event_fd, &one, 8) != 8 || epoll_wait(epoll_fd, &event, 1, 0) != 1 ||
	    read(event_fd, &one, 8) != 8)
		return -1;
	return epoll_ctl(epoll_fd, EPOLL_CTL_DEL, event_fd, NULL);
}

static void handler(int signal)
{
	(void)signal;
}

static long call_signal(void)
{
	return kill(getpid(), SIGUSR1);
}

static long call_select(void)
{
	struct pollfd fds[] = { { .fd = pair[0], .events = POLLIN }, { .fd = event_fd, .events = POLLIN } };

	return poll(fds, 2, 0);
}

#define SIMPLE(name, call) static long call_##name(void) { return call; }
SIMPLE(getppid, syscall(SYS_getppid))
SIMPLE(getuid, syscall(SYS_getuid))
SIMPLE(clock, syscall(SYS_clock_gettime, CLOCK_MONOTONIC, buffer))
SIMPLE(write_null, write(null_fd, buffer, 100))
SIMPLE(write_file, pwrite(file_fd, buffer, 20000, 0))
SIMPLE(read_file, pread(file_fd, buffer, 20000, 0))
SIMPLE(truncate, ftruncate(file_fd, 0))
SIMPLE(stat, stat("/etc/passwd", (struct stat *)buffer))
SIMPLE(readlink, readlink("/proc/self/exe", buffer, 100))
SIMPLE(dup, close(dup(null_fd)))
SIMPLE(fcntl, fcntl(null_fd, F_GETFL))
SIMPLE(ioctl, ioctl(null_fd, 0x5401, buffer))
SIMPLE(uname, uname((struct utsname *)buffer))
SIMPLE(sysinfo, sysinfo((struct sysinfo *)buffer))
SIMPLE(random, getrandom(buffer, 64, 0))
SIMPLE(yield, sched_yield())
SIMPLE(futex, syscall(SYS_futex, &word, FUTEX_WAKE, 1, NULL, NULL, 0))
SIMPLE(prctl, prctl(PR_GET_NAME, buffer))
SIMPLE(affinity, syscall(SYS_sched_getaffinity, 0, 128, buffer))
SIMPLE(bad_open, open("/no/such/file", O_RDONLY))
SIMPLE(nosys, syscall(999))
SIMPLE(mount, syscall(SYS_mount, "a", "/no/such", "b", 0, NULL))
SIMPLE(brk, syscall(SYS_brk, 0))

static const struct {
	const char *name;
	long (*call)(void);
} kinds[] = {
#define KIND(name) { #name, call_##name }
	KIND(getppid), KIND(getuid), KIND(clock), KIND(write_null), KIND(write_file),
	KIND(read_file), KIND(truncate), KIND(stat), KIND(readlink), KIND(dup), KIND(fcntl),
	KIND(ioctl), KIND(uname), KIND(sysinfo), KIND(random), KIND(yield), KIND(futex),
	KIND(prctl), KIND(affinity), KIND(bad_open), KIND(nosys), KIND(mount), KIND(brk),
	KIND(fork), KIND(nanosleep), KIND(touch), KIND(open), KIND(dirs), KIND(socket),
	KIND(getdents), KIND(pipe), KIND(pair), KIND(map), KIND(epoll), KIND(signal), KIND(select),
};
#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

static void set_up(void)
{
	struct sigaction action = { .sa_handler = handler };

	null_fd = open("/dev/null", O_RDWR);
	file_fd = open("/tmp/oracle.file", O_RDWR | O_CREAT | O_TRUNC, 0600);
	dir_fd = open("/etc", O_RDONLY | O_DIRECTORY);
	epoll_fd = epoll_create1(0);
	event_fd = eventfd(0, 0);
	page = mmap(NULL, 16 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (null_fd < 0 || file_fd < 0 || dir_fd < 0 || epoll_fd < 0 || event_fd < 0 ||
	    pipe(pipe_fds) || socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || page == MAP_FAILED ||
	    sigaction(SIGUSR1, &action, NULL))
		die("set-up");
}

static uint64_t *kcov_open(const char *path, unsigned long words, int *fd)
{
	uint64_t *area;

	*fd = open(path, O_RDWR);
	if (*fd < 0 || ioctl(*fd, KCOV_INIT_TRACE, words))
		die(path);
	area = mmap(NULL, words * 8, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (area == MAP_FAILED)
		die(path);
	/* No page fault while it is written to, and no copy of its page tables for a child. */
	memset(area, 0, words * 8);
	madvise(area, words * 8, MADV_DONTFORK);
	return area;
}

#endif
