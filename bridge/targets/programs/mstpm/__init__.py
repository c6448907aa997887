# SPDX-License-Identifier: Apache-2.0
"""Microsoft's reference implementation of a TPM 2.0, in C, behind the guest's TPM driver."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bridge.targets import Tpm
from bridge.targets.programs.build import BuiltTarget, Program, Step
from bridge.targets.programs.packaged import PackagedSource

__all__ = ["MSTPM", "Mstpm"]

_NAME: Final = "tpm"

MSTPM: Final = Program(
    name="mstpm",
    source=PackagedSource("mstpm", "0.4.4", ("coverage.txt", "go.mod", "go.sum", "main.go")),
    steps=(
        Step(
            "compiling the TPM and its control channel",
            (
                *("go", "build", "-buildvcs=false", "-mod=readonly", "-o", "mstpm"),
                # Go's own code for what else would be C.
                "-tags=netgo,osusergo",
                # Go's own id depends on the place of the source.
                *("-ldflags=-buildid= -extldflags=-Wl,--build-id", "."),
            ),
            environment=(
                # Go records the flags below in the program, so places are not among them.
                ("CC", "clang -fsanitize-coverage-allowlist={source}/coverage.txt"),
                ("LIBRARY_PATH", "{runtime}"),
                ("CGO_ENABLED", "1"),
                ("GOTOOLCHAIN", "local"),
                ("CGO_CFLAGS", "-g -O1 -fsanitize-coverage=trace-pc-guard,pc-table"),
                # Go links each of its packages in C with these, so there may be no archive.
                ("CGO_LDFLAGS", "-fno-sanitize-link-runtime -lkcovbridge"),
            ),
        ),
    ),
    products=("mstpm",),
    tools={
        "clang": "clang",
        "go": "golang-go",
        "/usr/include/openssl/evp.h": "libssl-dev",
    },
    versions=(("go", "version"), ("clang", "--version")),
    # As go.mod says.
    oldest={"go": "1.20"},
)
"""``main.go`` beside this file, on ``go-tpm-tools/simulator``, which has the C."""

_WORKLOAD: Final = f"""\
perl -e '
use Fcntl;
sysopen(my $tpm, "/dev/target/{_NAME}", O_RDWR) or die "the TPM cannot be opened: $!\\n";
my ($plain, $sessions) = ("8001", "8002");
my $failed = 0;
for (
    # Name, tag, code and the rest of a command; part 3 of the TPM 2.0 library says what they mean.
    ["SelfTest", $plain, "00000143", "01"],
    ["GetRandom", $plain, "0000017b", "0010"],
    ["StirRandom", $plain, "00000146", "000401020304"],
    ["ReadClock", $plain, "00000181", ""],
    ["GetCapability", $plain, "0000017a", "000000060000010000000008"],
    ["Hash", $plain, "0000017d", "0003616263" . "000b" . "40000007"],
    ["PCR_Extend", $sessions, "00000182",
        "00000010" . "00000009400000090000000000" . "00000001000b" . "5a" x 32],
    ["PCR_Read", $plain, "0000017e", "00000001000b03000001"],
) {{
    my ($name, $tag, $code, $rest) = @$_;
    my $command = pack "H4 N H*", $tag, 10 + length($rest) / 2, $code . $rest;
    syswrite($tpm, $command) == length $command or die "$name: $!\\n";
    sysread($tpm, my $answer, 4096) or die "$name: $!\\n";
    my $result = unpack "x6 N", $answer;
    printf "%-13s  result 0x%x, %d bytes\\n", $name, $result, length $answer;
    $failed = 1 if $result;
}}
exit $failed;
'
"""


class Mstpm(BuiltTarget):
    """A TPM 2.0, made anew when the target starts: ``/dev/target/tpm``, the guest's first TPM."""

    name = "mstpm"
    summary = "Microsoft's TPM 2.0 reference implementation (C), at /dev/target/tpm"
    program = MSTPM
    workload = _WORKLOAD

    def command(self) -> Sequence[str | Path]:
        """Take QEMU's control commands on a Unix socket."""
        return [self.built.source / "mstpm", self._socket]

    def sockets(self) -> Sequence[int | Path]:
        """Return the socket that QEMU connects to."""
        return (self._socket,)

    def serves(self) -> None:
        """Give the guest the device."""
        self.devices = (Tpm(_NAME, self._socket),)

    @property
    def _socket(self) -> Path:
        return self.scratch / "socket"
