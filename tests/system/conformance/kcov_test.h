/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the conformance programs share: a report in TAP, and kcov's steps. Nothing here knows of
 * the bridge: the programs run on any kernel with a kcov device.
 *
 *	PROGRAM [DEVICE [linux|gvisor]]
 *
 * DEVICE is /sys/kernel/debug/kcov if it is not given. The second word says whose contract to
 * expect where the two differ; without it, KCOV_PERSONALITY of the environment does, and linux is
 * the default. The exit status is 0 if no line is "not ok".
 */
#ifndef KCOV_TEST_H
#define KCOV_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/kcov.h>

#define WORDS		(64UL << 10)
#define PAGE		4096UL
#define PAGE_WORDS	(PAGE / sizeof(uint64_t))

/* The kernel's own errno for a mode that it was not built for; no C library names it. */
#ifndef ENOTSUPP
#define ENOTSUPP 524
#endif

/* ---- TAP ----------------------------------------------------------------------------------- */

static const char *kcov_device = "/sys/kernel/debug/kcov";
static int gvisor;
static int tap_tests, tap_failures;

static inline void begin(int argc, char **argv)
{
	const char *personality = getenv("KCOV_PERSONALITY");

	if (argc > 1)
		kcov_device = argv[1];
	if (argc > 2)
		personality = argv[2];
	gvisor = personality && !strcmp(personality, "gvisor");
	setvbuf(stdout, NULL, _IONBF, 0);
}

static inline int end(void)
{
	printf("1..%d\n", tap_tests);
	return tap_failures != 0;
}

__attribute__((noreturn, format(printf, 1, 2)))
static inline void bail(const char *format, ...)
{
	int error = errno;
	va_list list;

	printf("Bail out! ");
	va_start(list, format);
	vprintf(format, list);
	va_end(list);
	printf(": %s\n", strerror(error));
	exit(1);
}

__attribute__((format(printf, 2, 3)))
static inline int ok(int good, const char *format, ...)
{
	va_list list;

	tap_tests++;
	tap_failures += !good;
	printf("%s %d - ", good ? "ok" : "not ok", tap_tests);
	va_start(list, format);
	vprintf(format, list);
	va_end(list);
	printf("\n");
	return good;
}

/* A number, most often an errno; what came instead is said. */
static inline int is(long got, long wanted, const char *what)
{
	if (!ok(got == wanted, "%s", what))
		printf("# got %ld, wanted %ld\n", got, wanted);
	return got == wanted;
}

/* For what this kernel or this processor lacks, never for what goes wrong. */
static inline void skip(const char *what, const char *why)
{
	printf("ok %d - %s # SKIP %s\n", ++tap_tests, what, why);
}

/* ---- kcov ---------------------------------------------------------------------------------- */

struct kcov {
	int fd;
	uint64_t words;
	uint64_t *area;
};

static inline size_t kcov_bytes(const struct kcov *kcov)
{
	return kcov->words * sizeof(uint64_t);
}

/* The errno of an ioctl, 0 for success. */
static inline int control(int fd, unsigned long request, unsigned long argument)
{
	return ioctl(fd, request, argument) ? errno : 0;
}

static inline int kcov_open(void)
{
	int fd = open(kcov_device, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		bail("%s", kcov_device);
	return fd;
}

/* NULL and errno for a failure. */
static inline uint64_t *kcov_map(int fd, size_t bytes, int protection)
{
	void *area = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);

	return area == MAP_FAILED ? NULL : area;
}

/* The errno of an mmap, 0 for success; what it mapped is unmapped again. */
static inline int try_map(int fd, size_t bytes, int protection, int flags, off_t offset)
{
	void *area = mmap(NULL, bytes, protection, flags, fd, offset);

	if (area == MAP_FAILED)
		return errno;
	munmap(area, bytes);
	return 0;
}

/* An instance that lacks nothing but ENABLE. */
static inline struct kcov kcov_new(uint64_t words)
{
	struct kcov kcov = { .fd = kcov_open(), .words = words };

	errno = control(kcov.fd, KCOV_INIT_TRACE, words);
	if (errno)
		bail("KCOV_INIT_TRACE of %llu words", (unsigned long long)words);
	kcov.area = kcov_map(kcov.fd, kcov_bytes(&kcov), PROT_READ | PROT_WRITE);
	if (!kcov.area)
		bail("mmap of %llu words", (unsigned long long)words);
	return kcov;
}

static inline void kcov_free(struct kcov *kcov)
{
	munmap(kcov->area, kcov_bytes(kcov));
	close(kcov->fd);
}

/* After DISABLE: gVisor has dropped the area, it is to be mapped again. */
static inline void kcov_again(struct kcov *kcov)
{
	if (!gvisor)
		return;
	munmap(kcov->area, kcov_bytes(kcov));
	kcov->area = kcov_map(kcov->fd, kcov_bytes(kcov), PROT_READ | PROT_WRITE);
	if (!kcov->area)
		bail("mmap again");
}

static inline int kcov_enable(const struct kcov *kcov)
{
	return control(kcov->fd, KCOV_ENABLE, KCOV_TRACE_PC);
}

static inline int kcov_disable(const struct kcov *kcov)
{
	return control(kcov->fd, KCOV_DISABLE, 0);
}

static inline uint64_t count(const struct kcov *kcov)
{
	return __atomic_load_n(&kcov->area[0], __ATOMIC_ACQUIRE);
}

static inline void set_count(const struct kcov *kcov, uint64_t value)
{
	__atomic_store_n(&kcov->area[0], value, __ATOMIC_RELEASE);
}

static inline void reset(const struct kcov *kcov)
{
	set_count(kcov, 0);
}

/* A plain system call that does nothing, not even in the C library. */
static inline void call(void)
{
	syscall(SYS_getppid);
}

static inline void calls(int number)
{
	while (number-- > 0)
		call();
}

/* Whether the calling task traces through the instance. */
static inline int traces(const struct kcov *kcov)
{
	reset(kcov);
	call();
	return count(kcov) > 0;
}

/* Whether the calling task does not. */
static inline int traces_not(const struct kcov *kcov)
{
	reset(kcov);
	calls(10);
	return count(kcov) == 0;
}

/* ---- children ------------------------------------------------------------------------------ */

/* One process or thread lets another go on. */
struct gate {
	int fds[2];
};

static inline struct gate gate_new(void)
{
	struct gate gate;

	if (pipe(gate.fds))
		bail("pipe");
	return gate;
}

static inline void gate_open(const struct gate *gate)
{
	if (write(gate->fds[1], "", 1) != 1)
		_exit(99);
}

static inline void gate_wait(const struct gate *gate)
{
	char byte;

	if (read(gate->fds[0], &byte, 1) != 1)
		_exit(99);
}

static inline void gate_free(const struct gate *gate)
{
	close(gate->fds[0]);
	close(gate->fds[1]);
}

static inline pid_t child(void)
{
	pid_t pid = fork();

	if (pid < 0)
		bail("fork");
	return pid;
}

/* The exit status of a child, or minus the signal that ended it. */
static inline int wait_for(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) != pid)
		if (errno != EINTR)
			bail("waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static inline pthread_t thread(void *(*function)(void *), void *argument)
{
	pthread_t id;

	errno = pthread_create(&id, NULL, function, argument);
	if (errno)
		bail("pthread_create");
	return id;
}

#endif
