// SPDX-License-Identifier: Apache-2.0
/*
 * A kernel's own kcov against what the bridge sees of the same system calls.
 *
 *	oracle OWN OTHER ADDRESSES CALLS [BUSY]
 *
 * OWN is the kernel's kcov device, OTHER the bridge's. ADDRESSES is a file of 64-bit little-endian
 * addresses: begin and end of __sanitizer_cov_trace_pc(), then those behind each call to it. One
 * thread enables both and makes CALLS system calls of many kinds. After each it takes from OTHER's
 * area the PCs that are in ADDRESSES and follow on one of that function, which so has returned to
 * them; they must be those in OWN's, one by one. BUSY tasks run beside it.
 *
 * Prints "NAME VALUE" lines, and for the first differences where they are. The exit status is 0
 * also where there are some.
 */
#define _GNU_SOURCE
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

#define WORDS		(1UL << 20)
#define TEXT		0xffffffff80000000ULL
#define TEXT_BYTES	(256UL << 20)
#define SHOWN		10

static uint64_t *own, *other;
static uint8_t *known;
static uint64_t tracer[2];
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

/* ---- the two kcovs ------------------------------------------------------------------------- */

static uint64_t *kcov_open(const char *path, int *fd)
{
	uint64_t *area;

	*fd = open(path, O_RDWR);
	if (*fd < 0 || ioctl(*fd, KCOV_INIT_TRACE, WORDS))
		die(path);
	area = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (area == MAP_FAILED)
		die(path);
	/* No page fault while it is written to, and no copy of its page tables for a child. */
	memset(area, 0, WORDS * 8);
	madvise(area, WORDS * 8, MADV_DONTFORK);
	return area;
}

static void read_addresses(const char *path)
{
	FILE *file = fopen(path, "rb");
	uint64_t address;

	known = calloc(TEXT_BYTES / 8, 1);
	if (!file || !known || fread(tracer, 8, 2, file) != 2)
		die(path);
	while (fread(&address, 8, 1, file) == 1)
		if (address - TEXT < TEXT_BYTES)
			known[(address - TEXT) / 8] |= 1 << address % 8;
	fclose(file);
}

static uint64_t set_aside[WORDS];

/* Answers whether they are the same. */
static bool compare(const char *name, uint64_t call, uint64_t n_own, uint64_t n_other)
{
	static int shown;
	uint64_t n = 0, i;

	for (i = 1; i < n_other; i++)
		if (other[i + 1] - TEXT < TEXT_BYTES &&
		    known[(other[i + 1] - TEXT) / 8] >> other[i + 1] % 8 & 1 && other[i] >= tracer[0] && other[i] < tracer[1])
			set_aside[n++] = other[i + 1];
	for (i = 0; i < n && i < n_own; i++)
		if (set_aside[i] != own[i + 1])
			break;
	if (i == n && i == n_own)
		return true;
	if (shown++ < SHOWN) {
		printf("difference %s call %lu own %lu other %lu at %lu:", name,
		       (unsigned long)call, (unsigned long)n_own, (unsigned long)n, (unsigned long)i);
		for (uint64_t j = i > 2 ? i - 2 : 0; j < i + 6; j++)
			printf(" %#lx/%#lx", j < n_own ? (unsigned long)own[j + 1] : 0,
			       j < n ? (unsigned long)set_aside[j] : 0);
		printf("\n");
	}
	return false;
}

int main(int argc, char **argv)
{
	uint64_t calls, same[KINDS] = { 0 }, made[KINDS] = { 0 }, pcs = 0, all = 0, full = 0;
	int own_fd, other_fd, busy = argc > 5 ? atoi(argv[5]) : 0;
	pid_t children[16];

	if (argc < 5 || busy > 16) {
		fprintf(stderr, "usage: oracle OWN OTHER ADDRESSES CALLS [BUSY]\n");
		return 2;
	}
	read_addresses(argv[3]);
	calls = strtoull(argv[4], NULL, 0);
	set_up();
	own = kcov_open(argv[1], &own_fd);
	other = kcov_open(argv[2], &other_fd);
	memset(set_aside, 1, sizeof(set_aside));
	for (int i = 0; i < busy; i++) {
		children[i] = fork();
		if (!children[i])
			for (;;)
				syscall(SYS_getppid);
	}
	if (ioctl(other_fd, KCOV_ENABLE, KCOV_TRACE_PC))
		die(argv[2]);
	if (ioctl(own_fd, KCOV_ENABLE, KCOV_TRACE_PC))
		die(argv[1]);
	for (uint64_t i = 0; i < calls; i++) {
		unsigned int kind = i % KINDS;
		uint64_t n_own, n_other;

		__atomic_store_n(&other[0], 0, __ATOMIC_SEQ_CST);
		__atomic_store_n(&own[0], 0, __ATOMIC_SEQ_CST);
		kinds[kind].call();
		n_own = __atomic_load_n(&own[0], __ATOMIC_SEQ_CST);
		n_other = __atomic_load_n(&other[0], __ATOMIC_SEQ_CST);
		made[kind]++;
		pcs += n_own;
		all += n_other;
		full += n_own >= WORDS - 1 || n_other >= WORDS - 1;
		same[kind] += compare(kinds[kind].name, i, n_own, n_other);
	}
	if (ioctl(own_fd, KCOV_DISABLE, 0) || ioctl(other_fd, KCOV_DISABLE, 0))
		die("KCOV_DISABLE");
	for (int i = 0; i < busy; i++) {
		kill(children[i], SIGKILL);
		waitpid(children[i], NULL, 0);
	}
	calls = 0;
	for (unsigned int i = 0; i < KINDS; i++) {
		calls += same[i];
		if (same[i] != made[i])
			printf("kind %s made %lu same %lu\n", kinds[i].name, (unsigned long)made[i],
			       (unsigned long)same[i]);
	}
	printf("same %lu\npcs %lu\nall %lu\nfull %lu\n", (unsigned long)calls, (unsigned long)pcs,
	       (unsigned long)all, (unsigned long)full);
	return 0;
}
