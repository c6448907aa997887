// SPDX-License-Identifier: GPL-2.0
/*
 * Tasks that trace, and the work at the end of their system calls.
 *
 * The probe on sys_exit must not sleep. It queues a task work, which runs in process context before
 * the task returns to user mode. If the header's coverage epoch has not changed, there is nothing
 * to fetch, and no work is queued.
 *
 * With several owners, an owner may find coverage of the others' calls. Then the probe on
 * sys_enter notes where coverage stands, and a call asks only if a target can have answered it: it
 * gets what was covered from its begin on. See kb_owner_must_fetch().
 *
 * All code that runs for each system call of an owner is in this file, so that the compiler can
 * optimise it as a whole; elsewhere it calls only kb_instance_settle(), kb_request() and
 * kb_call_reach().
 */

#include <linux/hashtable.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <asm/syscall.h>
#include <asm/tsc.h>

#include "kcov_bridge.h"

#define KB_HASH_BITS		8

static DEFINE_HASHTABLE(kb_owners, KB_HASH_BITS);
static DEFINE_SPINLOCK(kb_owners_lock);

/*
 * Owners that report returns, those of them that tell calls apart, and owners with a log of calls.
 * Guarded by kb_owners_lock.
 */
static unsigned int kb_owners_reporting, kb_owners_telling, kb_owners_logging;

/*
 * Whether owners that tell calls apart note how calls begin: from the moment that another owner
 * reports, too, until none is left. The last one may still find coverage of others, who have ended.
 */
bool kb_entries_noted;
/* Grows each time that becomes so. Guarded by kb_owners_lock; read without it. */
static unsigned int kb_entries_number;
/* Whether an owner needs the probe on sys_enter. */
bool kb_entries_used;

/* Distinguishes owners with the same thread id. */
static atomic_t kb_owner_number = ATOMIC_INIT(0);

static void kb_owner_free(struct kref *ref)
{
	struct kb_owner *owner = container_of(ref, struct kb_owner, ref);
	struct kb_instance *inst = owner->inst;

	put_task_struct(owner->task);
	kb_calls_free(owner);
	kfree_rcu(owner, rcu);
	kref_put(&inst->ref, kb_instance_free);
}

static void kb_owner_put(struct kb_owner *owner)
{
	kref_put(&owner->ref, kb_owner_free);
}

/* Must be called within an RCU read-side section. */
static inline struct kb_owner *kb_owner_find(struct task_struct *task)
{
	struct kb_owner *owner;

	hash_for_each_possible_rcu(kb_owners, owner, node, (unsigned long)task)
		if (owner->task == task)
			return owner;
	return NULL;
}

/**
 * kb_owner_of() - find the owner of a task
 * @task: current
 *
 * Removal, and in gVisor's personality the last close, end the ownership of other tasks. So the
 * caller must be in an RCU read-side section while it uses the result.
 *
 * Return: the owner, or NULL.
 */
struct kb_owner *kb_owner_of(struct task_struct *task)
{
	return kb_owner_find(task);
}

/**
 * kb_current_id() - return the host's name for current
 *
 * Return: its owner's id if it traces, else its thread id, which is no owner's id, because its high
 * half is 0.
 */
u64 kb_current_id(void)
{
	struct kb_owner *mine;
	u64 id;

	rcu_read_lock();
	mine = kb_owner_find(current);
	id = mine ? mine->id : (u32)task_pid_nr(current);
	rcu_read_unlock();
	return id;
}

/* Count an owner that enters the table, or leaves it (-1). */
static void kb_owners_count(const struct kb_owner *owner, int change)
{
	bool noted = kb_entries_noted;

	lockdep_assert_held(&kb_owners_lock);
	kb_owners_reporting += owner->ignores_returns ? 0 : change;
	kb_owners_telling += owner->tells_calls ? change : 0;
	kb_owners_logging += owner->calls ? change : 0;
	if (!kb_owners_telling)
		noted = false;
	else if (kb_owners_reporting > 1)
		noted = true;
	if (noted && !kb_entries_noted)
		WRITE_ONCE(kb_entries_number, kb_entries_number + 1);
	WRITE_ONCE(kb_entries_noted, noted);
	WRITE_ONCE(kb_entries_used, noted || kb_owners_logging);
}

