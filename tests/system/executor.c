// SPDX-License-Identifier: Apache-2.0
/*
 * A client of kcov that behaves as the executor of a system call fuzzer does: a fork server opens
 * eight instances of 4 MiB, moves them to fixed descriptors and maps them between guard pages,
 * write-protected by a protection key where the processor has them. It forks a child for each
 * program; worker threads of the child each enable one instance, set word 0 to 0 before every call
 * and read it after the call. They never disable: the child exits or is killed, and the next one
 * enables the same descriptors at once.
 *
 *	executor [--remote] [--dir DIRECTORY] [--device DEVICE] CALLS
 *
 * --remote adds an instance of 8 MiB, enabled by the fork server with KCOV_REMOTE_ENABLE for a
 * common handle and one of USB. A few of the calls are made on DIRECTORY. Every call must leave at
 * least one PC, and each PC must lie where the kernel's code does. Prints one JSON object with
 * figures; ends with 1 and a message for anything that a fuzzer would stop at. Knows nothing of
 * the bridge.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/futex.h>
#include <linux/kcov.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define THREADS		8
#define MAPPED_EARLY	3	/* by the fork server; the others by the child that needs them */
#define FIRST_FD	200
#define REMOTE_FD	(FIRST_FD - 1)
#define WORDS		(512ULL << 10)
#define REMOTE_WORDS	(1024ULL << 10)
#define PAGE		4096ULL
#define PKEY		15	/* the last one, so that programs get the ones they expect */
#define CALLS_A_PROGRAM	64
#define KILLED_EVERY	5	/* of the programs, one in so many is killed at its end */
#define DIRECTORY_EVERY	16	/* of the calls, one in so many is made on the directory */
#define PATIENCE	60	/* seconds */
#define LOWEST_PC	0xffffffff80000000ULL
#define HIGHEST_PC	0xffffffffff000000ULL
#define SIGNALS		(1U << 16)

struct cover {
	int fd;
	uint64_t words;
	/* The area, volatile because the kernel writes it; guard pages lie around it. */
	volatile uint64_t *data;
};

struct event {
	int set;
};

enum call {
	CALL_MMAP, CALL_GETPPID, CALL_WRITE_NULL, CALL_PIPE, CALL_OPEN, CALL_READ, CALL_FSTAT,
	CALL_CLOSE, CALL_MUNMAP, CALL_STAT, CALL_YIELD, CALL_NANOSLEEP, CALL_PIPE_READ,
	CALL_PIPE_WRITE, CALL_GETDENTS, CALLS_PLAIN,
	CALL_DIR_STAT = CALLS_PLAIN, CALL_DIR_OPEN, CALL_DIR_READ, CALL_DIR_CLOSE, CALL_DIR_LIST,
	CALL_DIR_WRITE, CALLS_ALL,
};

struct thread {
	struct cover cover;
	struct event ready, done;
	enum call call;
	/* Word 0 after the call. */
	uint64_t size;
	int created, executing;
};

/* Shared by the fork server and the children, one of which lives at a time. */
struct figures {
	uint64_t calls, pcs, most, remote_pcs, signal;
	uint64_t signals[SIGNALS];
};

static const char *device = "/sys/kernel/debug/kcov";
static const char *directory;
static int pkeys_enabled;
static struct thread threads[THREADS];
static struct cover remote = { .fd = REMOTE_FD, .words = REMOTE_WORDS };
static struct figures *figures;

/* What the calls of one program leave for its later ones. */
static int null_fd, file_fd = -1, dir_fd = -1, list_fd = -1, pipe_fds[2] = { -1, -1 };
static void *mapped;
static char dir_name[256], dir_file[300], dir_scratch[300];

static void event_set(struct event *event)
{
	__atomic_store_n(&event->set, 1, __ATOMIC_RELEASE);
	syscall(SYS_futex, &event->set, FUTEX_WAKE, 1 << 20);
}

/* Waits until the event is set: false if it is not after @seconds. */
static int event_wait(struct event *event, int seconds)
{
	struct timespec step = { .tv_sec = 1 };

	for (int waited = 0; !__atomic_load_n(&event->set, __ATOMIC_ACQUIRE);) {
		if (waited == seconds)
			return 0;
		if (syscall(SYS_futex, &event->set, FUTEX_WAIT, 0, &step) && errno == ETIMEDOUT)
			waited++;
	}
	return 1;
}

static void event_reset(struct event *event)
{
	__atomic_store_n(&event->set, 0, __ATOMIC_RELAXED);
}

/* ---- instances ----------------------------------------------------------------------------- */

