# SPDX-License-Identifier: Apache-2.0
"""What the targets that are file servers have in common."""

from __future__ import annotations

from typing import Final

from bridge.targets import MOUNT_POINT

__all__ = ["FILE_WORKLOAD"]

FILE_WORKLOAD: Final = f"""\
set -e
cd {MOUNT_POINT}
ls -l . sizes >/dev/null
cat deep/0/1/2/level >/dev/null
dd if=sizes/100000 of=/dev/null bs=8192 status=none
mkdir new
echo text >new/file
dd if=/dev/zero of=new/file bs=4096 count=4 conv=fsync status=none
truncate -s 100 new/file
chmod 600 new/file
touch -d '2001-02-03 04:05:06 UTC' new/file
mv new/file new/moved
ln -s README link
cat link >/dev/null
stat -f . >/dev/null
rm link new/moved
rmdir new
"""
"""One of each operation on files, of which a server may refuse none."""
