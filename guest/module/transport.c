// SPDX-License-Identifier: GPL-2.0
/*
 * Slots, requests and answers, and a host that does not answer.
 *
 * The module writes a request into its slot, seq last. It notifies the host by a word of the header
 * (kick), and by the doorbell if the host sleeps. Then it waits for the answer: it polls for a
 * moment, then sleeps, kb_timeout_ms at most. A host that does not answer in time counts as gone,
 * and no task waits for it again until an answer or a new epoch shows that it is back.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/io.h>
#include <linux/ktime.h>
#include <linux/random.h>
#include <asm/tsc.h>

#include "kcov_bridge.h"

#define KB_KICK_TRIES		64
#define KB_SLEEP_MIN_US		20
#define KB_SLEEP_MAX_US		1000

static atomic64_t kb_number = ATOMIC64_INIT(0);

/**
 * kb_numbers_seed() - start the numbers at a random value
 *
 * So a module that is loaded again, or a guest that was rebooted, does not repeat a number.
 */
void kb_numbers_seed(void)
{
	atomic64_set(&kb_number, get_random_u64() >> 1);
}

/**
 * kb_number_new() - make a number for a request or a generation
 *
 * Return: a number that was never used before.
 */
u64 kb_number_new(void)
{
	return atomic64_inc_return(&kb_number);
}

/* ---- a host that does not answer ----------------------------------------------------------- */

/**
 * kb_host_is_gone_slow() - the slow path of kb_host_is_gone()
 * @bridge: the device
 * @epoch: the host's epoch, read just before
 *
 * Return: true if a request would get no answer.
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
	/* Read before the host can see the time-out, to which it reacts with a new epoch. */
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
		pr_info_ratelimited("no answer from the host in %u ms; continuing without it\n",
				    kb_timeout_ms);
}

/* ---- requests ------------------------------------------------------------------------------ */

static void kb_doorbell_kick(struct kb_bridge *bridge, unsigned int slot)
{
	/* A guess, because reading kick first would fetch its cache line from the host once more. */
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
	 * cmpxchg() is a full barrier between kick and host_state. It pairs with the barrier of the
	 * host's doorbell, which writes host_state and then reads kick before it sleeps.
	 */
	if (tries == KB_KICK_TRIES || READ_ONCE(bridge->header->host_state) != KB_HOST_AWAKE)
		iowrite32(bridge->host_peer << 16, bridge->registers + KB_REG_DOORBELL);
}

/* Wait for the answer to the request @seq in @slot; return whether it came. May sleep. */
static bool kb_request_wait(struct kb_bridge *bridge, unsigned int slot, u64 seq)
{
	u64 spin = (u64)READ_ONCE(kb_spin_us) * tsc_khz / 1000;
	unsigned int sleep_us = KB_SLEEP_MIN_US;
	u64 start = get_cycles();
	ktime_t end;

	/*
	 * The time-stamp counter, because reading the clock may leave the guest. A task that
	 * moves to a processor with another counter only polls for less or for longer; the clock
	 * bounds the loop below.
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

/* Write a request into @slot and notify the host. With the same @seq it is the same request. */
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

/* Send inst->request and wait for its answer; see kb_request(). */
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
 * kb_slots_name_generations() - write to each slot the generation of its instance, 0 for none
 * @bridge: the device
 *
 * Return: whether any slot had another value.
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
 * @inst: the instance whose slot is used; settled
 * @op: the operation
 * @task: the host's name for the task of the request, or 0
 * @arg0: see enum kb_op
 * @arg1: see enum kb_op
 * @arg2: see enum kb_op
 *
 * A program that writes to the region can make the host assign a slot to a false instance, which
 * holds room and tasks. If the host is short of these, the module writes each slot's generation
 * again; the host ends instances that no slot names, and the module sends the request once more.
 *
 * Return: 0, a negative errno from the host, or -EIO without an answer.
 */
int kb_request(struct kb_instance *inst, enum kb_op op, u64 task, u64 arg0, u64 arg1, u64 arg2)
{
	int err;

	lockdep_assert_held(&inst->lock);
	/* Field by field: a whole struct would be cleared and copied by string instructions. */
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

/* ---- the host's view of instances ---------------------------------------------------------- */

/**
 * kb_instance_defer_exit() - note an end of ownership that must be reported to the host
 * @inst: the instance
 * @task: the host's name for the task
 * @returns: its unreported returns
 *
 * kb_instance_settle() reports it.
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
 * If the last request timed out, its caller got an error. If the host has carried it out since,
 * this function undoes or completes that.
 *
 * Return: false while the host does not answer, and once the device is gone.
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
		/* Another request may have overwritten its payload. */
		if ((op == KB_OP_REMOTE || op == KB_OP_KERNEL || op == KB_OP_MODULE) &&
		    READ_ONCE(bridge->payload_inst) != inst)
			inst->request.op = KB_OP_NONE;
		/* It may have been overwritten on its way. The next caller gets the answer. */
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
 * kb_instance_init() - initialise an instance, except for its slot and references
 * @inst: the instance, zeroed
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
 * kb_slot_acquire() - give an instance its own slot
 * @inst: the instance
 *
 * Return: 0, -ENOMEM if all slots are in use, or -ENODEV if the device is being removed.
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
		/* The module's own instance has no owner, and never ends before the device. */
		if (inst != &bridge->self)
			bridge->instances[slot] = inst;
		inst->slot = slot;
		WRITE_ONCE(inst->hidden, &bridge->requests[slot].hidden);
	}
	spin_unlock(&bridge->slots_lock);
	return slot < KB_SLOTS ? 0 : -ENOMEM;
}

/**
 * kb_slot_release() - release the slot of an instance that ends
 * @inst: the instance; the caller has the only reference
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
