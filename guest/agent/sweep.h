/* SPDX-License-Identifier: Apache-2.0 */
/* Empties directories, whatever is in them. */
#ifndef KCOV_BRIDGE_AGENT_SWEEP_H
#define KCOV_BRIDGE_AGENT_SWEEP_H

#include <stdbool.h>

/* Whether a name is "." or "..". */
bool sweep_is_dots(const char *name);
/* Remove a file or an empty directory. Returns whether it is gone. */
bool sweep_remove(int at, const char *name);
/* Empty the working directory. Returns whether it is empty. */
bool sweep_all(void);

#endif
