// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * restorer: a QEMU plugin that restores the guest's memory from a snapshot, inside QEMU.
 *
 * Only QEMU knows which code it has translated. It forgets what it has translated of a page when
 * the page is written the way a device writes it. So the pages that differ from the snapshot are
 * written that way here, and the translations of all other pages stay valid: a guest that was reset
 * does not have its code translated again.
 *
 * Which pages differ: Linux 6.7 and newer tell which pages were written (userfaultfd's asynchronous
 * write protection, and the ioctl PAGEMAP_SCAN), whether by a vCPU, by a device or by the kernel on
 * behalf of either. Without that all pages are compared that the guest or the snapshot has.
 *
 * The bridge asks while the guest is paused, and gets struct answer: with 'T' once the memory is as
 * in the snapshot, before the guest runs, to take note of what is written; with 'R' to restore it. QEMU's main loop
 * calls take_request(), so nothing else of QEMU writes the memory meanwhile.
 *
 * QEMU's functions are found by name (system/physmem.c, util/main-loop.c). Plugins are not meant to
 * call them; a QEMU without them refuses the plugin, and the bridge does without.
 *
 * Arguments: ram=FD,saved=FD,control=FD, inherited from the bridge, and low=BYTES: what of the
 * guest's memory begins at address 0; the rest begins at 4 GiB.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "../../sources/guest_kernel/tcg/qemu_plugin_api.h"
#include "../../sources/guest_kernel/tcg/qemu_plugin_version.h"

#define PAGE		4096ULL
#define HIGH_MEMORY	(4ULL << 30)

/* include/uapi/linux/userfaultfd.h and linux/fs.h, of Linux 6.7 and newer */
#define ASYNC_WRITE_PROTECTION	(1ULL << 15)	/* UFFD_FEATURE_WP_ASYNC */
#define SHMEM_WRITE_PROTECTION	(1ULL << 12)	/* UFFD_FEATURE_WP_HUGETLBFS_SHMEM */
#define USER_FAULTS_ONLY	1		/* UFFD_USER_MODE_ONLY */
#define PAGE_WAS_WRITTEN	(1ULL << 1)	/* PAGE_IS_WRITTEN */
#define PROTECT_MATCHING	(1ULL << 0)	/* PM_SCAN_WP_MATCHING */
#define CHECK_ASYNC		(1ULL << 1)	/* PM_SCAN_CHECK_WPASYNC */

struct range {
	uint64_t start, end, categories;
};

struct scan {
	uint64_t size, flags, start, end, walk_end, ranges, n_ranges, max_pages;
	uint64_t inverted, mask, any_of, wanted;
};

#define SCAN	_IOWR('f', 16, struct scan)

/* struct Answer in restorer.py */
struct answer {
	uint64_t error;		/* an errno: the memory is not restored */
	uint64_t hidden;	/* pages that QEMU could not be told of */
	uint64_t tracked;	/* whether the kernel told which pages were written */
	uint64_t candidates;	/* pages that were compared */
	uint64_t restored;	/* pages that differed */
	uint64_t freed;		/* bytes given back */
	uint64_t find_ns, copy_ns, rest_ns;
};

typedef void *(*map_fn)(void *space, uint64_t at, uint64_t *bytes, bool write, uint64_t attributes);
typedef void (*unmap_fn)(void *space, void *buffer, uint64_t bytes, bool write, uint64_t accessed);
typedef void (*set_handler_fn)(int fd, void (*readable)(void *), void (*writable)(void *), void *);

static map_fn map_guest;
static unmap_fn unmap_guest;
static set_handler_fn set_handler;
static void *guest_space;

static int ram_fd = -1, saved_fd = -1, control = -1, pagemap = -1, faults = -1;
static uint64_t bytes, low;
static uint8_t *ram;		/* QEMU's mapping */
static const uint8_t *saved;
static struct range *extents;	/* where the snapshot has data, ascending */
static size_t n_extents;
static bool tracked;
static const uint8_t zeroes[PAGE];

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static bool next_data(int fd, uint64_t at, struct range *data)
{
	off_t start = lseek(fd, (off_t)at, SEEK_DATA), end;

	if (start < 0)
		return false;
	end = lseek(fd, start, SEEK_HOLE);
	data->start = (uint64_t)start / PAGE * PAGE;
	data->end = ((uint64_t)end + PAGE - 1) / PAGE * PAGE;
	return true;
}

/* ---- which pages were written -------------------------------------------------------------- */

