// SPDX-License-Identifier: Apache-2.0
module example.test/peer

go 1.22
