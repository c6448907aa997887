/* SPDX-License-Identifier: Apache-2.0 */
/*
 * traced: makes system calls whose results it knows, in two threads and a child, and prints them
 * afterwards, one a line: thread id, name, result, errno. tests/system/test_trace.py compares.
 *
 * It makes the calls itself, so that no library adds others between the marks (sched_yield).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MANY 2000

/* In memory that the child shares. */
static struct log {
	int lines;
	struct {
		int thread;
		char name[20];
		long result;
		int error;
	} line[128];
} *log;

static long direct(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
	long result;

	asm volatile("syscall"
		     : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
		     : "rcx", "r11", "memory");
	return result;
}

static void note(int thread, const char *name, long result)
{
	int at = __atomic_fetch_add(&log->lines, 1, __ATOMIC_RELAXED);

	log->line[at].thread = thread;
	strcpy(log->line[at].name, name);
	log->line[at].result = result;
	log->line[at].error = result < 0 && result >= -4095 ? -result : 0;
}

#define CALL(thread, name, a, b, c, d)                                                             \
	({                                                                                         \
		long r_ = direct(SYS_##name, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0);    \
		note(thread, #name, r_);                                                           \
		r_;                                                                                \
	})

static void mark(void)
{
	direct(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
}

static void known_calls(int me, const char *untouched)
{
	static char name[400], buffer[64];
	struct timespec moment = { 0, 1000 };
	long fd;

	memset(name, 'a', sizeof(name) - 1);
	mark();
	fd = CALL(me, openat, AT_FDCWD, "/etc/passwd", O_RDONLY | O_CLOEXEC, 0);
	CALL(me, read, fd, buffer, 16, 0);
	CALL(me, lseek, fd, 3, SEEK_SET, 0);
	CALL(me, ioctl, fd, 0x5401, buffer, 0);
	CALL(me, close, fd, 0, 0, 0);
	CALL(me, close, fd, 0, 0, 0);
	CALL(me, openat, AT_FDCWD, "/no/such \"file\"\n", O_WRONLY | O_CREAT, 0640);
	CALL(me, mkdir, "/tmp/traced", 0750, 0, 0);
	CALL(me, mkdir, "/tmp/traced", 0750, 0, 0);
	CALL(me, rename, "/tmp/traced", "/tmp/traced2", 0, 0);
	CALL(me, unlinkat, AT_FDCWD, "/tmp/traced2", AT_REMOVEDIR, 0);
	CALL(me, openat, AT_FDCWD, 8, O_RDONLY, 0);
	CALL(me, openat, AT_FDCWD, name, O_RDONLY, 0);
	CALL(me, openat, AT_FDCWD, untouched, O_RDONLY, 0);
	CALL(me, mmap, 0, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS);
	CALL(me, kill, 0x7fffffff, 0, 0, 0);
	CALL(me, nanosleep, &moment, 0, 0, 0);
	note(me, "nosuchcall", direct(9999, 1, 2, 3, 4, 5, 6));
	mark();
}

/* A call that seccomp refuses, and one of 32-bit programs. */
static void odd_calls(int me)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpriority, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EXDEV),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = { sizeof(code) / sizeof(code[0]), code };
	long result;

	asm volatile("int $0x80" : "=a"(result) : "a"(20) : "memory", "r8", "r9", "r10", "r11");
	note(me, "ia32_syscall_20", result);
	CALL(me, prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0);
	CALL(me, seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter, 0);
	CALL(me, getpriority, 0, 0, 0, 0);
}

static void *second_thread(void *unused)
{
	int me = gettid();

	(void)unused;
	mark();
	CALL(me, gettid, 0, 0, 0, 0);
	CALL(me, chdir, "/no/such/directory", 0, 0, 0);
	for (int i = 0; i < MANY; i++)
		direct(SYS_getppid, 0, 0, 0, 0, 0, 0);
	mark();
	return NULL;
}

static void child(void)
{
	int me = CALL(0, getpid, 0, 0, 0, 0);

	log->line[log->lines - 1].thread = me;
	CALL(me, close, 1000, 0, 0, 0);
	odd_calls(me);
	direct(SYS_exit_group, 3, 0, 0, 0, 0, 0);
}

static const char *untouched_path(void)
{
	int fd = open("/tmp/path", O_RDWR | O_CREAT, 0600);
	void *page;

	if (fd < 0 || write(fd, "/etc/group", 11) != 11)
		exit(1);
	/* Its own page, which nothing has read through this mapping. */
	page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
	if (page == MAP_FAILED)
		exit(1);
	close(fd);
	return page;
}

int main(void)
{
	const char *untouched = untouched_path();
	pthread_t thread;
	int status;
	pid_t pid;

	log = mmap(NULL, sizeof(*log), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (log == MAP_FAILED)
		return 1;
	known_calls(gettid(), untouched);
	if (pthread_create(&thread, NULL, second_thread, NULL) || pthread_join(thread, NULL))
		return 1;
	pid = direct(SYS_fork, 0, 0, 0, 0, 0, 0);
	if (!pid)
		child();
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return 1;
	pid = direct(SYS_fork, 0, 0, 0, 0, 0, 0);
	if (!pid) {
		direct(SYS_pause, 0, 0, 0, 0, 0, 0);
		direct(SYS_exit_group, 0, 0, 0, 0, 0, 0);
	}
	usleep(100000);
	if (pid < 0 || kill(pid, SIGKILL) || waitpid(pid, &status, 0) != pid)
		return 1;
	for (int i = 0; i < log->lines; i++)
		printf("%d %s %ld %d\n", log->line[i].thread, log->line[i].name,
		       log->line[i].result, log->line[i].error);
	return fflush(stdout) ? 1 : 0;
}
