// SPDX-License-Identifier: GPL-2.0
/*
 * Slots, requests and answers, and a host that does not answer.
 *
 * A request is written into its slot, its number last; then the host is told by a word of the
 * header (kick), and by the doorbell where it sleeps. The answer is waited for: busily for a
 * moment, then asleep, kb_timeout_ms at most. A host that does not answer in time is taken for
 * gone, and nobody waits for it again until it shows itself by an answer or a new epoch.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/io.h>
#include <linux/ktime.h>
#include <linux/random.h>
#include <asm/tsc.h>

#include "kcov_bridge.h"

/* Registers of ivshmem-doorbell in BAR 0: docs/specs/ivshmem-spec.txt in QEMU. */
#define KB_REG_DOORBELL		12

#define KB_KICK_TRIES		64
#define KB_SLEEP_MIN_US		20
#define KB_SLEEP_MAX_US		1000

static atomic64_t kb_number = ATOMIC64_INIT(0);

/**
 * kb_numbers_seed() - begin to count at random
 *
 * So a module that is loaded again, or a guest that was rebooted, repeats no number.
 */
void kb_numbers_seed(void)
{
	atomic64_set(&kb_number, get_random_u64() >> 1);
}

/**
 * kb_number_new() - a number for a request or a generation
 *
 * Return: a number that was never used before.
 */
u64 kb_number_new(void)
{
	return atomic64_inc_return(&kb_number);
}

/* ---- a host that does not answer ----------------------------------------------------------- */

/**
 * kb_host_is_gone_slow() - kb_host_is_gone() where that is not clear at once
 * @bridge: the device
 * @epoch: the host's epoch, as just read
 *
 * Return: true if there is no point in asking.
 */
bool kb_host_is_gone_slow(struct kb_bridge *bridge, u64 epoch)
{
	bool gone;

	if (!epoch)
		return true;
	spin_lock(&bridge->lost_lock);
	if (bridge->lost &&
	    (epoch != bridge->lost_epoch ||
	     kb_slot_is_answered(bridge, bridge->lost_slot, bridge->lost_seq))) {
		WRITE_ONCE(bridge->lost, false);
		pr_info("the host is back\n");
	}
	gone = bridge->lost;
	spin_unlock(&bridge->lost_lock);
	return gone;
}

static void kb_host_mark_lost(struct kb_bridge *bridge, unsigned int slot, u64 seq)
{
	/* Before the host can learn of it: it answers a time-out with a new epoch. */
	u64 epoch = READ_ONCE(bridge->header->host_epoch);
	bool first;

	WRITE_ONCE(bridge->header->guest_timeouts, atomic64_inc_return(&bridge->timeouts));
	spin_lock(&bridge->lost_lock);
	first = !bridge->lost;
	bridge->lost_slot = slot;
	bridge->lost_seq = seq;
	bridge->lost_epoch = epoch;
	WRITE_ONCE(bridge->lost, true);
	spin_unlock(&bridge->lost_lock);
	if (first)
		pr_info_ratelimited("no answer from the host in %u ms; going on without it\n",
				    kb_timeout_ms);
}

/* ---- requests ------------------------------------------------------------------------------ */

static void kb_doorbell_kick(struct kb_bridge *bridge, unsigned int slot)
{
	/* A guess: to read it first would fetch the cache line from the host once more. */
	u64 old = READ_ONCE(bridge->kicked);
	int tries;

	for (tries = 0; tries < KB_KICK_TRIES; tries++) {
		u64 next = (((old >> KB_KICK_SLOT_BITS) + 1) << KB_KICK_SLOT_BITS) | slot;
		u64 seen = cmpxchg(&bridge->header->kick, old, next);

		if (seen == old) {
			WRITE_ONCE(bridge->kicked, next);
			break;
		}
		old = seen;
	}
	/*
	 * cmpxchg() is a full barrier between kick and host_state; it pairs with the one of the
	 * host's doorbell, which writes host_state and then reads kick before it sleeps.
	 */
	if (tries == KB_KICK_TRIES || READ_ONCE(bridge->header->host_state) != KB_HOST_AWAKE)
		iowrite32(bridge->host_peer << 16, bridge->registers + KB_REG_DOORBELL);
}

