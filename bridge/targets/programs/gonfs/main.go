// SPDX-License-Identifier: Apache-2.0

// Command gonfs serves a directory by NFS version 3 on a Unix socket, with
// github.com/willscott/go-nfs. What clients change is kept in memory: the directory is only read.
package main

import (
	"log"
	"net"
	"os"

	nfs "github.com/willscott/go-nfs"
	"github.com/willscott/go-nfs/helpers"
	"github.com/willscott/memphis"
)

// How many files may have a handle at a time; a client that uses an older one gets ESTALE.
const handles = 65536

func main() {
	if len(os.Args) != 3 {
		log.Fatalf("usage: %s SOCKET DIRECTORY", os.Args[0])
	}
	listener, err := net.Listen("unix", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	tree := memphis.FromOS(os.Args[2]).AsBillyFS(0, 0)
	handler := helpers.NewCachingHandler(helpers.NewNullAuthHandler(tree), handles)
	log.Fatal(nfs.Serve(listener, handler))
}
