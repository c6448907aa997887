// SPDX-License-Identifier: Apache-2.0
/* The owner exits, is killed or dies of a fault: the instance is free again. */
#include "kcov_test.h"

static struct kcov kcov;
static struct gate gate;
static int owned;

static void *busy(void *unused)
{
	for (;;)
		call();
	return unused;
}

static void own(void)
{
	if (kcov_enable(&kcov) || !traces(&kcov))
		_exit(98);
	/* Whoever sees owned may end the process. */
	gate_open(&gate);
	__atomic_store_n(&owned, 1, __ATOMIC_RELEASE);
}

static void *own_and_be_busy(void *unused)
{
	own();
	return busy(unused);
}

static void exits(void)
{
	own();
	_exit(0);
}

static void exits_with_threads(void)
{
	thread(busy, NULL);
	own();
	_exit(0);
}

static void another_exits(void)
{
	thread(own_and_be_busy, NULL);
	while (!__atomic_load_n(&owned, __ATOMIC_ACQUIRE))
		usleep(1000);
	_exit(0);
}

static void is_busy(void)
{
	own_and_be_busy(NULL);
}

static void is_blocked(void)
{
	own();
	for (;;)
		pause();
}

static void has_threads(void)
{
	for (int i = 0; i < 4; i++)
		thread(busy, NULL);
	own_and_be_busy(NULL);
}

static void faults(void)
{
	own();
	raise(SIGSEGV);
}

static const struct {
	void (*function)(void);
	const char *what;
	int status;
} ends[] = {
	{ exits, "the owner exits", 0 },
	{ exits_with_threads, "the owner exits with the other threads of its process", 0 },
	{ another_exits, "another thread ends the owner's process", 0 },
	{ is_busy, "the owner is killed while it makes system calls", -SIGKILL },
	{ is_blocked, "the owner is killed while it sleeps in a system call", -SIGKILL },
	{ has_threads, "the owner is killed with the other threads of its process", -SIGKILL },
	{ faults, "the owner dies of a fault", -SIGSEGV },
};

/* The first thread exits alone; nobody can wait for that, so ask until the instance is free. */
static void leader_exits(void)
{
	int error = EINVAL;
	pid_t pid;

	gate = gate_new();
	pid = child();
	if (!pid) {
		thread(busy, NULL);
		own();
		syscall(SYS_exit, 0);
	}
	gate_wait(&gate);
	for (int i = 0; i < 60000 && error == EINVAL; i++) {
		usleep(1000);
		error = kcov_enable(&kcov);
	}
	is(error, 0, "the first thread exits, the others live on: its instance is free");
	kcov_disable(&kcov);
	kcov_again(&kcov);
	kill(pid, SIGKILL);
	is(wait_for(pid), -SIGKILL, "the others are killed");
	gate_free(&gate);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	kcov = kcov_new(WORDS);
	for (size_t i = 0; i < sizeof(ends) / sizeof(*ends); i++) {
		pid_t pid;

		gate = gate_new();
		pid = child();
		if (!pid) {
			ends[i].function();
			_exit(97);
		}
		gate_wait(&gate);
		if (ends[i].status == -SIGKILL)
			kill(pid, SIGKILL);
		is(wait_for(pid), ends[i].status, ends[i].what);
		gate_free(&gate);
		is(kcov_enable(&kcov), 0, "its instance is enabled without an mmap");
		ok(traces(&kcov), "and traces another");
		is(kcov_disable(&kcov), 0, "DISABLE");
		kcov_again(&kcov);
	}
	leader_exits();
	kcov_free(&kcov);
	return end();
}