/* The rights belong to the thread: each one opens and closes them for itself. */
static void cover_write(int allowed)
{
	if (pkeys_enabled && pkey_set(PKEY, allowed ? 0 : PKEY_DISABLE_WRITE))
		err(1, "pkey_set");
}

static void pkeys_start(void)
{
	int keys[PKEY + 1], count = 0;

	while (count <= PKEY && (keys[count] = pkey_alloc(0, 0)) >= 0 && keys[count] != PKEY)
		count++;
	pkeys_enabled = count <= PKEY && keys[count] == PKEY;
	while (count--)
		pkey_free(keys[count]);
}

static void cover_open(struct cover *cover)
{
	int fd = open(device, O_RDWR);

	if (fd < 0)
		err(1, "%s", device);
	if (dup2(fd, cover->fd) < 0)
		err(1, "dup2 to %d", cover->fd);
	close(fd);
	if (ioctl(cover->fd, KCOV_INIT_TRACE, cover->words))
		err(1, "KCOV_INIT_TRACE");
}

static void cover_map(struct cover *cover)
{
	size_t bytes = cover->words * sizeof(uint64_t);
	char *place = mmap(NULL, bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0);
	void *data;

	if (place == MAP_FAILED)
		err(1, "room for an area");
	data = mmap(place + PAGE, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, cover->fd,
		    0);
	if (data == MAP_FAILED)
		err(1, "mmap of descriptor %d", cover->fd);
	if (pkeys_enabled && pkey_mprotect(data, bytes, PROT_READ | PROT_WRITE, PKEY))
		err(1, "pkey_mprotect of an area");
	cover->data = data;
}

static void cover_reset(struct cover *cover)
{
	cover_write(1);
	cover->data[0] = 0;
	cover_write(0);
}

static void remote_enable(void)
{
	struct {
		struct kcov_remote_arg arg;
		__u64 handles[1];
	} enable = {
		.arg = {
			.trace_mode = KCOV_TRACE_PC,
			.area_size = REMOTE_WORDS,
			.num_handles = 1,
			.common_handle = kcov_remote_handle(KCOV_SUBSYSTEM_COMMON, 1),
		},
		.handles = { kcov_remote_handle(KCOV_SUBSYSTEM_USB, 1) },
	};

	if (ioctl(remote.fd, KCOV_REMOTE_ENABLE, &enable))
		err(1, "KCOV_REMOTE_ENABLE");
}

/* A word that must not be writable: a child dies of the attempt. */
static void must_fault(volatile uint64_t *word, const char *what)
{
	int status;
	pid_t child = fork();

	if (!child) {
		*word = 1;
		_exit(0);
	}
	if (child < 0 || waitpid(child, &status, 0) != child)
		err(1, "a child that writes to %s", what);
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSEGV)
		errx(1, "%s can be written to", what);
}

/* ---- what a program's calls gave ----------------------------------------------------------- */

/* As the filter sees it: the low bits of a PC are no news. */
static void signal_add(uint64_t pc)
{
	uint64_t value = pc >> 3;
	unsigned int at = (unsigned int)(value * 0x9e3779b97f4a7c15ULL >> 48);

	for (unsigned int tries = 0; tries < SIGNALS; tries++, at = (at + 1) % SIGNALS) {
		if (figures->signals[at] == value)
			return;
		if (!figures->signals[at]) {
			figures->signals[at] = value;
			figures->signal++;
			return;
		}
	}
	errx(1, "more than %u different signals", SIGNALS);
}

static void take_cover(const struct cover *cover, uint64_t size)
{
	if (size > cover->words - 1)
		errx(1, "too much cover: %" PRIu64, size);
	for (uint64_t i = 1; i <= size; i++) {
		uint64_t pc = cover->data[i];

		if (pc < LOWEST_PC || pc >= HIGHEST_PC)
			errx(1, "no PC of a kernel: %#" PRIx64, pc);
		signal_add(pc);
	}
}

static void handle_completion(struct thread *thread)
{
	thread->executing = 0;
	if (!thread->size)
		errx(1, "got no coverage from call %d", thread->call);
	take_cover(&thread->cover, thread->size);
	figures->calls++;
	figures->pcs += thread->size;
	if (thread->size > figures->most)
		figures->most = thread->size;
}

/* ---- calls --------------------------------------------------------------------------------- */

static int take(int *fd)
{
	return __atomic_exchange_n(fd, -1, __ATOMIC_RELAXED);
}

/*
 * A read waits for the write of another thread, or for ever: calls run beside each other, so even
 * one that was meant for a file may find a pipe under its number.
 */
