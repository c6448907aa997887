/* SPDX-License-Identifier: Apache-2.0 */
/*
 * follow: makes a known number of sched_getscheduler calls (that no shell makes)
 * in all the ways in which a program multiplies.
 *
 * usage: follow processes   a forked child that calls _exit, one that is killed, one that execs
 *                           this program again, and the process itself: 4 times CALLS
 *        follow threads     THREADS threads one after the other, and two at once: THREADS + 2
 *                           times CALLS
 *        follow calls       CALLS, no more
 *        follow exec        execs itself with "calls", from a thread: CALLS
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CALLS 10
#define THREADS 100

static void *call(void *unused)
{
	for (int i = 0; i < CALLS; i++)
		syscall(SYS_sched_getscheduler, 0);
	return unused;
}

static void *exec_again(void *unused)
{
	execl("/proc/self/exe", "follow", "calls", (char *)NULL);
	return unused;
}

static void wait_for(pid_t child)
{
	if (waitpid(child, NULL, 0) != child)
		perror("waitpid");
}

static int processes(void)
{
	pid_t child = fork();

	if (!child) {
		call(NULL);
		_exit(0);
	}
	wait_for(child);
	child = fork();
	if (!child) {
		call(NULL);
		kill(getpid(), SIGKILL);
	}
	wait_for(child);
	child = fork();
	if (!child)
		exec_again(NULL);
	wait_for(child);
	call(NULL);
	return 0;
}

static int threads(void)
{
	pthread_t thread, other;

	for (int i = 0; i < THREADS; i++)
		if (pthread_create(&thread, NULL, call, NULL) || pthread_join(thread, NULL))
			return 1;
	if (pthread_create(&thread, NULL, call, NULL) || pthread_create(&other, NULL, call, NULL) ||
	    pthread_join(thread, NULL) || pthread_join(other, NULL))
		return 1;
	return 0;
}

int main(int argc, char **argv)
{
	pthread_t thread;

	if (argc == 2 && !strcmp(argv[1], "processes"))
		return processes();
	if (argc == 2 && !strcmp(argv[1], "threads"))
		return threads();
	if (argc == 2 && !strcmp(argv[1], "calls"))
		return call(NULL) != NULL;
	if (argc == 2 && !strcmp(argv[1], "exec"))
		return pthread_create(&thread, NULL, exec_again, NULL) ||
		       pthread_join(thread, NULL);
	fprintf(stderr, "usage: follow processes|threads|calls|exec\n");
	return 2;
}
