// SPDX-License-Identifier: Apache-2.0
/*
 * An engine that does nothing but execute one case again and again, in the old protocol.
 *
 *	engine EXECUTIONS MAP-SIZE SHIM
 *
 * As engines do, it clears the map before each execution. Prints the seconds.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <time.h>
#include <unistd.h>

#define CASE_BYTES (1 << 20)

static void *share(const char *variable, size_t size)
{
	int id = shmget(IPC_PRIVATE, size, IPC_CREAT | 0600);
	void *memory = id < 0 ? (void *)-1 : shmat(id, NULL, 0);
	char text[16];

	if (memory == (void *)-1)
		exit(2);
	shmctl(id, IPC_RMID, NULL);
	snprintf(text, sizeof(text), "%d", id);
	setenv(variable, text, 1);
	return memory;
}

static uint32_t hear(int fd)
{
	uint32_t word;

	if (read(fd, &word, sizeof(word)) != sizeof(word))
		exit(3);
	return word;
}

static void say(int fd, uint32_t word)
{
	if (write(fd, &word, sizeof(word)) != sizeof(word))
		exit(3);
}

int main(int argc, char **argv)
{
	int requests[2], answers[2];
	struct timespec start, end;
	size_t map_size;
	uint32_t *length;
	void *map;
	long i;

	if (argc != 4 || pipe(requests) || pipe(answers))
		return 2;
	map_size = strtoul(argv[2], NULL, 10);
	map = share("__AFL_SHM_ID", map_size);
	length = share("__AFL_SHM_FUZZ_ID", CASE_BYTES + sizeof(*length));
	*length = 64;
	if (!fork()) {
		dup2(requests[0], 198);
		dup2(answers[1], 199);
		close(requests[1]);
		close(answers[0]);
		execl(argv[3], argv[3], NULL);
		_exit(127);
	}
	close(requests[0]);
	close(answers[1]);
	hear(answers[0]);
	say(requests[1], 0x81000001);
	for (i = -1000; i < atol(argv[1]); i++) {
		if (!i)
			clock_gettime(CLOCK_MONOTONIC, &start);
		memset(map, 0, map_size);
		say(requests[1], 0);
		hear(answers[0]);
		if (hear(answers[0]))
			return 4;
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.6f\n", (double)(end.tv_sec - start.tv_sec) +
	       (double)(end.tv_nsec - start.tv_nsec) / 1e9);
	return 0;
}
