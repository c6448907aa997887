/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ways: changes what this process may do, or where it is, in one of many ways, then makes CALLS
 * sched_getscheduler calls (that no shell makes) in a child, says "done", and ends with 0.
 *
 * usage: ways WAY; the table at the end has them. Without one it makes the calls itself. "crowd N"
 * keeps N threads alive at once and makes the calls in none of them, "many N" makes them in N children,
 * one after the other.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CALLS 10

static bool call(void)
{
	for (int i = 0; i < CALLS; i++)
		if (syscall(SYS_sched_getscheduler, 0) < 0)
			return false;
	return true;
}

static bool ended_well(pid_t child)
{
	int status;

	return child > 0 && waitpid(child, &status, __WALL) == child && WIFEXITED(status) &&
	       WEXITSTATUS(status) == 0;
}

static bool in_a_child(void)
{
	pid_t child = fork();

	if (!child)
		_exit(!call());
	return ended_well(child);
}

/* Nothing but what computing, forking and writing take; all else kills. */
static bool seccomp_filter(void)
{
#define KILL(nr)                                                                                   \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), BPF_STMT(BPF_RET | BPF_K,                    \
								SECCOMP_RET_KILL_PROCESS)
	struct sock_filter rules[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		KILL(SYS_socket), KILL(SYS_connect), KILL(SYS_sendmsg), KILL(SYS_recvmsg),
		KILL(SYS_openat), KILL(SYS_ioctl), KILL(SYS_prctl), KILL(SYS_mmap),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = { sizeof(rules) / sizeof(rules[0]), rules };

	return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
	       !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) && in_a_child();
}

static bool no_descriptors(void)
{
	struct rlimit none = { 0, 0 };

	return !setrlimit(RLIMIT_NOFILE, &none) && in_a_child();
}

static bool no_memory(void)
{
	struct rlimit none = { 0, 0 };

	return !setrlimit(RLIMIT_AS, &none) && in_a_child();
}

static bool closed_descriptors(void)
{
	return !syscall(SYS_close_range, 3, ~0U, 0) && in_a_child();
}

static bool empty_root(void)
{
	char path[] = "/tmp/ways.XXXXXX";

	return mkdtemp(path) && !chroot(path) && !chdir("/") && in_a_child();
}

static bool other_user(void)
{
	return !setgroups(0, NULL) && !setgid(65534) && !setuid(65534) && in_a_child();
}

static bool namespaces(void)
{
	return !unshare(CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS) &&
	       in_a_child();
}

static bool bare_clone(void)
{
	pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);

	if (!child)
		_exit(!call());
	return ended_well(child);
}

static int call_and_end(void *unused)
{
	(void)unused;
	return !call();
}

/* Shares memory, stops its parent meanwhile, and tells it of its end by no signal. */
static bool silent_vfork(void)
{
	static char stack[65536] __attribute__((aligned(16)));

	return ended_well(clone(call_and_end, stack + sizeof(stack),
				CLONE_VM | CLONE_VFORK | CLONE_FILES | CLONE_FS, NULL));
}

/* Its grandchild belongs to process 1, in a session of its own, without descriptors. */
static bool daemonised(void)
{
	int fds[2];
	char byte;
	pid_t child;

	if (pipe(fds))
		return false;
	child = fork();
	if (!child) {
		setsid();
		child = fork();
		if (child)
			_exit(child < 0);
		dup2(fds[1], 0);
		syscall(SYS_close_range, 1, ~0U, 0);
		call();
		/* The end of the pipe is that of the process: then all is told. */
		_exit(0);
	}
	close(fds[1]);
	return ended_well(child) && !read(fds[0], &byte, 1);
}

static bool cleared_environment(void)
{
	char *const arguments[] = { "ways", NULL }, *const nothing[] = { NULL };
	pid_t child = fork();

	if (!child) {
		execve("/proc/self/exe", arguments, nothing);
		_exit(1);
	}
	return ended_well(child);
}

static bool blocked_signals(void)
{
	sigset_t all;

	sigfillset(&all);
	return !sigprocmask(SIG_BLOCK, &all, NULL) && in_a_child();
}

static void *thread(void *unused)
{
	return call() ? unused : NULL;
}

static bool many(int count)
{
	while (count-- > 0)
		if (!in_a_child())
			return false;
	return true;
}

static bool in_a_thread(void)
{
	pthread_t id;
	void *result = NULL;

	return !pthread_create(&id, NULL, thread, (void *)"") && !pthread_join(id, &result) &&
	       result;
}

static pthread_barrier_t barrier;

static void *waits(void *unused)
{
	pthread_barrier_wait(&barrier);
	return unused;
}

static bool crowd(unsigned int count)
{
	pthread_attr_t attributes;
	pthread_t id;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 65536);
	pthread_barrier_init(&barrier, NULL, count + 1);
	for (unsigned int i = 0; i < count; i++)
		if (pthread_create(&id, &attributes, waits, NULL))
			return false;
	pthread_barrier_wait(&barrier);
	return true;
}

static const struct {
	const char *name;
	bool (*run)(void);
} ways[] = {
	{ "fork", in_a_child },
	{ "thread", in_a_thread },
	{ "bare-clone", bare_clone },
	{ "silent-vfork", silent_vfork },
	{ "daemon", daemonised },
	{ "cleared-environment", cleared_environment },
	{ "seccomp", seccomp_filter },
	{ "no-descriptors", no_descriptors },
	{ "closed-descriptors", closed_descriptors },
	{ "no-memory", no_memory },
	{ "empty-root", empty_root },
	{ "other-user", other_user },
	{ "namespaces", namespaces },
	{ "blocked-signals", blocked_signals },
};

int main(int argc, char **argv)
{
	bool well = false;

	if (argc == 1)
		return !call();
	if (argc == 3 && !strcmp(argv[1], "many"))
		return !many(atoi(argv[2]));
	if (argc == 3 && !strcmp(argv[1], "crowd"))
		return !crowd((unsigned int)atoi(argv[2]));
	for (size_t i = 0; argc == 2 && i < sizeof(ways) / sizeof(ways[0]); i++)
		if (!strcmp(argv[1], ways[i].name))
			well = ways[i].run();
	return !well || write(STDOUT_FILENO, "done\n", 5) != 5;
}
