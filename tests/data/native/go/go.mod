// SPDX-License-Identifier: Apache-2.0
module example.test/lines

go 1.22