/* Waits for the answer to the request @seq in @slot: true if it came. May sleep. */
static bool kb_request_wait(struct kb_bridge *bridge, unsigned int slot, u64 seq)
{
	u64 spin = (u64)READ_ONCE(kb_spin_us) * tsc_khz / 1000;
	unsigned int sleep_us = KB_SLEEP_MIN_US;
	u64 start = get_cycles();
	ktime_t end;

	/*
	 * The time-stamp counter, because reading the clock may leave the guest. A task that
	 * moves to a processor with another counter only waits busily for less or for longer;
	 * the loop below is bounded by the clock.
	 */
	do {
		if (kb_slot_is_answered(bridge, slot, seq))
			return true;
		cpu_relax();
	} while (get_cycles() - start < spin && !need_resched());

	end = ktime_add_ms(ktime_get(), READ_ONCE(kb_timeout_ms));
	while (!kb_slot_is_answered(bridge, slot, seq)) {
		if (ktime_after(ktime_get(), end))
			return kb_slot_is_answered(bridge, slot, seq);
		usleep_range(sleep_us, sleep_us * 2);
		sleep_us = min_t(unsigned int, sleep_us * 2, KB_SLEEP_MAX_US);
	}
	return true;
}

/* Writes a request into @slot and tells the host. Sent again with its old @seq, it is one still. */
static void kb_request_send(struct kb_bridge *bridge, unsigned int slot, u64 seq,
			    const struct kb_request *from)
{
	struct kb_request *request = &bridge->requests[slot];

	WRITE_ONCE(request->op, from->op);
	WRITE_ONCE(request->generation, from->generation);
	WRITE_ONCE(request->task, from->task);
	WRITE_ONCE(request->arg0, from->arg0);
	WRITE_ONCE(request->arg1, from->arg1);
	WRITE_ONCE(request->arg2, from->arg2);
	/* Pairs with the host's read of the whole request, which begins with seq. */
	smp_store_release(&request->seq, seq);
	kb_doorbell_kick(bridge, slot);
}

/* Sends inst->request and waits for its answer; see kb_request(). */
static int kb_request_try(struct kb_instance *inst)
{
	struct kb_bridge *bridge = inst->bridge;
	u64 error;

	inst->seq = kb_number_new();
	kb_request_send(bridge, inst->slot, inst->seq, &inst->request);
	if (!kb_request_wait(bridge, inst->slot, inst->seq)) {
		inst->unanswered = inst->request.op;
		atomic64_inc(&inst->timeouts);
		kb_host_mark_lost(bridge, inst->slot, inst->seq);
		return -EIO;
	}
	WRITE_ONCE(inst->answered, true);
	error = READ_ONCE(bridge->responses[inst->slot].error);
	return error > MAX_ERRNO ? -EIO : -(int)error;
}

/**
 * kb_slots_name_generations() - say in each slot which open it belongs to, 0 for none
 * @bridge: the device
 *
 * Return: whether any slot said otherwise.
 */
bool kb_slots_name_generations(struct kb_bridge *bridge)
{
	bool changed = false;
	unsigned int slot;

	spin_lock(&bridge->slots_lock);
	for (slot = 0; slot < KB_SLOTS; slot++) {
		struct kb_instance *inst = bridge->instances[slot];
		u64 generation = inst ? READ_ONCE(inst->generation) : 0;

		if (READ_ONCE(bridge->requests[slot].generation) != generation) {
			WRITE_ONCE(bridge->requests[slot].generation, generation);
			changed = true;
		}
	}
	spin_unlock(&bridge->slots_lock);
	return changed;
}

/**
 * kb_request() - send a request and wait for its answer
 * @inst: whose slot is used; settled
 * @op: what is asked
 * @task: how the host knows the task that it is about, or 0
 * @arg0: see enum kb_op
 * @arg1: see enum kb_op
 * @arg2: see enum kb_op
 *
 * Anybody who can write to the region can make the host take a slot for somebody else's, and hold
 * room and tasks in its name. Where the host is short of them, each slot says again whose it is;
 * the host ends what no slot names, and is asked once more.
 *
 * Return: 0, a negative errno from the host, or -EIO where there is no answer.
 */
int kb_request(struct kb_instance *inst, enum kb_op op, u64 task, u64 arg0, u64 arg1, u64 arg2)
{
	int err;

	lockdep_assert_held(&inst->lock);
	/* Field by field: a whole struct is cleared and copied by string instructions first. */
	inst->request.op = op;
	inst->request.generation = inst->generation;
	inst->request.task = task;
	inst->request.arg0 = arg0;
	inst->request.arg1 = arg1;
	inst->request.arg2 = arg2;
	err = kb_request_try(inst);
	if ((err == -ENOMEM || err == -EBUSY || err == -EEXIST) &&
	    kb_slots_name_generations(inst->bridge))
		err = kb_request_try(inst);
	return err;
}

/* ---- instances, as the host knows them ----------------------------------------------------- */

/**
 * kb_instance_defer_exit() - note that the host is to be told that a task owns the instance no more
 * @inst: the instance
 * @task: how the host knows the task
 * @returns: its returns that the host does not know of
 *
 * kb_instance_settle() tells it.
 */