/**
 * kb_owner_end() - end the ownership of an instance, if it has an owner
 * @inst: the instance; the caller holds a reference to it
 */
void kb_owner_end(struct kb_instance *inst)
{
	struct kb_owner *owner = inst->owner;

	lockdep_assert_held(&inst->lock);
	if (!owner)
		return;
	spin_lock(&kb_owners_lock);
	hash_del_rcu(&owner->node);
	kb_owners_count(owner, -1);
	spin_unlock(&kb_owners_lock);
	WRITE_ONCE(inst->owner, NULL);
	kb_owner_put(owner);
}

/**
 * kb_owner_end_exiting() - end the ownership of an exiting task, and report that to the host
 * @inst: the instance, which has an owner; the caller holds a reference to it
 */
void kb_owner_end_exiting(struct kb_instance *inst)
{
	lockdep_assert_held(&inst->lock);
	if (inst->owner->calls)
		kb_calls_end(inst->owner);
	/* Sent below, or by the next operation that finds the host back. */
	kb_instance_defer_exit(inst, inst->owner->id, READ_ONCE(inst->owner->unreported_returns));
	kb_owner_end(inst);
	kb_instance_settle(inst);
}

/**
 * kb_instance_lock() - lock an instance for an operation
 * @inst: the instance
 *
 * An exiting owner releases its mappings, and so wakes the threads that join it, before its exit
 * work runs. So the operation does that work in its place.
 */
void kb_instance_lock(struct kb_instance *inst)
{
	mutex_lock(&inst->lock);
	if (inst->owner && inst->owner->task != current &&
	    (READ_ONCE(inst->owner->task->flags) & PF_EXITING))
		kb_owner_end_exiting(inst);
}

/*
 * Return whether the host may have coverage for the owner. For coverage before an answer that the
 * task has received the epoch has changed, because it is written before the answer is passed on. No
 * value is written twice, so each owner sees the change, regardless of other owners.
 */
static inline bool kb_owner_may_have_coverage(const struct kb_owner *owner)
{
	u64 epoch = READ_ONCE(owner->inst->bridge->header->coverage_epoch);

	return !epoch || epoch != owner->coverage_epoch;
}

/**
 * kb_owner_call_begin() - note what an owner's system call finds when it begins
 * @owner: the owner, which is current and tells calls apart
 * @regs: of the system call
 * @number: its number
 */
void kb_owner_call_begin(struct kb_owner *owner, struct pt_regs *regs, long number)
{
	const struct kb_header *header = owner->inst->bridge->header;
	unsigned int entries_number = READ_ONCE(kb_entries_number);
	struct kb_entry *entry = &owner->entry;

	if (owner->entries_number != entries_number) {
		/* Calls were made that were not noted. */
		owner->entries_number = entries_number;
		owner->unsettled = true;
		owner->later_since = 0;
	}
	entry->reach = kb_call_reach(regs, number);
	entry->epoch = READ_ONCE(header->coverage_epoch);
	entry->since = READ_ONCE(header->coverage_position);
	if (entry->reach == KB_REACH_LATER) {
		u64 position = entry->since;

		entry->since = min(owner->later_since, position);
		owner->later_since = position;
	} else if (owner->unsettled) {
		entry->since = min(owner->later_since, entry->since);
	}
	entry->switches = current->nvcsw;
	entry->cycles = get_cycles();
	entry->noted = true;
}

/*
 * Return whether the owner's system call, which ends, may have coverage of its own for which the host
 * must be asked.
 *
 * A target that a call waits for has answered it only if the epoch has changed meanwhile, and if the
 * call slept or took at least as long as a target's quickest answer. Neither alone is enough: a call
 * whose processor the host took away finds the answer without sleep, and so may one take long that
 * asked for none. So the calls that touch nothing are told by their numbers.
 *
 * A call that may leave work to a target, and the next one after such a call, ask if anything was
 * covered since the last time: as do all calls while there is one owner.
 */
