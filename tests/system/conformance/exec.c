// SPDX-License-Identifier: Apache-2.0
/* exec keeps kcov, and it belongs to the thread that made it. */
#include "markers.h"

#define CALLS 100

static struct kcov kcov;
static char calls_text[] = "calls";

static void make_calls(void)
{
	for (int i = 0; i < CALLS; i++)
		marker_call(2);
}

/* How often the calls are in the area. */
static int found_calls(void)
{
	uint64_t end = count(&kcov);
	int found = 0;

	for (uint64_t i = 1; i <= end && i < kcov.words; i++)
		found += kcov.area[i] == markers[2];
	return found;
}

static void become(void)
{
	char *words[] = { calls_text, calls_text, NULL };

	execv("/proc/self/exe", words);
	_exit(96);
}

static void *exec_only(void *unused)
{
	become();
	return unused;
}

static void *enable_and_exec(void *unused)
{
	if (kcov_enable(&kcov))
		_exit(98);
	reset(&kcov);
	become();
	return unused;
}

static void by_leader(void)
{
	enable_and_exec(NULL);
}

static void by_thread(void)
{
	thread(enable_and_exec, NULL);
	for (;;)
		pause();
}

static void by_another_thread(void)
{
	if (kcov_enable(&kcov))
		_exit(98);
	thread(exec_only, NULL);
	for (;;)
		pause();
}

static void fails(void)
{
	char *words[] = { calls_text, NULL };

	if (kcov_enable(&kcov) || execv("/nowhere/at/all", words) != -1)
		_exit(98);
	reset(&kcov);
	make_calls();
	_exit(0);
}

/* Runs one of the above in a child: how often its calls have left their PC. */
static int run(void (*function)(void), const char *what)
{
	int found;
	pid_t pid;

	reset(&kcov);
	pid = child();
	if (!pid)
		function();
	is(wait_for(pid), 0, what);
	found = found_calls();
	is(kcov_enable(&kcov), 0, "once it has ended, the instance can be enabled");
	ok(traces(&kcov), "and traces another");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_again(&kcov);
	return found;
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], calls_text)) {
		make_calls();
		return 0;
	}
	begin(argc, argv);
	learn_markers();
	kcov = kcov_new(8 * WORDS);
	ok(run(by_leader, "a process enables and calls execve") >= CALLS,
	   "the new image is traced");
	ok(run(by_thread, "a thread that is not the first enables and calls execve") >= CALLS,
	   "the new image is traced");
	ok(run(by_another_thread, "the first thread enables, another calls execve") == 0,
	   "the new image is not traced: kcov was the first thread's");
	ok(run(fails, "execve fails") >= CALLS, "the caller is still traced");
	kcov_free(&kcov);
	return end();
}