void kb_instance_defer_exit(struct kb_instance *inst, u64 task, u64 returns)
{
	lockdep_assert_held(&inst->lock);
	inst->deferred_exit = task;
	inst->deferred_returns = returns;
}

/**
 * kb_instance_settle() - make the slot usable for a request
 * @inst: the instance
 *
 * Where the last request was given up, its caller was told that it failed; what the host made of
 * it later is undone or followed here.
 *
 * Return: false while the host does not answer, or once the device is gone.
 */
bool kb_instance_settle(struct kb_instance *inst)
{
	struct kb_bridge *bridge = inst->bridge;
	u64 op = inst->unanswered;
	bool done;

	lockdep_assert_held(&inst->lock);
	if (inst->detached || kb_host_is_gone(bridge))
		return false;
	if (likely(!op && !inst->deferred_exit))
		return true;
	if (op && !kb_slot_is_answered(bridge, inst->slot, inst->seq)) {
		/* Its payload may be another's by now. */
		if ((op == KB_OP_REMOTE || op == KB_OP_KERNEL || op == KB_OP_MODULE) &&
		    READ_ONCE(bridge->payload_inst) != inst)
			inst->request.op = KB_OP_NONE;
		/* Overwritten on its way, perhaps. The answer is for the next caller. */
		kb_request_send(bridge, inst->slot, inst->seq, &inst->request);
		return false;
	}
	inst->unanswered = 0;
	done = op && !READ_ONCE(bridge->responses[inst->slot].error);
	if (op == KB_OP_INIT && done)
		WRITE_ONCE(inst->generation, kb_number_new());
	else if ((op == KB_OP_ENABLE || op == KB_OP_UNIQUE || op == KB_OP_REMOTE ||
		  op == KB_OP_STREAM) && done)
		kb_instance_defer_exit(inst, inst->request.task, 0);
	else if ((op == KB_OP_DISABLE || op == KB_OP_CLOSE) && done)
		kb_owner_end(inst);
	if (inst->deferred_exit) {
		u64 id = inst->deferred_exit;

		inst->deferred_exit = 0;
		kb_request(inst, KB_OP_EXIT, id, 0, inst->deferred_returns, 0);
	}
	return !inst->unanswered;
}

/**
 * kb_instance_init() - begin an instance, except for its slot and references
 * @inst: zeroed
 * @bridge: the device that it belongs to
 */
void kb_instance_init(struct kb_instance *inst, struct kb_bridge *bridge)
{
	mutex_init(&inst->lock);
	inst->bridge = bridge;
	inst->generation = kb_number_new();
	inst->hidden = &inst->nowhere;
}

/**
 * kb_slot_acquire() - give an instance a slot of its own
 * @inst: the instance
 *
 * Return: 0, -ENOMEM if all slots are taken, or -ENODEV if the device goes away.
 */
int kb_slot_acquire(struct kb_instance *inst)
{
	const struct kb_request release = { .op = KB_OP_RELEASE };
	struct kb_bridge *bridge = inst->bridge;
	unsigned int slot;

	spin_lock(&bridge->slots_lock);
	if (bridge->removed) {
		spin_unlock(&bridge->slots_lock);
		return -ENODEV;
	}
	for_each_set_bit(slot, bridge->zombies, KB_SLOTS) {
		if (kb_slot_is_answered(bridge, slot, bridge->zombie_seq[slot])) {
			__clear_bit(slot, bridge->zombies);
			__clear_bit(slot, bridge->slots);
		} else {
			kb_request_send(bridge, slot, bridge->zombie_seq[slot], &release);
		}
	}
	slot = find_first_zero_bit(bridge->slots, KB_SLOTS);
	if (slot < KB_SLOTS) {
		__set_bit(slot, bridge->slots);
		/* The module's own has no owner, and never ends before the device. */
		if (inst != &bridge->self)
			bridge->instances[slot] = inst;
		inst->slot = slot;
		WRITE_ONCE(inst->hidden, &bridge->requests[slot].hidden);
	}
	spin_unlock(&bridge->slots_lock);
	return slot < KB_SLOTS ? 0 : -ENOMEM;
}

/**
 * kb_slot_release() - give the slot of an instance that ends back
 * @inst: the instance; nobody else has it any more
 */
void kb_slot_release(struct kb_instance *inst)
{
	struct kb_bridge *bridge = inst->bridge;

	spin_lock(&bridge->slots_lock);
	WRITE_ONCE(bridge->instances[inst->slot], NULL);
	if (inst->unanswered) {
		bridge->zombie_seq[inst->slot] = inst->seq;
		__set_bit(inst->slot, bridge->zombies);
	} else {
		__clear_bit(inst->slot, bridge->slots);
	}
	spin_unlock(&bridge->slots_lock);
	wake_up(&bridge->slot_released);
}
