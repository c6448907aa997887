// SPDX-License-Identifier: GPL-2.0
/*
 * The tracepoints that show system calls, exits and forks of owners: sys_exit,
 * sched_process_exit and sched_process_fork.
 *
 * The first ENABLE hooks them; the first owner with a log of its calls, or the second owner of any
 * kind, hooks sys_enter. Their cost for other tasks is removed again; see kb_task_drop_trace_flag().
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kprobes.h>
#include <linux/sched/signal.h>
#include <linux/workqueue.h>

#include "kcov_bridge.h"

/* Guards kb_hooked, kb_enter_hooked and kb_foreign_watched. */
static DEFINE_MUTEX(kb_hook_lock);
static bool kb_hooked;
static bool kb_enter_hooked;
/* Whether kb_foreign_probe() sees probes that others add. */
static bool kb_foreign_watched;

static struct tracepoint *kb_tp_sys_enter;
static struct tracepoint *kb_tp_sys_exit;
static struct tracepoint *kb_tp_process_exit;
static struct tracepoint *kb_tp_process_fork;

/* Whether the module's probe is the only one on the tracepoints of system calls. */
bool kb_trace_flag_exclusive;

int (*kb_task_work_add)(struct task_struct *task, struct callback_head *work,
			enum task_work_notify_mode notify);

static void kb_tracepoint_match(struct tracepoint *tp, void *unused)
{
	if (!strcmp(tp->name, "sys_enter"))
		kb_tp_sys_enter = tp;
	else if (!strcmp(tp->name, "sys_exit"))
		kb_tp_sys_exit = tp;
	else if (!strcmp(tp->name, "sched_process_exit"))
		kb_tp_process_exit = tp;
	else if (!strcmp(tp->name, "sched_process_fork"))
		kb_tp_process_fork = tp;
}

#ifdef KB_TASK_WORK_EXPORTED
static void kb_task_work_add_find(void)
{
	kb_task_work_add = task_work_add;
}
#else
static void kb_task_work_add_find(void)
{
	struct kprobe probe = { .symbol_name = "task_work_add" };

	/* A kprobe finds the address of a function that the kernel does not export. */
	if (!register_kprobe(&probe)) {
		kb_task_work_add = (void *)probe.addr;
		unregister_kprobe(&probe);
	}
}
#endif

/**
 * kb_hooks_find() - find the tracepoints and functions that the module needs
 *
 * Return: 0, or -EOPNOTSUPP if this kernel lacks something.
 */
int kb_hooks_find(void)
{
	for_each_kernel_tracepoint(kb_tracepoint_match, NULL);
	if (!kb_tp_sys_exit || !kb_tp_process_exit || !kb_tp_process_fork) {
		pr_err("this kernel lacks the tracepoint %s (CONFIG_FTRACE_SYSCALLS)\n",
		       !kb_tp_sys_exit ? "sys_exit" :
		       !kb_tp_process_exit ? "sched_process_exit" : "sched_process_fork");
		return -EOPNOTSUPP;
	}
	kb_task_work_add_find();
	if (!kb_task_work_add) {
		pr_err("this kernel neither exports task_work_add() nor has kprobes to find it\n");
		return -EOPNOTSUPP;
	}
	return 0;
}

/* ---- the flag of tasks whose system calls are traced --------------------------------------- */

static void kb_tasks_set_trace_flag(void)
{
	struct task_struct *process, *task;

	rcu_read_lock();
	for_each_process_thread(process, task)
		set_task_syscall_work(task, SYSCALL_TRACEPOINT);
	rcu_read_unlock();
}

static void kb_new_tasks_set_trace_flag(struct work_struct *unused)
{
	kb_tasks_set_trace_flag();
}
static DECLARE_DELAYED_WORK(kb_new_tasks_work, kb_new_tasks_set_trace_flag);

/* Set all tasks' flags, permanently, because another user needs to see system calls. */
static void kb_trace_flag_share(void)
{
	WRITE_ONCE(kb_trace_flag_exclusive, false);
	/* Pairs with the barrier in kb_task_drop_trace_flag(). */
	smp_mb();
	kb_tasks_set_trace_flag();
	/* Once more for tasks that are being forked, which inherit their parent's earlier flag. */
	schedule_delayed_work(&kb_new_tasks_work, msecs_to_jiffies(20));
}

/* Runs before a probe is added to any tracepoint, so that the probe misses nothing. */
static int kb_foreign_probe(struct kprobe *unused, struct pt_regs *regs)
{
	unsigned long tp = regs_get_kernel_argument(regs, 0);
	unsigned long probe = regs_get_kernel_argument(regs, 1);

	if ((tp == (unsigned long)kb_tp_sys_enter || tp == (unsigned long)kb_tp_sys_exit) &&
	    probe != (unsigned long)kb_sys_exit && probe != (unsigned long)kb_sys_enter)
		kb_trace_flag_share();
	return 0;
}

