// SPDX-License-Identifier: Apache-2.0
/* A process of a 32-bit program: traced since before its execve, and tracing by itself. */
#include "kcov_test.h"

#include <sys/mman.h>

#ifdef __x86_64__
#define CALLS			100
#define NO_SUCH_PROGRAM		99
#define NAMED_FD		100
/* As <linux/kcov.h> has it for a program whose unsigned long has 4 bytes. */
#define KCOV_INIT_TRACE_32	_IOR('c', 1, uint32_t)

/* An ELF file of 32 bits for code at this address, which is all that it has. */
#define ADDRESS			0x08048000
#define HEADERS			(52 + 32)

static size_t put(uint8_t *to, const char *format, ...)
{
	size_t size = 0;
	va_list list;

	va_start(list, format);
	for (; *format; format++) {
		uint32_t value = va_arg(list, uint32_t);
		size_t bytes = *format - '0';

		memcpy(to + size, &value, bytes);
		size += bytes;
	}
	va_end(list);
	return size;
}

/* Write a program that makes an ioctl, then CALLS calls, and ends with the errno of the ioctl. */
static size_t write_program(uint8_t *file, uint32_t request, uint32_t argument)
{
	uint8_t *code = file + HEADERS, *at = code;

	/* mov eax, 54; mov ebx, NAMED_FD; mov ecx, request; mov edx, argument; int 0x80 */
	at += put(at, "1414141411", 0xb8, 54, 0xbb, NAMED_FD, 0xb9, request, 0xba, argument, 0xcd, 0x80);
	/* mov edi, eax; mov esi, CALLS */
	at += put(at, "1114", 0x89, 0xc7, 0xbe, CALLS);
	/* 1: mov eax, 20; int 0x80; dec esi; jnz 1b */
	at += put(at, "1411111", 0xb8, 20, 0xcd, 0x80, 0x4e, 0x75, 0xf6);
	/* mov ebx, edi; neg ebx; mov eax, 1; int 0x80 */
	at += put(at, "11111411", 0x89, 0xfb, 0xf7, 0xdb, 0xb8, 1, 0xcd, 0x80);
	/* The rest of the identification is 0. An executable for the i386. */
	put(file, "1111111", 0x7f, 'E', 'L', 'F', 1, 1, 1);
	put(file + 16, "2244444222222", 2, 3, 1, ADDRESS + HEADERS, 52, 0, 0, 52, 32, 1, 0, 0, 0);
	/* One segment: all of the file, readable and executable. */
	put(file + 52, "44444444", 1, 0, ADDRESS, ADDRESS, at - file, at - file, 5, 4096);
	return at - file;
}

/* Run the program in a child, which enables the instance itself if that is wanted. */
static int run(const struct kcov *kcov, int enabled, uint32_t request, uint32_t argument)
{
	char *const nothing[] = { NULL }, *const names[] = { "compat", NULL };
	uint8_t file[512] = { 0 };
	size_t size = write_program(file, request, argument);
	int fd = memfd_create("compat", 0);
	pid_t pid;

	if (fd < 0 || write(fd, file, size) != (ssize_t)size)
		bail("memfd");
	reset(kcov);
	pid = child();
	if (!pid) {
		dup2(kcov->fd, NAMED_FD);
		if (enabled && kcov_enable(kcov))
			_exit(98);
		fexecve(fd, names, nothing);
		_exit(NO_SUCH_PROGRAM);
	}
	close(fd);
	return wait_for(pid);
}

int main(int argc, char **argv)
{
	struct kcov kcov;
	int status;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	status = run(&kcov, 0, KCOV_DISABLE, 0);
	if (status == NO_SUCH_PROGRAM) {
		skip("32-bit programs", "this kernel runs none");
		return end();
	}
	is(status, EINVAL, "DISABLE by a 32-bit process that is no owner");
	is(count(&kcov), 0, "which leaves no PCs");
	is(run(&kcov, 1, KCOV_ENABLE, KCOV_TRACE_PC), EINVAL,
	   "ENABLE of what it traces through since before its execve");
	ok(count(&kcov) >= CALLS, "each of its calls leaves PCs");
	is(run(&kcov, 0, KCOV_ENABLE, KCOV_TRACE_PC), 0, "ENABLE by a 32-bit process");
	ok(count(&kcov) >= CALLS, "each of its calls leaves PCs, too");
	is(run(&kcov, 0, KCOV_INIT_TRACE_32, WORDS), ENOTTY, "INIT_TRACE with 4 bytes");
	is(kcov_enable(&kcov), 0, "after its end the instance is free");
	ok(traces(&kcov), "and traces");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
	return end();
}
#else
int main(int argc, char **argv)
{
	begin(argc, argv);
	skip("32-bit programs", "not an x86-64 program");
	return end();
}
#endif