static inline bool kb_owner_must_fetch(const struct kb_owner *owner)
{
	const struct kb_entry *entry = &owner->entry;
	bool slept;
	u64 epoch;

	if (!entry->noted || entry->reach == KB_REACH_LATER)
		return kb_owner_may_have_coverage(owner);
	if (entry->reach == KB_REACH_NONE)
		return false;
	if (owner->unsettled && entry->reach != KB_REACH_WORKS)
		return kb_owner_may_have_coverage(owner);
	if (entry->reach == KB_REACH_WAIT)
		return false;
	epoch = READ_ONCE(owner->inst->bridge->header->coverage_epoch);
	if (epoch && epoch == entry->epoch)
		return false;
	slept = current->nvcsw != entry->switches;
	/* Before its works a task may have to leave the processor, because of the same tick. */
	if (slept || entry->reach == KB_REACH_WORKS)
		return slept;
	return get_cycles() - entry->cycles >= owner->soonest;
}

/*
 * Return whether a return without coverage must be reported: with the epoch 0 all are, and a host
 * that records the kernel empties areas at returns and changes the epoch for that.
 */
static inline bool kb_owner_must_report(const struct kb_owner *owner)
{
	u64 epoch = READ_ONCE(owner->inst->bridge->header->coverage_epoch);

	if (!epoch)
		return true;
	return READ_ONCE(kb_kernel_watched) && epoch != owner->coverage_epoch &&
	       epoch != owner->empty_epoch;
}

/* The works that are queued are the call's too: one that reaches nothing does if they do. */
static void kb_entry_continue(struct kb_owner *owner)
{
	struct kb_entry *entry = &owner->entry;

	if (entry->reach != KB_REACH_NONE &&
	    (entry->reach != KB_REACH_WAIT || owner->unsettled))
		return;
	entry->reach = KB_REACH_WORKS;
	entry->epoch = READ_ONCE(owner->inst->bridge->header->coverage_epoch);
	entry->switches = current->nvcsw;
}

/* Note the end of a system call. @fetched: the host has appended its coverage. */
static inline void kb_entry_end(struct kb_owner *owner, bool fetched)
{
	if (!owner->entry.noted)
		return;
	owner->entry.noted = false;
	if (owner->entry.reach == KB_REACH_LATER)
		owner->unsettled = true;
	else if (fetched)
		owner->unsettled = false;
}

/* Count a return that is not reported. */
static inline void kb_owner_count_return(struct kb_owner *owner)
{
	WRITE_ONCE(owner->unreported_returns, owner->unreported_returns + 1);
	kb_entry_end(owner, false);
}

/* The host has not answered: the next call is to get the coverage since @since as well. */
static void kb_entry_fail(struct kb_owner *owner, u64 since)
{
	kb_entry_end(owner, false);
	if (since == KB_SINCE_NONE)
		return;
	owner->unsettled = true;
	owner->later_since = min(owner->later_since, since);
}

/* Make the host append the owner's coverage since a position. */
static void kb_owner_fetch(struct kb_owner *owner, u64 since)
{
	struct kb_instance *inst = owner->inst;
	struct kb_header *header = inst->bridge->header;
	/* Read before the host collects: later coverage changes the epoch again. */
	u64 epoch = READ_ONCE(header->coverage_epoch);
	u64 returns = owner->unreported_returns;
	int err;

	lockdep_assert_held(&inst->lock);
	if (!kb_instance_settle(inst)) {
		atomic64_inc(&inst->skipped);
		kb_skipped_count(inst->bridge);
		kb_entry_fail(owner, since);
		return;
	}
	owner->unreported_returns = 0;
	err = kb_request(inst, KB_OP_RETURN, owner->id, owner->nr, returns, since);
	if (err)
		kb_entry_fail(owner, since);
	else
		kb_entry_end(owner, since != KB_SINCE_NONE);
	if (!err && since == KB_SINCE_NONE)
		owner->empty_epoch = epoch;
	else if (!err)
		owner->coverage_epoch = epoch;
	else if (err == -EINVAL && owner->stream)
		/* The host's command has ended, and this task still runs. */
		kb_owner_end(inst);
}

/* Make the host empty the log of the owner's calls. */
static void kb_owner_report_calls(struct kb_owner *owner)
{
	struct kb_instance *inst = owner->inst;

	lockdep_assert_held(&inst->lock);
	if (kb_instance_settle(inst) &&
	    kb_request(inst, KB_OP_CALLS, owner->id, 0, 0, 0) == -EINVAL)
		/* The host's command has ended, and this task still runs. */
		kb_owner_end(inst);
}

