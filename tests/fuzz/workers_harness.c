/* SPDX-License-Identifier: Apache-2.0 */
/* A harness whose first byte chooses a system call; a case that begins with "!!" fails. */
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char name[2] = "";
	int fd;

	if (size < 2)
		return access(".", R_OK);
	if (data[0] == '!' && data[1] == '!')
		abort();
	name[0] = (char)('a' + data[1] % 8);
	switch (data[0] % 8) {
	case 0:
		fd = open(name, O_RDWR | O_CREAT, 0600);
		if (fd >= 0) {
			(void)!write(fd, data, size);
			close(fd);
		}
		break;
	case 1:
		unlink(name);
		break;
	case 2:
		mkdir(name, 0700);
		break;
	case 3:
		rmdir(name);
		break;
	case 4:
		(void)!symlink("a", name);
		break;
	case 5:
		(void)!rename(name, "b");
		break;
	case 6:
		(void)!truncate(name, data[1]);
		break;
	default:
		getppid();
	}
	return 0;
}
