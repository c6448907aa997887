// SPDX-License-Identifier: Apache-2.0
/*
 * Makes system calls that its arguments name, each under kcov, and says what each one covered.
 *
 *	named_calls DEVICE CALL...
 *
 * A CALL is a name and its operands, separated by spaces:
 *
 *	open PATH FLAGS		FLAGS of r (read), w (both), c (create), d (direct), t (truncate)
 *	read N, write TEXT, pread N OFFSET, pwrite TEXT N OFFSET (padded with zeroes to N bytes)
 *	fsync, close		of the file that was opened last, as the four above
 *	stat PATH, mkdir PATH, unlink PATH, rename OLD NEW, list PATH (getdents64)
 *	can INTERFACE		takes a raw CAN socket as the file; not traced
 *	tcp ADDRESS PORT, udp ADDRESS PORT	takes a connected socket as the file; not traced
 *	i2c ADDRESS		ioctl I2C_SLAVE
 *
 * Each prints a line of fields, separated by tabs: the name, the result, the errno, the bytes that
 * were read, and the PCs; the last two in hexadecimal digits.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/can.h>
#include <linux/i2c-dev.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORDS (256 << 10)
#define KCOV_INIT_TRACE _IOR('c', 1, unsigned long)
#define KCOV_ENABLE _IO('c', 100)
#define KCOV_DISABLE _IO('c', 101)
#define ROOM (1 << 20)
#define SHOWN 256

static char buffer[ROOM] __attribute__((aligned(4096)));
/* Room for all that is printed: a call in between would take what the target does meanwhile. */
static char output[4 << 20];
static int file = -1;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static int open_flags(const char *text)
{
	int flags = strchr(text, 'w') ? O_RDWR : O_RDONLY;

	if (strchr(text, 'c'))
		flags |= O_CREAT;
	if (strchr(text, 'd'))
		flags |= O_DIRECT;
	if (strchr(text, 't'))
		flags |= O_TRUNC;
	return flags;
}

static int can_socket(const char *name)
{
	struct ifreq request = { 0 };
	struct sockaddr_can address = { .can_family = AF_CAN };
	int fd = socket(PF_CAN, SOCK_RAW, CAN_RAW);

	if (fd < 0)
		die("socket");
	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	if (ioctl(fd, SIOCGIFINDEX, &request))
		die(name);
	address.can_ifindex = request.ifr_ifindex;
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die("bind");
	return fd;
}

static int internet_socket(int type, const char *address, const char *port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };
	int fd = socket(AF_INET, type, 0);

	if (fd < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1)
		die("socket");
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		die("connect");
	return fd;
}

/* Copy a text to the buffer, with its pairs of hexadecimal digits decoded if it begins with 0x. */
static size_t decode(const char *text)
{
	size_t length = 0;

	if (strncmp(text, "0x", 2)) {
		length = strlen(text);
		memcpy(buffer, text, length);
		return length;
	}
	for (text += 2; text[0] && text[1]; text += 2) {
		char digits[] = { text[0], text[1], 0 };

		buffer[length++] = strtoul(digits, NULL, 16);
	}
	return length;
}

static size_t bounded(const char *text)
{
	size_t size = strtoul(text, NULL, 0);

	if (size > ROOM) {
		fprintf(stderr, "%zu bytes are too many\n", size);
		exit(2);
	}
	return size;
}

