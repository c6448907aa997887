// SPDX-License-Identifier: Apache-2.0
module mstpm

go 1.20

require github.com/google/go-tpm-tools v0.4.4

require (
	github.com/google/go-configfs-tsm v0.3.3 // indirect
	github.com/google/go-tpm v0.9.0 // indirect
	golang.org/x/sys v0.15.0 // indirect
)
