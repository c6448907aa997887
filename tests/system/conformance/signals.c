// SPDX-License-Identifier: Apache-2.0
/* Blocking system calls that signals interrupt, restart or stop; the handlers' own calls. */
#include "markers.h"

#include <time.h>

static struct kcov kcov;
static struct gate gate;
static uint64_t in_handler;
static int handled;

static void on_signal(int number)
{
	(void)number;
	in_handler = count(&kcov);
	marker_call(1);
	handled++;
	gate_open(&gate);
}

static void quiet(int number)
{
	(void)number;
	handled++;
}

/* What a thread in the kernel is doing, from its stat: S is asleep, T stopped. */
static char state_of(pid_t tid)
{
	char path[64], text[512], *end;
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", tid);
	fd = open(path, O_RDONLY);
	length = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (length <= 0)
		return '?';
	text[length] = 0;
	end = strrchr(text, ')');
	return end ? end[2] : '?';
}

static void await_state(pid_t tid, char state)
{
	for (int i = 0; i < 60000 && state_of(tid) != state; i++)
		usleep(1000);
}

/* A process that signals its parent once that sleeps. */
static pid_t signal_me(int number, int then)
{
	pid_t parent = getpid(), pid = child();

	if (!pid) {
		await_state(parent, 'S');
		kill(parent, number);
		if (then) {
			await_state(parent, 'T');
			kill(parent, then);
		}
		_exit(0);
	}
	return pid;
}

static void handle(int number, void (*function)(int), int flags)
{
	struct sigaction action = { .sa_handler = function, .sa_flags = flags };

	sigaction(number, &action, NULL);
}

int main(int argc, char **argv)
{
	struct timespec nap = { 0, 300 * 1000 * 1000 };
	struct gate silent = gate_new();
	char byte;
	pid_t pid;
	int error;
	long got;

	begin(argc, argv);
	learn_markers();
	gate = gate_new();
	kcov = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");

	printf("# a handler without SA_RESTART\n");
	handle(SIGUSR1, on_signal, 0);
	pid = signal_me(SIGUSR1, 0);
	reset(&kcov);
	in_handler = 0;
	got = read(silent.fds[0], &byte, 1);
	error = errno;
	ok(got == -1 && error == EINTR, "the interrupted call is EINTR");
	ok(in_handler > 0, "its PCs are in the area before the handler runs");
	ok(holds(&kcov, markers[1]), "the handler's own calls are traced");
	ok(count(&kcov) > in_handler + 1, "after the interrupted call's");
	reset(&kcov);
	call();
	ok(count(&kcov) > 0, "tracing goes on");
	wait_for(pid);
	gate_wait(&gate);

	printf("# a handler with SA_RESTART, which lets the call succeed\n");
	handle(SIGUSR1, on_signal, SA_RESTART);
	pid = signal_me(SIGUSR1, 0);
	reset(&kcov);
	in_handler = 0;
	got = read(gate.fds[0], &byte, 1);
	ok(got == 1, "the restarted call succeeds");
	ok(in_handler > 0, "the interrupted one's PCs were there before the handler ran");
	ok(holds(&kcov, markers[1]), "the handler's own calls are traced");
	ok(count(&kcov) > in_handler + 1, "the restarted call leaves PCs of its own");
	wait_for(pid);

	printf("# no handler: stopped and continued\n");
	pid = signal_me(SIGSTOP, SIGCONT);
	reset(&kcov);
	got = nanosleep(&nap, NULL);
	ok(got == 0, "a sleep that was stopped and continued ends as if nothing had been");
	ok(count(&kcov) > 0, "and leaves PCs");
	wait_for(pid);
	ok(traces(&kcov), "tracing goes on");

	printf("# signals to oneself\n");
	handle(SIGUSR2, quiet, 0);
	handled = 0;
	reset(&kcov);
	raise(SIGUSR2);
	ok(handled == 1 && count(&kcov) > 0, "raise: handled before it returns");
	for (int i = 0; i < 300; i++)
		raise(SIGUSR2);
	is(handled, 301, "as often as it is raised");
	ok(traces(&kcov), "tracing goes on");
	is(kcov_disable(&kcov), 0, "DISABLE");
	ok(traces_not(&kcov), "no PC comes any more");
	raise(SIGUSR2);
	ok(count(&kcov) == 0 && handled == 302, "not from a signal either");
	kcov_free(&kcov);
	return end();
}