/* Find where QEMU has mapped the guest's memory. */
static bool find_ram(void)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	unsigned long from, to, offset, inode;
	unsigned int major_of, minor_of;
	struct stat status;
	char line[512];
	uint8_t *found = NULL;

	if (!maps || fstat(ram_fd, &status))
		return false;
	while (fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx %*s %lx %x:%x %lu", &from, &to, &offset, &major_of,
			   &minor_of, &inode) == 6 &&
		    inode == status.st_ino && makedev(major_of, minor_of) == status.st_dev &&
		    !offset && to - from == bytes) {
			/* A second mapping would be written unseen. */
			if (found) {
				found = NULL;
				break;
			}
			found = (uint8_t *)from;
		}
	fclose(maps);
	ram = found;
	return found;
}

static void start_tracking(void)
{
	struct uffdio_api api = { .api = UFFD_API,
				  .features = ASYNC_WRITE_PROTECTION | SHMEM_WRITE_PROTECTION };
	struct uffdio_register area = { .range = { .start = (uintptr_t)ram, .len = bytes },
					.mode = UFFDIO_REGISTER_MODE_WP };

	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | USER_FAULTS_ONLY);
	if (pagemap < 0 || faults < 0 || ioctl(faults, UFFDIO_API, &api) ||
	    ioctl(faults, UFFDIO_REGISTER, &area)) {
		if (faults >= 0)
			close(faults);
		faults = -1;
	}
}

/* Take note of what is written from now on. */
static bool protect(void)
{
	struct scan scan = {
		.size = sizeof(scan),
		.flags = PROTECT_MATCHING | CHECK_ASYNC,
		.start = (uintptr_t)ram,
		.end = (uintptr_t)ram + bytes,
		.mask = PAGE_WAS_WRITTEN,
		.wanted = PAGE_WAS_WRITTEN,
	};

	return ram && faults >= 0 && ioctl(pagemap, SCAN, &scan) >= 0 && scan.walk_end == scan.end;
}

/* ---- restoring ----------------------------------------------------------------------------- */

/* The guest's address of a place in its memory. */
static uint64_t guest_address(uint64_t offset)
{
	return offset < low ? offset : offset - low + HIGH_MEMORY;
}

static const uint8_t *saved_page(uint64_t offset)
{
	size_t first = 0, last = n_extents;

	while (first < last) {
		size_t middle = first + (last - first) / 2;

		if (offset >= extents[middle].end)
			first = middle + 1;
		else if (offset < extents[middle].start)
			last = middle;
		else
			return saved + offset;
	}
	return zeroes;
}

/*
 * A page that was written is given to QEMU even if it is as it was: with several vCPUs QEMU 7.2 may
 * have kept a translation from between two writes.
 */
static void restore_page(uint64_t offset, bool was_written, struct answer *answer)
{
	const uint8_t *wanted = saved_page(offset);
	bool differs = memcmp(ram + offset, wanted, PAGE);
	uint64_t got = PAGE;
	void *mapped;

	answer->candidates++;
	answer->restored += differs;
	if (!differs && !was_written)
		return;
	mapped = map_guest(guest_space, guest_address(offset), &got, true, 0);
	if (mapped == ram + offset && got == PAGE) {
		if (differs)
			memcpy(mapped, wanted, PAGE);
		unmap_guest(guest_space, mapped, PAGE, true, PAGE);
		return;
	}
	/* Something else is at this address now. */
	if (mapped)
		unmap_guest(guest_space, mapped, got, false, 0);
	if (differs)
		memcpy(ram + offset, wanted, PAGE);
	answer->hidden++;
}

static void restore_range(uint64_t start, uint64_t end, bool were_written, struct answer *answer)
{
	for (; start < end && start < bytes; start += PAGE)
		restore_page(start, were_written, answer);
}

/* Restore what was written since protect(). */
static bool restore_written(struct answer *answer)
{
	static struct range found[512];
	struct scan scan = {
		.size = sizeof(scan),
		.flags = CHECK_ASYNC,
		.start = (uintptr_t)ram,
		.end = (uintptr_t)ram + bytes,
		.ranges = (uintptr_t)found,
		.n_ranges = sizeof(found) / sizeof(found[0]),
		.mask = PAGE_WAS_WRITTEN,
		.wanted = PAGE_WAS_WRITTEN,
	};

	while (scan.start < scan.end) {
		uint64_t begun = now(), scanned;
		int n = ioctl(pagemap, SCAN, &scan);

		if (n < 0 || scan.walk_end <= scan.start)
			return false;
		scanned = now();
		for (int i = 0; i < n; i++)
			restore_range(found[i].start - (uintptr_t)ram, found[i].end - (uintptr_t)ram,
				      true, answer);
		answer->find_ns += scanned - begun;
		answer->copy_ns += now() - scanned;
		scan.start = scan.walk_end;
	}
	return true;
}