static int may_hang(enum call call)
{
	return call == CALL_PIPE_READ || call == CALL_READ || call == CALL_DIR_READ;
}

/* One system call. It may fail, as calls of a fuzzer do; what it gave is for the later ones. */
static void execute(enum call call)
{
	struct timespec moment = { .tv_nsec = 1000 };
	struct stat status;
	char buffer[512] = "some bytes";
	long result;

	switch (call) {
	case CALL_MMAP:
		result = syscall(SYS_mmap, NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANON, -1, 0);
		if (result == -1)
			err(1, "a plain mmap");
		mapped = (void *)result;
		break;
	case CALL_MUNMAP:
		syscall(SYS_munmap, mapped, PAGE);
		break;
	case CALL_GETPPID:
		syscall(SYS_getppid);
		break;
	case CALL_WRITE_NULL:
		syscall(SYS_write, null_fd, buffer, sizeof(buffer));
		break;
	case CALL_PIPE:
		syscall(SYS_pipe2, pipe_fds, O_CLOEXEC);
		break;
	case CALL_PIPE_READ:
		syscall(SYS_read, pipe_fds[0], buffer, 1);
		break;
	case CALL_PIPE_WRITE:
		syscall(SYS_write, pipe_fds[1], buffer, 1);
		break;
	case CALL_OPEN:
		file_fd = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/status", O_RDONLY);
		break;
	case CALL_READ:
		syscall(SYS_read, file_fd, buffer, sizeof(buffer));
		break;
	case CALL_FSTAT:
		syscall(SYS_fstat, file_fd, &status);
		break;
	case CALL_CLOSE:
		syscall(SYS_close, take(&file_fd));
		break;
	case CALL_STAT:
		syscall(SYS_newfstatat, AT_FDCWD, "/etc/passwd", &status, 0);
		break;
	case CALL_YIELD:
		syscall(SYS_sched_yield);
		break;
	case CALL_NANOSLEEP:
		syscall(SYS_nanosleep, &moment, NULL);
		break;
	case CALL_GETDENTS:
		syscall(SYS_getdents64, list_fd, buffer, sizeof(buffer));
		break;
	case CALL_DIR_STAT:
		syscall(SYS_newfstatat, AT_FDCWD, dir_file, &status, 0);
		break;
	case CALL_DIR_OPEN:
		dir_fd = (int)syscall(SYS_openat, AT_FDCWD, dir_file, O_RDONLY);
		break;
	case CALL_DIR_READ:
		syscall(SYS_read, dir_fd, buffer, sizeof(buffer));
		break;
	case CALL_DIR_CLOSE:
		syscall(SYS_close, take(&dir_fd));
		break;
	case CALL_DIR_LIST:
		list_fd = (int)syscall(SYS_openat, AT_FDCWD, dir_name, O_RDONLY | O_DIRECTORY);
		break;
	case CALL_DIR_WRITE:
		syscall(SYS_truncate, dir_scratch, 10);
		break;
	case CALLS_ALL:
		break;
	}
}

static void *worker(void *argument)
{
	struct thread *thread = argument;

	cover_write(0);
	if (ioctl(thread->cover.fd, KCOV_ENABLE, KCOV_TRACE_PC))
		err(1, "KCOV_ENABLE of descriptor %d", thread->cover.fd);
	for (;;) {
		while (!event_wait(&thread->ready, 1 << 20))
			continue;
		event_reset(&thread->ready);
		/* What the waiting left is not the call's. */
		cover_reset(&thread->cover);
		execute(thread->call);
		thread->size = thread->cover.data[0];
		event_set(&thread->done);
	}
	return NULL;
}

static void schedule(struct thread *thread, enum call call)
{
	if (!thread->created) {
		pthread_t id;

		if (!thread->cover.data)
			cover_map(&thread->cover);
		thread->created = 1;
		event_set(&thread->done);
		errno = pthread_create(&id, NULL, worker, thread);
		if (errno)
			err(1, "pthread_create");
	}
	thread->call = call;
	event_reset(&thread->done);
	cover_reset(&thread->cover);
	thread->executing = 1;
	event_set(&thread->ready);
}

/* Waits until a thread is free of its last call: false for one that hangs in it. */
static int complete(struct thread *thread)
{
	if (!thread->executing)
		return 1;
	if (event_wait(&thread->done, may_hang(thread->call) ? 0 : PATIENCE)) {
		handle_completion(thread);
		return 1;
	}
	if (!may_hang(thread->call))
		errx(1, "call %d does not return", thread->call);
	return 0;
}