/* All functions that add a probe: kernel/tracepoint.c. */
static struct kprobe kb_adding[] = {
	{ .symbol_name = "tracepoint_probe_register", .pre_handler = kb_foreign_probe },
	{ .symbol_name = "tracepoint_probe_register_prio", .pre_handler = kb_foreign_probe },
	{ .symbol_name = "tracepoint_probe_register_prio_may_exist",
	  .pre_handler = kb_foreign_probe },
};
static struct kprobe *kb_adding_probes[] = { &kb_adding[0], &kb_adding[1], &kb_adding[2] };

static bool kb_tracepoint_has_foreign_probe(struct tracepoint *tp)
{
	const struct tracepoint_func *funcs;
	bool others = false;

	preempt_disable();
	funcs = rcu_dereference_sched(tp->funcs);
	for (; funcs && funcs->func; funcs++)
		others |= funcs->func != kb_sys_exit && funcs->func != kb_sys_enter;
	preempt_enable();
	return others;
}

/*
 * Let tasks lose the flag that the tracepoint set, unless others need it, or the module could not
 * see when they do. Must be called with sys_exit hooked.
 */
static void kb_trace_flag_start(void)
{
	lockdep_assert_held(&kb_hook_lock);
	if (!kb_tp_sys_enter ||
	    register_kprobes(kb_adding_probes, ARRAY_SIZE(kb_adding_probes))) {
		pr_info("system calls of all tasks are slower while the device is in use\n");
		return;
	}
	kb_foreign_watched = true;
	WRITE_ONCE(kb_trace_flag_exclusive, true);
	/* Either kb_foreign_probe() or the check below sees a probe that is added now. */
	smp_mb();
	if (kb_tracepoint_has_foreign_probe(kb_tp_sys_enter) ||
	    kb_tracepoint_has_foreign_probe(kb_tp_sys_exit))
		kb_trace_flag_share();
}

/* Must be called with sys_exit unhooked. */
static void kb_trace_flag_stop(void)
{
	unsigned int i;

	lockdep_assert_held(&kb_hook_lock);
	if (!kb_foreign_watched)
		return;
	unregister_kprobes(kb_adding_probes, ARRAY_SIZE(kb_adding_probes));
	/* Clear the kernel's values, because of which it would refuse them the next time. */
	for (i = 0; i < ARRAY_SIZE(kb_adding); i++) {
		kb_adding[i].addr = NULL;
		kb_adding[i].flags = 0;
	}
	cancel_delayed_work_sync(&kb_new_tasks_work);
	kb_foreign_watched = false;
	WRITE_ONCE(kb_trace_flag_exclusive, false);
}

/* ---- the tracepoints ----------------------------------------------------------------------- */

static int kb_probes_register(void)
{
	int err;

	err = tracepoint_probe_register(kb_tp_process_exit, kb_process_exit, NULL);
	if (err)
		return err;
	err = tracepoint_probe_register(kb_tp_process_fork, kb_process_fork, NULL);
	if (err)
		goto no_fork;
	err = tracepoint_probe_register(kb_tp_sys_exit, kb_sys_exit, NULL);
	if (err)
		goto no_sys_exit;
	return 0;

no_sys_exit:
	tracepoint_probe_unregister(kb_tp_process_fork, kb_process_fork, NULL);
no_fork:
	tracepoint_probe_unregister(kb_tp_process_exit, kb_process_exit, NULL);
	return err;
}

/**
 * kb_hooks_install() - hook the tracepoints, if they are not hooked yet
 *
 * Return: 0 or a negative errno.
 */
int kb_hooks_install(void)
{
	int err = 0;

	mutex_lock(&kb_hook_lock);
	if (!kb_hooked) {
		err = kb_probes_register();
		kb_hooked = !err;
		if (kb_hooked)
			kb_trace_flag_start();
	}
	mutex_unlock(&kb_hook_lock);
	return err;
}

/**
 * kb_hooks_install_enter() - hook sys_enter, if it is not hooked yet
 *
 * Return: 0 or a negative errno.
 */
int kb_hooks_install_enter(void)
{
	int err = 0;

	mutex_lock(&kb_hook_lock);
	if (!kb_enter_hooked) {
		err = kb_tp_sys_enter ?
			      tracepoint_probe_register(kb_tp_sys_enter, kb_sys_enter, NULL) :
			      -EOPNOTSUPP;
		kb_enter_hooked = !err;
	}
	mutex_unlock(&kb_hook_lock);
	return err;
}

/**
 * kb_hooks_remove() - unhook the tracepoints, and wait until their handlers have ended
 */
void kb_hooks_remove(void)
{
	mutex_lock(&kb_hook_lock);
	if (kb_enter_hooked) {
		tracepoint_probe_unregister(kb_tp_sys_enter, kb_sys_enter, NULL);
		kb_enter_hooked = false;
	}
	if (kb_hooked) {
		tracepoint_probe_unregister(kb_tp_sys_exit, kb_sys_exit, NULL);
		tracepoint_probe_unregister(kb_tp_process_fork, kb_process_fork, NULL);
		tracepoint_probe_unregister(kb_tp_process_exit, kb_process_exit, NULL);
		kb_trace_flag_stop();
		kb_hooked = false;
	}
	mutex_unlock(&kb_hook_lock);
	tracepoint_synchronize_unregister();
}
