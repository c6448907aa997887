// SPDX-License-Identifier: Apache-2.0
/*
 * io_uring: io_uring_enter is a call like any; what a kernel thread does is not the owner's.
 *
 * The owner need not make a call to be in the kernel: Linux records what runs in its name when it
 * was interrupted and goes on. So a request's own PCs are learnt first, from io_uring_enter.
 */
#include "kcov_test.h"

#include <linux/io_uring.h>

#define ROUNDS 4
#define PCS 4096

/* What each round left: submitting a request, and sleeping for a moment. */
static struct left {
	uint64_t pcs[PCS];
	size_t length;
} entered[ROUNDS], slept[ROUNDS];

struct ring {
	int fd;
	unsigned int *sq_tail, *sq_mask, *sq_array, *sq_flags, *cq_head, *cq_tail;
	struct io_uring_sqe *sqes;
};

static int ring_new(struct ring *ring, unsigned int flags)
{
	struct io_uring_params params = { .flags = flags, .sq_thread_idle = 60000 };
	char *sq, *cq;

	ring->fd = syscall(SYS_io_uring_setup, 4, &params);
	if (ring->fd < 0)
		return errno;
	sq = mmap(NULL, params.sq_off.array + params.sq_entries * sizeof(unsigned int),
		  PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
	cq = mmap(NULL, params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe),
		  PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_CQ_RING);
	ring->sqes = mmap(NULL, params.sq_entries * sizeof(*ring->sqes), PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || ring->sqes == MAP_FAILED)
		bail("mmap of a ring");
	ring->sq_tail = (unsigned int *)(sq + params.sq_off.tail);
	ring->sq_mask = (unsigned int *)(sq + params.sq_off.ring_mask);
	ring->sq_array = (unsigned int *)(sq + params.sq_off.array);
	ring->sq_flags = (unsigned int *)(sq + params.sq_off.flags);
	ring->cq_head = (unsigned int *)(cq + params.cq_off.head);
	ring->cq_tail = (unsigned int *)(cq + params.cq_off.tail);
	return 0;
}

static void submit(struct ring *ring)
{
	unsigned int tail = *ring->sq_tail, index = tail & *ring->sq_mask;

	memset(&ring->sqes[index], 0, sizeof(ring->sqes[index]));
	ring->sqes[index].opcode = IORING_OP_NOP;
	ring->sq_array[index] = index;
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
}

/* Whether a completion came; no system call. */
static int completed(struct ring *ring, unsigned long spins)
{
	unsigned int head = *ring->cq_head;

	while (spins-- && __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) == head)
		;
	if (__atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) == head)
		return 0;
	__atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
	return 1;
}

static void take(struct left *left, const struct kcov *kcov)
{
	uint64_t n = count(kcov);

	for (left->length = 0; left->length < n && left->length < PCS; left->length++)
		left->pcs[left->length] = kcov->area[left->length + 1];
}

static int is_in(const struct left *left, uint64_t pc)
{
	for (size_t i = 0; i < left->length; i++)
		if (left->pcs[i] == pc)
			return 1;
	return 0;
}

/* Whether a request leaves the PC whenever it is carried out by a call, and sleeping never does. */
static int is_requests(uint64_t pc)
{
	for (int round = 0; round < ROUNDS; round++)
		if (!is_in(&entered[round], pc) || is_in(&slept[round], pc))
			return 0;
	return 1;
}

/* Of what is in the area, how many are a request's. */
static int requests_pcs(const struct left *left)
{
	int found = 0;

	for (size_t i = 0; i < left->length; i++)
		found += is_requests(left->pcs[i]);
	return found;
}

static int enter(struct kcov *kcov)
{
	struct ring ring;
	int error = ring_new(&ring, 0);

	if (error) {
		skip("io_uring_enter", strerror(error));
		return 0;
	}
	submit(&ring);
	reset(kcov);
	is(syscall(SYS_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0), 1,
	   "io_uring_enter submits");
	ok(count(kcov) > 0, "and leaves PCs");
	ok(completed(&ring, 1), "the request is done");
	for (int round = 0; round < ROUNDS; round++) {
		submit(&ring);
		reset(kcov);
		syscall(SYS_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
		take(&entered[round], kcov);
		completed(&ring, 1);
		reset(kcov);
		usleep(1000);
		take(&slept[round], kcov);
	}
	ok(requests_pcs(&entered[0]) > 0, "there are PCs that only a request leaves");
	close(ring.fd);
	return 1;
}

static void polled(struct kcov *kcov)
{
	static struct left found;
	struct ring ring;
	int error = ring_new(&ring, IORING_SETUP_SQPOLL);
	int done;

	if (error) {
		skip("a submission thread", strerror(error));
		return;
	}
	submit(&ring);
	if (__atomic_load_n(ring.sq_flags, __ATOMIC_ACQUIRE) & IORING_SQ_NEED_WAKEUP)
		syscall(SYS_io_uring_enter, ring.fd, 1, 0, IORING_ENTER_SQ_WAKEUP, NULL, 0);
	while (!completed(&ring, 1000))
		usleep(1000);
	submit(&ring);
	reset(kcov);
	done = completed(&ring, 20000000000UL);
	take(&found, kcov);
	ok(done, "a kernel thread carries a request out");
	is(requests_pcs(&found), 0, "which leaves none of its PCs: it is no call of the owner's");
	close(ring.fd);
}

int main(int argc, char **argv)
{
	struct kcov kcov;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	is(kcov_enable(&kcov), 0, "ENABLE");
	if (enter(&kcov))
		polled(&kcov);
	ok(traces(&kcov), "tracing goes on");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
	return end();
}
