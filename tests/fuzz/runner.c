/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs cases as kcov-runner does, without kcov, on this machine:
 *
 *	runner NAME [ARGUMENT]... <CASES
 *
 * Standard input has the cases, each after its length in 4 bytes. For each one a line comes out: its
 * wait status, the nanoseconds that it took, the bytes of its output; then the output. What the
 * harness keeps is the file in the environment variable KEPT, which a later runner finds.
 */
#include "../../guest/agent/harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct runner_harness *harnesses;
static uint8_t data[1 << 20];

/* Shared by the processes. */
static struct {
	char output[1 << 16];
	size_t length;
	int status;
	long ns;
	char kept[3 << 16];
	size_t kept_length;
} *shared;

void runner_register(struct runner_harness *harness)
{
	harness->next = harnesses;
	harnesses = harness;
}

int runner_area_take(void)
{
	return 1;
}

int runner_area_enable(int index)
{
	return index != 1;
}

int runner_area_disable(int index)
{
	return index != 1;
}

int runner_area_descriptor(int index)
{
	(void)index;
	return -1;
}

void runner_area_give(int index)
{
	(void)index;
}

int runner_thread_begin(void)
{
	return 1;
}

void runner_thread_end(int index)
{
	(void)index;
}

int runner_error_descriptor(void)
{
	return 2;
}

void runner_output(const void *text, size_t length)
{
	if (length > sizeof(shared->output) - shared->length)
		length = sizeof(shared->output) - shared->length;
	memcpy(shared->output + shared->length, text, length);
	shared->length += length;
}

void runner_keep(const void *bytes, size_t length)
{
	if (length > sizeof(shared->kept))
		return;
	memcpy(shared->kept, bytes, length);
	shared->kept_length = length;
}

const void *runner_kept(size_t *length)
{
	*length = shared->kept_length;
	return *length ? shared->kept : NULL;
}

/* Read or write what is kept. Here: a child may have another root. */
static void move_kept(const char *mode)
{
	const char *path = getenv("KEPT");
	FILE *file = path ? fopen(path, mode) : NULL;

	if (!file)
		return;
	if (*mode == 'r')
		shared->kept_length = fread(shared->kept, 1, sizeof(shared->kept), file);
	else
		fwrite(shared->kept, 1, shared->kept_length, file);
	fclose(file);
}

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

/* Bytes come over the pipes: a length, the case; then an answer. */
static void child(const struct runner_harness *harness, int cases, int answers)
{
	uint32_t length;

	if (harness->begin && harness->begin())
		_exit(125);
	while (read(cases, &length, sizeof(length)) == sizeof(length)) {
		long begin;

		for (size_t have = 0; have < length;) {
			ssize_t got = read(cases, data + have, length - have);

			if (got <= 0)
				_exit(125);
			have += got;
		}
		begin = now();
		shared->status = harness->run(data, length);
		if (harness->clean)
			harness->clean();
		shared->ns = now() - begin;
		if (write(answers, "", 1) != 1)
			_exit(125);
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	const struct runner_harness *harness = harnesses;
	int cases[2], answers[2];
	pid_t pid = 0;
	uint32_t length;

	while (harness && argc > 1 && strcmp(harness->name, argv[1]))
		harness = harness->next;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (argc < 2 || !harness || shared == MAP_FAILED)
		return 2;
	move_kept("r");
	if (harness->load && harness->load(argc - 1, argv + 1))
		return 125;
	signal(SIGPIPE, SIG_IGN);
	while (fread(&length, sizeof(length), 1, stdin) == 1) {
		char answer;

		if (length > sizeof(data) || fread(data, 1, length, stdin) != length)
			return 2;
		shared->length = 0;
		if (!pid) {
			if (pipe(cases) || pipe(answers))
				return 2;
			pid = fork();
			if (!pid) {
				close(cases[1]);
				close(answers[0]);
				child(harness, cases[0], answers[1]);
			}
			close(cases[0]);
			close(answers[1]);
		}
		if (write(cases[1], &length, sizeof(length)) != sizeof(length) ||
		    write(cases[1], data, length) != (ssize_t)length ||
		    read(answers[0], &answer, 1) != 1) {
			close(cases[1]);
			close(answers[0]);
			waitpid(pid, &shared->status, 0);
			pid = 0;
		}
		printf("%d %ld %zu\n", shared->status, shared->ns, shared->length);
		fwrite(shared->output, 1, shared->length, stdout);
		fflush(stdout);
	}
	move_kept("w");
	return 0;
}
