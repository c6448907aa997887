// SPDX-License-Identifier: GPL-2.0
/*
 * The whole module as one translation unit: make ONE_UNIT=1. Where the compiler itself is emulated,
 * reading the kernel's headers takes longest, and they are read once this way.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include "main.c"
#include "transport.c"
#include "owners.c"
#include "calls.c"
#include "reach.c"
#include "follow.c"
#include "hooks.c"
#include "device.c"
#include "watch.c"
#include "wire.c"
#include "stats.c"
