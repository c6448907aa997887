// SPDX-License-Identifier: Apache-2.0
/* A descriptor that is sent over a Unix socket is the same instance. */
#include "kcov_test.h"

#include <sys/socket.h>

static void send_fd(int to, int fd)
{
	char room[CMSG_SPACE(sizeof(int))] = { 0 }, byte = 0;
	struct iovec iov = { &byte, 1 };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room,
				  .msg_controllen = sizeof(room) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	if (sendmsg(to, &message, 0) != 1)
		bail("sendmsg");
}

static int receive_fd(int from)
{
	char room[CMSG_SPACE(sizeof(int))] = { 0 }, byte;
	struct iovec iov = { &byte, 1 };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room,
				  .msg_controllen = sizeof(room) };
	int fd = -1;

	if (recvmsg(from, &message, 0) == 1 && CMSG_FIRSTHDR(&message))
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
	return fd;
}

int main(int argc, char **argv)
{
	struct gate traced = gate_new(), done = gate_new();
	struct kcov kcov;
	int sockets[2];
	pid_t pid;

	begin(argc, argv);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets))
		bail("socketpair");
	pid = child();
	if (!pid) {
		struct kcov got = { .fd = receive_fd(sockets[1]), .words = WORDS };

		got.area = kcov_map(got.fd, kcov_bytes(&got), PROT_READ | PROT_WRITE);
		if (got.fd < 0 || !got.area || got.area[9] != 9 || kcov_enable(&got))
			_exit(1);
		reset(&got);
		calls(10);
		gate_open(&traced);
		gate_wait(&done);
		if (!traces(&got))
			_exit(2);
		_exit(kcov_disable(&got));
	}
	kcov = kcov_new(WORDS);
	kcov.area[9] = 9;
	send_fd(sockets[0], kcov.fd);
	gate_wait(&traced);
	ok(count(&kcov) >= 10, "the receiver's calls are in the sender's mapping");
	is(kcov_enable(&kcov), EINVAL, "ENABLE by the sender is EINVAL now");
	is(kcov_disable(&kcov), EINVAL, "and so is DISABLE");
	close(kcov.fd);
	gate_open(&done);
	is(wait_for(pid), 0, "the receiver goes on after the sender's close, and disables");
	munmap(kcov.area, kcov_bytes(&kcov));

	kcov = kcov_new(WORDS);
	send_fd(sockets[0], kcov.fd);
	kcov_free(&kcov);
	kcov.fd = receive_fd(sockets[1]);
	is(control(kcov.fd, KCOV_INIT_TRACE, WORDS), EBUSY,
	   "an instance lives while its descriptor is under way");
	kcov.area = kcov_map(kcov.fd, kcov_bytes(&kcov), PROT_READ | PROT_WRITE);
	ok(!kcov_enable(&kcov) && traces(&kcov), "and works when it arrives");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
	return end();
}
