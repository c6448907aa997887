// SPDX-License-Identifier: Apache-2.0

// For each line of its input it does some work: it encodes a value if the line has "encode". If it has
// "peer", the program takes its own coverage then as gVisor does: it writes all counters, decodes them,
// and clears them. It answers with the nanoseconds of that and the number of blocks that it found.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	_ "net/http" // For its blocks.
	"os"
	"runtime/coverage"
	"strings"
	"time"
)

// Sizes of internal/coverage's CounterFileHeader and CounterSegmentHeader.
const (
	fileHeader    = 32
	segmentHeader = 16
)

// decode returns the number of counters that are not 0.
func decode(data []byte) int {
	functions := binary.LittleEndian.Uint64(data[fileHeader:])
	skip := binary.LittleEndian.Uint32(data[fileHeader+8:]) + binary.LittleEndian.Uint32(data[fileHeader+12:])
	at := (fileHeader + segmentHeader + int(skip) + 3) / 4 * 4
	next := func() uint64 {
		value, size := binary.Uvarint(data[at:])
		at += size
		return value
	}
	found := 0
	for ; functions > 0; functions-- {
		counters := next()
		next()
		next()
		for ; counters > 0; counters-- {
			if next() != 0 {
				found++
			}
		}
	}
	return found
}

func peer(buffer *bytes.Buffer) int {
	buffer.Reset()
	if err := coverage.WriteCounters(buffer); err != nil {
		panic(err)
	}
	found := decode(buffer.Bytes())
	if err := coverage.ClearCounters(); err != nil {
		panic(err)
	}
	return found
}

func main() {
	var buffer bytes.Buffer
	if err := coverage.WriteMeta(io.Discard); err != nil {
		panic(err)
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "encode") {
			if _, err := json.Marshal(map[string]any{"line": lines.Text(), "n": 1}); err != nil {
				panic(err)
			}
		}
		if strings.Contains(lines.Text(), "peer") {
			start := time.Now()
			found := peer(&buffer)
			fmt.Println(time.Since(start).Nanoseconds(), found)
		} else {
			fmt.Println("done")
		}
	}
}