/* Runs before a system call of the owner returns to user mode. Process context, may sleep. */
static void kb_owner_return_work(struct callback_head *head)
{
	struct kb_owner *owner = container_of(head, struct kb_owner, return_work);
	struct kb_instance *inst = owner->inst;
	bool fetches;

	/*
	 * Works run in the reverse order of queueing, so works that the call itself queued (close()
	 * queues one to drop the last reference to a file) would run after this one. Let them run
	 * first. TWA_NONE, because task_work_run() continues until no work is left.
	 */
	if (head->next && !kb_task_work_add(current, head, TWA_NONE)) {
		owner->return_alone = false;
		kb_recording_resume(inst);
		return;
	}
	owner->return_queued = false;
	/* Before the lock, for which it may sleep. */
	rcu_read_lock();
	fetches = READ_ONCE(inst->owner) == owner && kb_owner_must_fetch(owner);
	rcu_read_unlock();
	mutex_lock(&inst->lock);
	if (inst->owner == owner) {
		kb_recording_pause(inst);
		if (owner->calls && kb_calls_are_many(owner))
			kb_owner_report_calls(owner);
		if (inst->owner == owner && fetches)
			kb_owner_fetch(owner, owner->entry.noted ? owner->entry.since : 0);
		else if (inst->owner == owner && kb_owner_must_report(owner))
			kb_owner_fetch(owner, KB_SINCE_NONE);
		else
			kb_owner_count_return(owner);
		/* A signal is the task's own work: it comes next, or it made this work run. */
		kb_recording_resume_at_exit(inst, owner->return_alone && !signal_pending(current));
	}
	mutex_unlock(&inst->lock);
	kb_owner_put(owner);
}

static void kb_owner_exit_work(struct callback_head *head)
{
	struct kb_owner *owner = container_of(head, struct kb_owner, exit_work);
	struct kb_instance *inst = owner->inst;

	mutex_lock(&inst->lock);
	if (inst->owner == owner)
		kb_owner_end_exiting(inst);
	mutex_unlock(&inst->lock);
	if (owner->untraced_children)
		kb_untraced_report(inst->bridge, owner->stream, owner->untraced_children);
	kb_owner_put(owner);
}

/* Handle the end of an owner's system call. Must be called within an RCU read-side section. */
static inline void kb_owner_call_end(struct kb_owner *owner, struct pt_regs *regs, long result)
{
	bool many = false, works;

	if (unlikely(owner->calls)) {
		kb_call_returns(owner, regs, result);
		many = kb_calls_are_many(owner);
	}
	if (owner->return_queued)
		return;
	/* A work that is already queued may still reach a target. */
	works = READ_ONCE(current->task_works);
	if (owner->ignores_returns || (!works && !many && !kb_owner_must_fetch(owner) &&
				       !(owner->entry.noted && kb_owner_must_report(owner)))) {
		kb_owner_count_return(owner);
		return;
	}
	if (works && owner->entry.noted)
		kb_entry_continue(owner);
	/* Another task may have ended it just now. */
	if (!kref_get_unless_zero(&owner->ref))
		return;
	owner->return_alone = kb_exit_work_is_own(owner->inst);
	kb_recording_pause(owner->inst);
	owner->nr = syscall_get_nr(current, regs);
	owner->return_queued = true;
	if (kb_task_work_add(current, &owner->return_work, TWA_RESUME)) {
		owner->return_queued = false;
		owner->return_alone = false;
	}
	/* All code until the work is the module's if only the module caused exit work. */
	if (!owner->return_alone)
		kb_recording_resume(owner->inst);
	if (!owner->return_queued)
		kb_owner_put(owner);
}

/**
 * kb_sys_exit() - handle the tracepoint sys_exit, of owners and at times of other tasks
 * @unused: not used
 * @regs: of the system call
 * @ret: its result
 *
 * From Linux 6.13 on, probes of system calls do not run in an RCU read-side section of this kind.
 */
void kb_sys_exit(void *unused, struct pt_regs *regs, long ret)
{
	struct kb_owner *owner;

	rcu_read_lock();
	owner = kb_owner_find(current);
	if (unlikely(owner))
		kb_owner_call_end(owner, regs, ret);
	rcu_read_unlock();
	if (likely(!owner))
		kb_task_drop_trace_flag();
}

/**
 * kb_process_exit() - handle the tracepoint sched_process_exit, before the task's last works run
 * @unused: not used
 * @task: current, which is exiting
 */
