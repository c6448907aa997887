// SPDX-License-Identifier: Apache-2.0
/*
 * The device from open to close, as kernel/kcov.c in Linux has it: what any client of kcov may
 * rely on. Prints TAP. Knows nothing of the bridge; on a kernel with CONFIG_KCOV it runs too.
 *
 *	contract [DEVICE]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
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

#define WORDS	(64 << 10)
#define BYTES	(WORDS * sizeof(uint64_t))

static const char *device = "/sys/kernel/debug/kcov";
static int tests, failures;

static void ok(int good, const char *what)
{
	tests++;
	failures += !good;
	printf("%s %d - %s\n", good ? "ok" : "not ok", tests, what);
}

/* The errno of an ioctl, 0 for success. */
static int control(int fd, unsigned long request, unsigned long argument)
{
	return ioctl(fd, request, argument) ? errno : 0;
}

static int open_device(void)
{
	int fd = open(device, O_RDWR | O_CLOEXEC);

	if (fd < 0) {
		printf("Bail out! %s: %s\n", device, strerror(errno));
		exit(1);
	}
	return fd;
}

static uint64_t *map(int fd, size_t length, int protection)
{
	uint64_t *area = mmap(NULL, length, protection, MAP_SHARED, fd, 0);

	return area == MAP_FAILED ? NULL : area;
}

static uint64_t count(const uint64_t *area)
{
	return __atomic_load_n(&area[0], __ATOMIC_RELAXED);
}

static void reset(uint64_t *area)
{
	__atomic_store_n(&area[0], 0, __ATOMIC_RELAXED);
}

static uint64_t *ready(int *fd)
{
	*fd = open_device();
	if (control(*fd, KCOV_INIT_TRACE, WORDS))
		return NULL;
	return map(*fd, BYTES, PROT_READ | PROT_WRITE);
}

static void sizes(void)
{
	int fd = open_device();

	ok(control(fd, KCOV_INIT_TRACE, 0) == EINVAL, "INIT_TRACE of 0 words is EINVAL");
	ok(control(fd, KCOV_INIT_TRACE, 1) == EINVAL, "INIT_TRACE of 1 word is EINVAL");
	ok(control(fd, KCOV_INIT_TRACE, 0x7fffffff / 8 + 1) == EINVAL,
	   "INIT_TRACE of more than INT_MAX bytes is EINVAL");
	ok(control(fd, KCOV_ENABLE, KCOV_TRACE_PC) == EINVAL, "ENABLE before INIT_TRACE is EINVAL");
	ok(!map(fd, BYTES, PROT_READ) && errno == EINVAL, "mmap before INIT_TRACE is EINVAL");
	ok(!control(fd, KCOV_INIT_TRACE, WORDS), "INIT_TRACE succeeds");
	ok(control(fd, KCOV_INIT_TRACE, WORDS) == EBUSY, "INIT_TRACE again is EBUSY");
	ok(control(fd, _IO('c', 99), 0) == ENOTTY, "an unknown ioctl is ENOTTY");
	ok(control(fd, KCOV_DISABLE, 0) == EINVAL, "DISABLE without ENABLE is EINVAL");
	ok(!map(fd, BYTES / 2, PROT_READ) && errno == EINVAL, "mmap of a part is EINVAL");
	ok(!map(fd, BYTES * 2, PROT_READ) && errno == EINVAL, "mmap of more is EINVAL");
	ok(mmap(NULL, BYTES, PROT_READ, MAP_SHARED, fd, 4096) == MAP_FAILED && errno == EINVAL,
	   "mmap with an offset is EINVAL");
	close(fd);
}

static void mapping(void)
{
	uint64_t *area, *again, *readonly;
	int fd;

	area = ready(&fd);
	ok(area && !area[0] && !area[WORDS - 1], "the area is mapped and zero");
	again = map(fd, BYTES, PROT_READ | PROT_WRITE);
	readonly = map(fd, BYTES, PROT_READ);
	area[WORDS - 1] = 77;
	ok(again && again[WORDS - 1] == 77, "mmap again gives the same area");
	ok(readonly && readonly[WORDS - 1] == 77, "mmap may be read-only");
	munmap(again, BYTES);
	munmap(readonly, BYTES);
	close(fd);
	ok(area[WORDS - 1] == 77, "the mapping outlives the descriptor");
	munmap(area, BYTES);
	area = ready(&fd);
	ok(area && !area[WORDS - 1], "a new instance is zero");
	munmap(area, BYTES);
	close(fd);
}

