// SPDX-License-Identifier: GPL-2.0
/*
 * Tasks that trace, and the work at the end of their system calls.
 *
 * The probe on sys_exit must not sleep. It queues a task work, which runs in process context before
 * the task returns to user mode. If the header's coverage epoch has not changed, there is nothing
 * to fetch, and no work is queued.
 *
 * All code that runs for each system call of an owner is in this file, so that the compiler can
 * optimise it as a whole; elsewhere it calls only kb_instance_settle() and kb_request().
 */

#include <linux/hashtable.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <asm/syscall.h>

#include "kcov_bridge.h"

#define KB_HASH_BITS		8

static DEFINE_HASHTABLE(kb_owners, KB_HASH_BITS);
static DEFINE_SPINLOCK(kb_owners_lock);

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

/* Make the host append the owner's new coverage. */
static void kb_owner_fetch(struct kb_owner *owner)
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
		return;
	}
	owner->unreported_returns = 0;
	err = kb_request(inst, KB_OP_RETURN, owner->id, owner->nr, returns, 0);
	if (!err)
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
	mutex_lock(&inst->lock);
	if (inst->owner == owner) {
		kb_recording_pause(inst);
		if (owner->calls && kb_calls_are_many(owner))
			kb_owner_report_calls(owner);
		if (inst->owner == owner && kb_owner_may_have_coverage(owner))
			kb_owner_fetch(owner);
		else
			WRITE_ONCE(owner->unreported_returns, owner->unreported_returns + 1);
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
	bool many = false;

	if (unlikely(owner->calls)) {
		kb_call_returns(owner, regs, result);
		many = kb_calls_are_many(owner);
	}
	if (owner->return_queued)
		return;
	/* A work that is already queued may still change the epoch. */
	if (owner->ignores_returns || (!kb_owner_may_have_coverage(owner) &&
				       !READ_ONCE(current->task_works) && !many)) {
		WRITE_ONCE(owner->unreported_returns, owner->unreported_returns + 1);
		return;
	}
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
	u64 flags;
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
	spin_unlock(&kb_owners_lock);
	set_syscall_work(SYSCALL_TRACEPOINT);
	return 0;
}
