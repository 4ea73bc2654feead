// Command containerd-shim-cri-dockerd-server is the shim server of a pod.
// containerd-shim-cri-dockerd-v1 starts it.
package main

import (
	"context"

	"cri-dockerd/internal/shim/server"
)

func main() { server.Run(context.Background()) }