static void tracing(void)
{
	uint64_t *area, first, second;
	int fd, other;

	area = ready(&fd);
	ok(control(fd, KCOV_ENABLE, 7) == EINVAL, "ENABLE with an unknown mode is EINVAL");
	ok(!control(fd, KCOV_ENABLE, KCOV_TRACE_PC), "ENABLE succeeds");
	ok(control(fd, KCOV_ENABLE, KCOV_TRACE_PC) == EINVAL, "ENABLE again is EINVAL");
	reset(area);
	syscall(SYS_getppid);
	first = count(area);
	ok(first > 0, "a system call leaves PCs");
	syscall(SYS_getppid);
	second = count(area);
	ok(second > first, "the next call's PCs follow");
	ok(area[1] >> 31 == 0x1ffffffff, "PCs are kernel addresses");
	reset(area);
	ok(count(area) == 0, "no PC comes without a system call");
	syscall(SYS_getppid);
	ok(count(area) > 0 && count(area) < second, "word 0 set to 0 starts anew");
	__atomic_store_n(&area[0], WORDS - 1, __ATOMIC_RELAXED);
	syscall(SYS_getppid);
	ok(count(area) == WORDS - 1, "a full area stays full");
	other = open_device();
	control(other, KCOV_INIT_TRACE, WORDS);
	ok(control(other, KCOV_ENABLE, KCOV_TRACE_PC) == EBUSY,
	   "a task that traces gets EBUSY on another instance");
	close(other);
	ok(control(fd, KCOV_DISABLE, 1) == EINVAL, "DISABLE with an argument is EINVAL");
	reset(area);
	ok(!control(fd, KCOV_DISABLE, 0), "DISABLE succeeds");
	reset(area);
	syscall(SYS_getppid);
	ok(count(area) == 0, "no PC after DISABLE");
	ok(control(fd, KCOV_INIT_TRACE, WORDS) == EBUSY, "INIT_TRACE after DISABLE is EBUSY");
	ok(!control(fd, KCOV_ENABLE, KCOV_TRACE_PC), "ENABLE after DISABLE succeeds");
	close(fd);
	reset(area);
	syscall(SYS_getppid);
	ok(count(area) > 0, "tracing goes on after close");
	munmap(area, BYTES);
	/* This task traces for the rest of its life now: only the last step may do that. */
}

static void owners(void)
{
	uint64_t *area;
	int fd, pipe_fds[2], status;
	char byte;
	pid_t child;

	area = ready(&fd);
	ok(pipe(pipe_fds) == 0, "a pipe");
	child = fork();
	if (!child) {
		status = control(fd, KCOV_ENABLE, KCOV_TRACE_PC);
		reset(area);
		syscall(SYS_getppid);
		byte = !status && count(area) > 0;
		if (write(pipe_fds[1], &byte, 1) != 1)
			_exit(1);
		pause();
	}
	ok(read(pipe_fds[0], &byte, 1) == 1 && byte, "a child enables its parent's descriptor");
	ok(control(fd, KCOV_ENABLE, KCOV_TRACE_PC) == EINVAL,
	   "ENABLE of an instance that somebody traces through is EINVAL");
	ok(control(fd, KCOV_DISABLE, 0) == EINVAL, "DISABLE by another task is EINVAL");
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	ok(!control(fd, KCOV_ENABLE, KCOV_TRACE_PC), "a killed owner frees the instance");
	reset(area);
	child = fork();
	if (!child) {
		uint64_t before = count(area);

		for (int i = 0; i < 100; i++)
			syscall(SYS_getppid);
		/* The parent's waitpid is one call; 100 calls of a traced child would show. */
		_exit(count(area) - before >= 100);
	}
	waitpid(child, &status, 0);
	ok(WIFEXITED(status) && !WEXITSTATUS(status), "a forked child is not traced");
	control(fd, KCOV_DISABLE, 0);
	munmap(area, BYTES);
	close(fd);
}

struct thread {
	int fd;
	uint64_t *area;
	int good;
	int disable;
};

static void *traced_thread(void *argument)
{
	struct thread *thread = argument;
	int error = control(thread->fd, KCOV_ENABLE, KCOV_TRACE_PC);

	reset(thread->area);
	syscall(SYS_getppid);
	thread->good = !error && count(thread->area) > 0;
	if (thread->disable)
		control(thread->fd, KCOV_DISABLE, 0);
	return NULL;
}

static void threads(void)
{
	struct thread thread = { 0 };
	int rounds = 200, good = 0;
	pthread_t id;

	thread.area = ready(&thread.fd);
	for (int i = 0; i < rounds; i++) {
		thread.disable = i & 1;
		if (pthread_create(&id, NULL, traced_thread, &thread))
			break;
		pthread_join(id, NULL);
		good += thread.good;
	}
	ok(good == rounds, "a thread that was joined has freed its instance, DISABLE or not");
	munmap(thread.area, BYTES);
	close(thread.fd);
}

static void many(void)
{
	int good = 1;

	for (int i = 0; i < 2000 && good; i++) {
		int fd = open_device();
		uint64_t *area;

		good = !control(fd, KCOV_INIT_TRACE, 512 << 10);
		area = good ? map(fd, 4 << 20, PROT_READ | PROT_WRITE) : NULL;
		good = area && !area[0] && !area[(512 << 10) - 1];
		if (area) {
			area[(512 << 10) - 1] = 1;
			munmap(area, 4 << 20);
		}
		close(fd);
	}
	ok(good, "2,000 instances of 4 MiB, one after the other, each zero");
}

int main(int argc, char **argv)
{
	if (argc > 1)
		device = argv[1];
	setvbuf(stdout, NULL, _IONBF, 0);
	sizes();
	mapping();
	owners();
	threads();
	many();
	tracing();
	printf("1..%d\n", tests);
	return failures != 0;
}
