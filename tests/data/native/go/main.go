// SPDX-License-Identifier: Apache-2.0

// A program for tests: for each line of its input a command, with an answer.
package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"sync"
)

func add(a, b int) int {
	if a > 100 {
		return b
	}
	return a + b
}

func upper(text string) string {
	switch {
	case text == "":
		return "nothing"
	case len(text) > 20:
		return "long"
	}
	return strings.ToUpper(text)
}

func many(rounds int) int {
	var group sync.WaitGroup
	sums := make([]int, 4)
	for worker := range sums {
		group.Add(1)
		go func() {
			defer group.Done()
			for i := 0; i < rounds; i++ {
				if i%3 == 0 {
					sums[worker]++
				}
			}
		}()
	}
	group.Wait()
	return sums[0]
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	fmt.Println("ready")
	for lines.Scan() {
		name, rest, _ := strings.Cut(lines.Text(), " ")
		switch name {
		case "add":
			var a, b int
			fmt.Sscan(rest, &a, &b)
			fmt.Println(add(a, b))
		case "upper":
			fmt.Println(upper(rest))
		case "many":
			fmt.Println(many(1000))
		default:
			fmt.Println("error")
		}
	}
}