/* Restore what differs, of all pages that either has. */
static void restore_different(struct answer *answer)
{
	uint64_t begun = now(), done = 0;
	struct range data;

	for (size_t i = 0; i <= n_extents; i++) {
		uint64_t hole_end = i < n_extents ? extents[i].start : bytes;

		while (done < hole_end && next_data(ram_fd, done, &data) && data.start < hole_end) {
			restore_range(data.start, data.end < hole_end ? data.end : hole_end, false,
				      answer);
			done = data.end;
		}
		if (i == n_extents)
			break;
		restore_range(extents[i].start, extents[i].end, false, answer);
		done = extents[i].end;
	}
	answer->copy_ns += now() - begun;
}

/* Give back the memory where the snapshot has none; it is zero by now. */
static void free_holes(struct answer *answer)
{
	uint64_t at = 0;
	struct range data;

	for (size_t i = 0; i <= n_extents; i++) {
		uint64_t hole_end = i < n_extents ? extents[i].start : bytes;

		while (at < hole_end && next_data(ram_fd, at, &data) && data.start < hole_end) {
			uint64_t end = data.end < hole_end ? data.end : hole_end;

			if (!fallocate(ram_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				       (off_t)data.start, (off_t)(end - data.start)))
				answer->freed += end - data.start;
			at = end;
		}
		if (i < n_extents)
			at = extents[i].end;
	}
}

static void track(struct answer *answer)
{
	uint64_t begun = now();

	if (!ram && find_ram())
		start_tracking();
	tracked = protect();
	answer->tracked = tracked;
	answer->rest_ns = now() - begun;
}

static void restore(struct answer *answer)
{
	uint64_t begun;

	if (!ram && find_ram())
		start_tracking();
	if (!ram) {
		answer->error = ENOENT;
		return;
	}
	answer->tracked = tracked && restore_written(answer);
	if (!answer->tracked)
		restore_different(answer);
	begun = now();
	free_holes(answer);
	tracked = protect();
	answer->rest_ns = now() - begun;
}

/* ---- the bridge's requests ----------------------------------------------------------------- */

static void take_request(void *unused)
{
	struct answer answer = { 0 };
	char request;

	(void)unused;
	if (read(control, &request, 1) == 1) {
		if (request == 'T')
			track(&answer);
		else
			restore(&answer);
		if (write(control, &answer, sizeof(answer)) == sizeof(answer))
			return;
	}
	set_handler(control, NULL, NULL, NULL);
}

/* ---- installation -------------------------------------------------------------------------- */

static bool find_extents(void)
{
	struct range data;
	size_t room = 0;

	for (uint64_t at = 0; next_data(saved_fd, at, &data); at = data.end) {
		if (n_extents == room) {
			struct range *more;

			room = room ? 2 * room : 256;
			more = realloc(extents, room * sizeof(*extents));
			if (!more)
				return false;
			extents = more;
		}
		extents[n_extents++] = data;
	}
	return true;
}

static int refuse(const char *why)
{
	fprintf(stderr, "restorer: %s\n", why);
	return 1;
}

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	struct stat status, other;

	(void)id;
	(void)info;
	map_guest = (map_fn)dlsym(RTLD_DEFAULT, "address_space_map");
	unmap_guest = (unmap_fn)dlsym(RTLD_DEFAULT, "address_space_unmap");
	set_handler = (set_handler_fn)dlsym(RTLD_DEFAULT, "qemu_set_fd_handler");
	guest_space = dlsym(RTLD_DEFAULT, "address_space_memory");
	if (!map_guest || !unmap_guest || !set_handler || !guest_space)
		return refuse("this QEMU does not export the functions that write the guest's memory");
	for (int i = 0; i < argc; i++) {
		if (sscanf(argv[i], "ram=%d", &ram_fd) == 1 ||
		    sscanf(argv[i], "saved=%d", &saved_fd) == 1 ||
		    sscanf(argv[i], "control=%d", &control) == 1)
			continue;
		low = strncmp(argv[i], "low=", 4) ? low : strtoull(argv[i] + 4, NULL, 10);
	}
	if (ram_fd < 0 || saved_fd < 0 || control < 0)
		return refuse("ram=FD,saved=FD,control=FD is missing; kcov-bridge passes it");
	if (fstat(ram_fd, &status) || fstat(saved_fd, &other) || status.st_size != other.st_size ||
	    status.st_size <= 0 || (uint64_t)status.st_size % PAGE)
		return refuse("the guest's memory and the snapshot differ in size");
	bytes = (uint64_t)status.st_size;
	saved = mmap(NULL, bytes, PROT_READ, MAP_SHARED, saved_fd, 0);
	if (saved == MAP_FAILED || !find_extents())
		return refuse("out of memory");
	set_handler(control, take_request, NULL, NULL);
	return 0;
}