int main(int argc, char **argv)
{
	uint64_t *area;
	int kcov;

	if (argc < 3)
		return 2;
	kcov = open(argv[1], O_RDWR);
	if (kcov < 0 || ioctl(kcov, KCOV_INIT_TRACE, (unsigned long)WORDS))
		die(argv[1]);
	area = mmap(NULL, WORDS * sizeof(*area), PROT_READ | PROT_WRITE, MAP_SHARED, kcov, 0);
	if (area == MAP_FAILED)
		die("mmap");
	if (setvbuf(stdout, output, _IOFBF, sizeof(output)))
		die("setvbuf");
	if (ioctl(kcov, KCOV_ENABLE, 0))
		die("KCOV_ENABLE");
	for (int i = 2; i < argc; i++) {
		const char *word[5] = { "", "", "", "", "" };
		long result, number = 0, one = 0, two = 0, three = 0;
		int error, reads = 0;
		uint64_t count;
		char *rest = argv[i];
		struct stat status;

		for (int j = 0; j < 5 && rest; j++)
			word[j] = strsep(&rest, " ");
		if (!strcmp(word[0], "can")) {
			file = can_socket(word[1]);
			continue;
		}
		if (!strcmp(word[0], "tcp") || !strcmp(word[0], "udp")) {
			file = internet_socket(word[0][0] == 't' ? SOCK_STREAM : SOCK_DGRAM,
					       word[1], word[2]);
			continue;
		}
		if (!strcmp(word[0], "open")) {
			number = SYS_open;
			one = (long)word[1];
			two = open_flags(word[2]);
			three = 0644;
		} else if (!strcmp(word[0], "read") || !strcmp(word[0], "pread")) {
			number = word[0][0] == 'p' ? SYS_pread64 : SYS_read;
			one = file;
			two = (long)buffer;
			three = bounded(word[1]);
			reads = 1;
		} else if (!strcmp(word[0], "write")) {
			number = SYS_write;
			one = file;
			two = (long)buffer;
			three = decode(word[1]);
		} else if (!strcmp(word[0], "pwrite")) {
			number = SYS_pwrite64;
			one = file;
			two = (long)buffer;
			three = bounded(word[2]);
			memset(buffer, 0, three);
			decode(word[1]);
		} else if (!strcmp(word[0], "fsync") || !strcmp(word[0], "close")) {
			number = word[0][0] == 'f' ? SYS_fsync : SYS_close;
			one = file;
		} else if (!strcmp(word[0], "stat")) {
			number = SYS_stat;
			one = (long)word[1];
			two = (long)&status;
		} else if (!strcmp(word[0], "mkdir")) {
			number = SYS_mkdir;
			one = (long)word[1];
			two = 0755;
		} else if (!strcmp(word[0], "unlink")) {
			number = SYS_unlink;
			one = (long)word[1];
		} else if (!strcmp(word[0], "rename")) {
			number = SYS_rename;
			one = (long)word[1];
			two = (long)word[2];
		} else if (!strcmp(word[0], "list")) {
			number = SYS_getdents64;
			one = open(word[1], O_RDONLY | O_DIRECTORY);
			two = (long)buffer;
			three = ROOM;
		} else if (!strcmp(word[0], "i2c")) {
			number = SYS_ioctl;
			one = file;
			two = I2C_SLAVE;
			three = strtol(word[1], NULL, 0);
		} else {
			fprintf(stderr, "%s is no call\n", word[0]);
			return 2;
		}
		errno = 0;
		__atomic_store_n(&area[0], 0, __ATOMIC_SEQ_CST);
		result = syscall(number, one, two, three,
				 number == SYS_pread64 ? strtol(word[2], NULL, 0) :
				 number == SYS_pwrite64 ? strtol(word[3], NULL, 0) : 0);
		error = errno;
		count = __atomic_load_n(&area[0], __ATOMIC_SEQ_CST);
		if (number == SYS_open && result >= 0)
			file = result;
		printf("%s\t%ld\t%d\t", word[0], result, error);
		for (long j = 0; reads && j < result && j < SHOWN; j++)
			printf("%02x", (unsigned char)buffer[j]);
		printf("\t");
		for (uint64_t j = 1; j <= count; j++)
			printf("%lx ", area[j]);
		printf("\n");
	}
	fflush(stdout);
	return ioctl(kcov, KCOV_DISABLE, 0) ? 3 : 0;
}
