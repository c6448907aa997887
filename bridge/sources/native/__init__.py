# SPDX-License-Identifier: Apache-2.0
"""Coverage of native code: programs in C, C++, Rust and Go that serve the guest.

A compiler puts calls or counters into the program (``-fsanitize-coverage``, ``go build -cover``).
The run time in ``runtime/``, which C, C++ and Rust programs are linked with, notes covered blocks
in memory that the bridge maps (``layout.h``); the bridge reads the counters of Go programs in
place.

======================  ===========================================================
``build``               compiles run time and reader on first use
``memory``              the shared memory, through the reader (``runtime/reader.c``)
``modules``             executables and shared objects with their PCs, and their file
``debug``               functions and lines of their blocks, by libdw
``source``              the coverage source
======================  ===========================================================
"""
