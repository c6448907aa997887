// SPDX-License-Identifier: Apache-2.0
/* mmap: what it refuses. */
#include "kcov_test.h"

#define BYTES (WORDS * 8)

int main(int argc, char **argv)
{
	int fd;

	begin(argc, argv);
	fd = kcov_open();
	is(try_map(fd, BYTES, PROT_READ, MAP_SHARED, 0), EINVAL, "before INIT_TRACE: EINVAL");
	control(fd, KCOV_INIT_TRACE, WORDS);
	is(try_map(fd, BYTES / 2, PROT_READ, MAP_SHARED, 0), EINVAL, "half the area: EINVAL");
	is(try_map(fd, BYTES - PAGE, PROT_READ, MAP_SHARED, 0), EINVAL, "a page less: EINVAL");
	is(try_map(fd, BYTES + PAGE, PROT_READ, MAP_SHARED, 0), EINVAL, "a page more: EINVAL");
	is(try_map(fd, 2 * BYTES, PROT_READ, MAP_SHARED, 0), EINVAL, "twice the area: EINVAL");
	is(try_map(fd, BYTES, PROT_READ, MAP_SHARED, PAGE), EINVAL, "an offset: EINVAL");
	is(try_map(fd, BYTES - PAGE, PROT_READ, MAP_SHARED, PAGE), EINVAL,
	   "all but the first page: EINVAL");
	is(try_map(fd, BYTES - 1, PROT_READ, MAP_SHARED, 0), 0,
	   "a length that rounds to the area's is that");
	is(try_map(fd, BYTES, PROT_READ, MAP_SHARED, 0), 0, "read-only");
	is(try_map(fd, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, 0), 0, "read-write");
	is(try_map(fd, BYTES, PROT_NONE, MAP_SHARED, 0), 0, "without any access");
	close(fd);

	if (!gvisor) {
		fd = kcov_open();
		control(fd, KCOV_INIT_TRACE, PAGE_WORDS + 1);
		is(try_map(fd, PAGE + 8, PROT_READ, MAP_SHARED, 0), EINVAL,
		   "an odd size can never be mapped: not by its bytes");
		is(try_map(fd, 2 * PAGE, PROT_READ, MAP_SHARED, 0), EINVAL, "not by its pages");
		is(try_map(fd, PAGE, PROT_READ, MAP_SHARED, 0), EINVAL, "not by whole pages alone");
		close(fd);
	}

	fd = open(kcov_device, O_RDONLY | O_CLOEXEC);
	is(control(fd, KCOV_INIT_TRACE, WORDS), 0, "INIT_TRACE on a read-only descriptor");
	is(try_map(fd, BYTES, PROT_READ, MAP_SHARED, 0), 0, "which maps read-only");
	is(try_map(fd, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, 0), EACCES, "and no more: EACCES");
	close(fd);
	return end();
}
