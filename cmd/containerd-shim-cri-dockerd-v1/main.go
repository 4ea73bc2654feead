// Command containerd-shim-cri-dockerd-v1 is the program that containerd runs for containers with
// the runtime io.containerd.cri-dockerd.v1. It starts containerd-shim-cri-dockerd-server from the
// same directory.
package main

import (
	"fmt"
	"os"

	"cri-dockerd/internal/shim/launcher"
)

func main() {
	if err := launcher.Run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-shim-cri-dockerd-v1:", err)
		os.Exit(1)
	}
}
