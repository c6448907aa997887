// SPDX-License-Identifier: GPL-2.0
/*
 * Following: the children of a task that traces into a stream trace into it as well.
 *
 * A stream belongs to the host (KCOV_BRIDGE_STREAM). Each of its tasks has its own instance. A
 * child's instance has no descriptor, and no process maps its area, which the host reads itself. So
 * a program's restrictions do not affect it: its root and namespaces, its descriptors, its
 * credentials, and how it was linked.
 */

#include <linux/err.h>
#include <linux/slab.h>

#include "kcov_bridge.h"

/* A child that starts to trace as soon as it runs. Its work owns this. */
struct kb_child {
	struct callback_head work;
	/* Holds a reference to the device. */
	struct kb_bridge *bridge;
	u64 stream;
};

/**
 * kb_untraced_report() - report untraced tasks of a stream to the host
 * @bridge: the device
 * @stream: the stream
 * @tasks: number of tasks
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
		/* The command may end before the host answers again; the host reads this word. */
		bridge->untraced += tasks;
		WRITE_ONCE(bridge->header->guest_untraced, bridge->untraced);
	}
	mutex_unlock(&self->lock);
}

/* Make current trace into the stream. */
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
	/* The owner holds its own reference. */
	kref_put(&inst->ref, kb_instance_free);
	return err;
}

/* Runs in the child's context, before its first instruction in user mode. May sleep. */
static void kb_child_work(struct callback_head *head)
{
	struct kb_child *child = container_of(head, struct kb_child, work);
	int err;

	/* A child that was killed before it ran has covered nothing. */
	if (!(current->flags & PF_EXITING)) {
		err = kb_current_join(child->bridge, child->stream);
		/* ESRCH: the child's command has ended. */
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
	/* Removal may have ended the parent's ownership just now. */
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
 * kb_process_fork() - handle the tracepoint sched_process_fork, in the parent
 * @unused: not used
 * @parent: current
 * @child: has not run yet; its work runs before its first instruction in user mode
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
