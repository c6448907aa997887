// SPDX-License-Identifier: GPL-2.0
/*
 * Following: the children of a task that traces into a stream trace into it as well.
 *
 * A stream is the host's (KCOV_BRIDGE_STREAM). Each of its tasks has an instance of its own; that
 * of a child has no descriptor, and nobody maps its area, which the host reads itself. So nothing
 * that a program may do or not do matters to it: where it is, what it has open, who it is, how it
 * was linked.
 */

#include <linux/err.h>
#include <linux/slab.h>

#include "kcov_bridge.h"

/* A task that begins to trace as soon as it runs. Belongs to its work. */
struct kb_child {
	struct callback_head work;
	/* Holds a reference to it. */
	struct kb_bridge *bridge;
	u64 stream;
};

/**
 * kb_untraced_report() - tell the host of tasks of a stream that are not traced
 * @bridge: the device
 * @stream: the stream
 * @tasks: how many
 *
 * Process context, may sleep.
 */
void kb_untraced_report(struct kb_bridge *bridge, u64 stream, u64 tasks)
{
	struct kb_instance *self = &bridge->self;
	int err = -EIO;

	mutex_lock(&self->lock);
	if (kb_instance_settle(self))
		err = kb_request(self, KB_OP_UNTRACED, 0, stream, tasks, 0);
	if (err == -EIO && !self->detached) {
		/* The command may end before the host answers again, and the host looks here. */
		bridge->untraced += tasks;
		WRITE_ONCE(bridge->header->guest_untraced, bridge->untraced);
	}
	mutex_unlock(&self->lock);
}

/* Makes current trace into the stream. */
static int kb_current_join(struct kb_bridge *bridge, u64 stream)
{
	struct kb_instance *inst = kb_instance_new(bridge, NULL);
	int err = -EIO;

	if (IS_ERR(inst))
		return PTR_ERR(inst);
	mutex_lock(&inst->lock);
	if (kb_instance_settle(inst))
		err = kb_owner_start(inst, KB_OP_STREAM, stream, (unsigned long)current, true);
	mutex_unlock(&inst->lock);
	kb_recording_resume_current();
	/* The owner has a reference of its own. */
	kref_put(&inst->ref, kb_instance_free);
	return err;
}

/* The child is about to run for the first time, in its own context. May sleep. */
static void kb_child_work(struct callback_head *head)
{
	struct kb_child *child = container_of(head, struct kb_child, work);
	int err;

	/* Nothing is missed of one that was killed before it did anything. */
	if (!(current->flags & PF_EXITING)) {
		err = kb_current_join(child->bridge, child->stream);
		/* ESRCH: the command that it belongs to has ended. */
		if (err && err != -ESRCH)
			kb_untraced_report(child->bridge, child->stream, 1);
	}
	kb_bridge_put(child->bridge);
	kfree(child);
	module_put(THIS_MODULE);
}

static int kb_child_work_queue(struct task_struct *task, struct kb_bridge *bridge, u64 stream)
{
	struct kb_child *child = kmalloc(sizeof(*child), GFP_ATOMIC | __GFP_NOWARN);

	if (!child)
		return -ENOMEM;
	/* Removal may just have ended the parent's ownership. */
	if (!kref_get_unless_zero(&bridge->ref)) {
		kfree(child);
		return -ENODEV;
	}
	child->bridge = bridge;
	child->stream = stream;
	__module_get(THIS_MODULE);
	init_task_work(&child->work, kb_child_work);
	if (!kb_task_work_add(task, &child->work, TWA_RESUME))
		return 0;
	module_put(THIS_MODULE);
	kb_bridge_put(bridge);
	kfree(child);
	return -ESRCH;
}

/**
 * kb_process_fork() - tracepoint sched_process_fork, in the parent
 * @unused: nothing
 * @parent: current
 * @child: has not run yet; its work runs before it comes to user mode for the first time
 */
void kb_process_fork(void *unused, struct task_struct *parent, struct task_struct *child)
{
	struct kb_owner *owner;

	rcu_read_lock();
	owner = kb_owner_of(current);
	if (unlikely(owner && owner->follows_children)) {
		kb_recording_pause(owner->inst);
		if (kb_child_work_queue(child, owner->inst->bridge, owner->stream))
			owner->untraced_children++;
		kb_recording_resume(owner->inst);
	}
	rcu_read_unlock();
}