/* One program, in a child: it never returns from here. */
static void run_program(uint64_t number, uint64_t calls)
{
	uint64_t scheduled = 0;
	unsigned int hanging = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	for (unsigned int turn = 0; scheduled < calls && hanging < THREADS; turn++) {
		struct thread *thread = &threads[turn % THREADS];
		uint64_t salt = number * CALLS_A_PROGRAM + scheduled;
		enum call call = (enum call)(salt % CALLS_PLAIN);

		if (!complete(thread)) {
			hanging++;
			continue;
		}
		hanging = 0;
		if (!scheduled)
			call = CALL_MMAP;
		else if (directory && salt % DIRECTORY_EVERY == DIRECTORY_EVERY - 1)
			call = (enum call)(CALLS_PLAIN +
					   salt / DIRECTORY_EVERY % (CALLS_ALL - CALLS_PLAIN));
		schedule(thread, call);
		scheduled++;
		/* Most calls run beside those of the other threads. */
		if (scheduled == 1)
			complete(thread);
	}
	for (int i = 0; i < THREADS; i++)
		complete(&threads[i]);
	if (number % KILLED_EVERY == KILLED_EVERY - 1)
		kill(getpid(), SIGKILL);
	syscall(SYS_exit_group, 0);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "remote", no_argument, NULL, 'r' },
		{ "dir", required_argument, NULL, 'd' },
		{ "device", required_argument, NULL, 'D' },
		{ 0 },
	};
	struct timespec start, end;
	uint64_t calls, programs = 0, killed = 0;
	int option, with_remote = 0;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'r')
			with_remote = 1;
		else if (option == 'd')
			directory = optarg;
		else if (option == 'D')
			device = optarg;
		else
			return 2;
	}
	calls = optind == argc - 1 ? strtoull(argv[optind], NULL, 10) : 0;
	if (!calls)
		errx(2, "usage: executor [--remote] [--dir DIRECTORY] [--device DEVICE] CALLS");
	if (directory) {
		snprintf(dir_name, sizeof(dir_name), "%s", directory);
		snprintf(dir_file, sizeof(dir_file), "%s/README", dir_name);
		snprintf(dir_scratch, sizeof(dir_scratch), "%s/scratch/a", dir_name);
	}
	figures = mmap(NULL, sizeof(*figures), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANON, -1, 0);
	null_fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
	if (figures == MAP_FAILED || null_fd < 0)
		err(1, "set-up");

	pkeys_start();
	for (int i = 0; i < THREADS; i++) {
		struct cover *cover = &threads[i].cover;

		cover->fd = FIRST_FD + i;
		cover->words = WORDS;
		cover_open(cover);
		if (i < MAPPED_EARLY)
			cover_map(cover);
	}
	cover_write(0);
	if (with_remote) {
		cover_open(&remote);
		cover_map(&remote);
		remote_enable();
	}
	must_fault(threads[0].cover.data - 1, "the guard page below an area");
	must_fault(threads[0].cover.data + WORDS, "the guard page above an area");
	if (pkeys_enabled)
		must_fault(threads[0].cover.data, "an area under a protection key");

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (; figures->calls < calls; programs++) {
		uint64_t left = calls - figures->calls, before = figures->calls;
		int status, expected = programs % KILLED_EVERY == KILLED_EVERY - 1 ? SIGKILL : 0;
		pid_t child;

		if (with_remote)
			cover_reset(&remote);
		child = fork();
		if (!child)
			run_program(programs, left < CALLS_A_PROGRAM ? left : CALLS_A_PROGRAM);
		if (child < 0 || waitpid(child, &status, 0) != child)
			err(1, "a child");
		/* A child that failed has said why. */
		if (status != expected)
			errx(1, "program %" PRIu64 " ended with status %#x", programs, status);
		if (figures->calls == before)
			errx(1, "program %" PRIu64 " made no call", programs);
		killed += expected != 0;
		if (with_remote) {
			uint64_t size = remote.data[0];

			take_cover(&remote, size);
			figures->remote_pcs += size;
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("{\"calls\": %" PRIu64 ", \"programs\": %" PRIu64 ", \"killed\": %" PRIu64
	       ", \"pcs\": %" PRIu64 ", \"most_pcs\": %" PRIu64 ", \"signal\": %" PRIu64
	       ", \"remote\": %s, \"remote_pcs\": %" PRIu64 ", \"pkeys\": %s, \"seconds\": %.3f}\n",
	       figures->calls, programs, killed, figures->pcs, figures->most, figures->signal,
	       with_remote ? "true" : "false", figures->remote_pcs,
	       pkeys_enabled ? "true" : "false",
	       (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9);
	return 0;
}
