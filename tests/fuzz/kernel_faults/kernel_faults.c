// SPDX-License-Identifier: GPL-2.0
/*
 * Makes a kernel do what it complains about:
 *
 *	echo KIND >/sys/module/kernel_faults/parameters/provoke
 *
 * For tests: what tests/data/consoles has was written by kernels with this module. Each fault
 * is in a function of its own, so that a trace says which it was.
 */

#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>

#define SPIN_SECONDS 30

static int zero;
module_param(zero, int, 0600);

static noinline int fault_bug(void)
{
	BUG();
	return 0;
}

static noinline int fault_warn(void)
{
	WARN_ON(!zero);
	return 0;
}

static noinline int fault_warn_text(void)
{
	WARN(1, "kernel_faults: the count is %d of %d at %px\n", current->pid, 77, current);
	return 0;
}

static noinline int fault_null(void)
{
	return *(volatile int *)(8L + zero);
}

static noinline int fault_write_null(void)
{
	*(volatile int *)(16L + zero) = 1;
	return 0;
}

static noinline int fault_address(void)
{
	return *(volatile int *)0xffffc8ffdeadb000;
}

static noinline int fault_non_canonical(void)
{
	return *(volatile int *)0xdead000000000100;
}

static noinline int fault_execute(void)
{
	int (*nowhere)(void) = (int (*)(void))(long)zero;

	return nowhere();
}

static noinline int fault_divide(void)
{
	volatile int dividend = 7;

	return dividend / zero;
}

static noinline int fault_panic(void)
{
	panic("kernel_faults: all is lost after %d steps", current->pid);
	return 0;
}

static noinline int fault_refcount(void)
{
	refcount_t count = REFCOUNT_INIT(0);

	refcount_inc(&count);
	return 0;
}

static noinline int fault_list(void)
{
	static LIST_HEAD(head);
	struct list_head one;

	list_add(&one, &head);
	list_add(&one, &head);
	return 0;
}

static noinline int fault_atomic(void)
{
	preempt_disable();
	schedule_timeout_uninterruptible(1);
	preempt_enable();
	return 0;
}

static noinline int fault_soft_lockup(void)
{
	unsigned long end = jiffies + SPIN_SECONDS * HZ;

	preempt_disable();
	while (time_before(jiffies, end))
		cpu_relax();
	preempt_enable();
	return 0;
}

static noinline int fault_rcu_stall(void)
{
	unsigned long end = jiffies + SPIN_SECONDS * HZ;

	rcu_read_lock();
	while (time_before(jiffies, end))
		cpu_relax();
	rcu_read_unlock();
	return 0;
}

static noinline int fault_hang(void)
{
	static DEFINE_MUTEX(never);

	mutex_lock(&never);
	mutex_lock(&never);
	return 0;
}

static noinline int fault_stack(void)
{
	volatile char room[512];

	room[0] = zero;
	return room[0] + fault_stack() + room[0];
}

static noinline int fault_usercopy(void)
{
	char *room = kmalloc(64, GFP_KERNEL);
	int error = -ENOMEM;

	if (room)
		error = copy_to_user((void __user *)current->mm->start_stack - 4096, room, 200 + zero);
	kfree(room);
	return error ? -EFAULT : 0;
}

static noinline int fault_double_free(void)
{
	char *room = kmalloc(64, GFP_KERNEL);

	kfree(room);
	kfree(room);
	return 0;
}

static noinline int fault_use_after_free(void)
{
	volatile char *room = kmalloc(64, GFP_KERNEL);

	kfree((void *)room);
	return room[8];
}

static noinline int fault_out_of_bounds(void)
{
	volatile char *room = kmalloc(120, GFP_KERNEL);

	room[120 + zero] = 1;
	kfree((void *)room);
	return 0;
}

static noinline int fault_shift(void)
{
	volatile int bits = 40;

	return 1 << bits;
}

static noinline int fault_index(void)
{
	static volatile int table[4];
	volatile int index = 7;

	return table[index];
}

/* KFENCE guards an object now and then: one of these is it. */
static noinline int fault_guarded_read(void)
{
	unsigned long end = jiffies + 3 * HZ;
	int sum = 0;

	while (time_before(jiffies, end)) {
		volatile char *room = kmalloc(32, GFP_KERNEL);

		kfree((void *)room);
		if ((unsigned long)room % PAGE_SIZE)
			sum += room[3];
		usleep_range(50, 100);
	}
	return sum & 0;
}

static int shared;

static noinline int racing_write(void *unused)
{
	unsigned long end = jiffies + 4 * HZ;

	while (time_before(jiffies, end)) {
		shared++;
		cond_resched();
	}
	return 0;
}

static noinline int fault_race(void)
{
	unsigned long end = jiffies + 4 * HZ;
	int sum = 0;

	if (IS_ERR(kthread_run(racing_write, NULL, "racing")))
		return -EAGAIN;
	while (time_before(jiffies, end)) {
		sum += shared;
		cond_resched();
	}
	msleep(200);
	return sum & 0;
}

static DEFINE_SPINLOCK(first_lock);
static DEFINE_SPINLOCK(second_lock);

static noinline int fault_lock_order(void)
{
	spin_lock(&first_lock);
	spin_lock(&second_lock);
	spin_unlock(&second_lock);
	spin_unlock(&first_lock);
	spin_lock(&second_lock);
	spin_lock(&first_lock);
	spin_unlock(&first_lock);
	spin_unlock(&second_lock);
	return 0;
}

static noinline int fault_sleep_in_atomic(void)
{
	spin_lock(&first_lock);
	might_sleep();
	spin_unlock(&first_lock);
	return 0;
}

#define FAULT(name) { #name, fault_##name }

static const struct {
	const char *name;
	int (*provoke)(void);
} faults[] = {
	FAULT(bug), FAULT(warn), FAULT(warn_text), FAULT(null), FAULT(write_null), FAULT(address),
	FAULT(non_canonical), FAULT(execute), FAULT(divide), FAULT(panic), FAULT(refcount),
	FAULT(list), FAULT(atomic), FAULT(soft_lockup), FAULT(rcu_stall), FAULT(hang), FAULT(stack),
	FAULT(usercopy), FAULT(double_free), FAULT(use_after_free), FAULT(out_of_bounds),
	FAULT(shift), FAULT(index), FAULT(guarded_read), FAULT(race), FAULT(lock_order),
	FAULT(sleep_in_atomic),
};

static int provoke(const char *text, const struct kernel_param *unused)
{
	size_t i;
	int error;

	for (i = 0; i < ARRAY_SIZE(faults); i++)
		if (sysfs_streq(text, faults[i].name)) {
			/* A parameter is set under a lock that others need too. */
			kernel_param_unlock(THIS_MODULE);
			error = faults[i].provoke() < 0 ? -EFAULT : 0;
			kernel_param_lock(THIS_MODULE);
			return error;
		}
	return -EINVAL;
}

static const struct kernel_param_ops provoke_ops = { .set = provoke };
module_param_cb(provoke, &provoke_ops, NULL, 0200);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("provokes what a kernel complains about");
