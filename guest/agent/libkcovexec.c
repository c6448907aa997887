/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libkcovexec.so: follows children and threads for `kcov-exec -f`, preloaded by LD_PRELOAD.
 *
 * kcov belongs to a thread: exec keeps it, and children of fork and pthread_create do not inherit
 * it. So every new process image (constructor), forked child (atfork handler) and thread
 * (pthread_create wrapper) asks kcov-exec for its own descriptor, enables it and closes it again;
 * the task holds its own reference, and kcov-exec keeps the area mapped. If something fails here,
 * the program runs untraced, with its errno, descriptors and signals as they were.
 */
#define _GNU_SOURCE
#include "kcov.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

typedef int create_function(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

struct start {
	void *(*routine)(void *);
	void *argument;
};

static struct sockaddr_un server;
static socklen_t server_length;

/* Receives OFFER with its descriptor and its value. Returns the descriptor, or -1. */
static int receive_offer(int connection, int32_t *value)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct follow_message message = { 0 };
	struct iovec part = { &message, sizeof(message) };
	struct msghdr header = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes),
	};
	struct cmsghdr *attached;
	ssize_t got;
	int fd = -1;

	do {
		got = recvmsg(connection, &header, MSG_CMSG_CLOEXEC);
	} while (got < 0 && errno == EINTR);
	if (got < 0)
		return -1;
	attached = CMSG_FIRSTHDR(&header);
	if (attached && attached->cmsg_level == SOL_SOCKET && attached->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(attached), sizeof(fd));
	*value = message.value;
	return fd;
}

static int enable(int kcov, int32_t value)
{
	if (value == FOLLOW_COMPARISONS)
		return ioctl(kcov, KCOV_ENABLE, KCOV_TRACE_CMP);
	return value ? ioctl(kcov, KCOV_UNIQUE_ENABLE, (unsigned long)(uint32_t)value) :
		       ioctl(kcov, KCOV_ENABLE, KCOV_TRACE_PC);
}

/* Makes the calling thread trace. Uses only system calls, because it also runs in a child that one
 * of many threads forked. */
static void trace_this_thread(void)
{
	struct follow_message message = { .kind = FOLLOW_HELLO };
	int saved = errno, connection, kcov;
	int32_t value = 0;

	if (!server_length)
		return;
	message.value = (int32_t)syscall(SYS_gettid);
	message.pid = (int32_t)syscall(SYS_getpid);
	connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (connection >= 0) {
		if (!connect(connection, (struct sockaddr *)&server, server_length) &&
		    send(connection, &message, sizeof(message), MSG_NOSIGNAL) > 0) {
			kcov = receive_offer(connection, &value);
			if (kcov >= 0) {
				message.kind = FOLLOW_ENABLED;
				message.value = enable(kcov, value) ? errno : 0;
				close(kcov);
				send(connection, &message, sizeof(message), MSG_NOSIGNAL);
			}
		}
		close(connection);
	}
	errno = saved;
}

__attribute__((constructor)) static void follow(void)
{
	const char *name = getenv(FOLLOW_VARIABLE);
	size_t length = name ? strlen(name) : 0;

	if (!length || length >= sizeof(server.sun_path) - 1)
		return;
	server.sun_family = AF_UNIX;
	memcpy(server.sun_path + 1, name, length); /* the leading zero byte makes it abstract */
	server_length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
	pthread_atfork(NULL, NULL, trace_this_thread);
	trace_this_thread();
}

static void *start_traced(void *argument)
{
	struct start start = *(struct start *)argument;

	free(argument);
	trace_this_thread();
	return start.routine(start.argument);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *),
		   void *argument)
{
	create_function *create;
	struct start *start = NULL;
	int error;

	/* The one conversion that POSIX allows from dlsym's result, without a cast that warns. */
	*(void **)&create = dlsym(RTLD_NEXT, "pthread_create");
	if (!create)
		return ENOSYS;
	if (server_length)
		start = malloc(sizeof(*start));
	if (!start)
		return create(thread, attributes, routine, argument);
	start->routine = routine;
	start->argument = argument;
	error = create(thread, attributes, start_traced, start);
	if (error)
		free(start);
	return error;
}