void kb_process_exit(void *unused, struct task_struct *task)
{
	struct kb_owner *owner;

	rcu_read_lock();
	owner = kb_owner_find(current);
	if (owner && !kref_get_unless_zero(&owner->ref))
		owner = NULL;
	rcu_read_unlock();
	if (likely(!owner))
		return;
	if (kb_task_work_add(current, &owner->exit_work, TWA_NONE))
		kb_owner_put(owner);
}

/* Let a new owner, which is current, and others tell their calls apart from the next one on. */
static void kb_owner_tell_calls(struct kb_owner *owner)
{
	owner->later_since = ~0ULL;
	owner->entries_number = READ_ONCE(kb_entries_number);
	if (!READ_ONCE(kb_entries_noted)) {
		/* Calls that it makes until then will not have been noted. */
		owner->entries_number--;
		return;
	}
	/* Without sys_enter calls get what is covered between them, too. */
	if (kb_hooks_install_enter() || !owner->tells_calls)
		return;
	/* The present call is the one by which it starts, and reaches nothing. */
	owner->entry.reach = KB_REACH_NONE;
	owner->entry.noted = true;
}

/**
 * kb_owner_start() - make current the owner, if the host agrees
 * @inst: the instance; settled
 * @op: an op that starts to trace
 * @arg0: first argument of the request
 * @arg1: second argument
 * @arg2: third argument
 *
 * Return: 0 or a negative errno.
 */
int kb_owner_start(struct kb_instance *inst, enum kb_op op, u64 arg0, u64 arg1, u64 arg2)
{
	const struct kb_response *response = &inst->bridge->responses[inst->slot];
	u64 mine = kb_current_id();
	struct kb_owner *owner;
	u64 flags, soonest_ns;
	int err;

	lockdep_assert_held(&inst->lock);
	err = kb_hooks_install();
	if (err)
		return err;
	owner = kzalloc(sizeof(*owner), GFP_KERNEL);
	if (!owner)
		return -ENOMEM;
	kref_init(&owner->ref);
	owner->task = current;
	owner->inst = inst;
	/*
	 * A task that traces through another instance sends the id that the host knows, so that the
	 * host refuses it. The number above the thread id is needed because thread ids are reused.
	 */
	owner->id = mine >> 32 ? mine : mine | (u64)atomic_inc_return(&kb_owner_number) << 32;
	init_task_work(&owner->return_work, kb_owner_return_work);
	init_task_work(&owner->exit_work, kb_owner_exit_work);
	/* Until kb_recording_resume_current(): the host may watch the task once it answers. */
	if (!inst->owner)
		kb_recording_pause(inst);
	err = kb_request(inst, op, owner->id, arg0, arg1, arg2);
	if (err) {
		kfree(owner);
		return err;
	}
	flags = READ_ONCE(response->flags);
	owner->ignores_returns = flags & KB_ANSWER_SILENT;
	soonest_ns = READ_ONCE(response->soonest_ns);
	owner->tells_calls = soonest_ns && !owner->ignores_returns;
	owner->soonest = div_u64(soonest_ns * tsc_khz, USEC_PER_SEC);
	if (op == KB_OP_STREAM) {
		owner->stream = arg0;
		owner->follows_children = arg2;
	}
	if (op == KB_OP_STREAM && flags & KB_ANSWER_CALLS) {
		/* A descriptor's owner joins by ioctl(), others before their first call. */
		err = kb_calls_start(owner, READ_ONCE(response->area_offset), inst->mapping);
		if (err) {
			kb_instance_defer_exit(inst, owner->id, 0);
			kb_instance_settle(inst);
			kfree(owner);
			return err;
		}
	}
	if (kb_kernel_watched && op != KB_OP_REMOTE)
		kb_owner_await_recording(inst);
	get_task_struct(owner->task);
	kref_get(&inst->ref);
	WRITE_ONCE(inst->owner, owner);
	spin_lock(&kb_owners_lock);
	hash_add_rcu(kb_owners, &owner->node, (unsigned long)owner->task);
	kb_owners_count(owner, 1);
	spin_unlock(&kb_owners_lock);
	kb_owner_tell_calls(owner);
	set_syscall_work(SYSCALL_TRACEPOINT);
	return 0;
}
